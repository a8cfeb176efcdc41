"""Is it a local path or a URI, and of which kind of storage?

- A path that begins with a word of two letters or more and ``:/`` is a URI: ``gs://bucket/x``, ``file:///data/x``.
- So is one that begins with the name of a well-known store and a colon: ``gs:bucket/x``.
- Everything else is a local path, whatever colons it holds: ``runs/12:30``, ``a:b.txt``.
- A ``./`` at the beginning makes every path a local one: ``./gs:/x``.

A URI of the kind ``file`` is a local path too, and percent signs in it are decoded. A URI that is incomplete, or of a
kind that nobody serves, is refused: it would otherwise become a directory below the working directory.
"""

import difflib
import re
from urllib.parse import unquote

from fsspec.registry import known_implementations, registry

from raybert.errors import InputError

GOOGLE = ("gs", "gcs")
# What stands before the first slash of these URIs is a bucket (or a container), which may be missing.
BUCKETS = (*GOOGLE, "s3", "s3a", "az", "abfs", "abfss")
HTTP = ("http", "https")
# No storage: texts that a Python package brings along; see raybert.data.text.embedded.
EMBEDDED = "embedded"
STORES = (*BUCKETS, *HTTP, "file", "hdfs", "hf")
PACKAGES = {"abfss": "adlfs"}  # of the kinds that fsspec learns from their package alone
_URI = re.compile(r"(?P<kind>(?:\w+::)*[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>/*)(?P<rest>.*)", re.DOTALL)


def split(uri: str) -> tuple[str, str]:
    """``("gs", "bucket/x")`` of ``gs://bucket/x``; ``("file", path)`` of a local path, also of one given as a file URI.

    Raises:
        InputError: it looks like a URI but is not one: see the rule above.
    """
    match = _URI.match(uri)
    if match is None:
        return "file", uri
    kind, slashes, rest = match["kind"].lower(), len(match["slashes"]), match["rest"]
    if not slashes and kind not in STORES:
        return "file", uri
    if kind in ("file", "local"):
        return "file", _path_of(uri, slashes, rest)
    known = {*registry, *known_implementations, *PACKAGES, EMBEDDED}
    if unknown := [part for part in kind.split("::") if part not in known]:
        raise _unknown(uri, unknown[0], rest)
    if slashes < 2 or (kind in (*BUCKETS, *HTTP) and (slashes > 2 or not rest)):
        raise InputError(
            f"{uri} is not a URI; write {kind}://{rest or 'BUCKET/PATH'}, or ./{uri} for a local path of that name."
        )
    return kind, "/" * (slashes - 2) + rest


def _path_of(uri: str, slashes: int, rest: str) -> str:
    """The path in a file URI: file:/x, file:///x, file://localhost/x."""
    host, slash, below = rest.partition("/") if slashes == 2 else ("", "/" if slashes else "", rest)
    if not slash or host.lower() not in ("", "localhost"):
        raise InputError(f"{uri} is not a local file URI; write file:///{rest}, or the path without file:.")
    return "/" + unquote(below).lstrip("/")


def _unknown(uri: str, kind: str, rest: str) -> InputError:
    near = difflib.get_close_matches(kind, STORES, n=1)
    hint = f"did you mean {near[0]}://{rest}?" if near else "gs, s3, az, hf, http and file are the most common."
    return InputError(
        f"{uri} has an unknown scheme: {hint} Install the fsspec package that serves {kind}://, or write ./{uri} "
        "for a local path of that name."
    )


def scheme(uri: str) -> str:
    """``gs`` of ``gs://bucket/x``; ``file`` of a local path."""
    return split(uri)[0]
