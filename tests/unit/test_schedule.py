"""The learning rate's laws, and which parameters decay."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raybert.model import optimizer
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.schedule import lr_at


@given(
    steps=st.integers(2, 2000),
    warmup=st.integers(0, 500),
    decay=st.sampled_from(["linear", "cosine", "wsd", "constant"]),
    ratio=st.floats(0, 1),
)
def test_the_rate_rises_to_the_peak_then_never_rises_again(steps, warmup, decay, ratio):
    warmup = min(warmup, steps - 1)
    rates = [
        lr_at(s, peak_lr=1.0, total_steps=steps, warmup_steps=warmup, decay=decay, min_lr_ratio=ratio)
        for s in range(steps)
    ]
    assert all(0 < rate <= 1 + 1e-12 for rate in rates[: max(1, warmup)])
    assert rates[max(0, warmup - 1)] == pytest.approx(1.0) or warmup == 0
    after = rates[warmup:]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(after))
    assert all(rate >= ratio - 1e-9 for rate in after)


@given(steps=st.integers(2, 500), fraction=st.floats(0.01, 1))
def test_wsd_stays_at_the_peak_until_its_last_part(steps, fraction):
    def rate(step, decay="wsd", **options):
        return lr_at(step, peak_lr=1.0, total_steps=steps, warmup_steps=0, decay=decay, **options)

    rates = [rate(step, decay_fraction=fraction) for step in range(steps)]
    begin = round(steps * (1 - fraction))
    assert rates[: begin + 1] == [1.0] * min(steps, begin + 1)
    assert all(b < a for a, b in itertools.pairwise(rates[begin:]))
    assert [rate(step, decay_fraction=1.0) for step in range(steps)] == [
        rate(step, "linear") for step in range(steps)
    ], "a decay as long as the run is a linear one"


def test_matrices_decay_and_biases_and_norms_do_not():
    model = Bert(BertConfig(vocab_size=70, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    built = optimizer.build(model, lr=1.0, weight_decay=0.1, beta1=0.9, beta2=0.99, eps=1e-6)
    decayed = {id(p) for p in built.param_groups[0]["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (not name.endswith("bias") and "norm" not in name), name
    assert [g["weight_decay"] for g in built.param_groups] == [0.1, 0.0]
    assert isinstance(built, torch.optim.AdamW)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_token_embeddings_move_by_their_share_of_the_rate(ratio):
    torch.manual_seed(0)
    model = Bert(BertConfig(vocab_size=70, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, dropout=0.0))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    built = optimizer.build(model, lr=1.0, weight_decay=0.0, beta1=0.9, beta2=0.99, eps=0.0, embedding_lr_ratio=ratio)
    optimizer.set_lr(built, 0.01)
    model(torch.arange(8).reshape(1, 8))["mlm_logits"].square().sum().backward()
    built.step()
    # The first update of AdamW is the rate times the gradient's sign.
    for name, value in model.named_parameters():
        rate = 0.01 * (ratio if name == "word_embeddings.weight" else 1)
        moved = (value.detach() - before[name]).abs()[(value.grad if value.grad is not None else value * 0) != 0]
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(1.0, 0.5), (0.5, 1.0), (0.5, 0.25)])
def test_moments_are_restored_under_another_ratio_and_the_settings_are_the_new_ones(old, new):
    def make(ratio, decay):
        torch.manual_seed(0)
        model = Bert(BertConfig(vocab_size=70, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
        settings = {"lr": 1.0, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "embedding_lr_ratio": ratio}
        return model, optimizer.build(model, weight_decay=decay, **settings)

    (first, before), (second, after) = make(old, 0.1), make(new, 0.2)
    first(torch.arange(8).reshape(1, 8))["mlm_logits"].square().sum().backward()
    before.step()
    optimizer.restore(after, before.state_dict())
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert (mine in before.state) == (theirs in after.state)
        if mine in before.state:
            assert torch.equal(before.state[mine]["exp_avg"], after.state[theirs]["exp_avg"])
    assert {group["weight_decay"] for group in after.param_groups} == {0.2, 0.0}
    optimizer.set_lr(after, 0.1)
    rates = {id(p): group["lr"] for group in after.param_groups for p in group["params"]}
    assert rates[id(second.word_embeddings.weight)] == pytest.approx(0.1 * new)
