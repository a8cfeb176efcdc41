"""A checkpoint as a directory of files at any URI: their names and checksums, written whole or not at all.

Nothing here imports torch, so that the driver can check a checkpoint without it.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from raybert import storage
from raybert.errors import DamagedCheckpoint, InputError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TRAINING_STATE = "training_state.pt"
SUMS = "SHA256SUMS"  # what `sha256sum -c` takes
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
REQUIRED = (CONFIG, WEIGHTS, TRAINING_STATE)  # of a checkpoint that training can resume from
BEFORE = ".before-"


def describe(uri: str, where: str) -> dict[str, Any]:
    """What config.json says of a checkpoint, or of a directory of transformers; `where` is what errors call it.

    Raises:
        InputError: there is none, or it is not JSON.
    """
    path = storage.join(uri, CONFIG)
    if not storage.exists(path):
        raise InputError(f"{where} is neither a checkpoint nor a transformers directory: it has no {CONFIG}.")
    try:
        described = storage.read_json(path)
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
    return described if isinstance(described, dict) else {}


def tensor_names(uri: str, where: str) -> list[str]:
    """The names in the header of a directory's safetensors file; the tensors themselves are not read.

    Raises:
        InputError: the file is missing or is not a safetensors file.
    """
    try:
        with storage.open_uri(storage.join(uri, WEIGHTS)) as file:
            size = int.from_bytes(file.read(8), "little")  # https://github.com/huggingface/safetensors#format
            if size > LARGEST_HEADER:
                raise ValueError(f"its header would have {size:,} bytes")
            return [name for name in json.loads(file.read(size)) if name != "__metadata__"]
    except FileNotFoundError as error:
        raise InputError(f"{where} has no {WEIGHTS}; save the model as one safetensors file.") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}/{WEIGHTS} is not a safetensors file: {error}.") from error


def write_directory(uri: str, fill: Callable[[Path], None], *, workplace: str = "") -> int:
    """Write a directory of files and their checksums, and return its size in bytes.

    A local directory appears under its name only when it is complete. An object store has no directories: there
    ``config.json`` is uploaded last, and a directory without it is not a checkpoint.

    Args:
        fill: writes the files into an empty local directory.
        workplace: directory at which a local one is written until it is complete, on the same file system; by default
            where `uri` lies.
    """
    if storage.is_remote(uri):
        directory = Path(tempfile.mkdtemp(prefix="raybert-checkpoint-"))
    else:
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        parent = Path(workplace or Path(uri).parent)
        directory = Path(tempfile.mkdtemp(prefix=f".{Path(uri).name}-", dir=parent))
        directory.chmod(0o755)
    try:
        fill(directory)
        names = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
        (directory / SUMS).write_text("".join(f"{_sha256(directory / name)}  {name}\n" for name in names))
        size = sum((directory / name).stat().st_size for name in (*names, SUMS))
        if storage.is_remote(uri):
            for name in sorted([*names, SUMS], key=lambda name: name == CONFIG):
                storage.upload_file(directory / name, storage.join(uri, name))
        else:
            _replace(directory, Path(uri))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return size


def _replace(directory: Path, place: Path) -> None:
    """Give a directory its name, which the best weights before it have, or an attempt that was cut off.

    A process that is killed in between leaves those under the name with `BEFORE`, where a restart finds them.
    """
    before = place.with_name(BEFORE + place.name)
    if place.exists():
        shutil.rmtree(before, ignore_errors=True)
        place.rename(before)
    try:
        directory.rename(place)
    except OSError:
        with suppress(OSError):
            before.rename(place)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_sums(uri: str) -> dict[str, str]:
    """Name -> SHA-256 of the files that were written into a directory, as `SUMS` lists them.

    Raises:
        DamagedCheckpoint: there is no such list, or it cannot be read.
        InputError: the storage does not let us in.
    """
    try:
        lines = storage.read_bytes(storage.join(uri, SUMS)).decode("ascii").splitlines()
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except InputError:
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise DamagedCheckpoint(f"{uri} has no readable {SUMS}.") from error


def verify_files(uri: str, required: Sequence[str] = REQUIRED) -> None:
    """Read the files of a checkpoint and compare them with its checksums.

    Args:
        required: files that must be there; by default, those that training can resume from.

    Raises:
        DamagedCheckpoint: a file is missing or not the one that was written, or there are no checksums.
        InputError: the storage does not let us in.
    """
    sums = read_sums(uri)
    for name in (*required, *(name for name in sums if name not in required)):
        try:
            with storage.open_uri(storage.join(uri, name)) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{uri} lacks {name}.") from error
        if found != sums.get(name):
            raise DamagedCheckpoint(f"{uri}/{name} has changed since it was written (its SHA-256 differs).")
