"""`raybert embed`: texts at any URI to vectors, as a streaming Ray Data job."""

import posixpath
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext

from raybert import storage
from raybert.errors import InputError
from raybert.probe import tables
from raybert.probe.embed import POOLINGS, embed
from raybert.probe.encoders import open_encoder

READERS = {".parquet": ray.data.read_parquet, ".csv": ray.data.read_csv, ".jsonl": ray.data.read_json}
COLUMN = "embedding"


class Embedder:
    """An actor of the job: one encoder, applied to one batch of rows after the other."""

    def __init__(self, checkpoint: str, text_column: str, pooling: str) -> None:
        self._encoder = open_encoder(checkpoint)
        self._column, self._pooling = text_column, pooling
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: pa.Table) -> pa.Table:
        texts = [str(text or "") for text in batch.column(self._column).to_pylist()]
        if not texts:
            return batch.append_column(COLUMN, _vectors(np.empty((0, self._encoder.hidden_size), np.float32)))
        sequences = self._encoder.tokenize(texts, self._encoder.positions)
        return batch.append_column(
            COLUMN, _vectors(embed(self._encoder, sequences, device=self._device)[self._pooling])
        )


def _vectors(values: np.ndarray) -> pa.Array:
    """(N, D) float32 as a column of lists of D."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def run_embed(checkpoint: str, inputs: str, output: str, *, text_column: str, pooling: str, workers: int) -> int:
    """Write the rows of `inputs` with a column `embedding` (float32, D a row) as Parquet, and return their number.

    Ray must be connected. Texts are cut to the encoder's positions.

    Raises:
        InputError: the checkpoint or the input is missing or of a wrong kind, or something lies at the output.
    """
    if pooling not in POOLINGS:
        raise InputError(f"There is no pooling {pooling}; use one of {', '.join(POOLINGS)}.")
    checkpoint, output = storage.absolute(checkpoint), storage.absolute(output)
    open_encoder(checkpoint)
    inputs = storage.absolute(inputs)
    found = tables.columns(inputs)
    if text_column not in found:
        raise InputError(f"{inputs} has no column {text_column}; choose one of {', '.join(found)} with --text-column.")
    if storage.list_dir(output):
        raise InputError(f"Something lies at {output} already; give another --output.")
    files = [file for file in storage.list_files(inputs) if file.endswith(tuple(READERS))]
    kinds = {posixpath.splitext(file)[1] for file in files}
    if len(kinds) != 1:
        raise InputError(
            f"{inputs} holds files of several kinds ({', '.join(sorted(kinds))}); give one kind at a time."
        )
    DataContext.get_current().enable_progress_bars = False
    gpus: dict[str, Any] = {"num_gpus": 1} if ray.cluster_resources().get("GPU", 0) else {}
    rows = READERS[kinds.pop()](files).map_batches(
        Embedder,
        fn_constructor_kwargs={"checkpoint": checkpoint, "text_column": text_column, "pooling": pooling},
        batch_format="pyarrow",
        batch_size=1024,
        compute=ActorPoolStrategy(size=workers),
        num_cpus=0.5,
        **gpus,
    )
    rows.write_parquet(output)
    return int(ray.data.read_parquet(output).count())
