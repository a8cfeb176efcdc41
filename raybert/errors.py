"""The exceptions that the command line shows as a sentence instead of a stack trace."""


class InputError(ValueError):
    """A fault in what the user gave (config, data, paths, resources), found before any work was done.

    The message is one sentence or two: what is wrong, where, and what to do. The command line prints it and exits
    with code 2.
    """


class DamagedCheckpoint(InputError):  # noqa: N818 - reads as what was found
    """The files of a checkpoint are not what was written; a run that goes on passes it over."""


class RunFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """The work began and could not be finished. The command line prints the sentence and exits with code 1."""


class Interrupted(KeyboardInterrupt):
    """Somebody ended the work early, and what was done is kept. The command line exits with code 130."""
