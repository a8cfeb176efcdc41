"""Where a tokenizer lies, and which of its tokens are special."""

import json
from collections.abc import Mapping
from typing import Any

from raybert import storage
from raybert.errors import InputError
from raybert.storage import hub
from raybert.tokenizer.fast import CONFIG, JSON, NEEDED, FastTokenizer, shared
from raybert.tokenizer.gpt2 import (
    END_OF_TEXT,
    GPT2,
    MODEL_INPUTS,
    NUM_TEXT_TOKENS,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    Tokenizer,
    template,
    vocabulary_files,
)
from raybert.tokenizer.vocabulary import TextTokenizer

DIRECTORY = "tokenizer"  # of a shard set or a checkpoint, where its tokenizer is another than raybert's own
VOCAB, SPECIALS = "vocab.txt", "special_tokens_map.json"
FILES = (JSON, VOCAB, CONFIG, SPECIALS)
WRITTEN = (JSON, CONFIG)  # of those, what raybert itself writes
ROLES = (*NEEDED, "unk")
# What BERT and RoBERTa call them, for directories that do not say it.
USUAL = {
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
}


def load(where: str) -> TextTokenizer:
    """Load a tokenizer.

    Args:
        where: a directory at any URI with tokenizer.json or vocab.txt; a checkpoint or an export of raybert; the name
            of a model on the Hugging Face Hub; or `gpt2`, raybert's own (a directory of that name is `./gpt2`).

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if where == Tokenizer.name:
        return Tokenizer()
    uri = storage.absolute(hub.local(where, FILES))
    for place in (uri, storage.join(uri, DIRECTORY)):
        found = {name: storage.read_bytes(storage.join(place, name)) for name in FILES if _is_there(place, name)}
        if JSON in found or VOCAB in found:
            return of_files(found, place)
    config = storage.join(uri, "config.json")
    described = _json(storage.read_bytes(config), config) if storage.exists(config) else {}
    # A checkpoint without one of its own; one of another vocabulary was imported without its tokenizer.
    if described.get("model_type") == "raybert" and described.get("vocab_size", VOCAB_SIZE) == VOCAB_SIZE:
        return Tokenizer()
    raise InputError(f"{where} contains no tokenizer: it has neither {JSON} nor {VOCAB}.")


def load_for_training(where: str) -> TextTokenizer:
    """`load`, of a tokenizer that a model can be trained with.

    Raises:
        InputError: as `load`; or it lacks a special token, or its ids have holes.
    """
    found = load(where)
    _ = found.vocabulary
    return found


def of_files(found: Mapping[str, bytes], where: str) -> TextTokenizer:
    """The tokenizer of the files of a directory, by their names; `where` is what errors call it.

    Raises:
        InputError: they are damaged.
    """
    config = _json(found[CONFIG], f"{where}/{CONFIG}") if CONFIG in found else {}
    special = _json(found[SPECIALS], f"{where}/{SPECIALS}") if SPECIALS in found else {}
    if JSON not in found and VOCAB not in found:
        raise InputError(f"{where} contains no tokenizer: it has neither {JSON} nor {VOCAB}.")
    content = found.get(JSON) or _of_vocab(found[VOCAB], {**special, **config}, where)
    described = _json(content, f"{where}/{JSON}", f"The tokenizer in {where} cannot be read")
    if _is_gpt2(described):
        return Tokenizer()
    roles = _roles(described, {**special, **config})
    named = {f"{role}_token": token for role, token in roles.items()}
    if CONFIG not in found:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": MODEL_INPUTS}
    missing = {key: token for key, token in named.items() if key not in config}
    written = json.dumps(config | missing, indent=2).encode() + b"\n" if missing else found[CONFIG]
    return shared(content, written, tuple(roles.items()), where)


def _is_there(place: str, name: str) -> bool:
    return storage.exists(storage.join(place, name))


def _json(content: bytes, path: str, reason: str = "") -> dict[str, Any]:
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{reason or f'{path} cannot be read'}: {error}.") from error
    return found


def _is_gpt2(described: Mapping[str, Any]) -> bool:
    """Whether it is what raybert's own tokenizer is exported as."""
    added = {token["id"]: token["content"] for token in described.get("added_tokens") or ()}
    if added != SPECIAL_TOKENS and added != {**SPECIAL_TOKENS, NUM_TEXT_TOKENS - 1: END_OF_TEXT}:
        return False
    before = described.get("pre_tokenizer") or {}
    if described.get("normalizer") or before.get("type") != "ByteLevel" or before.get("add_prefix_space"):
        return False
    own = json.loads(vocabulary_files()[0].read_text("utf-8"))
    vocabulary: Any = described["model"].get("vocab")
    return {token: number for token, number in vocabulary.items() if number not in SPECIAL_TOKENS} == own


def _roles(described: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, str]:
    """The special token of each role that is named, or has a usual name. One that is named null is none."""
    vocabulary = described.get("model", {}).get("vocab") or {}
    words = set(vocabulary) if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}
    words |= {token["content"] for token in described.get("added_tokens") or ()}
    roles = {}
    for role in ROLES:
        given = named.get(f"{role}_token", "")
        token = given.get("content") if isinstance(given, dict) else given
        usual = next((name for name in USUAL[role] if name in words), None)
        token = usual if token == "" else token
        if token is not None:
            roles[role] = str(token)
    return roles


def _of_vocab(content: bytes, config: Mapping[str, Any], where: str) -> bytes:
    """The tokenizer.json of a BERT's vocab.txt: a token a line, its id the number of the line.

    Raises:
        InputError: it is not text, or has a token twice or an empty line.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        tokens = content.decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}/{VOCAB} is not text: {error}.") from error
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(tokens):
        token = token.rstrip("\r\n")
        if not token.strip() or token in vocabulary:
            fault = f"repeats {token!r} of line {vocabulary[token] + 1}" if token in vocabulary else "is empty"
            raise InputError(f"Line {number + 1} of {where}/{VOCAB} {fault}; a vocabulary must have every token once.")
        vocabulary[token] = number
    roles = _roles({"model": {"vocab": vocabulary}}, config)
    unknown = roles.get("unk", "[UNK]")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown, continuing_subword_prefix="##"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
        lowercase=bool(config.get("do_lower_case", True)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    specials = [token for token in roles.values() if token in vocabulary]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if "cls" in roles and "sep" in roles:
        template(tokenizer, roles)
    return tokenizer.to_str(pretty=True).encode()


def own_or(tokenizer: TextTokenizer | None) -> TextTokenizer:
    """A model's tokenizer, raybert's own where it has none."""
    return Tokenizer() if tokenizer is None else tokenizer


def is_own(tokenizer: TextTokenizer) -> bool:
    return tokenizer.hash == GPT2.hash


def written(tokenizer: TextTokenizer) -> dict[str, bytes]:
    """The files that a shard set or checkpoint keeps of it; none of raybert's own, which every process has."""
    return tokenizer.files() if isinstance(tokenizer, FastTokenizer) else {}
