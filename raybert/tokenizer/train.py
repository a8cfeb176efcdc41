"""A tokenizer of one's own: learned from text, or an older one with more words."""

import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer as Theirs
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from raybert.errors import InputError
from raybert.tokenizer.fast import CONFIG, EXTENDS, JSON, FastTokenizer, shared
from raybert.tokenizer.gpt2 import CONFIG as OWN_CONFIG
from raybert.tokenizer.gpt2 import MODEL_INPUTS, Tokenizer, hugging_face, template
from raybert.tokenizer.vocabulary import TextTokenizer

PASSES = {"bpe": 1, "wordpiece": 2, "word": 3}  # over the text, of each kind
WORD_SHARE = 6  # of a vocabulary of words, one token in six is a piece; all other words are split into pieces
ROLES = {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "pad": "[PAD]"}
PIECES = 3  # a word of so many pieces is worth a token of its own, if it stands there more than once


def train(
    texts: Callable[[], Iterable[str]], *, vocab_size: int, kind: str = "bpe", lowercase: bool = False
) -> FastTokenizer:
    """Learn a vocabulary. The same texts, in any order, give the same bytes.

    Args:
        texts: begins to go through them; `PASSES` times.
        kind: "bpe", byte-pair encoding on bytes, which knows every text; "wordpiece", BERT's; or "word", a WordPiece
            whose tokens are some pieces, and then the most frequent words that occur at least twice.

    Raises:
        InputError: the vocabulary is smaller than the alphabet, or larger than what the texts have.
    """
    if kind not in PASSES:
        raise InputError(f"--kind must be one of {', '.join(PASSES)}, not {kind}.")
    least = len(ROLES) + 256
    if kind == "bpe" and vocab_size < least:
        raise InputError(
            f"--vocab-size {vocab_size} is below {least}: 256 bytes and {len(ROLES)} special tokens; raise it."
        )
    learn = {"bpe": _bpe, "wordpiece": _wordpiece, "word": _words}[kind]
    tokenizer, roles = learn(texts, vocab_size, lowercase)
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        raise _too_many(size, vocab_size)
    template(tokenizer, roles)
    names = {f"{role}_token": token for role, token in roles.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "model_input_names": MODEL_INPUTS}
    return _made(json.loads(tokenizer.to_str()), config, roles)


def _bpe(texts: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool) -> tuple[Theirs, dict[str, str]]:
    tokenizer = Theirs(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=sorted(ROLES.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer, ROLES


def _wordpiece(
    texts: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool, *, share: int = 1
) -> tuple[Theirs, dict[str, str]]:
    """Of `vocab_size` // `share` tokens, but at least one for each character."""
    roles = {**ROLES, "unk": "[UNK]"}
    names = sorted(roles.values())

    def trained(size: int, first: list[str]) -> Theirs:
        tokenizer = _prepared(models.WordPiece({}, unk_token=roles["unk"]), lowercase)
        tokenizer.decoder = decoders.WordPiece(prefix="##")
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
        tokenizer.train_from_iterator(texts(), trainer)
        return tokenizer

    # The library numbers characters as it meets them in a hash map, which is another order each time, and of merges
    # that are as frequent it takes the one of lower numbers. So the characters are found first, and given in order.
    characters = sorted(set(trained(0, names).get_vocab()) - set(names))
    least = len(names) + len(characters)
    if least > vocab_size:
        raise InputError(
            f"--vocab-size {vocab_size} is below {least}: the characters of the text, within words and at their start, "
            f"and {len(names)} special tokens; raise it, or use --kind bpe, whose alphabet is 256 bytes."
        )
    described = json.loads(trained(max(least, vocab_size // share), [*names, *characters]).to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] in names]
    return Theirs.from_str(json.dumps(described)), roles


def _words(texts: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool) -> tuple[Theirs, dict[str, str]]:
    pieces, roles = _wordpiece(texts, vocab_size, lowercase, share=WORD_SHARE)
    counted = _prepared(models.WordLevel({}, unk_token=roles["unk"]), lowercase)
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False)
    counted.train_from_iterator(texts(), trainer)
    frequent = counted.get_vocab()  # word -> place, the most frequent first
    described = json.loads(pieces.to_str())
    vocabulary: dict[str, int] = described["model"]["vocab"]
    longest = described["model"]["max_input_chars_per_word"]  # longer words are [UNK], in the vocabulary or not
    words = [word for word in sorted(frequent, key=frequent.__getitem__) if 1 < len(word) <= longest]
    new = [word for word in words if word not in vocabulary][: vocab_size - len(vocabulary)]
    if len(vocabulary) + len(new) < vocab_size:
        letters = sum(len(token.removeprefix("##")) == 1 for token in vocabulary)
        # A smaller vocabulary has fewer pieces, but these and the letters in any case.
        raise _too_many(len(roles) + letters + len(words), vocab_size)
    vocabulary.update({word: number for number, word in enumerate(new, len(vocabulary))})
    return Theirs.from_str(json.dumps(described)), roles


def _too_many(supported: int, vocab_size: int) -> InputError:
    return InputError(
        f"The text supports {supported:,} tokens, fewer than --vocab-size {vocab_size:,}; lower it, or give more text."
    )


def _prepared(model: models.Model, lowercase: bool) -> Theirs:
    """BERT's normal form and its words, before `model`."""
    tokenizer = Theirs(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _made(described: dict[str, Any], config: dict[str, Any], roles: dict[str, str]) -> FastTokenizer:
    content = json.dumps(described, ensure_ascii=False, indent=1).encode() + b"\n"
    return shared(content, json.dumps(config, indent=2).encode() + b"\n", tuple(roles.items()), "the new tokenizer")


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word (of two letters or more) stands in the texts, as it is written."""
    counts, word = Counter[str](), _word()
    for text in texts:
        counts.update(word.findall(text))
    return counts


@functools.cache
def _word() -> re.Pattern[str]:
    """A letter, and letters and combining marks behind it: \\w leaves out the vowel signs of many scripts."""
    marks = "".join(re.escape(chr(code)) for code in range(0x300, 0x10000) if unicodedata.category(chr(code))[0] == "M")
    return re.compile(rf"[^\W\d_](?:[^\W\d_]|[{marks}])+")


def extend(base: TextTokenizer, counts: Counter[str], words: int) -> FastTokenizer:
    """The tokenizer with new tokens behind its last: the most frequent words that it cuts into three or more pieces.

    Raises:
        InputError: its kind of model cannot be extended, or the text has no such words.
    """
    described, config, roles = _description(base)
    kind = described["model"]["type"]
    if kind not in ("WordPiece", "BPE", "Unigram"):
        raise InputError(f"A tokenizer of the kind {kind} cannot be extended; WordPiece, BPE and Unigram can.")
    written = _writer(described)
    gathered: Counter[str] = Counter()
    for word, count in counts.items():
        if piece := written(word):
            gathered[piece] += count
    text_of = {written(word): word for word in sorted(counts, reverse=True)}
    known = _vocabulary(described)
    chosen: list[str] = []
    for piece in sorted(gathered, key=lambda piece: (-gathered[piece], piece)):
        if len(chosen) == words or gathered[piece] < 2:
            break
        if piece not in known and len(base.encode(f" {text_of[piece]}")) >= PIECES:
            chosen.append(piece)
    if not chosen:
        raise InputError(
            f"No word that occurs at least twice in the text is split into {PIECES} or more pieces; there is "
            "nothing to add."
        )
    before = _made(described, config, roles).pieces(range(base.size))
    _add(described, chosen, base.size)
    made = _made(described, config | {EXTENDS: base.hash}, roles)
    # A model goes on with the old ids, so each has to mean what it meant. Of a Unigram an id is a place in the list of
    # pieces, and specials that only the list of added tokens has come behind it.
    if made.size != base.size + len(chosen) or made.pieces(range(base.size)) != before:
        raise InputError(
            f"The tokenizer {base.name} cannot be extended: new words would take the ids of its special "
            "tokens, which are not among its model's pieces."
        )
    return made


def _description(base: TextTokenizer) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """tokenizer.json, tokenizer_config.json and the special tokens by role."""
    if isinstance(base, FastTokenizer):
        files = base.files()
        return json.loads(files[JSON]), json.loads(files[CONFIG]), dict(base.tokens)
    assert isinstance(base, Tokenizer)
    return json.loads(hugging_face().to_str()), dict(OWN_CONFIG), dict(ROLES)


def _vocabulary(described: dict[str, Any]) -> set[str]:
    vocabulary = described["model"]["vocab"]
    return set(vocabulary) if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}


def _writer(described: dict[str, Any]) -> Callable[[str], str]:
    """How the vocabulary writes a word that stands after a space; empty for what is no single word to it."""
    theirs = Theirs.from_str(json.dumps(described))

    def written(word: str) -> str:
        text = f" {word}"
        if theirs.normalizer is not None:
            text = theirs.normalizer.normalize_str(text)
        parts = theirs.pre_tokenizer.pre_tokenize_str(text) if theirs.pre_tokenizer else [(text, None)]
        return parts[0][0] if len(parts) == 1 else ""

    return written


def _add(described: dict[str, Any], chosen: list[str], first: int) -> None:
    model = described["model"]
    if model["type"] == "Unigram":
        best = max(score for _, score in model["vocab"][4:])
        model["vocab"] += [[piece, best] for piece in chosen]
        return
    # The library would number specials anew that only the list of added tokens has.
    model["vocab"].update({token["content"]: token["id"] for token in described.get("added_tokens") or ()})
    model["vocab"].update({piece: number for number, piece in enumerate(chosen, first)})
    if model["type"] == "BPE":
        model["ignore_merges"] = True  # a whole word that is in the vocabulary is one token


def cost(tokenizer: TextTokenizer, texts: list[str]) -> tuple[float, float]:
    """What texts cost: tokens for each word between white space; characters for each token, in any script."""
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    words, characters = (sum(len(part) for part in parts) for parts in (map(str.split, texts), texts))
    return tokens / max(1, words), characters / max(1, tokens)
