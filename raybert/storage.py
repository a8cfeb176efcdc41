"""URI -> file system: the one place that knows where bytes live.

A path is a local path or any URI that fsspec knows (``gs://``, ``s3://``, ``az://``, ``hf://``, ``memory://`` ...).
Everything that raybert reads or writes outside Ray's own storage goes through these functions, so retries and error
messages are written once.
"""

import json
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec import AbstractFileSystem

from raybert.errors import InputError


def is_remote(uri: str) -> bool:
    """True for a URI with a scheme other than ``file``."""
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """The same place under a name that holds in every process: local paths become absolute, URIs lose a last slash."""
    if is_remote(uri):
        return uri.rstrip("/")
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def join(uri: str, *parts: str) -> str:
    """Join with forward slashes, for local paths and URIs alike."""
    return posixpath.join(uri.rstrip("/") if len(uri) > 1 else uri, *parts)


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of ``uri`` and the path inside it.

    Raises:
        InputError: the scheme is unknown, or the package that serves it is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(absolute(uri))
    except (ValueError, ImportError) as error:
        raise InputError(f"Cannot open {uri}: {error}. Install the fsspec package for this kind of URI.") from error
    return fs, path


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def open_uri(uri: str, mode: str = "rb") -> IO[Any]:
    """Open for reading or writing as a stream. A remote object appears only when the stream is closed."""
    fs, path = filesystem(uri)
    if "w" in mode and not is_remote(uri):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    return fs.open(path, mode)


def read_bytes(uri: str) -> bytes:
    fs, path = filesystem(uri)
    return bytes(fs.cat_file(path))


def read_from(uri: str, offset: int) -> bytes:
    """What a growing file holds from ``offset`` on; nothing while it does not exist."""
    fs, path = filesystem(uri)
    try:
        fs.invalidate_cache(path)
        return bytes(fs.cat_file(path, start=offset)) if fs.size(path) > offset else b""
    except FileNotFoundError:
        return b""


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole object so that a reader sees the old one or the new one, never a part.

    Object stores do that by themselves; a local file is written beside its name and renamed.
    """
    fs, path = filesystem(uri)
    if is_remote(uri):
        fs.pipe_file(path, data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
    os.replace(temporary, path)


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def list_dir(uri: str) -> list[str]:
    """Full URIs of what lies directly under ``uri``, sorted; empty when it does not exist."""
    fs, path = filesystem(uri)
    fs.invalidate_cache(path)
    try:
        names = fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    return sorted(join(uri, posixpath.basename(name.rstrip("/"))) for name in names if name.rstrip("/") != path)


def list_files(uri: str) -> list[str]:
    """Full URIs of every file at or under ``uri`` (a file, a directory or a glob), sorted."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    if fs.has_magic(path) if hasattr(fs, "has_magic") else any(mark in path for mark in "*?["):
        found = [name for name in fs.glob(path) if fs.isfile(name)]
    elif fs.isfile(path):
        found = [path]
    else:
        found = fs.find(path)
    return sorted(str(fs.unstrip_protocol(name)) if is_remote(uri) else str(name) for name in found)


def remove(uri: str) -> None:
    """Delete a file or a whole directory; it is no fault when it is not there."""
    fs, path = filesystem(uri)
    try:
        fs.rm(path, recursive=True)
    except FileNotFoundError:
        return


def move(uri: str, target: str) -> None:
    """Give a file or a whole directory another name on the same file system; an object store copies and deletes."""
    fs, path = filesystem(uri)
    fs.mv(path, filesystem(target)[1], recursive=True)


def upload_file(local: str | Path, uri: str) -> None:
    """Copy a local file to ``uri`` without reading it into memory."""
    fs, path = filesystem(uri)
    fs.put_file(str(local), path)


@contextmanager
def local_copy(uri: str, names: Sequence[str]) -> Iterator[Path]:
    """``with local_copy(uri, names) as path``: a local directory with these files of ``uri``, as far as they exist.

    The place itself when it is local.
    """
    if not is_remote(uri):
        yield Path(absolute(uri))
        return
    with tempfile.TemporaryDirectory(prefix="raybert-") as directory:
        for name in names:
            fs, path = filesystem(join(uri, name))
            if fs.exists(path):
                os.makedirs(os.path.dirname(os.path.join(directory, name)), exist_ok=True)
                fs.get_file(path, os.path.join(directory, name))
        yield Path(directory)
