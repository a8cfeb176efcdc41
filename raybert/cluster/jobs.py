"""Jobs of a cluster: sending one through the dashboard, and following what it prints."""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raybert.errors import InputError, RunFailed, last_line

ADDRESS = "http://127.0.0.1:8265"
# Seconds that a stopped job gets to write its checkpoint, and its Ray to clean up; Ray's default of 3 is short.
STOP_SECONDS = 120
# Seconds that `--follow` waits for a cluster that does not answer.
FOLLOW_SECONDS = 300.0
# Seconds without a line after which it asks whether the job, and the connection, are still there.
QUIET_SECONDS = 60.0


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


def send(entrypoint: str, *, directory: str, metadata: dict[str, str], address: str | None = None) -> Job:
    """Send a job whose code is a directory of this machine.

    Args:
        address: of the dashboard; RAY_API_SERVER_ADDRESS or the port that `ray dashboard` forwards if None. The token
            of the cluster comes from where Ray looks for it (RAY_AUTH_MODE, RAY_AUTH_TOKEN, ~/.ray/auth_token).

    Raises:
        InputError: no cluster takes it.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS
    try:
        job = _client(address).submit_job(
            entrypoint=entrypoint,
            runtime_env={"working_dir": directory, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}},
            metadata=metadata,
        )
    except RuntimeError as error:
        raise InputError(f"The cluster at {address} refused the job: {last_line(error)}") from error
    return Job(job, address)


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
    import aiohttp

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
                    f"{job.address} has not answered for {patience:.0f} s ({last_line(error)}); the job {job.id} "
                    f"may still be running. To follow it again: {job.follow}"
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
        raise InputError(f"The cluster at {address} refused access: {last_line(error)}") from error
