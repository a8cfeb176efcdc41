"""A file of lines that grows at any URI: appended to where that is a local file, uploaded now and then elsewhere."""

import logging
import os
import posixpath
import tempfile
import threading
import time
from collections.abc import Sequence

from raybert import storage

logger = logging.getLogger(__name__)

UPLOAD_SECONDS = 10.0  # between two uploads of a growing remote file


class GrowingFile:
    """Lines that one process appends. What lies there already stays, but for half a line that a killed process left.

    An object store appends to nothing: a local copy grows, and the whole of it is written again by a thread, and at
    `flush`.
    """

    def __init__(self, uri: str) -> None:
        self._uri, self._remote = uri, storage.is_remote(uri)
        # Of the local file, and of the object in storage: appending waits for no upload, and no older upload ends after
        # a newer one.
        self._lock, self._uploading = threading.Lock(), threading.Lock()
        self._dirty, self._closed = False, False
        self._uploader: threading.Thread | None = None
        self._uploaded = time.monotonic()
        if self._remote:
            stem = posixpath.basename(uri).partition(".")[0]
            descriptor, self._path = tempfile.mkstemp(prefix=f"raybert-{stem}-")
            os.close(descriptor)
            if storage.exists(uri):
                with open(self._path, "wb") as file:
                    file.write(storage.read_bytes(uri))
        else:
            self._path = uri
            os.makedirs(os.path.dirname(uri), exist_ok=True)
        _drop_half_line(self._path)

    def append(self, lines: Sequence[str]) -> None:
        """Append all lines or, with an exception, none of them. A reader of a local file sees them at once."""
        with self._lock:
            _append(self._path, "".join(f"{line}\n" for line in lines).encode())
            self._dirty = self._remote
        busy = self._uploader is not None and self._uploader.is_alive()
        if self._remote and not busy and time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self._uploaded = time.monotonic()
            self._uploader = threading.Thread(target=self._try_to_flush, name="upload", daemon=True)
            self._uploader.start()

    def _try_to_flush(self) -> None:
        try:
            self.flush()
        except Exception as error:  # the next one will say so, or succeed
            logger.warning("Cannot write %s; retrying: %s", self._uri, error)

    def flush(self) -> None:
        """Return when all that was appended before lies in storage; at once after `close`."""
        with self._uploading:
            self._upload()

    def close(self) -> None:
        """Flush, and remove the local copy of a remote file. After an exception it may be done again."""
        with self._uploading:
            self._upload()
            if self._remote and not self._closed:
                os.unlink(self._path)
            self._closed = True

    def _upload(self) -> None:
        with self._lock:
            if not self._dirty:
                return
            with open(self._path, "rb") as file:
                content = file.read()
            self._dirty = False
        try:
            storage.write_bytes(self._uri, content)
        except BaseException:
            self._dirty = True
            raise


def _append(path: str, content: bytes) -> None:
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(before)
            raise


def _drop_half_line(path: str) -> None:
    if not os.path.exists(path) or not os.path.getsize(path):
        return
    with open(path, "rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
