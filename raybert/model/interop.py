"""Lossless to and from ``transformers``' BERT: the same weights give the same outputs."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raybert.errors import InputError, one_line
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.tokenizer import PAD_ID, VOCAB_SIZE
from raybert.tokenizer.gpt2 import hugging_face

if TYPE_CHECKING:
    from transformers import BertForPreTraining

# Our names (left) and transformers' (right), outside the layers and within layer N.
OUTER = {
    "position_embeddings.weight": "bert.embeddings.position_embeddings.weight",
    "token_type_embeddings.weight": "bert.embeddings.token_type_embeddings.weight",
    "embedding_norm.weight": "bert.embeddings.LayerNorm.weight",
    "embedding_norm.bias": "bert.embeddings.LayerNorm.bias",
    "pooler.weight": "bert.pooler.dense.weight",
    "pooler.bias": "bert.pooler.dense.bias",
    "mlm_transform.weight": "cls.predictions.transform.dense.weight",
    "mlm_transform.bias": "cls.predictions.transform.dense.bias",
    "mlm_norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "mlm_norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "mlm_bias": "cls.predictions.bias",
    "nsp_head.weight": "cls.seq_relationship.weight",
    "nsp_head.bias": "cls.seq_relationship.bias",
}
INNER = {
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
WORDS = "bert.embeddings.word_embeddings.weight"
NEW_HEADS_SEED = 0


def to_transformers(model: Bert) -> "BertForPreTraining":
    """The same model as a transformers BertForPreTraining, in evaluation mode.

    The vocabulary has exactly `vocab_size` rows; input and output embedding stay tied.
    """
    from transformers import BertConfig as TheirConfig
    from transformers import BertForPreTraining

    ours = model.config
    theirs = BertForPreTraining(
        TheirConfig(
            vocab_size=ours.vocab_size,
            hidden_size=ours.hidden_size,
            num_hidden_layers=ours.num_hidden_layers,
            num_attention_heads=ours.num_attention_heads,
            intermediate_size=ours.intermediate_size,
            hidden_act="gelu",
            hidden_dropout_prob=ours.dropout,
            attention_probs_dropout_prob=ours.dropout,
            max_position_embeddings=ours.max_position_embeddings,
            type_vocab_size=ours.type_vocab_size,
            initializer_range=ours.initializer_range,
            layer_norm_eps=ours.layer_norm_eps,
            pad_token_id=_pad_id(model),
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    missing, unexpected = theirs.load_state_dict(to_their_names(model.state_dict(), ours), strict=False)
    # What may be missing are second names of the tied embedding and of its bias.
    if unexpected or any(not name.startswith("cls.predictions.decoder") for name in missing):
        raise RuntimeError(f"this version of transformers uses other names for its weights: {missing} {unexpected}")
    theirs.tie_weights()
    return theirs.eval()


def _pad_id(model: Bert) -> int | None:
    if model.tokenizer is not None:
        return model.tokenizer.roles["pad"]
    return PAD_ID if model.config.vocab_size == VOCAB_SIZE else None


def from_transformers(theirs: "BertForPreTraining") -> Bert:
    """A transformers BertForPreTraining as a raybert model, in evaluation mode.

    Raises:
        InputError: it uses what raybert's encoder lacks (another activation, untied embeddings, a decoder, ...).
    """
    model = Bert(our_config(theirs.config))
    model.load_state_dict(to_our_names(theirs.state_dict(), model))
    return model.eval()


def our_config(config: Any) -> BertConfig:
    """The dimensions of a transformers BertConfig.

    Raises:
        InputError: it asks for what our encoder does not have.
    """
    refused = {
        "hidden_act": (config.hidden_act, "gelu"),
        "is_decoder": (getattr(config, "is_decoder", False), False),
        "add_cross_attention": (getattr(config, "add_cross_attention", False), False),
        "position_embedding_type": (getattr(config, "position_embedding_type", "absolute"), "absolute"),
        "tie_word_embeddings": (getattr(config, "tie_word_embeddings", True), True),
        "attention_probs_dropout_prob": (config.attention_probs_dropout_prob, config.hidden_dropout_prob),
    }
    for name, (found, needed) in refused.items():
        if found != needed:
            raise InputError(
                f"The transformers model has {name}={found!r}; raybert's encoder supports only {needed!r}."
            )
    return BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        dropout=config.hidden_dropout_prob,
        initializer_range=config.initializer_range,
        layer_norm_eps=config.layer_norm_eps,
    )


def read_config(described: dict[str, Any], name: str) -> BertConfig:
    """The dimensions that a transformers config.json of a BERT describes; `name` is what errors call it.

    Raises:
        InputError: it is none, asks for what our encoder does not have, or transformers is not installed.
    """
    try:
        from transformers import BertConfig as TheirConfig
    except ImportError as error:
        raise InputError(f"Starting from {name} needs transformers: pip install 'raybert[hf]'.") from error
    try:
        return our_config(TheirConfig(**{key: value for key, value in described.items() if key != "model_type"}))
    except InputError:
        raise
    except Exception as error:  # transformers checks values in its own ways
        raise InputError(f"The config.json of {name} cannot be used: {one_line(error)}") from error


def to_their_names(state: dict[str, Tensor], config: BertConfig) -> dict[str, Tensor]:
    """Our tensors under transformers' names: spare vocabulary rows dropped, query, key and value apart."""
    out = {theirs: state[ours].clone() for ours, theirs in OUTER.items()}
    out[WORDS] = state["word_embeddings.weight"][: config.vocab_size].clone()
    for index in range(config.num_hidden_layers):
        prefix = f"bert.encoder.layer.{index}"
        for kind in ("weight", "bias"):
            for part, tensor in zip(
                ("query", "key", "value"), state[f"layers.{index}.qkv.{kind}"].chunk(3), strict=True
            ):
                out[f"{prefix}.attention.self.{part}.{kind}"] = tensor.clone()
            for ours, theirs in INNER.items():
                out[f"{prefix}.{theirs}.{kind}"] = state[f"layers.{index}.{ours}.{kind}"].clone()
    return out


def to_our_names(state: dict[str, Tensor], model: Bert) -> dict[str, Tensor]:
    """transformers' tensors under our names; the spare vocabulary rows keep the values of `model`."""
    out = {ours: state[theirs].clone() for ours, theirs in OUTER.items()}
    words = model.word_embeddings.weight.detach().clone()
    words[: model.config.vocab_size] = state[WORDS]
    out["word_embeddings.weight"] = words
    for index in range(model.config.num_hidden_layers):
        prefix = f"bert.encoder.layer.{index}"
        for kind in ("weight", "bias"):
            parts = [state[f"{prefix}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            out[f"layers.{index}.qkv.{kind}"] = torch.cat(parts)
            for ours, theirs in INNER.items():
                out[f"layers.{index}.{ours}.{kind}"] = state[f"{prefix}.{theirs}.{kind}"].clone()
    return out


# Nothing, words, a character that no vocabulary has, and a pair.
_TRIED = (("",), ("a text",), ("\U000e0001",), ("a \U000e0001", "b"))


def has_tokenizer(directory: str) -> bool:
    """Whether a transformers directory holds a BERT's tokenizer. `AutoTokenizer` makes an empty one where none lies."""
    return any(Path(directory, name).exists() for name in ("tokenizer.json", "vocab.txt"))


def read_tokenizer(directory: str | Path, name: str) -> Any:
    """Open the tokenizer in a local directory; `name` is what errors call it.

    Raises:
        InputError: it cannot be read, or needs code or a package that is not there.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the parsers behind it raise whatever they like, Rust's a plain Exception
        raise InputError(f"The tokenizer in {name} cannot be read: {one_line(error)}") from error


def open_tokenizer(directory: str, vocab_size: int) -> Any:
    """The tokenizer in a transformers directory, which can make the sequences of any text.

    Args:
        vocab_size: of the directory's model, which must have a row for every id.

    Raises:
        InputError: it cannot be read or fails at a text, lacks a special token or does not put them around a text, or
            does not fit the model.
    """
    tokenizer, name = read_tokenizer(directory, directory), f"The tokenizer in {directory}"
    tokens = 1 + max([len(tokenizer) - 1, *tokenizer.get_vocab().values()])
    if tokens > vocab_size:
        raise InputError(f"{name} has {tokens} tokens, but its model has {vocab_size}.")
    for part in ("pad", "cls", "sep"):
        if getattr(tokenizer, f"{part}_token_id") is None:
            raise InputError(
                f"{name} has no {part}_token, which embedding needs; name it in its tokenizer_config.json."
            )
    try:
        tried = [tokenizer(*texts, return_token_type_ids=True)["input_ids"] for texts in _TRIED]
    except Exception as error:
        raise InputError(f"{name} cannot be used: {one_line(error)}") from error
    if any(ids[:1] != [tokenizer.cls_token_id] or ids[-1:] != [tokenizer.sep_token_id] for ids in tried):
        raise InputError(
            f"{name} does not put {tokenizer.cls_token} before a text and {tokenizer.sep_token} after it, as a "
            "BERT tokenizer does."
        )
    return tokenizer


def read_transformers(directory: str) -> tuple["BertForPreTraining", list[str]]:
    """Open a local transformers BERT directory, with or without its pre-training heads; safetensors only.

    Returns:
        The model, and the names of the tensors that the directory lacks (of heads that it was saved without), which
        begin as training does: at random, with a fixed seed.

    Raises:
        InputError: there is no config.json of model type bert, no safetensors weights, or a part of the encoder lacks.
    """
    from transformers import BertForPreTraining

    path = Path(directory, "config.json")
    try:
        described = json.loads(path.read_bytes()) if path.exists() else {}
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(described, dict) or described.get("model_type") != "bert":
        raise InputError(
            f"{directory} is not a transformers BERT directory: it needs a config.json with model_type bert."
        )
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(NEW_HEADS_SEED)
        try:
            found: Any = BertForPreTraining.from_pretrained(
                directory, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except Exception as error:  # wrong values in config.json and damaged weights are errors of many kinds
            raise InputError(f"{directory} cannot be loaded: {one_line(error)}") from error
    model, report = found
    missing = sorted(report["missing_keys"])
    encoder = [name for name in missing if not name.startswith(("cls.", "bert.pooler."))]
    if encoder:
        raise InputError(f"{directory} lacks the tensor {encoder[0]}; the encoder is incomplete.")
    return model, missing


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' bars, and its report of new heads, which the caller states in a sentence of its own."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def fast_tokenizer(max_length: int) -> Any:
    """Our tokenizer as transformers knows it: the same ids, [CLS] A [SEP] B [SEP], token types."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=hugging_face(),
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        pad_token="[PAD]",
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
