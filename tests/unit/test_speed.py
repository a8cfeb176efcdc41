"""What makes the step fast changes no numbers: beside plain torch, over 50 steps, padding and joining included."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from raybert.model import optimizer
from raybert.model.attention import _flash, attention
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.dropout import Noise, apply_mask, dropout
from raybert.model.layout import padded, unpadded
from raybert.model.losses import Pretraining
from raybert.train.step import forward_sums, group_micro_batches, means, train_step

CONFIG = BertConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, dropout=0.0)
ADAM = {"lr": 1e-3, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6}


def micro_batch(samples, seed, length=24, places=3):
    """Samples of different lengths, padded, with different numbers of masked positions."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, length + 1, (samples, 1), generator=generator)
    positions = torch.stack([torch.randperm(6, generator=generator)[:places] for _ in range(samples)])
    positions[::2, -1] = -1
    labels = torch.randint(0, 101, (samples, places), generator=generator)
    return {
        "input_ids": torch.randint(0, 101, (samples, length), generator=generator),
        "token_type_ids": torch.randint(0, 2, (samples, length), generator=generator),
        "attention_mask": torch.arange(length) < lengths,
        "masked_positions": positions,
        "masked_labels": labels.where(positions >= 0, -100),
        "next_sentence_label": torch.randint(0, 2, (samples,), generator=generator),
    }


def plain_losses(bert, steps, dtype):
    """The textbook's loop: every logit, torch's cross entropy, nothing joined and nothing left out."""
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in bert.parameters() if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in bert.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-3,
        eps=1e-6,
    )
    losses = []
    for parts in steps:
        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = bert(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"], batch["masked_positions"])
        labels = batch["masked_labels"][batch["masked_positions"] >= 0]
        loss = F.cross_entropy(out["mlm_logits"].float(), labels)
        loss = loss + F.cross_entropy(out["nsp_logits"].float(), batch["next_sentence_label"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_losses_of_50_steps_are_those_of_the_plain_loop(dtype, tolerance):
    torch.manual_seed(0)
    bert = Bert(CONFIG).train()
    steps = [[micro_batch(4, 3 * step + part) for part in range(3)] for step in range(50)]
    expected = plain_losses(copy.deepcopy(bert), steps, dtype)
    adam, model, found = optimizer.build(bert, **ADAM), Pretraining(bert), []
    for step, parts in enumerate(steps):
        keys = {"seed": 0, "step": step, "first_micro_batch": 0, "global_batch": 12}
        sums, _ = train_step(model, adam, parts, lr=1e-3, grad_clip=1.0, dtype=dtype, **keys)
        found.append(means(sums)["loss"])
    assert found == pytest.approx(expected, rel=tolerance)


def test_joined_micro_batches_have_the_dropout_and_the_gradients_of_each_alone():
    torch.manual_seed(0)
    together = Pretraining(Bert(BertConfig(**{**CONFIG.__dict__, "dropout": 0.3}))).train()
    alone = copy.deepcopy(together)
    parts, seeds = [micro_batch(3, seed) for seed in range(4)], [11, 12, 13, 14]
    joined = forward_sums(together, parts, seeds)
    single = [forward_sums(alone, [part], [seed]) for part, seed in zip(parts, seeds, strict=True)]
    torch.testing.assert_close(joined, torch.stack(single).sum(0), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(joined, forward_sums(together, parts, [1, 2, 3, 4]))
    joined[0].backward()
    torch.stack(single).sum(0)[0].backward()
    for (name, a), b in zip(together.named_parameters(), alone.parameters(), strict=True):
        if a.grad is not None or b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_short_micro_batches_share_a_forward_pass_up_to_the_tokens_of_a_full_one():
    model = Pretraining(Bert(CONFIG))
    short = [dict(micro_batch(2, seed), attention_mask=torch.arange(24).expand(2, -1) < 6) for seed in range(10)]
    assert group_micro_batches(model, short) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    full = [dict(part, attention_mask=torch.ones(2, 24, dtype=torch.bool)) for part in short[:3]]
    assert group_micro_batches(model, full) == [[0], [1], [2]]


@settings(max_examples=10)
@given(samples=st.integers(1, 3), length=st.integers(1, 9), heads=st.sampled_from([1, 2]), seed=st.integers(0, 1000))
def test_the_attention_of_cpus_is_that_of_gpus(samples, length, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(samples * length, 24, generator=generator, requires_grad=True)
    mask = torch.arange(length) < torch.randint(1, length + 1, (samples, 1), generator=generator)
    whole = padded(samples, length, mask, None)
    real = mask.flatten()
    ours, theirs = attention(qkv, heads, whole, 0.0), _flash(qkv, heads, whole.blocks[0], 0.0)
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-5)
    weights = torch.randn(int(real.sum()), 8, generator=generator)
    expected = torch.autograd.grad((theirs[real] * weights).sum(), qkv)[0]
    torch.testing.assert_close(
        torch.autograd.grad((ours[real] * weights).sum(), qkv)[0], expected, rtol=1e-4, atol=1e-5
    )
    # The same samples without their padding.
    layout = unpadded(mask, [(samples, None)])
    tight = attention(qkv[real], heads, layout, 0.0)
    torch.testing.assert_close(tight, theirs[real], rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad((tight * weights).sum(), qkv)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_attention_dropout_has_the_gradient_of_what_it_computes():
    qkv = torch.randn(2 * 5, 12, dtype=torch.float64, requires_grad=True)

    def drop(values):
        return attention(values, 2, padded(2, 5, None, Noise(3)), 0.4)

    assert torch.autograd.gradcheck(drop, qkv)


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate):
    masks = torch.stack([Noise(seed).keep(5000, rate) for seed in range(200)])
    assert set(masks.unique().tolist()) <= {-1, 0}
    dropped = (masks == 0).double().mean().item()
    # The threshold is drawn once a mask, so its spread counts as well: at most half a 256th, over 200 masks.
    spread = (rate * (1 - rate) / masks.numel() + (0.5 / 256) ** 2 / 200) ** 0.5
    assert abs(dropped - rate) < 5 * spread + 1e-12
    values = torch.randn(5000, dtype=torch.bfloat16)
    kept = apply_mask(values, masks[0])
    assert torch.equal(kept, values.where(masks[0] == -1, 0))
    if rate:
        torch.testing.assert_close(dropout(values, rate, masks[0]), kept / (1 - rate))


def test_the_compiled_step_with_fixed_shapes_is_the_eager_one():
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()  # of what other tests compiled in this process
    eager = Pretraining(Bert(CONFIG))
    fixed = torch.compile(copy.deepcopy(eager), backend="eager")
    for seed in range(3):
        part = micro_batch(4, seed)
        a, b = forward_sums(eager, [part], [seed]), forward_sums(fixed, [part], [seed])
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        (a[0] + a[3]).backward()
        (b[0] + b[3]).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "shapes changed, and it compiled again"
    for (name, p), q in zip(eager.named_parameters(), fixed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=name)
