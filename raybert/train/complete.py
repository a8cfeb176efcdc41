"""What a run's settings leave to its shards and to the weights that it begins with: the encoder's dimensions."""

from dataclasses import asdict, dataclass
from typing import Any

from raybert import storage
from raybert.config import Config, load_run
from raybert.data.shards import ShardSet
from raybert.errors import InputError
from raybert.model import directory
from raybert.model.config import BertConfig
from raybert.storage import hub
from raybert.tokenizer import TextTokenizer
from raybert.tokenizer import files as tokenizers
from raybert.tokenizer.fast import FastTokenizer
from raybert.train.recovery.committed import last_step

# Of the run, not of the weights that it begins with.
OF_THE_RUN = ("dropout", "initializer_range")
FAMILY = "bert"  # transformers' model_type; DistilBERT and RoBERTa number their positions otherwise, or have no types
# Each by one of its tensors, as transformers names it.
HEADS = {
    "the pooler": "pooler.dense.weight",
    "the MLM head": "cls.predictions.transform.dense.weight",
    "the next-sentence head": "cls.seq_relationship.weight",
}
FILES = (directory.CONFIG, directory.WEIGHTS, *tokenizers.FILES)


@dataclass(frozen=True)
class Start:
    """A model that a run begins with: its dimensions and its tokenizer, without its weights."""

    config: BertConfig
    tokenizer: TextTokenizer | None  # None of a run that goes on from its own checkpoint
    # Of what pre-training trains beside the encoder: what a transformers directory was saved without.
    lacks: tuple[str, ...] = ()


def complete(config: Config, shards: ShardSet, start: Start | None = None) -> Config:
    """The settings with every dimension that is not the default's stated. Nothing is read but a few small files.

    Args:
        start: `start_of` the settings, if it was read before.

    Raises:
        InputError: the model that the run begins with cannot be read, has other dimensions than the settings state, or
            another tokenizer than the shards.
    """
    rows = shards.vocabulary.size
    found: dict[str, Any] = {"vocab_size": rows}
    start = start or start_of(config)
    if start is not None:
        if start.tokenizer is not None:
            _require_tokenizer(start.tokenizer, config.model.start_from, shards)
        found = {name: value for name, value in asdict(start.config).items() if name not in OF_THE_RUN}
        found["vocab_size"] = max(rows, start.config.vocab_size)
    for name, given in config.model.given().items():
        if found.get(name, given) != given:
            raise _mismatch(config, shards, name, given, found[name])
    usual = asdict(BertConfig()) | config.model.given()
    stated = {name: value for name, value in found.items() if usual[name] != value}
    return config.model_copy(update={"model": config.model.model_copy(update=stated)}) if stated else config


def start_of(config: Config) -> Start | None:
    """The model that the settings begin with; None where they name none.

    Of a run that goes on from its own checkpoint it is not read: the weights that it began with may be gone by now.

    Raises:
        InputError: as `read_start`.
    """
    where = config.model.start_from
    if not where:
        return None
    if last_step(config.run_uri):
        began = load_run(config.run_uri)
        if began.model.start_from == where:
            return Start(began.model.bert(), None)
    return read_start(where)


def _mismatch(config: Config, shards: ShardSet, name: str, given: object, found: object) -> InputError:
    where = config.model.start_from
    if not where:
        return InputError(
            f"model.{name}={given} does not match the tokenizer of the shards in {shards.uri}, which has {found} "
            f"tokens; leave model.{name} out."
        )
    key = name if getattr(config.model, name) is not None else "size"
    return InputError(
        f"model.start_from={where} has {name}={found}, but this run asks for {given}; a run takes the dimensions "
        f"of the model it starts from: leave model.{key} out (model.{key}=null)."
    )


def read_start(where: str) -> Start:
    """The dimensions and the tokenizer of a checkpoint, or of a transformers BERT directory, and what that one lacks.

    Raises:
        InputError: it is neither, or uses what raybert's encoder does not have.
    """
    uri = hub.local(where, FILES)
    described = directory.describe(uri, where)
    kind = described.get("model_type")
    # Both import torch, for which a start without such weights does not wait.
    if kind == FAMILY:
        from raybert.model import interop

        config = interop.read_config(described, where)
    elif kind == "raybert":
        from raybert.model import files

        with storage.local_copy(uri, [directory.CONFIG]) as local:
            config = files.read_config(local, where)
    else:
        raise InputError(
            f"{where} has model_type {kind!r}; training can start from raybert checkpoints and from transformers "
            f"directories of model_type {FAMILY}."
        )
    tokenizer = tokenizers.load(uri)
    if not storage.exists(storage.join(uri, directory.WEIGHTS)):
        raise InputError(f"{where} has no {directory.WEIGHTS}; save the model as one safetensors file.")
    if config.vocab_size < tokenizer.size:
        raise InputError(
            f"{where} has {config.vocab_size:,} rows of token embeddings, but its tokenizer has "
            f"{tokenizer.size:,} tokens; resize the model's embeddings and save it again."
        )
    if config.type_vocab_size < 2:
        raise InputError(f"{where} has {config.type_vocab_size} token type, but pairs of texts need two.")
    return Start(config, tokenizer, _heads_it_lacks(uri, where) if kind == FAMILY else ())


def _heads_it_lacks(uri: str, where: str) -> tuple[str, ...]:
    """
    Raises:
        InputError: its weights are not a safetensors file.
    """
    names = directory.tensor_names(uri, where)
    return tuple(head for head, tensor in HEADS.items() if not any(name.endswith(tensor) for name in names))


def _require_tokenizer(mine: TextTokenizer, where: str, shards: ShardSet) -> None:
    if shards.vocabulary.hash == mine.hash:
        return
    theirs = shards.tokenizer()
    if isinstance(theirs, FastTokenizer) and theirs.extends == mine.hash:
        return
    raise InputError(
        f"The shards in {shards.uri} were prepared with the tokenizer {shards.tokenizer_name} "
        f"({shards.tokenizer_hash[:12]}, {shards.vocabulary.size:,} tokens), but model.start_from={where} has "
        f"{mine.name} ({mine.hash[:12]}, {mine.size:,} tokens), so token ids would mean other words. Prepare the "
        f"text again: raybert prepare --tokenizer {where} --seq-len {shards.seq_len} --input ... --output ..."
    )
