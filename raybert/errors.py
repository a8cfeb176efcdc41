"""The exceptions that the command line shows as a sentence instead of a stack trace, and what others' errors say."""


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


class InputError(ValueError):
    """A fault in what the user gave (config, data, paths, resources), found before any work was done.

    The message is one sentence or two: what is wrong, where, and what to do. The command line prints it and exits
    with code 2.
    """


class DamagedCheckpoint(InputError):  # noqa: N818 - reads as what was found
    """The files of a checkpoint are not what was written; a resumed run skips it."""


class RunFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """The work began and could not be finished. The command line prints the sentence and exits with code 1."""


class Interrupted(KeyboardInterrupt):
    """The user ended the work early; what was done is kept. The command line exits with code 130."""


def last_line(error: BaseException, default: str = "") -> str:
    """The last line of an error's text, which is the cause where a remote stack trace stands before it.

    Args:
        default: what an error without a text says; the name of its type where it is empty.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else default or type(error).__name__
