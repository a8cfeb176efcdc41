"""Any `tokenizer.json` (WordPiece, BPE, Unigram) on the library `tokenizers`, made to take text for text alone."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Theirs

from raybert.errors import InputError, one_line
from raybert.tokenizer.gpt2 import begins_word, byte_of_character
from raybert.tokenizer.vocabulary import TextTokenizer, Vocabulary

JSON, CONFIG = "tokenizer.json", "tokenizer_config.json"
EXTENDS = "raybert_extends"  # in tokenizer_config.json: the hash of the tokenizer whose ids this one goes on from
NEEDED = ("cls", "sep", "mask", "pad")
# Slots that a vocabulary keeps free: BERT's, mT5's and T5's, fairseq's.
_UNUSED = re.compile(r"\[unused_?\d+\]|<unused_?\d+>|<extra_id_\d+>|madeupword\d+")


class FastTokenizer(TextTokenizer):
    """A tokenizer from the bytes of its files. All of a process share one of the same files, also when unpickled.

    Args:
        content: tokenizer.json, and tokenizer_config.json, which `transformers` wants to see again.
        roles: the special tokens by their role: cls, sep, mask, pad, unk; as far as there are any.
        where: what errors call it.

    Raises:
        InputError: tokenizer.json is none, or a special token is not in the vocabulary.
    """

    def __init__(self, content: bytes, config: bytes, roles: Mapping[str, str], where: str) -> None:
        self.content, self.config, self.where = content, config, where
        self.tokens = dict(roles)
        self._theirs = _load(content, where)
        self._described = json.loads(content)
        # Older files do not say of what kind their model is.
        self._described["model"].setdefault("type", type(self._theirs.model).__name__)
        vocabulary = self._theirs.get_vocab(with_added_tokens=True)
        if missing := [token for token in roles.values() if token not in vocabulary]:
            raise InputError(f"The special token {missing[0]} of the tokenizer in {where} is not in its vocabulary.")
        self.roles = {role: vocabulary[token] for role, token in roles.items()}
        self.size = max(vocabulary.values()) + 1
        self._tokens_by_id = {number: token for token, number in vocabulary.items()}
        self._holes = self.size - len(self._tokens_by_id)
        self._doubled = len(vocabulary) - len(self._tokens_by_id)
        self.name = str(self._described["model"].get("type", "tokenizer"))
        self.hash = _hash(self._described, self.roles)
        self._special = np.zeros(self.size, bool)
        self._special[[self.roles[role] for role in NEEDED if role in self.roles]] = True

    def __reduce__(self) -> tuple[Any, ...]:
        return shared, (self.content, self.config, tuple(self.tokens.items()), self.where)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        if missing := [role for role in NEEDED if role not in self.roles]:
            raise InputError(
                f"The tokenizer in {self.where} has no token in the role {missing[0]}, which training needs; name its "
                f"{missing[0]}_token in tokenizer_config.json, or train one with `raybert tokenizer train`."
            )
        if self._doubled or self._holes:
            fault = (
                f"{self._doubled} duplicate ids" if self._doubled else f"{self._holes} missing ids below {self.size}"
            )
            raise InputError(f"The vocabulary of the tokenizer in {self.where} has {fault}; correct its {JSON}.")
        if len({self.roles[role] for role in NEEDED}) < len(NEEDED):
            raise InputError(
                f"Two of the roles {', '.join(NEEDED)} have the same token in {self.where}; give each a token of "
                "its own."
            )
        text = np.array([not _UNUSED.fullmatch(self._tokens_by_id[number]) for number in range(self.size)])
        text[list(self.roles.values())] = False
        special = [token["id"] for token in self._described.get("added_tokens") or () if token.get("special")]
        text[special] = False
        edges = np.flatnonzero(np.diff(text.astype(np.int8), prepend=0, append=0))
        cls, sep, mask, pad = (self.roles[role] for role in NEEDED)
        drawn = tuple((int(first), int(stop)) for first, stop in edges.reshape(-1, 2))
        unk = self.roles.get("unk")
        return Vocabulary(hash=self.hash, size=self.size, cls=cls, sep=sep, mask=mask, pad=pad, unk=unk, drawn=drawn)

    @functools.cached_property
    def word_starts(self) -> np.ndarray:
        if self._described["model"].get("end_of_word_suffix"):
            raise InputError(
                f"The tokenizer in {self.where} marks where words end, but objective.whole_word needs to know "
                "where they begin; leave objective.whole_word out."
            )
        begins = _word_test(self._described)
        added = {token["id"] for token in self._described.get("added_tokens") or ()}
        return np.array(
            [number in added or begins(self._tokens_by_id.get(number, "")) for number in range(self.size)], bool
        )

    @property
    def extends(self) -> str:
        """The hash of the tokenizer that it has more words than; empty for one that stands alone."""
        return str(json.loads(self.config).get(EXTENDS, ""))

    def encode(self, text: str) -> list[int]:
        return self._as_text(self._theirs.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """`encode` of each text; with more than one thread, on those of the library `tokenizers`."""
        if num_threads == 1:
            return [self.encode(text) for text in texts]
        return [self._as_text(found.ids) for found in self._theirs.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_sentences(self, text: str, ends: list[int]) -> tuple[np.ndarray, list[int]]:
        found = self._theirs.encode(text, add_special_tokens=False)
        ids = np.array(found.ids, np.uint32 if self.size > 65_535 else np.uint16)
        # A token goes to the sentence in which it begins, as far as its normalised text tells.
        starts = np.maximum.accumulate(np.fromiter((span[0] for span in found.offsets), np.int64, len(found.ids)))
        special = self._special[ids]
        if special.any():  # as `_as_text`
            if "unk" in self.roles:
                ids[special] = self.roles["unk"]
            else:
                ids, starts = ids[~special], starts[~special]
        counts = starts.searchsorted(ends)
        counts[-1:] = len(ids)
        return ids, [count for count in dict.fromkeys(counts.tolist()) if count]

    def _as_text(self, ids: list[int]) -> list[int]:
        """Some models (Unigram) know the names of their specials as words; text that has one has an unknown word."""
        if not self._special[ids].any():
            return ids
        unknown = [self.roles["unk"]] if "unk" in self.roles else []
        return [kept for number in ids for kept in (unknown if self._special[number] else [number])]

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(number) for number in ids]
        for number in ids:
            if not 0 <= number < self.size:
                raise ValueError(f"token id {number} is not in the vocabulary of {self.size} ids")
        return str(self._theirs.decode(ids, skip_special_tokens=False))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The tokens as the vocabulary writes them."""
        return [self._tokens_by_id[int(number)] for number in ids]

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (directory / name).write_bytes(content)

    def files(self) -> dict[str, bytes]:
        return {JSON: self.content, CONFIG: self.config}


@functools.lru_cache(maxsize=8)
def shared(content: bytes, config: bytes, roles: tuple[tuple[str, str], ...], where: str) -> FastTokenizer:
    """One tokenizer a process for the same files."""
    return FastTokenizer(content, config, dict(roles), where)


def _load(content: bytes, where: str) -> Theirs:
    try:
        theirs = Theirs.from_str(content.decode())
        if not isinstance(json.loads(content).get("model"), dict):
            raise ValueError("it has no model")
    except Exception as error:  # Rust's parsers raise a plain Exception
        raise InputError(f"The tokenizer in {where} cannot be read: {one_line(error)}") from error
    theirs.no_truncation()  # both are kept in the file, as whoever saved it used it last
    theirs.no_padding()
    theirs.encode_special_tokens = True
    return theirs


def _hash(described: Mapping[str, Any], roles: Mapping[str, int]) -> str:
    """Of all that decides which ids a text has; not of what only decoding, padding or the specials around it need."""
    # What newer files state and older ones leave out is false or none.
    model = {key: value for key, value in described["model"].items() if value is not None and value is not False}
    if "merges" in model:  # "a b", or ["a", "b"], as newer files have it
        model["merges"] = [part if isinstance(part, str) else " ".join(part) for part in model["merges"]]
    added = [
        {"id": token["id"], "content": token["content"]} if token.get("special") else token
        for token in described.get("added_tokens") or ()
    ]
    parts = [model, described.get("normalizer"), described.get("pre_tokenizer"), added, dict(roles)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _word_test(described: Mapping[str, Any]) -> Any:
    """Whether a token, as the vocabulary writes it, begins a word."""
    model = described["model"]
    kinds = json.dumps([described.get("pre_tokenizer"), described.get("normalizer")], ensure_ascii=False)
    if '"ByteLevel"' in kinds:
        table = byte_of_character()
        return lambda token: begins_word(bytes(table.get(character, 32) for character in token))
    if '"Metaspace"' in kinds or "▁" in kinds or model["type"] == "Unigram":
        return lambda token: token.startswith("▁") or begins_word(token[:1].encode())
    if prefix := model.get("continuing_subword_prefix"):
        return lambda token: not token.startswith(prefix)
    return lambda token: True
