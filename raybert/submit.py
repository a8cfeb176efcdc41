"""`raybert submit`: a command as a job on a cluster, with this checkout as its code."""

import getpass
import importlib.metadata
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raybert import config as configs
from raybert import storage
from raybert.cluster import jobs
from raybert.cluster.jobs import Job
from raybert.cluster.upload import require_small
from raybert.errors import InputError
from raybert.sweep import space

# Entry scripts; the other commands need no cluster.
SCRIPTS = ("prepare", "pretrain", "sweep", "probe", "embed", "report", "doctor")


def submit(arguments: Sequence[str], *, address: str | None = None, directory: str = ".") -> Job:
    """Send a command and the checkout to a cluster.

    Args:
        arguments: what would follow `raybert` on the command line.
        address: of the dashboard, as `raybert.cluster.jobs.send` takes it.
        directory: the checkout.

    Raises:
        InputError: the command has no entry script, its settings are wrong or name places that other machines cannot
            see, the checkout is larger than Ray takes, or no cluster takes the job.
    """
    command = arguments[0] if arguments else ""
    if command not in SCRIPTS:
        raise InputError(f"{command or 'Nothing'} cannot be submitted; use one of {', '.join(SCRIPTS)}.")
    directory = str(storage.local_path(directory, "give a checkout on this machine as --directory"))
    script = Path(directory, "jobs", f"{command}.py")
    if not script.exists():
        raise InputError(f"{directory} is not a checkout of raybert: it has no {script.relative_to(directory)}.")
    metadata = _metadata(list(arguments), directory)
    require_small(directory)
    entrypoint = shlex.join(["python", f"jobs/{command}.py", *arguments[1:]])
    return jobs.send(entrypoint, directory=directory, metadata=metadata, address=address)


def _metadata(arguments: list[str], directory: str) -> dict[str, str]:
    """What the jobs list of the cluster shows of this job."""
    found = {
        "raybert.command": shlex.join(arguments),
        "raybert.version": importlib.metadata.version("raybert"),
        "raybert.user": getpass.getuser(),
    }
    command, words = arguments[0], arguments[1:]
    if command in ("prepare", "embed"):
        _require_shared("--output", _option(words, "--output")[0] or "")
    resumed, words = _option(words, "--resume") if command == "pretrain" else (None, words)
    plain = [word for word in words if not word.startswith("--")]
    if resumed is not None:
        _require_shared("--resume", resumed)
        found["raybert.run"] = configs.load_run(resumed, plain).run_uri
    elif command in ("pretrain", "sweep") and plain:
        file, overrides = plain[0], plain[1:]
        path = storage.absolute(file, directory)
        settings = configs.load(path, overrides) if command == "pretrain" else space.load(path, overrides)
        written = configs.read_overridden(path, overrides)
        places = ("run.storage", "data.shards") if command == "pretrain" else ("storage", "base.data.shards")
        for key in places:
            _require_shared(key, _written(written, key))
        found["raybert.run"] = settings.run_uri if isinstance(settings, configs.Config) else settings.uri
    return found


def _option(words: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of ``name VALUE`` or ``name=VALUE``, and the other words."""
    for place, word in enumerate(words):
        if word.startswith(f"{name}="):
            return word.partition("=")[2], words[:place] + words[place + 1 :]
        if word == name and place + 1 < len(words):
            return words[place + 1], words[:place] + words[place + 2 :]
    return None, words


def _written(tree: Any, key: str) -> str:
    """A setting as the user wrote it, before a relative path is made one of this machine."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    if tree is None:  # both defaults, of a run and of a sweep
        return "runs" if key.endswith("storage") else ""
    return str(tree)


def _require_shared(key: str, path: str) -> None:
    if path and storage.is_relative(path):
        raise InputError(
            f"{key}={path} is a path in this directory, which the cluster cannot read; give a URI, or the "
            "absolute path of a file system that all nodes share."
        )
