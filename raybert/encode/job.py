"""`raybert embed`: texts to vectors. One file, written by this process; or a directory, written by a Ray Data job.

The job's output is one Parquet file for each piece of the input, in its order, written whole or not at all. A job that
was interrupted goes on with the pieces that lack their file, on however many nodes there are then.
"""

import hashlib
import io
import json
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raybert import storage
from raybert.cluster import largest_resources
from raybert.console import say
from raybert.data.text import rows
from raybert.data.text.columns import Kind, merge_all
from raybert.data.text.documents import Piece
from raybert.data.text.values import Bad, column_values, text_of
from raybert.encode.encoders import Encoder, open_encoder
from raybert.encode.vectors import check_choices, embed
from raybert.errors import InputError
from raybert.model import files
from raybert.records import read_object

if TYPE_CHECKING:
    import ray

COLUMN = "embedding"
PLAN = "_embeddings.json"  # a name that readers of a directory of Parquet files pass over
STDIN = "-"
Tables = Iterator[tuple[str, pa.Table]]  # each with the name of its file


@dataclass(frozen=True)
class Settings:
    """Everything besides the texts that decides the vectors."""

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
        """float32 (N, D) of the table's texts, as `rows.read` gives them; a missing text counts as an empty one."""
        found = map(text_of, column_values(table.column(self._settings.text_column)))
        texts = ["" if isinstance(text, Bad) else text for text in found]
        if not texts:
            return np.empty((0, self.size), np.float32)
        sequences = self._encoder.tokenize(texts, self._encoder.positions)
        vectors = embed(self._encoder, sequences, device=self._device, dtype=self._settings.dtype)
        return vectors[self._settings.pooling]

    def table(self, table: pa.Table) -> pa.Table:
        """The same rows with the column `embedding`, in the place of one of that name."""
        values = self.vectors(table)
        if COLUMN in table.column_names:
            table = table.drop_columns([COLUMN])
        return table.append_column(COLUMN, pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), self.size))


def _plan(inputs: str, text_column: str) -> rows.Source:
    """As `rows.plan`; skipped files are listed on standard error."""
    source = rows.plan(inputs, text_column)
    if source.passed_over:
        say(source.passed_over)
    return source


def embed_file(settings: Settings, inputs: str, output: str) -> int:
    """Embed here, without Ray, into one file: `.npy` (vectors, float32 (N, D)) or `.parquet` (rows and vectors).

    Args:
        inputs: as `raybert.data.text.rows.plan` takes it, or "-" for standard input, one text per line.

    Returns:
        The number of rows.

    Raises:
        InputError: the checkpoint or the input is missing or of a wrong kind, or the output exists.
    """
    check_choices(settings.pooling, settings.dtype)
    if storage.exists(output):
        raise InputError(f"{output} already exists; give another --output.")
    array = output.endswith(".npy")
    if inputs == STDIN:
        settings = Settings(**asdict(settings) | {"text_column": rows.LINE_COLUMN})
        tables: Tables = (("standard input", table) for table in rows.read_lines(sys.stdin.buffer, "standard input"))
    else:
        source = _plan(inputs, settings.text_column)
        settings = Settings(**asdict(settings) | {"text_column": source.text_column})
        tables = _tables(source, others=not array)
    embedder = Embedder(settings)
    return (_write_npy if array else _write_parquet)(embedder, tables, output)


def _tables(source: rows.Source, *, others: bool) -> Tables:
    looked = (rows.kinds(piece, source.text_column) for piece in source.pieces if others)
    kinds: dict[str, Kind] = reduce(merge_all, looked, {})
    for piece in source.pieces:
        for table in rows.read(piece, source.text_column, kinds, others=others):
            yield piece.uri, table


def _write_npy(embedder: Embedder, tables: Tables, output: str) -> int:
    parts = [embedder.vectors(table) for _, table in tables]
    values = np.concatenate([np.empty((0, embedder.size), np.float32), *parts])
    with _whole_file(output) as file:
        np.save(file, values)
    return len(values)


def _write_parquet(embedder: Embedder, tables: Tables, output: str) -> int:
    count, writer = 0, None
    with _whole_file(output) as file, ExitStack() as opened:
        for uri, texts in tables:
            table = embedder.table(texts)
            writer = writer or opened.enter_context(pq.ParquetWriter(file, table.schema))
            try:
                writer.write_table(table.cast(writer.schema))
            except (pa.ArrowException, ValueError) as error:
                raise InputError(
                    f"The rows after the first {count:,} have other columns or other types than those before "
                    f"({uri}: {error}); make them equal, or write a .npy file or a directory."
                ) from error
            count += len(table)
        if not count:
            raise InputError("The input contains no text.")
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
        workers: parallel encoders; by default one per GPU, or one fewer than the CPUs.
        progress: called with the number of finished pieces and of all pieces.

    Returns:
        The number of rows in the output, those of an earlier call included.

    Raises:
        InputError: the checkpoint or the input is missing or of a wrong kind; or the output contains something else, or
            vectors whose settings are unknown.
    """
    import ray

    check_choices(settings.pooling, settings.dtype)
    source = _plan(inputs, settings.text_column)
    checkpoint, output = storage.absolute(settings.checkpoint), storage.absolute(output)
    settings = Settings(checkpoint, source.text_column, settings.pooling, settings.dtype)
    open_encoder(checkpoint)
    described = _describe(settings, source)
    _require_same(described, output)
    pending = [number for number in range(len(source.pieces)) if _rows(_part(output, number)) is None]
    done = len(source.pieces) - len(pending)
    if pending:
        cpus, gpus = largest_resources()
        most = workers or max(1, int(gpus or cpus - 1))
        ray.data.DataContext.get_current().enable_progress_bars = False
        kinds = _kinds(source)  # before anything is written: it refuses rows that cannot be used
        storage.write_json(storage.join(output, PLAN), described)
        job = _dataset(source, pending).map_batches(
            _Pieces,
            fn_constructor_kwargs={"settings": settings, "kinds": kinds, "output": output},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(most, len(pending))),
            num_cpus=1 if most > 1 else 0.5,
            num_gpus=1 if gpus else None,
        )
        for row in job.iter_rows():
            _raise(row["fault"])
            done += 1
            if progress is not None:
                progress(done, len(source.pieces))
    return sum(_rows(_part(output, number)) or 0 for number in range(len(source.pieces)))


def _dataset(source: rows.Source, numbers: Sequence[int]) -> "ray.data.Dataset":
    import ray

    items = [{"number": number, **asdict(source.pieces[number])} for number in numbers]
    return ray.data.from_items(items, override_num_blocks=len(items))


def _numbered_piece(fields: dict[str, Any]) -> tuple[int, Piece]:
    """The other way round: a row of those."""
    numbers = (int(fields[name]) for name in ("start", "stop", "size"))
    return int(fields["number"]), Piece(str(fields["uri"]), str(fields["kind"]), *numbers)


def _kinds(source: rows.Source) -> dict[str, Kind]:
    """The columns of all pieces, so that their files get the same types, however the pieces are shared out.

    Raises:
        InputError: a row cannot be used.
    """
    if source.pieces[0].kind != "jsonl":
        return {}

    text_column = source.text_column  # alone, or every task would be sent all pieces

    def look(row: dict[str, Any]) -> dict[str, Any]:
        number, piece = _numbered_piece(row)
        try:
            return {"number": number, "kinds": pickle.dumps(rows.kinds(piece, text_column)), "fault": ""}
        except InputError as error:
            return {"number": number, "kinds": b"", "fault": str(error)}

    found: dict[int, dict[str, Kind]] = {}
    for row in _dataset(source, range(len(source.pieces))).map(look).iter_rows():
        _raise(row["fault"])
        found[row["number"]] = pickle.loads(row["kinds"])
    return reduce(merge_all, (found[number] for number in sorted(found)))


def _raise(fault: str) -> None:
    if fault:
        raise InputError(fault)


class _Pieces:
    """An actor of the job: piece in, Parquet file out."""

    def __init__(self, settings: Settings, kinds: dict[str, Kind], output: str) -> None:
        self._embedder, self._settings, self._kinds, self._output = Embedder(settings), settings, kinds, output

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        number, piece = _numbered_piece({name: values[0] for name, values in batch.items()})
        buffer = io.BytesIO()
        try:
            found = rows.read(piece, self._settings.text_column, self._kinds)
            table = pa.concat_tables(map(self._embedder.table, found))
        except InputError as error:  # as a value: an exception would come back wrapped in Ray's
            return {"fault": np.array([str(error)])}
        pq.write_table(table, buffer)
        storage.write_bytes(_part(self._output, number), buffer.getvalue())
        return {"fault": np.array([""])}


def _describe(settings: Settings, source: rows.Source) -> dict[str, Any]:
    """What an output is made of."""
    with storage.open_uri(storage.join(settings.checkpoint, files.WEIGHTS)) as file:
        weights = hashlib.sha256()
        while part := file.read(1 << 20):
            weights.update(part)
    pieces = hashlib.sha256(json.dumps([asdict(piece) for piece in source.pieces]).encode()).hexdigest()
    return {
        "weights": weights.hexdigest(),
        "input": source.identity,
        "pieces": len(source.pieces),
        "pieces_sha256": pieces,
        **{key: value for key, value in asdict(settings).items() if key != "checkpoint"},
    }


def _require_same(described: dict[str, Any], output: str) -> None:
    """
    Raises:
        InputError: something else lies at the output, or vectors whose settings are unknown.
    """
    path = storage.join(output, PLAN)
    others = [uri for uri in storage.list_dir(output) if uri != path]
    try:
        before = read_object(path)
    except FileNotFoundError:
        if others:
            raise InputError(f"{output} already exists; give another --output.") from None
    except ValueError as error:
        # It is written before the first vectors: where there are none, nothing can be mixed up, and it is written anew.
        if others:
            raise InputError(
                f"{path} is damaged ({error}), so it is unknown how the vectors were made; delete {output}, or "
                "give another --output."
            ) from error
    else:
        if before != described:
            changed = [key for key in described if before.get(key) != described[key]]
            raise InputError(
                f"{output} contains vectors made with other settings ({', '.join(changed)} differ); give "
                "another --output."
            )


def _part(output: str, number: int) -> str:
    return storage.join(output, f"part-{number:05d}.parquet")


def _rows(uri: str) -> int | None:
    """How many rows a file of the output holds; None where it is missing or was cut off, and has to be written."""
    try:
        with storage.open_uri(uri) as file:
            return int(pq.read_metadata(file).num_rows)
    except (FileNotFoundError, pa.ArrowInvalid):  # a Parquet file ends with what says how long it is
        return None
