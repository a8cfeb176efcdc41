"""`raybert tokenizer train` and `extend`, and models that go on with an extended vocabulary or another's weights."""

import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import hypothesis
import numpy as np
import pytest
import tokenizers
import yaml
from hypothesis import strategies as st

import raybert
from raybert.cli import run_app
from raybert.config import from_mapping
from raybert.config_sections import VALIDATION_LOSS
from raybert.data import shards
from raybert.data.reader import SampleReader
from raybert.data.spec import SampleSpec
from raybert.data.tensors import to_torch
from raybert.data.text.sample import draw
from raybert.errors import InputError
from raybert.model import directory, optimizer
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.losses import Pretraining
from raybert.model.objective import Objective
from raybert.ray_internals.names import SNAPSHOT
from raybert.sweep.run import check_data
from raybert.tokenizer import GPT2, Tokenizer, load
from raybert.tokenizer.files import load_for_training
from raybert.tokenizer.train import cost, count_words, extend, train
from raybert.train.check import check_inputs
from raybert.train.complete import complete
from raybert.train.start import begin, read_model
from raybert.train.step import means, train_step
from tests.vocabulary import make_set, wordpiece
from tests.vocabulary import minilm as minilm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def texts() -> list[str]:
    rng = random.Random(0)
    letters, words = "абвгдежзиклмнопрстуфхц", []
    words = ["".join(rng.choices(letters, k=rng.randrange(2, 9))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=40)) for _ in range(200)]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "word"])
def test_the_same_texts_give_the_same_bytes_in_any_order(kind, tmp_path):
    size = 300 if kind == "word" else 600  # the texts have 300 words
    made = train(texts, vocab_size=size, kind=kind, lowercase=True)
    again = train(lambda: reversed(texts()), vocab_size=size, kind=kind, lowercase=True)
    assert made.files() == again.files()
    assert made.size == size
    assert cost(made, texts()[:20])[0] < 0.5 * cost(Tokenizer(), texts()[:20])[0]
    made.save(tmp_path / "it")
    assert load_for_training(str(tmp_path / "it")).hash == made.hash
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "it")
    text = texts()[0]
    assert theirs(text)["input_ids"] == [made.roles["cls"], *made.encode(text), made.roles["sep"]]
    assert made.decode(made.encode(text)) == text
    assert theirs.mask_token_id == made.vocabulary.mask
    assert {made.pieces([number])[0] for number in range(made.size) if not made.vocabulary.is_text[number]} == {
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[PAD]",
    }


@pytest.mark.parametrize(
    ("size", "kind", "sentence"),
    [
        (200, "bpe", "is below 260: 256 bytes"),
        (30, "wordpiece", "is below 49: the characters"),
        (60_000, "bpe", "The text supports .* fewer than --vocab-size 60,000"),
        (60_000, "wordpiece", "The text supports"),
        (30, "word", "is below 49: the characters"),
        (60_000, "word", "The text supports"),
        (600, "words", "--kind must be one of bpe, wordpiece, word, not"),
    ],
)
def test_a_size_that_the_text_does_not_give_is_refused(size, kind, sentence):
    with pytest.raises(InputError, match=sentence):
        train(texts, vocab_size=size, kind=kind)


@hypothesis.given(st.lists(st.text("abcde", min_size=1, max_size=6), min_size=10, max_size=200), st.data())
def test_of_a_vocabulary_of_words_the_most_frequent_are_whole(words, data):
    counts = Counter(words)
    letters = {letter for word in words for letter in word} | {f"##{letter}" for word in words for letter in word[1:]}
    least, repeated = 5 + len(letters), sum(count > 1 and len(word) > 1 for word, count in counts.items())
    room = data.draw(st.integers(0, repeated))
    made = train(lambda: [" ".join(words)], vocab_size=least + room, kind="word")
    known = set(made.pieces(range(made.size)))
    whole = {word for word, count in counts.items() if word in known}
    assert all(made.pieces(made.encode(word)) == [word] for word in whole)
    # Beside the letters and a sixth of pieces no word is left out that is more frequent than one that is in.
    taken = made.pieces(range(max(least, (least + room) // 6), made.size))
    left_out = [count for word, count in counts.items() if word not in known]
    assert not left_out or not taken or max(left_out) <= min(counts[word] for word in taken)
    assert all(counts[word] >= 2 for word in taken)


def test_a_vocabulary_of_words_says_what_size_the_text_supports():
    with pytest.raises(InputError, match="The text supports") as said:
        train(texts, vocab_size=900, kind="word")
    supported = int(re.search(r"supports (\d+) tokens", str(said.value))[1])
    assert train(texts, vocab_size=supported, kind="word").size == supported
    long = "a" * 101  # of which WordPiece makes [UNK]
    made = train(lambda: [f"{long} {long} ab ab"], vocab_size=10, kind="word")
    assert made.pieces(made.encode("ab")) == ["ab"]
    with pytest.raises(InputError, match="The text supports 10 tokens"):
        train(lambda: [f"{long} {long} ab ab"], vocab_size=11, kind="word")


def test_the_commands_read_what_prepare_reads(tmp_path, capsys):
    rows = [{"body": text} for text in texts()]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:100]))
    (tmp_path / "b.txt").write_text("\n".join(row["body"] for row in rows[100:]))
    jsonl, words = str(tmp_path / "a.jsonl"), ["--vocab-size", "500", "--text-column", "body"]
    out = str(tmp_path / "made")
    assert run_app(["tokenizer", "train", "--input", jsonl, "--output", out, *words]) == 0
    said = capsys.readouterr().out
    assert re.search(r"now  .* tokens per word, .* characters per token\n +GPT-2", said)
    assert "500 tokens" in said
    assert run_app(["tokenizer", "train", "--input", jsonl, "--output", out, *words]) == 2
    assert "contains other files" in capsys.readouterr().err
    lines = ["--input", str(tmp_path / "b.txt"), "--split-txt", "lines"]
    assert run_app(["tokenizer", "extend", out, *lines, "--words", "7", "--output", str(tmp_path / "more")]) == 0
    assert "7 words added" in capsys.readouterr().out
    assert load(str(tmp_path / "more")).size == 507
    assert run_app(["tokenizer", "extend", out, *lines, "--words", "0", "--output", str(tmp_path / "x")]) == 2
    assert run_app(["tokenizer", "train", "--input", str(tmp_path / "none"), "--output", str(tmp_path / "x")]) == 2
    drawn = draw([jsonl], "body", "", tokens=10**6, seed=0)
    seen = list(drawn.texts())
    assert sorted([*seen, *drawn.unseen]) == sorted(row["body"] for row in rows[:100])
    assert drawn.unseen


LETTERS = "abcdefghijklmnopqrstuvwxyz"
DOMAIN = f"said the government . {'hypercalcaemia, ' * 9} {'parathyroidectomy ' * 8}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {
        "wordpiece": wordpiece(folder / "w"),
        "gpt2": Tokenizer(),
        "bpe": train(texts, vocab_size=400, kind="bpe"),
    }


@pytest.mark.parametrize("kind", ["wordpiece", "gpt2", "bpe"])
def test_the_most_frequent_words_become_tokens_and_no_other_text_changes(bases, kind):
    base = bases[kind]
    made = extend(base, count_words([DOMAIN]), 2)
    assert made.size == base.size + 2
    assert [made.decode([number]).strip() for number in (base.size, base.size + 1)] == [
        "hypercalcaemia",
        "parathyroidectomy",
    ]
    assert [len(made.encode(f" {word}")) for word in ("hypercalcaemia", "parathyroidectomy")] == [1, 1]
    assert made.roles == base.roles
    assert made.extends == base.hash != made.hash
    rest = " said the government, taxes will fall [MASK] this year."
    assert made.encode(rest) == base.encode(rest)
    assert made.vocabulary.is_text[[base.size, base.size + 1]].all()
    assert set(made.vocabulary.random_ids) == {*base.vocabulary.random_ids, base.size, base.size + 1}


@pytest.mark.parametrize("inside", [True, False])
def test_a_unigram_whose_ids_would_move_is_not_extended(tmp_path, inside):
    specials = [(f"[{role}]", 0.0) for role in ("CLS", "SEP", "MASK", "PAD")]
    letters = [*((f"▁{letter}", -3.0) for letter in "abh"), *((letter, -4.0) for letter in LETTERS)]
    pieces = [("<unk>", 0.0), *(specials if inside else []), *letters]
    theirs = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    theirs.add_special_tokens(["[CLS]", "[SEP]", "[MASK]", "[PAD]"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    base = load(str(tmp_path))
    if not inside:
        with pytest.raises(InputError, match="new words would take the ids of its special tokens"):
            extend(base, count_words([DOMAIN]), 2)
        return
    made = extend(base, count_words([DOMAIN]), 2)
    assert made.pieces(range(base.size)) == base.pieces(range(base.size))
    assert made.roles == base.roles
    assert made.encode("hypercalcaemia") == [base.size]
    assert made.encode("a habit [MASK]") == base.encode("a habit [MASK]")


def test_words_keep_their_combining_marks():
    assert count_words(["हिन्दी भाषा, தமிழ் 12 x"]) == {"हिन्दी": 1, "भाषा": 1, "தமிழ்": 1}


def test_nothing_to_add_is_a_sentence(bases):
    with pytest.raises(InputError, match="there is nothing to add"):
        extend(bases["gpt2"], Counter({"the": 5}), 10)


# -- models ---------------------------------------------------------------------------------------------------------


def save_model(folder, tokenizer, **dimensions) -> Bert:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40}
    model = Bert(BertConfig(vocab_size=tokenizer.size, **(sizes | dimensions))).eval()
    model.tokenizer = tokenizer
    raybert.save(model, str(folder))
    return model


def settings(folder, found, **model):
    return from_mapping(
        {"run": {"storage": str(folder / "runs")}, "data": {"shards": found.uri}, "model": model, "every": {"probe": 0}}
    )


def test_a_run_takes_the_dimensions_and_weights_of_its_start(bases, tmp_path):
    tokenizer = bases["wordpiece"]
    model = save_model(tmp_path / "start", tokenizer, layer_norm_eps=1e-5, type_vocab_size=3)
    found = make_set(tmp_path / "shards", tokenizer)
    config = complete(settings(tmp_path, found, start_from=str(tmp_path / "start")), found)
    assert config.model.bert() == model.config
    assert complete(config, found) == config
    bert = Bert(config.model.bert())
    bert.tokenizer = found.tokenizer()
    begin(bert, config, found, "")
    for name, value in model.state_dict().items():
        assert torch.equal(bert.state_dict()[name], value), name
    stated = settings(tmp_path, found, start_from=str(tmp_path / "start"), hidden_size=16)
    assert complete(stated, found).model.bert() == model.config
    for given, key in (
        ({"hidden_size": 32}, "hidden_size"),
        ({"size": "tiny"}, "size"),
        ({"layer_norm_eps": 1e-3}, ""),
    ):
        with pytest.raises(InputError, match=rf"takes the dimensions of the model it starts from: leave model\.{key}"):
            complete(settings(tmp_path, found, start_from=str(tmp_path / "start"), **given), found)


def test_a_run_with_a_checkpoint_does_without_the_weights_that_it_began_with(bases, tmp_path):
    model = save_model(tmp_path / "start", bases["wordpiece"])
    found = make_set(tmp_path / "shards", bases["wordpiece"])
    asked = settings(tmp_path, found, start_from=str(tmp_path / "start"))
    config = complete(asked, found)
    run = Path(asked.run_uri)
    run.mkdir(parents=True)
    tree = config.model_dump(mode="json") | {"about": {"manifest": found.manifest_hash}}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    shutil.rmtree(tmp_path / "start")
    with pytest.raises(InputError, match=r"start is neither a checkpoint"):  # killed before its first checkpoint
        check_inputs(asked)
    snapshot = run / SNAPSHOT
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    snapshot.write_text(json.dumps({"latest_checkpoint_result": {"checkpoint_dir_name": "step-00000004"}}))
    assert check_inputs(asked).config.model.bert() == model.config
    other = settings(tmp_path, found, start_from=str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"other is neither a checkpoint"):
        check_inputs(other)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("BertForPreTraining", []), ("BertForMaskedLM", ["pooler", "next"]), ("BertModel", ["MLM head", "next"])],
)
def test_what_a_start_was_saved_without_is_said(bases, tmp_path, capsys, kind, said):
    tokenizer = bases["wordpiece"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    theirs = getattr(transformers, kind)(transformers.BertConfig(vocab_size=tokenizer.size, **sizes))
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    found = make_set(tmp_path / "shards", tokenizer)
    check_inputs(settings(tmp_path, found, start_from=str(tmp_path / "theirs")))
    line = " ".join(capsys.readouterr().err.split())
    for head in ("pooler", "MLM head", "next"):
        assert (head in line) == (head in said), line
    (tmp_path / "theirs" / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match=r"theirs/model\.safetensors is not a safetensors file"):
        check_inputs(settings(tmp_path, found, start_from=str(tmp_path / "theirs")))


def test_shards_of_another_tokenizer_than_the_start_are_refused_with_the_command_that_mends_it(bases, tmp_path):
    """Also where both have as many tokens."""
    save_model(tmp_path / "start", bases["wordpiece"])
    other = wordpiece(tmp_path / "other", unused=2, fill=1)
    assert other.size == bases["wordpiece"].size
    found = make_set(tmp_path / "shards", other)
    with pytest.raises(InputError, match=r"ids would mean other words.*raybert prepare --tokenizer .*/start") as said:
        complete(settings(tmp_path, found, start_from=str(tmp_path / "start")), found)
    assert other.hash[:12] in str(said.value)
    assert bases["wordpiece"].hash[:12] in str(said.value)


def test_new_words_begin_as_the_mean_of_their_pieces(bases, tmp_path):
    base = bases["wordpiece"]
    model = save_model(tmp_path / "start", base)
    more = extend(base, count_words([DOMAIN]), 2)
    found = make_set(tmp_path / "shards", more)
    config = complete(settings(tmp_path, found, start_from=str(tmp_path / "start")), found)
    assert config.model.bert().vocab_size == base.size + 2
    bert = Bert(config.model.bert())
    bert.tokenizer = found.tokenizer()
    begin(bert, config, found, "")
    before, after = model.word_embeddings.weight, bert.word_embeddings.weight
    assert torch.equal(before[: base.size], after[: base.size])
    pieces = base.encode("hypercalcaemia")
    assert len(pieces) == len("hypercalcaemia")
    torch.testing.assert_close(after[base.size], before[pieces].mean(0))
    torch.testing.assert_close(bert.mlm_bias[base.size], model.mlm_bias[pieces].mean())
    assert torch.equal(model.layers[0].ffn_in.weight, bert.layers[0].ffn_in.weight)


def test_a_directory_of_transformers_is_a_start(bases, tmp_path):
    tokenizer = bases["wordpiece"]
    theirs = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=tokenizer.size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        )
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    found = make_set(tmp_path / "shards", tokenizer)
    config = complete(settings(tmp_path, found, start_from=str(tmp_path / "theirs")), found)
    assert config.model.bert().intermediate_size == 24
    bert = Bert(config.model.bert()).eval()
    bert.tokenizer = found.tokenizer()
    begin(bert, config, found, "")
    ids = torch.tensor([[5, 9, 11, 6]])
    with torch.no_grad():
        torch.testing.assert_close(bert(ids)["mlm_logits"], theirs(ids).prediction_logits)
    raybert.save(bert, str(tmp_path / "ours"))
    assert run_app(["export", str(tmp_path / "ours"), str(tmp_path / "out")]) == 0
    again = transformers.BertForPreTraining.from_pretrained(tmp_path / "out").state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, again[name]), name
    same = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert same("taxes fall")["input_ids"] == [same.cls_token_id, *tokenizer.encode("taxes fall"), same.sep_token_id]
    assert read_model(str(tmp_path / "theirs")).tokenizer.hash == tokenizer.hash


def test_a_start_is_read_once_before_a_run_and_what_it_lacks_is_said(bases, tmp_path, monkeypatch, capsys):
    tokenizer = bases["wordpiece"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    theirs = transformers.BertModel(transformers.BertConfig(vocab_size=tokenizer.size, **sizes))
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    found = make_set(tmp_path / "shards", tokenizer)
    described = Mock(side_effect=directory.describe)
    monkeypatch.setattr(directory, "describe", described)
    check_inputs(settings(tmp_path, found, start_from=str(tmp_path / "theirs")))
    assert described.call_count == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "theirs was saved without the MLM head, the next-sentence head; missing weights are" in said


def test_a_start_that_cannot_be_one_is_refused_before_the_first_step(bases, tmp_path):
    tokenizer = bases["wordpiece"]
    found = make_set(tmp_path / "shards", tokenizer)
    start = tmp_path / "start"

    def refused(sentence):
        with pytest.raises(InputError, match=sentence):
            complete(settings(tmp_path, found, start_from=str(start)), found)

    save_model(start, tokenizer)
    (start / "model.safetensors").unlink()
    refused("has no model.safetensors")
    save_model(start, tokenizer, type_vocab_size=1)
    refused("pairs of texts need two")
    save_model(start, tokenizer)
    described = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(described | {"vocab_size": tokenizer.size - 1}))
    refused("rows of token embeddings, but its tokenizer")
    shutil.rmtree(start / "tokenizer")
    refused("contains no tokenizer")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "roberta"}, "has model_type 'roberta'; training can start from raybert checkpoints"),
        ({"hidden_act": "relu"}, "relu"),
    ],
)
def test_other_families_are_refused(bases, tmp_path, change, sentence):
    transformers.BertConfig(vocab_size=100).save_pretrained(tmp_path / "it")
    path = tmp_path / "it" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    bases["wordpiece"].save(tmp_path / "it")
    found = make_set(tmp_path / "shards", bases["wordpiece"])
    with pytest.raises(InputError, match=sentence):
        complete(settings(tmp_path, found, start_from=str(tmp_path / "it")), found)


def test_a_sweep_compares_losses_of_one_tokenizer(bases, tmp_path):
    found = [make_set(tmp_path / kind, bases[kind]) for kind in ("wordpiece", "bpe")]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    trials = [SimpleNamespace(config=settings(tmp_path, shards, **sizes)) for shards in found]
    sweep = SimpleNamespace(metric=VALIDATION_LOSS)
    check_data(sweep, trials[:1])
    with pytest.raises(InputError, match=r"wordpiece and .*bpe, which were prepared with different tokenizers"):
        check_data(sweep, trials)


def test_a_start_that_is_nowhere_is_a_sentence(bases, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = make_set(tmp_path / "shards", bases["wordpiece"])
    for where, sentence in (("no/such", "cannot be fetched"), (str(tmp_path / "none"), "has no config.json")):
        with pytest.raises(InputError, match=sentence):
            complete(settings(tmp_path, found, start_from=where), found)


def test_what_was_prepared_before_goes_on_as_before(tmp_path):
    """raybert's own tokenizer leaves a set of version 1, byte for byte, and no trace in the settings."""
    found = make_set(tmp_path / "own", Tokenizer())
    described = json.loads((tmp_path / "own" / "manifest.json").read_text())
    assert (described["version"], described["tokenizer"]) == (1, {"name": "gpt2", "hash": Tokenizer.hash})
    assert found.vocabulary == GPT2
    save_model(tmp_path / "start", Tokenizer())
    config = complete(settings(tmp_path, found, start_from=str(tmp_path / "start")), found)
    assert config.model.vocab_size is None
    unit = found.units()[0]
    assert shards.read_unit(found.uri, unit, found.vocabulary).tokens.dtype == np.uint16


def test_published_weights_come_in_and_go_out_unchanged(minilm, tmp_path):
    """all-MiniLM-L6-v2 as a run begins with it, exported before the first step; opened by sentence-transformers too."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tokenizer = load(minilm)
    found = make_set(tmp_path / "shards", tokenizer, documents=40)
    config = complete(settings(tmp_path, found, start_from=minilm), found)
    sizes = config.model.bert()
    assert (sizes.hidden_size, sizes.num_attention_heads, sizes.vocab_size) == (384, 12, 30_522)
    bert = Bert(sizes)
    bert.tokenizer = found.tokenizer()
    begin(bert, config, found, "")
    raybert.save(bert, str(tmp_path / "ours"))
    assert run_app(["export", str(tmp_path / "ours"), str(tmp_path / "out")]) == 0
    before, after = (
        transformers.AutoModel.from_pretrained(where).state_dict() for where in (minilm, str(tmp_path / "out"))
    )
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    several = ["Taxes will fall.", "An unaffable CAFÉ", "今天", "🎈"]
    own, theirs = (transformers.AutoTokenizer.from_pretrained(where) for where in (str(tmp_path / "out"), minilm))
    assert own(several)["input_ids"] == theirs(several)["input_ids"]
    vectors = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(several)
    np.testing.assert_allclose(bert.eval().embed(several), vectors, rtol=1e-4, atol=1e-5)


def test_training_goes_on_where_published_weights_are(minilm, tmp_path):
    """A few steps on words that it knows: its loss falls."""
    tokenizer = load(minilm)
    found = make_set(tmp_path / "shards", tokenizer, documents=60)
    reader = SampleReader(found, seed=0, spec=SampleSpec(next_sentence=False))
    model = Pretraining(read_model(minilm).train(), Objective(pair="none"))
    adam = optimizer.build(model, **from_mapping({}).optimizer.model_dump())
    losses = []
    for step in range(6):
        batch = to_torch(reader.build(np.arange(4 * step, 4 * step + 4)), torch.device("cpu"), reader.spec)
        keys = {"seed": 0, "step": step, "first_micro_batch": 0, "global_batch": 4, "objective": model.objective}
        sums, _ = train_step(model, adam, [batch], lr=1e-3, grad_clip=1.0, dtype=torch.float32, **keys)
        losses.append(means(sums, model.objective)["loss"])
    assert losses[-1] < losses[0] - 1
