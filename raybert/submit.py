"""`raybert submit`: a command as a job on a cluster, with this checkout as its code."""

import asyncio
import getpass
import importlib.metadata
import logging
import os
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import aiohttp

from raybert import config as configs
from raybert import storage
from raybert.errors import InputError, RunFailed, last_line
from raybert.sweep import space

ADDRESS = "http://127.0.0.1:8265"
# Seconds that a stopped job gets to write its checkpoint, and its Ray to clean up; Ray's default of 3 is short.
STOP_SECONDS = 120
# Seconds that `--follow` waits for a cluster that does not answer.
FOLLOW_SECONDS = 300.0
# Seconds without a line after which it asks whether the job, and the connection, are still there.
QUIET_SECONDS = 60.0
# Bytes of a checkout that the dashboard takes, whatever the cluster's settings are (Ray's DASHBOARD_CLIENT_MAX_SIZE).
LARGEST_UPLOAD = 100 * 2**20
# Entry scripts; the other commands need no cluster.
SCRIPTS = ("prepare", "pretrain", "sweep", "probe", "embed", "report", "doctor")


@dataclass(frozen=True)
class Job:
    """A job that the cluster has accepted."""

    id: str
    address: str

    @property
    def dashboard(self) -> str:
        return f"{self.address}/#/jobs/{self.id}"

    @property
    def follow(self) -> str:
        return f"ray job logs --address {self.address} --follow {self.id}"


def submit(arguments: Sequence[str], *, address: str | None = None, directory: str = ".") -> Job:
    """Send a command and the checkout to a cluster.

    Args:
        arguments: what would follow `raybert` on the command line.
        address: of the dashboard; RAY_API_SERVER_ADDRESS or the port that `ray dashboard` forwards if None. The token
            of the cluster comes from where Ray looks for it (RAY_AUTH_MODE, RAY_AUTH_TOKEN, ~/.ray/auth_token).
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
        raise InputError(f"{directory} is no checkout of raybert: it has no {script.relative_to(directory)}.")
    metadata = _metadata(list(arguments), directory)
    require_small(directory)
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS
    try:
        job = _client(address).submit_job(
            entrypoint=shlex.join(["python", f"jobs/{command}.py", *arguments[1:]]),
            runtime_env={"working_dir": directory, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}},
            metadata=metadata,
        )
    except RuntimeError as error:
        raise InputError(f"The cluster at {address} refused the job: {last_line(error)}") from error
    return Job(job, address)


def require_small(directory: str) -> None:
    """
    Raises:
        InputError: what Ray would upload of the directory is more than it takes, or a part of it cannot be read.
    """
    try:
        sizes = _upload_sizes(directory)
    except OSError as error:
        raise InputError(
            f"{error.filename or directory} cannot be packed for the job: {error.strerror or error}; make it readable, "
            "or name it in .rayignore."
        ) from error
    total = sum(sizes.values())
    if total > LARGEST_UPLOAD:
        largest = [f"{path} ({_megabytes(size)})" for path, size in _largest(sizes, 3)]
        raise InputError(
            f"The job would upload {_megabytes(total)} of {Path(directory).absolute()}, and Ray takes at most "
            f"{_megabytes(LARGEST_UPLOAD)}. The largest are {', '.join(largest)}: name what the job does not need in "
            ".rayignore, which is written like a .gitignore."
        )


def _upload_sizes(directory: str) -> dict[PurePath, int]:
    """Bytes that each file takes in Ray's package of a directory: a zip archive without compression.

    Ray has no public way to list what it packs; its own walk is the only one that reads .gitignore and .rayignore as
    it does.
    """
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
    from ray._private.runtime_env.packaging import _dir_travel

    root = Path(directory).absolute()
    sizes: dict[PurePath, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            name = path.relative_to(root)
            # The name stands in two headers, of 30 and 46 bytes: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
            sizes[name] = path.stat().st_size + 2 * len(os.fsencode(name)) + 76

    quiet = logging.getLogger(f"{__name__}.packaging")
    quiet.disabled = True  # the error that it would log is raised as well
    ignoring = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(root, [], add, include_gitignore=ignoring, logger=quiet)
    return sizes


def _largest(sizes: Mapping[PurePath, int], count: int) -> list[tuple[str, int]]:
    """The files and directories to look at first. One that is nearly all of its directory is named instead of it."""
    totals: Counter[PurePath] = Counter()
    for path, size in sizes.items():
        for place in (path, *path.parents):
            totals[place] += size
    children: dict[PurePath, list[PurePath]] = defaultdict(list)
    for place in totals:
        if place != place.parent:
            children[place.parent].append(place)
    found = []
    for place in sorted(children[PurePath()], key=lambda place: -totals[place])[:count]:
        while (inner := max(children[place], key=totals.__getitem__, default=place)) != place:
            if totals[inner] < 0.8 * totals[place]:
                break
            place = inner
        found.append((f"{place}/" if children[place] else str(place), totals[place]))
    return found


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def follow(job: Job, show: Callable[[str], None], *, patience: float = FOLLOW_SECONDS) -> int:
    """Pass on what the job prints until it ends, and return its exit code.

    Args:
        patience: seconds that the cluster may be out of reach, as when a forwarded port is dropped and taken up again.

    Raises:
        RunFailed: it was for longer. What became of the job is not known.
    """
    details = asyncio.run(_follow(_client(job.address), job, show, patience))
    if details.driver_exit_code is not None:
        return int(details.driver_exit_code)
    return 0 if details.status == "SUCCEEDED" else 1


async def _follow(client: Any, job: Job, show: Callable[[str], None], patience: float) -> Any:
    shown, lost = 0, None  # characters; when the cluster was first found out of reach
    while True:
        at, chunks = 0, client.tail_job_logs(job.id)
        while True:
            try:
                text = await asyncio.wait_for(anext(chunks), QUIET_SECONDS)
            except (StopAsyncIteration, OSError, RuntimeError, aiohttp.ClientError):
                break  # over, cut off, or silent, which a connection that nobody closed is as well
            show(text[max(0, shown - at) :])  # on a new connection it comes from its beginning
            at += len(text)
            shown = max(shown, at)
        try:
            details = client.get_job_info(job.id)
            rest = client.get_job_logs(job.id)[shown:] if details.status.is_terminal() else ""
        except (OSError, RuntimeError) as error:
            lost = lost or time.monotonic()
            if time.monotonic() - lost > patience:
                raise RunFailed(
                    f"{job.address} has not answered for {patience:.0f} s ({last_line(error)}); the job {job.id} may "
                    f"well go on. To follow it again: {job.follow}"
                ) from error
        else:
            lost = None
            if details.status.is_terminal():
                show(rest)
                return details
        await asyncio.sleep(1)


def _client(address: str):  # type: ignore[no-untyped-def] # Ray has no types
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # how the package is made is of no interest
    try:
        return JobSubmissionClient(address)
    except ConnectionError as error:
        raise InputError(
            f"No Ray dashboard answers at {address}; forward its port (`ray dashboard cluster/gcp.yaml`, or "
            "`kubectl port-forward`), or give another --address."
        ) from error
    except (AuthenticationError, RuntimeError) as error:
        raise InputError(f"The cluster at {address} does not let us in: {last_line(error)}") from error


def _metadata(arguments: list[str], directory: str) -> dict[str, str]:
    """What the jobs list of the cluster shows of this job."""
    found = {
        "raybert.command": shlex.join(arguments),
        "raybert.version": importlib.metadata.version("raybert"),
        "raybert.user": getpass.getuser(),
    }
    command, words = arguments[0], arguments[1:]
    if command in ("prepare", "embed"):
        _seen_by_all("--output", _option(words, "--output")[0] or "")
    resumed, words = _option(words, "--resume") if command == "pretrain" else (None, words)
    plain = [word for word in words if not word.startswith("--")]
    if resumed is not None:
        _seen_by_all("--resume", resumed)
        found["raybert.run"] = configs.load_run(resumed, plain).run_uri
    elif command in ("pretrain", "sweep") and plain:
        file, overrides = plain[0], plain[1:]
        path = storage.absolute(file, directory)
        settings = configs.load(path, overrides) if command == "pretrain" else space.load(path, overrides)
        written = configs.read_overridden(path, overrides)
        places = ("run.storage", "data.shards") if command == "pretrain" else ("storage", "base.data.shards")
        for key in places:
            _seen_by_all(key, _written(written, key))
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


def _seen_by_all(key: str, path: str) -> None:
    if path and storage.is_relative(path):
        raise InputError(
            f"{key}={path} is a path in this directory, which the cluster does not have; "
            "give a URI, or the absolute path of a file system that all nodes share."
        )
