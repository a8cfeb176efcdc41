"""URI -> file system: the one place that knows where bytes live.

A path is a local path or any URI that fsspec knows (``gs://``, ``s3://``, ``az://``, ``hf://``, ``memory://`` ...);
raybert.storage.uri has the rule that tells them apart. ``~`` and ``~user`` are home directories, as in a shell.
Everything that raybert reads or writes goes through these functions; where Ray itself takes a URI, `arrow_uri` says how
Ray must be told. Retries with back-off are those of the fsspec packages: docs/storage.md has what was measured of them.
"""

import io
import json
import os
import posixpath
import re
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fsspec import AbstractFileSystem

from raybert.errors import InputError
from raybert.storage.clients import (
    ANONYMOUS,
    bucket,
    client,
    no_client,
    sentences,
    share_emulator,
    unranged,
    without_user,
)
from raybert.storage.uri import BUCKETS, GOOGLE, HTTP, scheme, split

# Ray reaches these through pyarrow's own clients, everything else through fsspec.
_ARROW = (*GOOGLE, "s3")
_MAGIC = re.compile(r"[*?[]")


def is_remote(uri: str) -> bool:
    """True for a URI with a scheme other than ``file``."""
    return scheme(uri) != "file"


def absolute(uri: str, base: str = "") -> str:
    """The same place under a name that holds in every process: local paths become absolute, URIs lose a last slash.

    Args:
        base: what relative paths are relative to, the working directory when empty.

    Raises:
        InputError: it looks like a URI but is not one, or names the home of a user who does not exist.
    """
    kind, rest = split(uri)
    if kind != "file":
        return f"{kind}://{rest.rstrip('/')}"
    path = _expand_user(rest)
    if base and not os.path.isabs(path):
        return absolute(join(base, path))
    return os.path.abspath(path)


def is_relative(uri: str) -> bool:
    """True for a local path that means another place in another working directory, or to another user (``~``)."""
    kind, path = split(uri)
    return kind == "file" and not os.path.isabs(path)


def local_path(uri: str, remedy: str) -> Path:
    """The absolute path of what must lie on this machine.

    Args:
        remedy: what to do where it does not, for the sentence.

    Raises:
        InputError: it does not.
    """
    if is_remote(uri):
        raise InputError(f"{uri} is not on this machine; {remedy}.")
    return Path(absolute(uri))


def _expand_user(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise InputError(
            f"{path} names the user {path[1:].partition('/')[0]}, who does not exist; write ./{path} for a local file."
        )
    return expanded


def join(uri: str, *parts: str) -> str:
    """Join with forward slashes, for local paths and URIs alike."""
    return posixpath.join(uri.rstrip("/") if len(uri) > 1 else uri, *parts)


def arrow_uri(uri: str) -> str:
    """The same place as Ray and pyarrow expect it.

    An emulator, and a public bucket named as ``gs://anonymous@bucket/x``, are asked without credentials.
    """
    uri = absolute(uri)
    kind = scheme(uri)
    if kind == "file" or kind in _ARROW:
        if kind in GOOGLE and share_emulator():
            return f"{kind}://{ANONYMOUS}{without_user(uri).partition('://')[2]}"
        return uri
    return f"fsspec+{uri}"


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of ``uri`` and the path inside it.

    Raises:
        InputError: the scheme is unknown, the package that serves it is not installed, or there are no credentials.
    """
    uri = absolute(uri)
    with sentences(uri):
        try:
            fs, path = client(uri)
        except InputError:
            raise
        except (ValueError, ImportError, OSError) as error:
            raise no_client(uri, error) from error
    return fs, path


def require_bucket(uri: str) -> None:
    """
    Raises:
        InputError: the bucket of a ``uri`` that has one does not exist.
    """
    if scheme(uri) not in BUCKETS:
        return
    fs, path = filesystem(uri)
    root = path.lstrip("/").partition("/")[0]
    with sentences(uri):
        if not fs.exists(root):
            raise InputError(f"There is no bucket {bucket(uri)}; create it, or correct the URI {uri}.")


def require_writable(uri: str) -> None:
    """Write a small object below ``uri``, read it back and delete it; of a local path look at the permissions.

    Raises:
        InputError: the bucket does not exist, the credentials are missing or expired, or there is no permission.
    """
    uri = absolute(uri)
    if not is_remote(uri):
        place = Path(uri)
        while not place.exists():
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise InputError(f"Cannot write to {uri}: {place} is {'not writable' if place.is_dir() else 'a file'}.")
        return
    fs, _ = filesystem(uri)
    marker = join(uri, f".raybert-{uuid.uuid4().hex[:12]}")
    with sentences(uri):
        if hasattr(fs, "credentials") and hasattr(fs.credentials, "maybe_refresh"):
            fs.credentials.maybe_refresh()  # gcsfs asks for a refused token again and again, for half a minute
        try:
            write_bytes(marker, b"raybert")
            found = read_bytes(marker)
        except FileNotFoundError as error:
            raise InputError(f"There is no bucket {bucket(uri)}; create it, or correct the URI {uri}.") from error
        remove(marker)
    if found != b"raybert":
        raise InputError(f"The read-after-write check of {uri} failed: it returned other bytes than were written.")


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    with sentences(uri):
        return bool(fs.exists(path))


def size(uri: str) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: it does not exist.
    """
    if scheme(uri) in HTTP:
        with open_uri(uri) as file:
            return file.seek(0, os.SEEK_END)
    fs, path = filesystem(uri)
    with sentences(uri):
        return int(fs.info(path)["size"])


@contextmanager
def open_uri(uri: str) -> Iterator[IO[bytes]]:
    """``with open_uri(uri) as file``: a file to read from, at any place."""
    fs, path = filesystem(uri)
    with sentences(uri):
        content = unranged(fs, path) if scheme(uri) in HTTP else None
        with fs.open(path, "rb") if content is None else io.BytesIO(content) as file:
            yield file


def read_bytes(uri: str) -> bytes:
    fs, path = filesystem(uri)
    with sentences(uri):
        return bytes(fs.cat_file(path))


def read_range(uri: str, start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop`` of a file, in one request."""
    if scheme(uri) in HTTP:  # its client would take the whole answer of a server without ranges for the part
        with open_uri(uri) as file:
            file.seek(start)
            return file.read(stop - start)
    fs, path = filesystem(uri)
    with sentences(uri):
        return bytes(fs.cat_file(path, start=start, end=stop)) if stop > start else b""


def read_ranges(wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Bytes (URI, start, stop) of several files on one file system, asked for at the same time."""
    if not wanted:
        return []
    fs, _ = filesystem(wanted[0][0])
    paths = [filesystem(uri)[1] for uri, _, _ in wanted]
    with sentences(wanted[0][0]):
        found: list[bytes] = fs.cat_ranges(paths, [w[1] for w in wanted], [w[2] for w in wanted], on_error="raise")
        return found


def read_from(uri: str, offset: int) -> bytes:
    """What a growing file holds from ``offset`` on; nothing while it does not exist."""
    try:
        length = size(uri)
        return read_range(uri, offset, length)
    except FileNotFoundError:
        return b""


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole object so that a reader sees the old one or the new one, never a part.

    Object stores do that by themselves; a local file is written beside its name and renamed.
    """
    fs, path = filesystem(uri)
    if scheme(uri) in HTTP:
        raise InputError(f"{uri} is read-only; write to a local path or a bucket.")
    if is_remote(uri):
        with sentences(uri):
            fs.pipe_file(path, data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:  # a full disk must not fill up with incomplete files
        with suppress(OSError):
            os.unlink(temporary)
        raise


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def list_dir(uri: str) -> list[str]:
    """Full URIs of what lies directly under ``uri``, sorted; empty when it does not exist."""
    fs, path = filesystem(uri)
    try:
        with sentences(uri):
            names = fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    uri = absolute(uri)
    return sorted(join(uri, posixpath.basename(name.rstrip("/"))) for name in names if name.rstrip("/") != path)


def list_files(uri: str) -> list[str]:
    """Full URIs of every file at or under ``uri`` (a file, a directory or a glob), sorted."""
    return [found for found, _ in find_files(uri)]


def find_files(uri: str) -> list[tuple[str, str]]:
    """Every file at or under ``uri`` (a file, a directory or a glob): its full URI, and its path below ``uri``; sorted.

    The path below a file is empty; below a glob it begins with the first part that has a wildcard. What exists under
    its name is not a glob, nor is a directory that exists a part of one: ``v[1].jsonl``, ``My data [2024]/*.jsonl``.
    """
    fs, path = filesystem(uri)
    with sentences(uri):
        if scheme(uri) in HTTP:  # no listings there, and a question mark begins a query
            return [(absolute(uri), "")] if fs.exists(path, strict=True) else []
        root, pattern = _divided(fs, path)
        found = fs.glob(pattern, detail=True) if pattern else fs.find(root, detail=True)
    if isinstance(found, list):  # adlfs answers so for a single file, whatever it is asked for
        found = {name: {"type": "file"} for name in found}
    # What pyarrow writes in the place of a directory is an object whose name ends with a slash.
    names = [name for name, about in found.items() if about["type"] == "file" and not name.endswith("/")]
    user = ANONYMOUS if f"://{ANONYMOUS}" in uri else ""

    def full(name: str) -> str:
        if not is_remote(uri):
            return name
        return f"{scheme(uri)}://{user}{fs.unstrip_protocol(name).partition('://')[2]}"

    return sorted((full(name), name[len(root.rstrip("/")) :].strip("/")) for name in names)


def _divided(fs: AbstractFileSystem, path: str) -> tuple[str, str]:
    """The leading parts of a path that have no wildcard or exist, and the glob, where the path is one."""
    parts = path.split("/")
    for place, part in enumerate(parts):
        if _MAGIC.search(part) and not fs.exists("/".join(parts[: place + 1])):
            return "/".join(parts[:place]), "/".join([*map(_literal, parts[:place]), *parts[place:]])
    return path, ""


def _literal(path: str) -> str:
    """A path as the glob that it alone matches."""
    return _MAGIC.sub(r"[\g<0>]", path)


def remove(uri: str) -> None:
    """Delete a file or a whole directory; a missing one is not an error."""
    fs, path = filesystem(uri)
    try:
        with sentences(uri):
            fs.rm(_literal(path) if is_remote(uri) else path, recursive=True)  # the remote ones expand globs
    except FileNotFoundError:
        return


def move(uri: str, target: str) -> None:
    """Give a file or a whole directory another name on the same file system; an object store copies and deletes."""
    fs, path = filesystem(uri)
    new = filesystem(target)[1]
    with sentences(uri):
        if not is_remote(uri):
            fs.mv(path, new, recursive=True)
            return
        names = fs.find(path)
        fs.copy(names, [new + name[len(path) :] for name in names], on_error="raise")
    remove(uri)


def upload_file(local: str | Path, uri: str) -> None:
    """Copy a local file to ``uri`` without reading it into memory."""
    fs, path = filesystem(uri)
    with sentences(uri):
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
        fs, path = filesystem(uri)
        for name in names:
            target = Path(directory, name)
            with sentences(uri), suppress(FileNotFoundError):
                fs.get_file(join(path, name), os.path.join(directory, ".part"))
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(os.path.join(directory, ".part"), target)
        yield Path(directory)
