"""Tokenizers other than raybert's own: ids as transformers has them, roles of specials, shards, masks, checkpoints."""

import json
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Theirs
from tokenizers import models

import raybert
from raybert.config import from_mapping
from raybert.data import block, halves, shards
from raybert.data.bag import originals
from raybert.data.masking import mask
from raybert.data.reader import SampleReader, iter_batches
from raybert.data.spec import ORIGINAL, MaskedFraction, SampleSpec, sample_spec
from raybert.data.tensors import to_torch
from raybert.data.text import sentences
from raybert.encode.encoders import RaybertEncoder
from raybert.errors import InputError
from raybert.model import files
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.spectral import count
from raybert.tokenizer import GPT2, Tokenizer, load
from raybert.tokenizer.files import load_for_training
from raybert.tokenizer.gpt2 import begins_word
from raybert.train.check import check_inputs
from raybert.train.complete import complete
from raybert.train.ledger import digest
from tests.vocabulary import SENTENCES, make_set, wordpiece, write_wordpiece
from tests.vocabulary import minilm as minilm

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")


def random_texts(count: int) -> list[str]:
    """Strings of any characters of Unicode but half surrogate pairs, in runs of one block as text has them."""
    rng = random.Random(0)
    texts = []
    for _ in range(count):
        first = rng.choice([0, 0, 0x300, 0x400, 0x600, 0x900, 0x3000, 0x4E00, 0xAC00, 0x1F300, rng.randrange(0x30000)])
        codes = (rng.choice([32, first + rng.randrange(200)]) for _ in range(rng.randrange(1, 30)))
        texts.append("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000))
    return texts


def test_ids_are_those_of_transformers(minilm):
    ours, theirs = load(minilm), transformers.AutoTokenizer.from_pretrained(minilm)
    texts = [
        "",
        "Taxes WILL fall.",
        "unaffable café naïve",
        "今天天气很好。日本語",
        "🎈👩‍👩‍👧 fun",
        "a\x00b\u200dc",
        *random_texts(10_000),
    ]
    assert ours.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
    assert ours.encode_batch(texts[:500], num_threads=2) == ours.encode_batch(texts[:500])
    assert ours.decode(ours.encode("taxes will fall")) == "taxes will fall"
    assert (ours.size, ours.vocabulary.dtype) == (30_522, np.uint16)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return wordpiece(tmp_path_factory.mktemp("small"))


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200)
def test_a_document_has_the_ids_of_its_text_and_its_sentences_rise(small_path, text):
    tokenizer = load(small_path)
    whole, ends = sentences.find_ends(text)
    if not ends:
        return
    ids, counts = tokenizer.encode_sentences(whole, ends)
    assert ids.tolist() == tokenizer.encode(whole)
    assert counts == sorted(set(counts))
    assert not len(ids) or (counts[0] > 0 and counts[-1] == len(ids))


@pytest.fixture(scope="module")
def small_path(tmp_path_factory):
    return str(write_wordpiece(tmp_path_factory.mktemp("small")))


def test_sentences_end_where_their_text_does(small):
    text = "The government said this. Taxes will fall."
    ids, ends = small.encode_sentences(text, [text.index(" Taxes"), len(text)])
    assert ends == [5, 9] == [len(small.encode(text.partition(" Taxes")[0])), len(ids)]


@pytest.mark.parametrize("special", ["[MASK]", "[CLS]", "[SEP]", "[PAD]"])
def test_a_special_written_in_text_is_text(small, minilm, special):
    for tokenizer in (small, load(minilm)):
        ids = tokenizer.encode(f"the {special} will")
        assert not set(ids) & set(tokenizer.vocabulary.specials)
        assert len(ids) > 3


def test_the_same_tokenizer_has_the_same_hash_however_it_is_stored(minilm, tmp_path):
    found = load(minilm)
    (tmp_path / "vocab.txt").write_bytes(Path(minilm, "vocab.txt").read_bytes())
    assert load(str(tmp_path)).hash == found.hash
    transformers.AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path / "saved")
    assert load(str(tmp_path / "saved")).hash == found.hash
    found.save(tmp_path / "again")
    again = load(str(tmp_path / "again"))
    assert (again.hash, again.roles) == (found.hash, found.roles)
    assert pickle.loads(pickle.dumps(found)).hash == found.hash
    older = json.loads(Path(minilm, "tokenizer.json").read_text())
    del older["model"]["type"]  # as files of older versions are
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "tokenizer.json").write_text(json.dumps(older))
    assert load(str(tmp_path / "older")).hash == found.hash
    Tokenizer().save(tmp_path / "own")
    assert isinstance(load(str(tmp_path / "own")), Tokenizer)
    lowered = json.loads((tmp_path / "own" / "tokenizer.json").read_text())
    (tmp_path / "own" / "tokenizer.json").write_text(json.dumps(lowered | {"normalizer": {"type": "Lowercase"}}))
    assert load(str(tmp_path / "own")).encode("TAXES") == Tokenizer().encode("taxes")
    lower = load(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert load(str(tmp_path)).hash != lower.hash


def test_random_replacement_draws_no_special_and_no_unused_slot(small):
    drawn = small.vocabulary.random_ids.tolist()
    names = small.pieces(drawn)
    assert len(drawn) == small.size - 5 - 3
    assert not [name for name in names if name.startswith("[") and len(name) > 1]


def test_words_begin_where_no_piece_goes_on(small):
    ids = small.encode("taxes zebra")
    assert small.pieces(ids) == ["taxes", "z", "##e", "##b", "##r", "##a"]
    assert small.word_starts[ids].tolist() == [True, True, False, False, False, False]
    own = Tokenizer()
    ids = own.encode(" unfathomable, yes")
    assert [own.decode([i]) for i in ids] == [" unf", "athom", "able", ",", " yes"]
    assert own.word_starts[ids].tolist() == [True, False, False, True, True]


def roberta_like(directory, **config):
    from tokenizers import Tokenizer as Theirs
    from tokenizers import decoders, models, pre_tokenizers, trainers

    theirs = Theirs(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([SENTENCES] * 3, trainer)
    directory.mkdir(exist_ok=True)
    theirs.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_roles_are_found_by_name_or_as_the_files_say(tmp_path):
    found = load(str(roberta_like(tmp_path / "a")))
    assert found.roles == {"cls": 0, "sep": 2, "mask": 4, "pad": 1, "unk": 3}
    found = load(str(roberta_like(tmp_path / "b", cls_token="</s>", sep_token={"content": "<s>"})))
    assert (found.roles["cls"], found.roles["sep"]) == (2, 0)
    assert found.decode(found.encode("tax </s> 税")) == "tax </s> 税"
    with pytest.raises(InputError, match="no token in the role mask"):
        load_for_training(str(roberta_like(tmp_path / "c", mask_token=None)))
    with pytest.raises(InputError, match=r"special token \[M\] .* is not in its vocabulary"):
        load(str(roberta_like(tmp_path / "d", mask_token="[M]")))


def holes(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["elephant"] = 400
    (folder / "tokenizer.json").write_text(json.dumps(content))


def doubled(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["elephant"] = 100
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (holes, "missing ids below 401"),
        (doubled, "1 duplicate ids"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("no json"), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), "cannot be read"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "tokenizer_config.json cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "neither tokenizer.json nor vocab.txt"),
    ],
)
def test_what_is_no_tokenizer_is_a_sentence(tmp_path, damage, sentence):
    folder = roberta_like(tmp_path / "it")
    damage(folder)
    with pytest.raises(InputError, match=sentence) as said:
        load_for_training(str(folder))
    assert "/it" in str(said.value)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("[PAD]\n[CLS]\n[PAD]\n", r"Line 3 of .* repeats '\[PAD\]' of line 1"),
        ("[PAD]\n\n[CLS]\n", "Line 2 of .* is empty"),
    ],
)
def test_a_vocab_txt_has_each_id_once(tmp_path, lines, sentence):
    (tmp_path / "vocab.txt").write_text(lines)
    with pytest.raises(InputError, match=sentence):
        load(str(tmp_path))


def test_a_hub_name_without_a_network_is_a_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="There is no directory someone/no-such-bert"):
        load("someone/no-such-bert")


# -- shards and batches ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Shard sets with ids of two bytes and of four."""
    folder = tmp_path_factory.mktemp("sets")
    narrow, wide = wordpiece(folder / "n"), wordpiece(folder / "w", fill=66_000)
    return {kind: make_set(folder / kind, tokenizer) for kind, tokenizer in (("uint16", narrow), ("uint32", wide))}


@pytest.mark.parametrize("kind", ["uint16", "uint32"])
def test_batches_have_the_ids_of_their_set(sets, kind):
    found = sets[kind]
    vocabulary, tokenizer = found.vocabulary, found.tokenizer()
    assert vocabulary.dtype == kind
    assert (vocabulary.cls, vocabulary.unk) == (tokenizer.roles["cls"], tokenizer.roles["unk"])
    batch = next(iter_batches(found.uri, seed=0, global_batch_size=64))
    ids, real = batch["input_ids"], batch["attention_mask"]
    assert (ids[:, 0] == vocabulary.cls).all()
    assert (ids[~real] == vocabulary.pad).all()
    assert ((ids == vocabulary.sep) & real).sum() == 2 * len(ids)
    labels = batch["masked_labels"][batch["masked_labels"] != -100]
    assert vocabulary.is_text[labels].all()
    assert "zeb" in tokenizer.decode(batch["input_ids"][real]).replace(" ", "")
    spec = SampleSpec(halves=True, bag_tokens=4, next_sentence=False)
    reader = SampleReader(found, seed=0, spec=spec)
    columns = reader.build(np.arange(8))
    there = block.from_table(block.to_table(columns))
    for name, values in columns.items():
        np.testing.assert_array_equal(there[name], values)
        assert there[name].dtype == values.dtype
    assert digest(there) == digest(columns)
    sent = to_torch(columns, torch.device("cpu"), reader.spec)
    np.testing.assert_array_equal(
        sent["input_ids"].numpy(), block.widen(halves.split(columns, vocabulary))["input_ids"]
    )
    bag = sent["bag_labels"][sent["bag_labels"] >= 0].numpy()
    assert len(bag)
    assert vocabulary.is_text[bag].all()


def test_the_same_text_gives_the_same_batches_whatever_the_width_of_ids(sets):
    narrow, wide = (next(iter_batches(sets[kind].uri, seed=0, global_batch_size=64)) for kind in ("uint16", "uint32"))
    for name in ("token_type_ids", "attention_mask", "masked_positions", "masked_labels", "next_sentence_label"):
        np.testing.assert_array_equal(narrow[name], wide[name])


def test_masks_are_eight_one_one_in_any_vocabulary(sets, small):
    vocabulary = replace(small.vocabulary)
    rng = np.random.default_rng(0)
    text = np.flatnonzero(vocabulary.is_text)
    ids = rng.choice(text, (4000, 64)).astype(vocabulary.dtype)
    cut, length = np.full(4000, 30), np.full(4000, 64)
    masked, positions, labels = mask(ids, cut, length, np.arange(4000).astype(np.uint64), 0.15, vocabulary)
    rows, columns = np.nonzero(positions >= 0)
    now, before = masked[rows, positions[rows, columns]], labels[rows, columns]
    assert (before == ids[rows, positions[rows, columns]]).all()
    assert abs((now == vocabulary.mask).mean() - 0.8) < 0.01
    changed = now[(now != vocabulary.mask) & (now != before)]
    assert np.isin(changed, vocabulary.random_ids).all()
    assert abs(len(changed) / len(now) - 0.1 * (1 - 1 / len(vocabulary.random_ids))) < 0.01


def test_a_set_says_when_its_tokenizer_is_another(sets, tmp_path, small):
    found = make_set(tmp_path / "set", small)
    wordpiece(tmp_path / "other", unused=1).save(tmp_path / "set" / "tokenizer")
    with pytest.raises(InputError, match="is not the tokenizer that the shards were prepared with"):
        found.tokenizer()


def test_a_special_in_the_shards_is_found(sets, tmp_path, small):
    found = make_set(tmp_path / "set", small)
    unit = found.units()[0]
    rows = shards.read_unit(found.uri, unit, found.vocabulary)
    tokens = rows.tokens.copy()
    tokens[5] = small.roles["mask"]
    shards.write_shard(found.uri, unit.shard, replace(rows, tokens=tokens), 64)
    shards._footer.cache_clear()
    with pytest.raises(InputError, match=f"contains the token id {small.roles['mask']}, a special token"):
        shards.read_unit(found.uri, unit, found.vocabulary)
    shards._footer.cache_clear()


@pytest.mark.parametrize(
    "change_it",
    [
        lambda entry: entry["ids"].__setitem__("mask", 10**6),
        lambda entry: entry["ids"].__setitem__("mask", entry["ids"]["cls"]),
        lambda entry: entry["ids"].__setitem__("drawn", []),
        lambda entry: entry["ids"].__setitem__("drawn", [[5, 3]]),
        lambda entry: entry.pop("size"),
    ],
)
def test_a_manifest_with_impossible_ids_is_refused(sets, tmp_path, change_it):
    content = json.loads(Path(sets["uint16"].uri, "manifest.json").read_text())
    change_it(content["tokenizer"])
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="is not a manifest of `raybert prepare`: tokenizer"):
        shards.open_shards(str(tmp_path))


# -- models ---------------------------------------------------------------------------------------------------------


def tree(folder, found, **model):
    return {
        "run": {"storage": str(folder / "runs")},
        "data": {"shards": found.uri},
        "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | model,
        "every": {"probe": 0, "validation": 0},
    }


def test_the_vocabulary_of_a_run_is_that_of_its_shards(sets, tmp_path):
    for found in sets.values():
        config = check_inputs(from_mapping(tree(tmp_path, found))).config
        assert config.model.bert().vocab_size == found.vocabulary.size
        assert from_mapping(config.model_dump(mode="json")) == config
    with pytest.raises(InputError, match=r"leave model\.vocab_size out"):
        check_inputs(from_mapping(tree(tmp_path, found, vocab_size=77)))


def test_settings_that_say_nothing_of_the_vocabulary_stay_as_they_are(tmp_path):
    from tests.data import make_shards

    config = from_mapping(tree(tmp_path, make_shards(str(tmp_path / "shards"))))
    assert complete(config, shards.open_shards(config.data.shards)) is config
    assert (config.model.bert().vocab_size, ORIGINAL.vocabulary) == (50_261, GPT2)


def test_a_model_brings_its_tokenizer_wherever_it_goes(sets, tmp_path):
    tokenizer = sets["uint16"].tokenizer()
    model = Bert(BertConfig(vocab_size=tokenizer.size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(InputError, match="vocabulary"):
        RaybertEncoder(model)
    model.tokenizer = tokenizer
    raybert.save(model, str(tmp_path / "checkpoint"))
    back = raybert.load(str(tmp_path / "checkpoint"))
    assert back.tokenizer.hash == tokenizer.hash
    encoder = RaybertEncoder(back)
    ids = encoder.tokenize([("the government", "said [MASK]")], 64).ids.tolist()
    cls, sep = tokenizer.roles["cls"], tokenizer.roles["sep"]
    assert ids == [cls, *tokenizer.encode("the government"), sep, *tokenizer.encode("said [MASK]"), sep]
    assert encoder.untrained()._tokenizer is encoder._tokenizer
    assert sorted(path.name for path in (tmp_path / "checkpoint" / files.TOKENIZER).iterdir()) == sorted(
        ["tokenizer.json", "tokenizer_config.json"]
    )
    raybert.save(Bert(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)), str(tmp_path / "own"))
    assert isinstance(raybert.load(str(tmp_path / "own")).tokenizer, Tokenizer)
    assert not (tmp_path / "own" / files.TOKENIZER).exists()


def test_pairs_of_tokens_are_counted_alike_whatever_the_width_of_ids(sets):
    """The same text has the same ids in both sets."""
    found = {}
    for kind, shard_set in sets.items():
        vocabulary = shard_set.vocabulary
        units = [shards.read_unit(shard_set.uri, unit, vocabulary) for unit in shard_set.units()]
        stream = count.lay_out(units, 4, vocabulary)
        assert stream.dtype == kind
        frequency = count.frequencies(stream, vocabulary.text_stop)
        assert frequency.sum() == shard_set.tokens("train")
        chosen = count.pick_columns(frequency, 10)
        found[kind] = (chosen, count.count(stream, chosen, 0, 60, 4))
    np.testing.assert_array_equal(found["uint16"][0], found["uint32"][0])
    for part in ("starts", "columns", "values"):
        np.testing.assert_array_equal(*(getattr(pairs, part) for _, pairs in found.values()))


# -- whole words ----------------------------------------------------------------------------------------------------


def masked_words(found, fraction=0.15, count=256):
    """Of samples with whole words: ids before, which places are masked, which are text, which begin a word."""
    spec = SampleSpec(whole_word=True, masked=MaskedFraction(fraction, fraction))
    reader = SampleReader(found, seed=3, spec=spec)
    columns = reader.build(np.arange(count))
    ids = originals(columns)
    place = np.arange(ids.shape[1])
    cut, length = columns["cut"][:, None], columns["length"][:, None]
    text = (place > 0) & (place != cut - 1) & (place < length - 1)
    starts = text & (found.tokenizer().word_starts[ids] | (place == 1) | (place == cut))
    chosen = np.zeros(ids.shape, bool)
    rows, columns_ = np.nonzero(columns["masked_positions"] >= 0)
    chosen[rows, columns["masked_positions"][rows, columns_]] = True
    return ids, chosen, text, starts


@pytest.mark.parametrize("kind", ["uint16", "uint32"])
def test_all_tokens_of_a_word_are_masked_or_none(sets, kind):
    _, chosen, text, starts = masked_words(sets[kind])
    assert not (chosen & ~text).any()
    wanted = np.maximum(1, np.rint(0.15 * text.sum(1)))
    assert (chosen.sum(1) <= wanted).all()
    assert (chosen.sum(1) >= 1).all()
    assert chosen.sum() > 0.75 * wanted.sum()
    inside = text & ~starts
    whole = chosen[inside] == np.roll(chosen, 1, axis=1)[inside]
    # But for the samples none of whose words is as short as what is to be masked.
    assert whole.mean() > 0.98
    partly = np.flatnonzero((inside & (chosen != np.roll(chosen, 1, axis=1))).any(1))
    for row in partly:
        sizes = np.bincount(np.cumsum(starts[row])[text[row]])[1:]
        assert sizes.min() > wanted[row]
        assert chosen[row].sum() == wanted[row]


def test_where_no_word_is_short_enough_any_tokens_are_masked():
    """Thai, for one, has no spaces: to a vocabulary of bytes a sentence is a word."""
    rng = np.random.default_rng(0)
    ids = np.full((200, 64), GPT2.pad, np.uint16)
    ids[:, :64] = rng.integers(300, 40_000, (1, 64))
    ids[:, 0], ids[:, 31], ids[:, 63] = GPT2.cls, GPT2.sep, GPT2.sep
    one_word = replace(GPT2, word_starts=np.zeros(GPT2.size, bool))
    keys = rng.integers(0, 2**63, 200).astype(np.uint64)
    _, positions, _ = mask(ids, np.full(200, 32), np.full(200, 64), keys, 0.15, one_word)
    assert (positions >= 0).sum(1).tolist() == [9] * 200
    counts = np.bincount(positions[positions >= 0], minlength=64)
    assert counts[[0, 31, 63]].sum() == 0
    assert counts[np.setdiff1d(np.arange(64), [0, 31, 63])].min() > 10, "every place of the text has its turn"


@pytest.mark.parametrize(("token", "begins"), [("今天", True), ("。", True), (" é", True), ("é", False)])
def test_ideographs_and_punctuation_of_any_script_begin_a_word(token, begins):
    assert begins_word(token.encode()) == begins


def test_a_bpe_that_marks_the_ends_of_words_has_no_whole_words(tmp_path):
    model = models.BPE({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3, "a</w>": 4}, [], end_of_word_suffix="</w>")
    Theirs(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"marks where words end.*leave objective.whole_word out"):
        _ = load(str(tmp_path)).word_starts


def test_each_word_is_as_likely_as_any_other(sets):
    """Words of one token, which always fit, are chosen as often at each place."""
    _, chosen, text, starts = masked_words(sets["uint16"], count=2000)
    alone = starts & np.append((starts | ~text)[:, 1:], np.ones((len(text), 1), bool), axis=1)
    rates = [chosen[:, part][alone[:, part]].mean() for part in (slice(1, 9), slice(9, 17), slice(17, 25))]
    assert max(rates) - min(rates) < 0.04


def test_a_sample_with_whole_words_depends_on_itself_alone(sets):
    spec = SampleSpec(whole_word=True)
    reader = SampleReader(sets["uint16"], seed=3, spec=spec)
    together = reader.build(np.arange(40))
    for index in (0, 7, 39):
        for name, value in reader.build(np.array([index])).items():
            np.testing.assert_array_equal(value[0], together[name][index])


def test_whole_words_are_a_setting_that_changes_nothing_by_default(sets):
    config = from_mapping({"objective": {"whole_word": True, "pair": "none"}})
    spec = sample_spec(config, sets["uint16"].vocabulary)
    assert (spec.whole_word, spec.next_sentence) == (True, False)
    assert not sample_spec(from_mapping({}), spec.vocabulary).whole_word
