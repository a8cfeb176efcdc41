"""`raybert embed`: texts to vectors. One file, written by this process; or a directory, written by a Ray Data job.

The job's output is one Parquet file for each piece of the input, in its order, written whole or not at all. A job that
was interrupted goes on with the pieces that lack their file, on however many nodes there are then.
"""

import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raybert import storage
from raybert.cluster import largest_resources
from raybert.data.text import rows
from raybert.data.text.documents import Piece
from raybert.encode.encoders import Encoder, open_encoder
from raybert.encode.vectors import check_choices, embed
from raybert.errors import InputError
from raybert.model import files

COLUMN = "embedding"
PLAN = "_embeddings.json"  # a name that readers of a directory of Parquet files pass over
STDIN = "-"


@dataclass(frozen=True)
class Settings:
    """What decides the vectors beside the texts."""

    checkpoint: str
    text_column: str
    pooling: str = "mean"
    dtype: str = "float32"


class Embedder:
    """One encoder, on the GPU where there is one, applied to one table after the other."""

    def __init__(self, settings: Settings) -> None:
        self._encoder: Encoder = open_encoder(settings.checkpoint)
        self._settings = settings
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def size(self) -> int:
        return self._encoder.hidden_size

    def vectors(self, table: pa.Table) -> np.ndarray:
        """float32 (N, D) of the table's texts; a missing text counts as an empty one."""
        texts = [_as_text(value) for value in table.column(self._settings.text_column).to_pylist()]
        if not texts:
            return np.empty((0, self.size), np.float32)
        sequences = self._encoder.tokenize(texts, self._encoder.positions)
        found = embed(self._encoder, sequences, device=self._device, dtype=self._settings.dtype)
        return found[self._settings.pooling]

    def table(self, table: pa.Table) -> pa.Table:
        """The same rows with the column `embedding`, in the place of one of that name."""
        values = self.vectors(table)
        if COLUMN in table.column_names:
            table = table.drop_columns([COLUMN])
        return table.append_column(COLUMN, pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), self.size))


def _as_text(value: Any) -> str:
    """A missing text is an empty one; bytes, which some writers of Parquet leave, are UTF-8.

    Raises:
        InputError: they are not.
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"A text is not UTF-8: {value[:40]!r}.") from error
    return "" if value is None else str(value)


def embed_file(settings: Settings, inputs: str, output: str) -> int:
    """Embed here, without Ray, into one file: `.npy` (vectors, float32 (N, D)) or `.parquet` (rows and vectors).

    Args:
        inputs: as `raybert.data.text.rows.plan` takes it, or "-" for a text a line from standard input.

    Returns:
        The number of rows.

    Raises:
        InputError: the checkpoint or the input is missing or of a wrong kind, or something lies at the output.
    """
    check_choices(settings.pooling, settings.dtype)
    if storage.exists(output):
        raise InputError(f"Something lies at {output} already; give another --output.")
    if inputs == STDIN:
        settings = Settings(**asdict(settings) | {"text_column": rows.LINE_COLUMN})
        tables: Iterable[pa.Table] = rows.read_lines(sys.stdin.buffer, "standard input")
    else:
        source = rows.plan(inputs, settings.text_column)
        settings = Settings(**asdict(settings) | {"text_column": source.text_column})
        tables = (table for piece in source.pieces for table in rows.read(piece, source.text_column))
    embedder = Embedder(settings)
    return (_write_npy if output.endswith(".npy") else _write_parquet)(embedder, tables, output)


def _write_npy(embedder: Embedder, tables: Iterable[pa.Table], output: str) -> int:
    parts = [embedder.vectors(table) for table in tables]
    values = np.concatenate([np.empty((0, embedder.size), np.float32), *parts])
    with _whole_file(output) as file:
        np.save(file, values)
    return len(values)


def _write_parquet(embedder: Embedder, tables: Iterable[pa.Table], output: str) -> int:
    count, writer = 0, None
    with _whole_file(output) as file, ExitStack() as opened:
        for table in map(embedder.table, tables):
            writer = writer or opened.enter_context(pq.ParquetWriter(file, table.schema))
            try:
                writer.write_table(table.cast(writer.schema))
            except (pa.ArrowException, ValueError) as error:
                raise InputError(
                    f"The rows after the first {count:,} have other columns than those before, or columns of another "
                    f"type ({error}); make them equal, or write a .npy file or a directory."
                ) from error
            count += len(table)
        if writer is None:
            raise InputError("There is no text in the input.")
    return count


@contextmanager
def _whole_file(uri: str) -> Iterator[IO[bytes]]:
    """A file that appears under its name when it is whole; nothing of it stays when writing fails."""
    uri = storage.absolute(uri)
    if storage.is_remote(uri):
        with io.BytesIO() as buffer:
            yield buffer
            storage.write_bytes(uri, buffer.getvalue())
        return
    target = Path(uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def embed_job(
    settings: Settings,
    inputs: str,
    output: str,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Embed as a Ray Data job into a directory of Parquet files. Ray must be connected.

    Args:
        workers: encoders at the same time; by default one a GPU, or one for each CPU but one.
        progress: is told how many pieces are done, of how many.

    Returns:
        The number of rows in the output, those of an earlier call included.

    Raises:
        InputError: the checkpoint or the input is missing or of a wrong kind; or something else lies at the output.
    """
    import ray

    check_choices(settings.pooling, settings.dtype)
    source = rows.plan(inputs, settings.text_column)
    checkpoint, output = storage.absolute(settings.checkpoint), storage.absolute(output)
    settings = Settings(checkpoint, source.text_column, settings.pooling, settings.dtype)
    open_encoder(checkpoint)
    _begin(settings, source, output)
    pending = [number for number in range(len(source.pieces)) if not storage.exists(_part(output, number))]
    done = len(source.pieces) - len(pending)
    if pending:
        cpus, gpus = largest_resources()
        most = workers or max(1, int(gpus or cpus - 1))
        ray.data.DataContext.get_current().enable_progress_bars = False
        job = ray.data.from_items(
            [{"number": number, **asdict(source.pieces[number])} for number in pending],
            override_num_blocks=len(pending),
        ).map_batches(
            _Pieces,
            fn_constructor_kwargs={"settings": settings, "output": output},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(most, len(pending))),
            num_cpus=1 if most > 1 else 0.5,
            num_gpus=1 if gpus else None,
        )
        for _ in job.iter_rows():
            done += 1
            if progress is not None:
                progress(done, len(source.pieces))
    return sum(_rows(_part(output, number)) for number in range(len(source.pieces)))


class _Pieces:
    """An actor of the job: piece in, Parquet file out."""

    def __init__(self, settings: Settings, output: str) -> None:
        self._embedder, self._settings, self._output = Embedder(settings), settings, output

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        fields = {name: values[0] for name, values in batch.items()}
        number = int(fields.pop("number"))
        piece = Piece(str(fields["uri"]), str(fields["kind"]), *(int(fields[n]) for n in ("start", "stop", "size")))
        buffer = io.BytesIO()
        found = [self._embedder.table(table) for table in rows.read(piece, self._settings.text_column)]
        # A piece without a line of its own: nothing but a schema.
        empty = pa.table({self._settings.text_column: pa.array([], pa.string())})
        table = pa.concat_tables(found, promote_options="permissive") if found else self._embedder.table(empty)
        pq.write_table(table, buffer)
        storage.write_bytes(_part(self._output, number), buffer.getvalue())
        return {"number": np.array([number]), "rows": np.array([len(table)])}


def _begin(settings: Settings, source: rows.Source, output: str) -> None:
    """Note what this output is made of, or see that it is the same as before.

    Raises:
        InputError: something else lies there.
    """
    with storage.open_uri(storage.join(settings.checkpoint, files.WEIGHTS)) as file:
        weights = hashlib.sha256()
        while part := file.read(1 << 20):
            weights.update(part)
    pieces = hashlib.sha256(json.dumps([asdict(piece) for piece in source.pieces]).encode()).hexdigest()
    described = {
        "weights": weights.hexdigest(),
        "input": source.identity,
        "pieces": len(source.pieces),
        "pieces_sha256": pieces,
        **{key: value for key, value in asdict(settings).items() if key != "checkpoint"},
    }
    path = storage.join(output, PLAN)
    if storage.exists(path):
        before = storage.read_json(path)
        if before != described:
            changed = [key for key in described if before.get(key) != described[key]]
            raise InputError(
                f"{output} holds vectors made otherwise ({', '.join(changed)} differ); give another --output."
            )
    elif storage.list_dir(output):
        raise InputError(f"Something lies at {output} already; give another --output.")
    else:
        storage.write_json(path, described)


def _part(output: str, number: int) -> str:
    return storage.join(output, f"part-{number:05d}.parquet")


def _rows(uri: str) -> int:
    with storage.open_uri(uri) as file:
        return int(pq.read_metadata(file).num_rows)
