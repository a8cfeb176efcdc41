"""Clients of remote storage: what they are asked for, and what their refusals mean in a sentence.

Credentials come from the provider's default chain alone (Google's: GOOGLE_APPLICATION_CREDENTIALS, then
`gcloud auth application-default login`, then the machine's service account); there is no setting for them.
"""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.asyn import sync
from fsspec.registry import known_implementations

from raybert.errors import InputError, RunFailed, one_line
from raybert.storage.uri import GOOGLE, PACKAGES, scheme, split

# Seconds without a byte of an answer after which a request is given up and made again.
STALL = 60.0
ANONYMOUS = "anonymous@"
HADOOP = ("hdfs", "arrow_hdfs")
# A file from a server that serves no byte ranges is held in memory.
MOST_WITHOUT_RANGES = 64 << 20
_FIRST_BYTE = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
# What the clients raise when a service fails or cannot be reached: aiohttp and botocore, gcsfs, requests, azure-core.
_NO_ANSWER = {
    *("ClientError", "HttpError", "TimeoutError", "ConnectionError", "RequestException", "GoogleAuthError"),
    *("HttpResponseError", "ServiceRequestError", "ServiceResponseError"),
}


def share_emulator() -> str:
    """The address of a GCS emulator, if the environment names one: in either of two variables, since gcsfs and pyarrow
    each look into another one.
    """
    address = os.environ.get("STORAGE_EMULATOR_HOST") or os.environ.get("CLOUD_STORAGE_EMULATOR_ENDPOINT") or ""
    if address:
        address = address if "://" in address else f"http://{address}"
        os.environ.setdefault("STORAGE_EMULATOR_HOST", address)
        os.environ.setdefault("CLOUD_STORAGE_EMULATOR_ENDPOINT", address)
    return address


# Before gcsfs is imported, which reads it once: asking a bucket for its kind over gRPC stalls where only HTTP answers.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
share_emulator()
# It logs the trace of every exception that it raises; the exception itself is enough.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def client(uri: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of an absolute path or a URI, and the path inside it."""
    if scheme(uri) == "file":
        return fsspec.filesystem("file"), uri
    if scheme(uri) not in GOOGLE:
        # Another process may have written since a directory was listed.
        return fsspec.core.url_to_fs(uri, use_listings_cache=False)
    anonymous = bool(share_emulator()) or f"://{ANONYMOUS}" in uri
    fs = _google(os.getpid(), anonymous, STALL)
    return fs, fs._strip_protocol(without_user(uri))


@functools.cache
def _google(process: int, anonymous: bool, stall: float) -> AbstractFileSystem:
    """One client a process: fsspec's own cache makes one a thread, and each would fetch a token."""
    import aiohttp  # a sixth of a second, and every process of a run imports this module

    return fsspec.filesystem(
        "gs",
        skip_instance_cache=True,
        use_listings_cache=False,
        # Google's own chain; gcsfs would also try a cache of its own and then go on without credentials.
        token="anon" if anonymous else "google_default",
        access="read_write",
        # gcsfs's default is to wait forever.
        requests_timeout=aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=stall),
    )


def without_user(uri: str) -> str:
    """``gs://bucket/x`` of ``gs://anonymous@bucket/x``."""
    return uri.replace(f"://{ANONYMOUS}", "://", 1) if scheme(uri) in GOOGLE else uri


def no_client(uri: str, error: Exception) -> InputError:
    """The sentence for a URI whose client cannot be made: mostly because a package is missing."""
    kind = scheme(uri)
    if kind in HADOOP:
        return InputError(
            f"Cannot open {uri}: {kind}:// needs Hadoop's client (libhdfs) on every node, with JAVA_HOME, HADOOP_HOME "
            f"and CLASSPATH set ({one_line(error)})."
        )
    package = str(known_implementations.get(kind, {}).get("class", "")).partition(".")[0]
    if package in ("", "fsspec"):  # fsspec's own clients need others' packages
        package = PACKAGES.get(kind) or str(getattr(error.__cause__ or error, "name", None) or "")
    if package and (isinstance(error, ImportError) or kind not in known_implementations):
        package = package.replace("_", "-")
        return InputError(f"Cannot open {uri}: {kind}:// needs a package on every node: pip install {package}.")
    return InputError(f"Cannot open {uri}: {one_line(error)}")


def unranged(fs: Any, url: str) -> bytes | None:
    """All of an http file whose server serves no byte ranges; None where it does, so that the client can seek.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is too large to be held in memory.
    """

    async def ask() -> bytes | None:
        session = await fs.set_session()
        async with session.get(fs.encode_url(url), headers=_FIRST_BYTE) as answer:
            if answer.status == 404:
                raise FileNotFoundError(url)
            if answer.status == 416:  # of an empty file
                return b""
            answer.raise_for_status()
            if answer.status == 206:
                return None
            found = bytearray()
            async for part in answer.content.iter_chunked(1 << 20):
                found += part
                if len(found) > MOST_WITHOUT_RANGES:
                    raise InputError(
                        f"{url} has more than {MOST_WITHOUT_RANGES >> 20} MB and its server does not support "
                        "range requests; download it and give the local file."
                    )
            return bytes(found)

    found: bytes | None = sync(fs.loop, ask)
    return found


def bucket(uri: str) -> str:
    """``gs://bucket`` of ``gs://bucket/x``."""
    kind, rest = split(without_user(uri))
    return f"{kind}://{rest.partition('/')[0]}"


@contextmanager
def sentences(uri: str) -> Iterator[None]:
    """Turn what a remote storage refuses into a sentence; what is missing stays FileNotFoundError.

    Raises:
        InputError: no credentials, expired ones, no permission.
        RunFailed: it does not answer, or answers with errors, also when its client asks again.
    """
    try:
        yield
    except (InputError, RunFailed):
        raise
    except Exception as error:
        found = explain(uri, error) if scheme(uri) != "file" else None
        if found is None:
            raise
        raise found from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    while (cause := error.__cause__ or error.__context__) is not None:
        yield cause
        error = cause


def explain(uri: str, error: Exception) -> Exception | None:
    """The sentence for an exception of a remote storage's client, None where there is none.

    By names and codes, since each client has exceptions of its own and most clients are not installed.
    """
    place, names = bucket(uri), {kind.__name__ for kind in type(error).__mro__}
    code = getattr(error, "code", None) or getattr(error, "status_code", None)
    login = " run `gcloud auth application-default login`, or renew the key" if scheme(uri) in GOOGLE else " renew them"
    if names & {"DefaultCredentialsError", "NoCredentialsError"}:
        return InputError(
            f"There are no credentials for {place}: "
            + (
                "run `gcloud auth application-default login`, set GOOGLE_APPLICATION_CREDENTIALS to the path of a key, "
                "or use a machine with a service account."
                if scheme(uri) in GOOGLE
                else "set them up as its provider describes."
            )
        )
    if "RefreshError" in names and any(
        isinstance(found, OSError) or "Transport" in type(found).__name__ for found in _causes(error)
    ):
        return RunFailed(f"The server that renews the credentials for {place} does not respond; rerun the command.")
    if "ResourceNotFoundError" in names and "container" in str(error).lower():
        return InputError(f"There is no container {place}; create it, or correct the URI {uri}.")
    if code in (401, "401") or names & {"RefreshError", "ClientAuthenticationError"}:
        return InputError(f"The credentials for {place} have expired or are wrong (401 Unauthorized);{login}.")
    if code in (403, "403") or "PermissionError" in names or str(error).startswith("Forbidden"):
        return InputError(
            f"These credentials have no permission for {uri} (403 Forbidden); give their account the right to read, "
            f"write, list and delete objects in {place}"
            + (" (roles/storage.objectAdmin)." if scheme(uri) in GOOGLE else ".")
        )
    if names & _NO_ANSWER:
        return RunFailed(f"{place} cannot be reached or answers with errors ({one_line(error)}); rerun the command.")
    return None
