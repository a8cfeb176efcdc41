"""Objectives beside the original's: each loss against its definition, and none dependent on how a batch is cut."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.config import from_mapping
from raybert.data import bag, halves
from raybert.data.block import take
from raybert.data.masking import max_masked
from raybert.data.reader import SampleReader, validation_batches
from raybert.data.shards import read_unit
from raybert.data.spec import ORIGINAL, MaskedFraction, SampleSpec, sample_spec
from raybert.data.tensors import to_torch
from raybert.errors import InputError
from raybert.model import optimizer
from raybert.model.bert import Bert, flops_per_token
from raybert.model.config import BertConfig
from raybert.model.losses import Pretraining, contrast, tied_cross_entropy
from raybert.model.objective import Objective
from raybert.records import format_line
from raybert.sweep.run import _require_one_loss
from raybert.tokenizer import CLS_ID, GPT2, MASK_ID, NUM_TEXT_TOKENS, PAD_ID, SEP_ID
from raybert.train.check import check_inputs
from raybert.train.flops import run_flops_per_token
from raybert.train.step import COUNT, SUMS, forward_sums, group_micro_batches, means, train_step
from tests.data import make_shards

CPU = torch.device("cpu")
TINY = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32, dropout=0.1)
CONTRAST = SampleSpec(next_sentence=False, halves=True, bag_tokens=5, bag_of_neighbour=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(str(tmp_path_factory.mktemp("shards")))


@pytest.fixture(scope="module")
def columns(shards):
    return SampleReader(shards, seed=3, spec=CONTRAST).build(np.arange(24))


@pytest.fixture
def bert():
    torch.manual_seed(0)
    return Bert(TINY)


# -- samples ------------------------------------------------------------------------------------------------------


def test_without_next_sentences_every_sample_is_a_whole_window_cut_at_the_same_place(shards, columns):
    reader = SampleReader(shards, seed=3)
    original = reader.build(np.arange(24))
    assert not columns["next_sentence_label"].any()
    np.testing.assert_array_equal(columns["cut"], original["cut"])
    assert (columns["length"] >= original["length"]).all()
    assert (columns["length"] > original["length"]).any()
    whole, before = bag.originals(columns), bag.originals(original)
    _, units, rows = reader.plan.locate(np.arange(24))
    for i, (cut, length) in enumerate(zip(columns["cut"], columns["length"], strict=True)):
        unit = read_unit(shards.uri, shards.units()[units[i]], shards.vocabulary)
        window = unit.tokens[unit.token_offsets[rows[i]] : unit.token_offsets[rows[i] + 1]]
        np.testing.assert_array_equal(
            whole[i][:length], [CLS_ID, *window[: cut - 2], SEP_ID, *window[cut - 2 :], SEP_ID]
        )
        np.testing.assert_array_equal(whole[i][:cut], before[i][:cut])


@given(st.floats(0.05, 0.9), st.floats(0.05, 0.9), st.integers(1, 200))
@settings(max_examples=40)
def test_the_masked_fraction_goes_straight_from_first_to_last(first, last, samples):
    found = MaskedFraction(first, last, samples).at(np.arange(2 * samples + 1))
    assert found[0] == pytest.approx(first)
    assert found[samples:] == pytest.approx(last)
    assert np.diff(found[: samples + 1]) == pytest.approx((last - first) / samples)


def test_a_sample_s_masks_follow_from_its_index_alone_and_a_larger_fraction_keeps_those_of_a_smaller(shards):
    falling = SampleSpec(masked=MaskedFraction(0.4, 0.15, samples=60))
    reader = SampleReader(shards, seed=0, spec=falling)
    whole, part = reader.build(np.arange(80)), reader.build(np.arange(50, 55))
    for name, values in part.items():
        np.testing.assert_array_equal(values, whole[name][50:55], err_msg=name)
    wanted = np.rint(falling.masked.at(whole["index"]) * (whole["length"] - 3)).clip(1)
    np.testing.assert_array_equal((whole["masked_positions"] >= 0).sum(1), wanted)
    assert whole["masked_positions"].shape[1] == max_masked(shards.seq_len, 0.4)
    usual = SampleReader(shards, seed=0).build(np.arange(80))
    for more, less in zip(whole["masked_positions"], usual["masked_positions"], strict=True):
        assert set(less) - {-1} <= set(more)
    np.testing.assert_array_equal(bag.originals(whole), bag.originals(usual))
    validated = next(validation_batches(shards, seed=0, batch_size=30, samples=30, spec=falling))
    assert (validated["masked_positions"] >= 0).sum() == np.rint(0.15 * (validated["length"] - 3)).clip(1).sum()


def test_halves_hold_all_that_the_samples_held(columns):
    split = halves.split(columns, GPT2)
    whole, parts = bag.originals(columns), bag.originals(split)
    for i, (cut, length) in enumerate(zip(columns["cut"], columns["length"], strict=True)):
        one, other = parts[2 * i][: split["length"][2 * i]], parts[2 * i + 1][: split["length"][2 * i + 1]]
        assert (one[0], one[-1], other[0], other[-1]) == (CLS_ID, SEP_ID, CLS_ID, SEP_ID)
        np.testing.assert_array_equal([*one, *other[1:]], whole[i][:length])
        assert len(one) == cut
    assert (split["input_ids"][np.arange(32) >= split["length"][:, None]] == PAD_ID).all()
    assert (split["masked_positions"] >= 0).sum() == (columns["masked_positions"] >= 0).sum()
    assert (split["input_ids"] == MASK_ID).sum() == (columns["input_ids"] == MASK_ID).sum()
    masked = split["masked_positions"] >= 0
    assert (split["masked_positions"] < split["length"][:, None]).all()
    assert (split["masked_labels"][masked] < NUM_TEXT_TOKENS).all()
    batch = to_torch(columns, CPU, SampleSpec(halves=True))
    assert batch["input_ids"].shape == (48, 32)
    assert not batch["token_type_ids"].any()


@pytest.mark.parametrize("split", [False, True])
def test_a_bag_is_content_of_its_own_text_and_no_token_twice(columns, split):
    common = columns["input_ids"].copy()
    common[:, 1] = 5  # in every text
    texts = columns | {"input_ids": np.where(columns["masked_positions"][:, :1] == 1, columns["input_ids"], common)}
    texts = halves.split(texts, GPT2) if split else texts
    bags, ids = bag.draw_bags(texts, 7, seed=1, vocabulary=GPT2), bag.originals(texts)
    assert bags.shape == (len(ids), 7)
    for drawn, own in zip(bags, ids, strict=True):
        found = drawn[drawn >= 0]
        assert len(set(found)) == len(found) == min(7, len({i for i in own if i < NUM_TEXT_TOKENS and i != 5}))
        assert set(found) <= set(own)
        assert 5 not in found
    np.testing.assert_array_equal(bags, bag.draw_bags(texts, 7, seed=1, vocabulary=GPT2))
    assert (bags != bag.draw_bags(texts, 7, seed=2, vocabulary=GPT2)).any()
    fewer = [set(row[row >= 0]) for row in bag.draw_bags(texts, 3, seed=1, vocabulary=GPT2)]
    assert all(few <= set(row) for few, row in zip(fewer, bags, strict=True))


def test_a_neighbour_s_bag_is_the_other_half_s(columns):
    own, other = (
        to_torch(columns, CPU, SampleSpec(halves=True, bag_tokens=4, bag_of_neighbour=swapped))["bag_labels"]
        for swapped in (False, True)
    )
    assert torch.equal(own[0::2], other[1::2])
    assert torch.equal(own[1::2], other[0::2])


# -- losses -------------------------------------------------------------------------------------------------------


def test_contrast_is_info_nce_without_negatives_of_the_same_document():
    torch.manual_seed(0)
    vectors = torch.randn(10, 6, requires_grad=True)
    document = torch.tensor([1, 2, 1, 3, 4]).repeat_interleave(2)
    loss, right = contrast(vectors, document, temperature=0.2)
    one, other, of = vectors[0::2].detach(), vectors[1::2].detach(), document[0::2]
    expected, hits = 0.0, 0
    for query, keys in ((one, other), (other, one)):
        for i in range(5):
            rows = [j for j in range(5) if j == i or of[j] != of[i]]
            scores = F.cosine_similarity(query[i : i + 1], keys[rows]) / 0.2
            expected += (scores.logsumexp(0) - scores[rows.index(i)]).item() / 2
            hits += int(scores.argmax() == rows.index(i))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert right.item() == hits / 2
    loss.backward()
    assert torch.isfinite(vectors.grad).all()


def test_pairs_without_negatives_are_neither_a_loss_nor_right():
    vectors, one = torch.randn(8, 6), torch.ones(8)
    other, own = (torch.tensor(of).repeat_interleave(2) for of in ([1, 1, 1, 2], [0, 0, 0, 1]))
    for document, part in ((one, None), (other, own)):  # no part has two documents
        loss, right = contrast(vectors, document, temperature=0.2, part=part)
        assert (loss.item(), right.item()) == (0, 0), "nothing to tell apart"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_labels_a_row_are_the_sum_of_one_each(dtype):
    torch.manual_seed(0)
    weight = torch.randn(101 + 3, 8, requires_grad=True)
    bias = torch.randn(101, requires_grad=True)
    features = torch.randn(700, 8, requires_grad=True)  # more than a chunk
    labels = torch.stack([torch.randperm(101)[:4] for _ in range(700)])
    labels[::3, 2:] = -100
    labels[5] = -100
    leaves = (weight, bias, features)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss, right = tied_cross_entropy(features, weight, bias, labels)
    found = torch.autograd.grad(loss, leaves)
    logits = F.linear(features, weight[:101], bias)
    reference = F.cross_entropy(logits.repeat_interleave(4, 0), labels.flatten(), reduction="sum", ignore_index=-100)
    near = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 2.0}
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5 if dtype == torch.float32 else 0.01)
    for ours, theirs in zip(found, torch.autograd.grad(reference, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, **near)
    if dtype == torch.float32:
        assert right == (logits.argmax(1)[:, None] == labels).sum()


def reference_losses(bert, batch, objective):
    """The three losses from the encoder's public outputs, with plain torch."""
    out = bert(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])
    rows, places = torch.nonzero(batch["masked_positions"] >= 0, as_tuple=True)
    logits = out["mlm_logits"][rows, batch["masked_positions"][rows, places]]
    found = {"mlm": F.cross_entropy(logits, batch["masked_labels"][rows, places])}
    mask = batch["attention_mask"][..., None]
    mean = (out["last_hidden_state"] * mask).sum(1) / mask.sum(1)
    vectors = [{"pooler": out["pooler_output"], "mean": mean}[name] for name in objective.pooled]
    if "contrast" in objective.losses:
        each = [contrast(v, batch["document"], objective.temperature)[0] for v in vectors]
        found["contrast"] = torch.stack(each).mean() / (len(mean) / 2)
    labels = batch["bag_labels"]
    bags = []
    for vector in vectors:
        scores = bert.mlm_logits(vector)
        bags.append(
            -(scores.log_softmax(-1).gather(1, labels.clamp(min=0)) * (labels >= 0)).sum() / (labels >= 0).sum()
        )
    return found | {"bag": torch.stack(bags).mean()}


@pytest.mark.parametrize("vectors", ["pooler", "mean", "both"])
@pytest.mark.parametrize("pair", ["contrastive", "none"])
def test_every_loss_and_the_step_s_gradient_are_those_of_plain_torch(bert, shards, pair, vectors):
    bert.eval()
    objective = Objective(pair=pair, pair_weight=0.5, bag_weight=0.25, mlm_weight=2.0, vectors=vectors)
    spec = SampleSpec(next_sentence=False, halves=pair == "contrastive", bag_tokens=5)
    batch = to_torch(SampleReader(shards, seed=3, spec=spec).build(np.arange(12)), CPU, spec)
    expected = reference_losses(bert, batch, objective)
    sums = forward_sums(Pretraining(bert, objective), [batch], None)
    found = means(sums, objective)
    for name, loss in expected.items():
        assert found[f"{name}_loss"] == pytest.approx(loss.item(), rel=1e-4), name
    total = sum(objective.weights[name] * loss for name, loss in expected.items())
    assert found["loss"] == pytest.approx(total.item(), rel=1e-4)
    assert "nsp_loss" not in found
    parameters = [p for p in bert.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(total, parameters, allow_unused=True)
    assert all(gradient is not None for gradient in wanted), "what no loss reaches is not trained"
    losses, counts = sums.view(-1, len(SUMS))[:, 0], sums.view(-1, len(SUMS))[:, COUNT].detach()
    ours = sum(w * s / c for w, s, c in zip(objective.weights.values(), losses, counts, strict=True))
    for a, b in zip(torch.autograd.grad(ours, parameters), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


OBJECTIVES = [
    (Objective(pair="contrastive", bag_weight=0.5), CONTRAST),
    (Objective(pair="contrastive", vectors="pooler"), SampleSpec(next_sentence=False, halves=True)),
    (Objective(pair="none"), SampleSpec(next_sentence=False)),
    (Objective(bag_weight=0.5, vectors="mean"), SampleSpec(bag_tokens=4)),
]


@pytest.mark.parametrize(("objective", "spec"), OBJECTIVES)
def test_joined_micro_batches_are_those_one_by_one_also_with_padding(bert, shards, objective, spec):
    made = SampleReader(shards, seed=3, spec=spec).build(np.arange(24))
    parts = [to_torch(take(made, slice(at, at + 6)), CPU, spec) for at in range(0, 24, 6)]
    model = Pretraining(bert, objective).train()
    seeds = [5, 6, 7, 8]
    joined = forward_sums(model, parts, seeds)
    single = [forward_sums(model, [part], [seed]) for part, seed in zip(parts, seeds, strict=True)]
    torch.testing.assert_close(joined, torch.stack(single).sum(0), rtol=1e-5, atol=1e-3)
    model.eval()
    inputs = [dict(part) for part in parts]
    padded = torch.stack([model(**part) for part in inputs]).sum(0)
    torch.testing.assert_close(forward_sums(model, parts, None), padded, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("objective", "spec"), OBJECTIVES)
def test_every_loss_compiles_into_one_graph(bert, shards, objective, spec):
    """As GPUs run it: nothing in it waits for the device or breaks the graph."""
    batch = to_torch(SampleReader(shards, seed=3, spec=spec).build(np.arange(8)), CPU, spec)
    model = Pretraining(bert, objective).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch), model(**batch))
    compiled(**batch)[0].backward()


def test_halves_are_joined_up_to_the_tokens_of_a_micro_batch(shards):
    made = SampleReader(shards, seed=3, spec=CONTRAST).build(np.arange(64))
    parts = [to_torch(take(made, slice(at, at + 8)), CPU, CONTRAST) for at in range(0, 64, 8)]
    for group in group_micro_batches(Pretraining(Bert(TINY)), parts):
        tokens = sum(int(parts[index]["attention_mask"].sum()) for index in group)
        assert len(group) == 1 or tokens <= 8 * shards.seq_len


@pytest.mark.parametrize(("objective", "spec"), OBJECTIVES)
def test_a_step_changes_what_a_loss_reaches_and_nothing_else(bert, shards, objective, spec):
    columns = SampleReader(shards, seed=3, spec=spec).build(np.arange(24))
    parts = [to_torch(take(columns, slice(at, at + 12)), CPU, spec) for at in range(0, 24, 12)]
    adam = optimizer.build(bert, lr=1e-3, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-6)
    before = copy.deepcopy(bert.state_dict())
    options = {"lr": 1e-3, "grad_clip": 1.0, "dtype": torch.float32, "seed": 0, "step": 0, "first_micro_batch": 0}
    model = Pretraining(bert, objective)
    first, norm = train_step(model, adam, parts, global_batch=24, objective=objective, **options)
    assert norm > 0
    changed = {
        name.partition(".")[0] for name, value in bert.state_dict().items() if not torch.equal(value, before[name])
    }
    assert ("nsp_head" in changed) == ("nsp" in objective.losses)
    assert ("pooler" in changed) == (
        "nsp" in objective.losses or ("pooler" in objective.pooled and objective.pair != "none")
    )
    assert {"word_embeddings", "layers", "mlm_transform"} <= changed
    for step in range(1, 30):
        last, _ = train_step(model, adam, parts, global_batch=24, objective=objective, **options | {"step": step})
    early, late = means(first, objective), means(last, objective)
    assert {name for name in early if name.endswith("_loss")} == {f"{name}_loss" for name in objective.losses}
    for name in objective.losses:
        assert late[f"{name}_loss"] < early[f"{name}_loss"], name


def test_before_training_a_loss_is_about_that_of_guessing(bert, shards):
    for objective, spec in OBJECTIVES:
        batch = to_torch(SampleReader(shards, seed=0, spec=spec).build(np.arange(16)), CPU, spec)
        found = means(forward_sums(Pretraining(bert, objective).eval(), [batch], None), objective)
        assert found["loss"] == pytest.approx(objective.loss_by_chance(TINY.vocab_size, 16), rel=0.1)


# -- settings -----------------------------------------------------------------------------------------------------


def settings_of(**objective):
    train = {"steps": 11, "global_batch": 64, "micro_batch": 32}
    return from_mapping({"objective": objective, "train": train, "schedule": {"warmup_steps": 1}})


def test_the_default_is_the_original():
    config = from_mapping({})
    assert config.objective.objective() == Objective()
    spec = sample_spec(config, GPT2)
    assert (spec.next_sentence, spec.halves, spec.bag_tokens) == (True, False, 0)
    assert spec.masked.at(np.arange(10)) == pytest.approx(ORIGINAL.masked.first)
    assert Objective().loss_by_chance(50_261, 32) == math.log(50_261) + math.log(2)


def test_the_settings_become_losses_and_samples():
    config = settings_of(pair="contrastive", mlm_rate=0.3, mlm_rate_end=0.15, bag_weight=0.1, bag_of="neighbour")
    assert config.objective.objective().weights == {"mlm": 1.0, "contrast": 1.0, "bag": 0.1}
    spec = sample_spec(config, GPT2)
    assert spec.masked.at(np.array([0, 320, 640, 703])) == pytest.approx([0.3, 0.225, 0.15, 0.15])
    assert (spec.next_sentence, spec.halves, spec.bag_tokens, spec.bag_of_neighbour) == (False, True, 16, True)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"objective": {"pair": "contrastive"}, "train": {"micro_batch": 1}}, "train.micro_batch=1 has none"),
        ({"objective": {"bag_weight": 1, "bag_of": "neighbour"}}, "bag_of=neighbour needs objective.pair=contrastive"),
        ({"objective": {"pair": "contrast"}}, "objective.pair='contrast'"),
        ({"objective": {"mlm_rate": 0}}, "objective.mlm_rate=0"),
        (
            {"objective": {"temperature": 0.1}},
            "objective.temperature=0.1 has no effect with objective.pair=next_sentence",
        ),
        ({"objective": {"pair": "none", "pair_weight": 2}}, "objective.pair_weight=2.0 has no effect"),
        ({"objective": {"bag_tokens": 2}}, "objective.bag_tokens=2 has no effect"),
        ({"objective": {"pair": "contrastive", "temperature": 1e-9}}, "objective.temperature=1e-09"),
        ({"objective": {"mlm_rates": 0.2}}, "Did you mean objective.mlm_rate?"),
    ],
)
def test_what_cannot_be_is_a_sentence(tree, sentence):
    with pytest.raises(InputError, match=sentence):
        from_mapping(tree)


def test_a_sweep_does_not_compare_losses_that_mean_different_things():
    def configs(*trees):
        train = {"steps": 200, "global_batch": 64}
        return [from_mapping({"train": train | tree.pop("train", {}), "objective": tree}) for tree in trees]

    for trees, sentence in (
        ([{}, {"mlm_weight": 2}], "objective.mlm_weight changes the loss itself"),
        ([{"pair": "contrastive", "train": {"micro_batch": m}} for m in (8, 16)], "depend on train.micro_batch"),
    ):
        with pytest.raises(InputError, match=sentence):
            _require_one_loss(configs(*trees))
    _require_one_loss(configs(*({"train": {"micro_batch": m}} for m in (8, 16))))
    _require_one_loss(configs({"mlm_weight": 2}, {"mlm_weight": 2}))


def test_flops_follow_the_objective():
    def of(sample=None, **objective):
        train = {"steps": 101, "global_batch": 32}
        tree = {"train": train, "schedule": {"warmup_steps": 0}, "objective": objective}
        return run_flops_per_token(from_mapping(tree), 128, sample)

    bert = from_mapping({}).model.bert()
    assert of() == of(5) == flops_per_token(bert, 128, 0.15)
    assert of(mlm_rate=0.3) == flops_per_token(bert, 128, 0.3)
    assert of(0, mlm_rate=0.3, mlm_rate_end=0.1) == flops_per_token(bert, 128, 0.3)
    assert of(3200, mlm_rate=0.3, mlm_rate_end=0.1) == pytest.approx(flops_per_token(bert, 128, 0.1))
    assert of(mlm_rate=0.3, mlm_rate_end=0.1) == pytest.approx(flops_per_token(bert, 128, 0.2))
    assert of(pair="contrastive") == flops_per_token(bert, 64, 0.15)
    assert of(pair="contrastive", bag_weight=1) == pytest.approx(flops_per_token(bert, 64, 0.15 + 4 / 128))


def test_a_contrast_without_negatives_is_refused(tmp_path):
    tree = {"run": {"storage": str(tmp_path / "runs")}, "objective": {"pair": "contrastive"}, "model": {"size": "tiny"}}
    shards = make_shards(str(tmp_path / "one"), documents=1)
    with pytest.raises(InputError, match=r"come from one document, so objective\.pair=contrastive finds"):
        check_inputs(from_mapping(tree | {"data": {"shards": shards.uri}}))
    more = make_shards(str(tmp_path / "more"), documents=2)
    check_inputs(from_mapping(tree | {"data": {"shards": more.uri}}))
    few = make_shards(str(tmp_path / "few"), documents=2, validation=1)
    with pytest.raises(InputError, match=r"All validation windows .* from one document.* set every\.validation=0"):
        check_inputs(from_mapping(tree | {"data": {"shards": few.uri}}))
    check_inputs(from_mapping(tree | {"data": {"shards": few.uri}, "every": {"validation": 0}}))


def test_a_log_line_names_the_losses_that_are_on():
    record = {"step": 3, "loss": 9.5, "mlm_loss": 7.25, "contrast_loss": 2.0, "bag_loss": 8.0, "mlm_accuracy": 0.1}
    assert "loss 9.5000 (mlm 7.2500 contrast 2.0000 bag 8.0000) | acc mlm 0.100" in format_line(record, 10)
