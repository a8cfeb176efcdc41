"""The encoders that can be probed: raybert's checkpoints, and transformers' BERT directories with their tokenizer."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raybert import storage
from raybert.encode import Text
from raybert.errors import InputError
from raybert.model import files
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.directory import describe
from raybert.tokenizer import VOCAB_SIZE, TextTokenizer
from raybert.tokenizer import files as tokenizers

UNTRAINED_SEED = 0


@dataclass(frozen=True)
class Sequences:
    """N token sequences, [CLS] A [SEP] or [CLS] A [SEP] B [SEP], without padding."""

    ids: np.ndarray  # int32, all sequences one after the other
    offsets: np.ndarray  # (N + 1,) int64: sequence i is ids[offsets[i] : offsets[i + 1]]
    cuts: np.ndarray  # (N,) int32: tokens of the first segment, its specials included
    truncated: int  # texts that were longer

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


class Encoder(ABC):
    """An encoder, and how it makes sequences of texts.

    Attributes:
        positions: the longest sequence that it takes.
        hidden_size: width of its vectors.
        hash: identity of its architecture and tokenizer, not of its weights.
        warnings: what a reader of its results must know, by pooling.
    """

    positions: int
    hidden_size: int
    pad_id: int
    hash: str
    module: nn.Module
    warnings: Mapping[str, str] = {}

    @abstractmethod
    def tokenize(self, texts: Sequence[Text], max_tokens: int) -> Sequences:
        """Texts or pairs -> ids, cut to `max_tokens`."""

    @abstractmethod
    def encode(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, T) -> last hidden state (B, T, D) and pooler output (B, D)."""

    @abstractmethod
    def untrained(self) -> "Encoder":
        """The same architecture with the weights that training starts from."""


class RaybertEncoder(Encoder):
    """A checkpoint of this project, with its tokenizer.

    Raises:
        InputError: the tokenizer does not fit the model's vocabulary, or lacks a special token.
    """

    def __init__(self, model: Bert) -> None:
        self.module = self._model = model
        rows = model.config.vocab_size
        if model.tokenizer is None and rows != VOCAB_SIZE:
            raise InputError(
                f"The model has a vocabulary of {rows} tokens, but raybert's tokenizer has {VOCAB_SIZE}; import "
                "the model with its own tokenizer, or use its transformers directory."
            )
        self._tokenizer = tokenizers.own_or(model.tokenizer)
        if self._tokenizer.size > rows:
            raise InputError(
                f"The model's tokenizer has {self._tokenizer.size} tokens, but the model's vocabulary has {rows}."
            )
        if missing := {"cls", "sep", "pad"} - self._tokenizer.roles.keys():
            raise InputError(f"The model's tokenizer has no token in the role {min(missing)}, which embedding needs.")
        self.pad_id = self._tokenizer.roles["pad"]
        self.positions = model.config.max_position_embeddings
        self.hidden_size = model.config.hidden_size
        self.hash = architecture_hash(model.config, self._tokenizer)

    def tokenize(self, texts: Sequence[Text], max_tokens: int) -> Sequences:
        return tokenize(texts, min(max_tokens, self.positions), self._tokenizer)

    def encode(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._model.encode(input_ids, token_type_ids, attention_mask)

    def untrained(self) -> "RaybertEncoder":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(UNTRAINED_SEED)
            model = Bert(self._model.config)
        model.tokenizer = self._tokenizer
        return RaybertEncoder(model.eval())


class TransformersEncoder(Encoder):
    """A transformers BERT with the tokenizer in its directory."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.module = self._model = model.eval()
        self._tokenizer = tokenizer
        self.pad_id = int(tokenizer.pad_token_id)
        self.positions = int(model.config.max_position_embeddings)
        self.hidden_size = int(model.config.hidden_size)
        description = model.config.to_diff_dict() | _describe_tokenizer(tokenizer)
        for key in ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"):
            description.pop(key, None)
        self.hash = _digest(description)

    def tokenize(self, texts: Sequence[Text], max_tokens: int) -> Sequences:
        return _tokenize_with(self._tokenizer, texts, min(max_tokens, self.positions))

    def encode(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        out = self._model(input_ids=input_ids, token_type_ids=token_type_ids, attention_mask=attention_mask)
        return out.last_hidden_state, out.pooler_output

    def untrained(self) -> "TransformersEncoder":
        from transformers import BertModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(UNTRAINED_SEED)
            return TransformersEncoder(BertModel(self._model.config), self._tokenizer)


def open_encoder(uri: str) -> Encoder:
    """A raybert checkpoint at any URI, or a local transformers BERT directory.

    Raises:
        InputError: it is neither, it is damaged, or it has another vocabulary than the tokenizer.
    """
    if describe(uri, uri).get("model_type") == "bert":
        return _open_transformers(uri)
    return RaybertEncoder(files.load(uri))


def _open_transformers(uri: str) -> Encoder:
    try:
        from transformers import BertModel

        from raybert.model.interop import has_tokenizer, open_tokenizer
    except ImportError as error:
        raise InputError("Reading a transformers directory needs transformers: pip install 'raybert[hf]'.") from error
    if storage.is_remote(uri):
        raise InputError(f"Copy the transformers directory {uri} to a local one first.")
    directory = str(Path(storage.absolute(uri)))
    if not has_tokenizer(directory):
        raise InputError(f"{uri} has no tokenizer (tokenizer.json or vocab.txt); save the model's tokenizer there.")
    try:
        # What the directory lacks is drawn at random: the same numbers each time, as every result must be.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(UNTRAINED_SEED)
            model, report = BertModel.from_pretrained(
                directory, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
            )
    except Exception as error:  # wrong values in config.json and damaged weights are errors of many kinds
        raise InputError(f"{uri} cannot be loaded: {' '.join(str(error).split())}") from error
    tokenizer = open_tokenizer(directory, model.config.vocab_size)
    missing = sorted(report["missing_keys"])
    if others := [name for name in missing if not name.startswith("pooler.")]:
        raise InputError(f"{uri} lacks {len(others)} tensors of the encoder, such as {others[0]}.")
    encoder = TransformersEncoder(model, tokenizer)
    if missing:
        encoder.warnings = {"pooler": "the directory has no pooler; this one is random and untrained"}
    return encoder


def _describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    return {"tokenizer": type(tokenizer).__name__, "rows": len(tokenizer)}


def _tokenize_with(tokenizer: Any, texts: Sequence[Text], limit: int) -> Sequences:
    """The sequences of a transformers tokenizer."""
    first = [text if isinstance(text, str) else text[0] for text in texts]
    second = None if isinstance(texts[0], str) else [text[1] for text in texts]
    encoded = tokenizer(first, second, truncation="longest_first", max_length=limit, return_token_type_ids=True)
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    return Sequences(
        ids=np.concatenate([np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        cuts=np.array([len(types) - sum(types) for types in encoded["token_type_ids"]], dtype=np.int32),
        truncated=int((lengths == limit).sum()),  # a text of exactly this length counts, which nobody will notice
    )


def tokenize(texts: Sequence[Text], max_tokens: int, tokenizer: TextTokenizer | None = None) -> Sequences:
    """The sequences that raybert makes: [CLS] A [SEP], or [CLS] A [SEP] B [SEP] with the longer of the two cut first.

    Args:
        tokenizer: raybert's own where it is not given.
    """
    tokenizer = tokenizers.own_or(tokenizer)
    encode, cls, sep = tokenizer.encode_batch, tokenizer.roles["cls"], tokenizer.roles["sep"]
    first = encode([text if isinstance(text, str) else text[0] for text in texts])
    second = [[]] * len(texts) if isinstance(texts[0], str) else encode([text[1] for text in texts])
    specials = 2 if isinstance(texts[0], str) else 3
    sequences, cuts, truncated = [], [], 0
    for a, b in zip(first, second, strict=True):
        keep_a, keep_b = _shares(len(a), len(b), max_tokens - specials)
        truncated += keep_a + keep_b < len(a) + len(b)
        sequence = [cls, *a[:keep_a], sep]
        cuts.append(len(sequence))
        sequences.append(sequence if specials == 2 else [*sequence, *b[:keep_b], sep])
    lengths = [len(sequence) for sequence in sequences]
    return Sequences(
        ids=np.concatenate([np.array(sequence, dtype=np.int32) for sequence in sequences]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        cuts=np.array(cuts, dtype=np.int32),
        truncated=int(truncated),
    )


def _shares(a: int, b: int, room: int) -> tuple[int, int]:
    """How many tokens of each part fit: a part shorter than half the room is kept whole."""
    if a + b <= room:
        return a, b
    keep_b = min(b, max(room // 2, room - a))
    return room - keep_b, keep_b


def architecture_hash(config: BertConfig, tokenizer: TextTokenizer) -> str:
    """Identity of what an untrained encoder of this configuration is."""
    return _digest(asdict(config) | {"tokenizer": tokenizer.hash, "seed": UNTRAINED_SEED})


def _digest(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()
