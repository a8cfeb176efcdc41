"""A table of token vectors on disk: one .npy file, float32 (k, V), a component after the other. No Ray here.

A model takes its first components, which lie at the beginning of the file and are read alone.
"""

import io
from contextlib import suppress

import numpy as np

from raybert import storage
from raybert.errors import InputError
from raybert.spectral.recipe import too_few

HEADER_BYTES = 128  # of a .npy file of two dimensions, in format 1.0
_TYPE = np.dtype("<f4")
COMPONENTS_AT_ONCE = 16  # that are turned: a second copy of 250,000 vectors would be 0.8 GB


def write(uri: str, vectors: np.ndarray) -> None:
    """Write float32 (V, k) whole or not at all."""
    content = io.BytesIO()
    header = {"descr": _TYPE.str, "fortran_order": False, "shape": vectors.shape[::-1]}
    np.lib.format.write_array_header_1_0(content, header)
    for first in range(0, vectors.shape[1], COMPONENTS_AT_ONCE):
        content.write(np.ascontiguousarray(vectors[:, first : first + COMPONENTS_AT_ONCE].T, _TYPE).data)
    storage.write_bytes(uri, content.getvalue())  # which copies nothing


def shape(uri: str) -> tuple[int, int] | None:
    """(k, V) of the table at `uri`; None where there is none, or a damaged one."""
    with suppress(FileNotFoundError, IsADirectoryError, ValueError):
        stream = io.BytesIO(storage.read_range(uri, 0, HEADER_BYTES))
        if np.lib.format.read_magic(stream) == (1, 0):
            found, by_columns, kind = np.lib.format.read_array_header_1_0(stream)
            whole = HEADER_BYTES + kind.itemsize * int(np.prod(found))
            if len(found) == 2 and not by_columns and kind == _TYPE and storage.size(uri) == whole:
                return found
    return None


def read(uri: str, hidden_size: int) -> np.ndarray:
    """float32 (V, hidden_size): the first components of each token, zeros for tokens that have no vector.

    Raises:
        InputError: there is no whole table, or it has fewer components.
    """
    found = shape(uri)
    if found is None:
        raise InputError(f"The token vectors {uri} are missing or damaged; rerun the command to compute them again.")
    components, vocabulary = found
    if components < hidden_size:
        raise too_few(uri, components, hidden_size)
    data = storage.read_range(uri, HEADER_BYTES, HEADER_BYTES + _TYPE.itemsize * hidden_size * vocabulary)
    return np.frombuffer(data, _TYPE).reshape(hidden_size, vocabulary).T
