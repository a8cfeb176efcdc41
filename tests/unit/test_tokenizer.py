"""GPT-2's ids, round trips, and specials that text can never produce."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybert.errors import InputError
from raybert.tokenizer import CLS_ID, MASK_ID, NUM_TEXT_TOKENS, PAD_ID, SEP_ID, VOCAB_SIZE, Tokenizer, vocabulary_files
from raybert.tokenizer import gpt2 as module

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # all of Unicode but half surrogate pairs
SPECIALS = ["<|endoftext|>", "[CLS]", "[SEP]", "[MASK]", "[PAD]"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@given(TEXT)
def test_decode_undoes_encode(text: str) -> None:
    assert Tokenizer().decode(Tokenizer().encode(text)) == text


@given(st.lists(st.one_of(TEXT, st.sampled_from(SPECIALS))).map("".join))
def test_every_way_to_encode_gives_the_same_text_tokens(text: str) -> None:
    tokenizer = Tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.encode_batch([text, text]) == [ids, ids]
    assert all(0 <= i < NUM_TEXT_TOKENS - 1 for i in ids)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.byte_lengths[np.array(ids, np.int64)].sum()) == len(text.encode())


@pytest.mark.parametrize("special", SPECIALS)
def test_a_special_written_in_text_is_text(tokenizer: Tokenizer, special: str) -> None:
    assert len(tokenizer.encode(f"a {special} b")) > 4
    assert max(tokenizer.encode(special)) < NUM_TEXT_TOKENS - 1


def test_known_ids_of_gpt2(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("hello world!") == [31373, 995, 0]
    assert tokenizer.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert tokenizer.encode("   The year 2024's ") == [220, 220, 383, 614, 48609, 338, 220]


def test_ids_are_those_of_the_published_vocabulary(tokenizer: Tokenizer) -> None:
    vocabulary = json.loads(vocabulary_files()[0].read_text("utf-8"))
    for token in ("hello", "Ġworld", "ĠTransformers", "ĠBERT"):
        if token in vocabulary:
            assert tokenizer.encode(token.replace("Ġ", " ")) == [vocabulary[token]]
    assert len(vocabulary) == NUM_TEXT_TOKENS


def test_specials_follow_the_text_tokens(tokenizer: Tokenizer) -> None:
    assert (CLS_ID, SEP_ID, MASK_ID, PAD_ID, VOCAB_SIZE) == (50257, 50258, 50259, 50260, 50261)
    assert tokenizer.decode([CLS_ID, 15496, SEP_ID, MASK_ID, PAD_ID]) == "[CLS]Hello[SEP][MASK][PAD]"


def test_an_id_past_the_vocabulary_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="50261"):
        tokenizer.decode([VOCAB_SIZE])


def test_threads_change_nothing(tokenizer: Tokenizer) -> None:
    texts = ["one", "", "two three " * 50, "あいう"]
    assert tokenizer.encode_batch(texts, num_threads=2) == [tokenizer.encode(text) for text in texts]


def test_pickling_keeps_it(tokenizer: Tokenizer) -> None:
    data = pickle.dumps(tokenizer)
    assert len(data) < 200
    assert pickle.loads(data).encode("Hello world") == [15496, 995]


def test_another_vocabulary_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in vocabulary_files():
        (tmp_path / path.name).write_bytes(path.read_bytes() + b" ")
    monkeypatch.setattr(module, "vocabulary_files", lambda: (tmp_path / "encoder.json", tmp_path / "vocab.bpe"))
    with pytest.raises(InputError, match="is not GPT-2's vocabulary"):
        module._load_encoding.__wrapped__()
