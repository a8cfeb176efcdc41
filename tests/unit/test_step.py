"""The training step against plain torch, and its independence of how the batch is cut."""

import copy
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from raybert.model import compiler, optimizer, precision
from raybert.model.bert import Bert
from raybert.model.config import BertConfig
from raybert.model.losses import Pretraining
from raybert.model.peak import peak_flops
from raybert.model.precision import pick_dtype
from raybert.train.gpu_memory import exhausted, out_of_memory
from raybert.train.interval import Streak, Totals
from raybert.train.step import COUNT, SUMS, dropout_seed, means, train_step, validate

CONFIG = BertConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, dropout=0.0)


def batch(samples, length=12, places=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.randperm(length, generator=generator)[:places] for _ in range(samples)])
    positions[::2, -1] = -1  # samples have different numbers of masked positions
    return {
        "input_ids": torch.randint(0, 101, (samples, length), generator=generator),
        "token_type_ids": torch.randint(0, 2, (samples, length), generator=generator),
        "attention_mask": torch.ones(samples, length, dtype=torch.bool),
        "masked_positions": positions,
        "masked_labels": torch.randint(0, 101, (samples, places), generator=generator),
        "next_sentence_label": torch.randint(0, 2, (samples,), generator=generator),
    }


def part(whole, rows):
    return {name: value[rows] for name, value in whole.items()}


def step(bert, parts, dropout_step=0, clip=1e9):
    model = copy.deepcopy(bert)
    adam = optimizer.build(model, lr=1e-3, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-6)
    sums, norm = train_step(
        Pretraining(model),
        adam,
        parts,
        lr=1e-3,
        grad_clip=clip,
        dtype=torch.float32,
        seed=0,
        step=dropout_step,
        first_micro_batch=0,
        global_batch=sum(len(p["input_ids"]) for p in parts),
    )
    return model, sums, norm


@pytest.fixture
def bert():
    torch.manual_seed(0)
    return Bert(CONFIG)


def test_the_loss_is_the_mean_over_the_batch_as_torch_computes_it(bert):
    whole = batch(8)
    _, sums, norm = step(bert, [whole])
    out = bert(whole["input_ids"], whole["token_type_ids"], whole["attention_mask"])
    rows, places = torch.nonzero(whole["masked_positions"] >= 0, as_tuple=True)
    logits = out["mlm_logits"][rows, whole["masked_positions"][rows, places]]
    mlm = F.cross_entropy(logits, whole["masked_labels"][rows, places])
    nsp = F.cross_entropy(out["nsp_logits"], whole["next_sentence_label"])
    found = means(sums)
    assert found["mlm_loss"] == pytest.approx(mlm.item(), abs=1e-5)
    assert found["nsp_loss"] == pytest.approx(nsp.item(), abs=1e-5)
    (mlm + nsp).backward()
    expected = torch.stack([p.grad.norm() for p in bert.parameters()]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-4)


def test_micro_batches_of_unequal_mask_counts_give_the_same_update(bert):
    whole = batch(8)
    one, sums_one, _ = step(bert, [whole])
    rows = [slice(0, 2), slice(2, 4), slice(4, 8)]
    many, sums_many, _ = step(bert, [part(whole, r) for r in rows])
    assert torch.allclose(sums_one, sums_many, atol=1e-4)
    assert sums_one[COUNT] == 8 * 3 - 4
    assert sums_one[len(SUMS) + COUNT] == 8
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_dropout_depends_on_step_and_micro_batch_alone():
    torch.manual_seed(0)
    bert, whole = Bert(BertConfig(**{**CONFIG.__dict__, "dropout": 0.3})), batch(4)
    first = step(bert, [whole])[1]
    torch.manual_seed(123)
    assert torch.equal(first, step(bert, [whole])[1])
    assert not torch.equal(first, step(bert, [whole], dropout_step=1)[1])
    seeds = {dropout_seed(0, s, m) for s in range(50) for m in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_validation_leaves_the_model_as_it_was(bert):
    model = Pretraining(bert).train()
    before = [p.clone() for p in bert.parameters()]
    found = validate(model, [batch(4), batch(2, seed=1)], torch.float32, torch.device("cpu"))
    assert model.training
    assert bert.training
    assert found[len(SUMS) + COUNT] == 6
    assert all(torch.equal(a, b) for a, b in zip(before, bert.parameters(), strict=True))
    assert all(p.grad is None for p in bert.parameters())


def test_gradients_are_clipped_to_the_norm(bert):
    whole = batch(4)
    _, _, norm = step(bert, [whole], clip=1e-3)
    assert norm > 1e-3


def test_the_type_is_the_one_asked_for_or_the_faster_one_that_the_hardware_has(monkeypatch):
    cpu = torch.device("cpu")
    assert pick_dtype("float32", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    for native, slower, found in (
        (True, torch.float32, torch.bfloat16),
        (True, torch.bfloat16, torch.float32),  # as on a CPU with AVX512-BF16 whose AMX is hidden
        (False, torch.float32, torch.float32),
    ):
        precision._faster_on_cpu.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        monkeypatch.setattr(precision, "product", lambda device, dtype, size, slow=slower: lambda: 1 + (dtype == slow))
        assert pick_dtype("auto", cpu) == found
    precision._faster_on_cpu.cache_clear()


def test_measuring_the_machine_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    assert peak_flops(torch.device("cpu"), torch.float32, seconds=0.01) > 0
    assert torch.equal(before, torch.get_rng_state())


def test_a_step_under_bfloat16_autocast_is_close_to_float32(bert):
    whole = batch(8)
    sums = [
        validate(Pretraining(bert), [whole], dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16)
    ]
    assert means(sums[0])["loss"] == pytest.approx(means(sums[1])["loss"], rel=0.02)


def test_an_update_with_a_gradient_that_is_not_finite_is_left_out(bert):
    adam = optimizer.build(bert, lr=1e-2, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-6)
    model, poison = Pretraining(bert), [1.0]
    bert.pooler.weight.register_hook(lambda grad: grad * poison[0])

    def one():
        options = {"lr": 1e-2, "grad_clip": 1.0, "dtype": torch.float32, "seed": 0, "step": 0}
        sums, norm = train_step(model, adam, [batch(4)], first_micro_batch=0, global_batch=4, **options)
        state = copy.deepcopy((bert.state_dict(), adam.state_dict()["state"]))
        return sums, norm, state

    _, _, before = one()
    for bad in (math.nan, math.inf):
        poison[0] = bad
        sums, norm, after = one()
        assert not torch.isfinite(norm)
        assert sums.tolist() == [0.0] * 6
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    poison[0] = 1.0
    sums, norm, after = one()
    assert torch.isfinite(norm)
    assert sums[len(SUMS) + COUNT] == 4
    assert not torch.equal(after[0]["pooler.weight"], before[0]["pooler.weight"])


def test_a_gpu_without_memory_says_what_to_halve():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    sentence = out_of_memory(error, step=3, micro_batch=64, seq_len=512, checkpointing=False)
    assert all(word in sentence for word in ("step 3", "train.micro_batch=64", "T=512", "to 32", "2.00 GiB"))
    assert "train.gradient_checkpointing=true" in sentence
    last = out_of_memory(error, step=3, micro_batch=1, seq_len=512, checkpointing=True)
    assert "model.size" in last
    assert "gradient_checkpointing" not in last


def test_what_a_gpu_without_memory_raises():
    assert exhausted(torch.OutOfMemoryError("CUDA out of memory."))
    for text in (
        "CUDA error: out of memory\nCompile with",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "backend='inductor' raised: CUDA out of memory. Tried to allocate 2 GiB",
    ):
        assert exhausted(RuntimeError(text))
    assert not exhausted(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))


def test_what_cannot_be_compiled_runs_all_the_same():
    cpu, card = torch.device("cpu"), torch.device("cuda")
    assert [compiler.wanted("auto", device) for device in (cpu, card)] == [False, True]
    assert [compiler.wanted(setting, cpu) for setting in (True, False)] == [True, False]
    state = torch.random.get_rng_state()
    for error, words in ((None, ""), (RuntimeError("Cannot find a working\ntriton installation"), "working triton")):
        compiler.why_not.cache_clear()
        with mock.patch.object(compiler, "compiled", side_effect=error or (lambda module: module)):
            sentence = compiler.why_not(cpu)
        assert words in sentence
        assert bool(sentence) == bool(words)
        assert torch.equal(torch.random.get_rng_state(), state)
    compiler.why_not.cache_clear()


def test_a_streak_of_bad_steps_is_found_across_log_lines():
    def totals(first, *norms):
        return Totals(first, torch.zeros(6), 0, norms, [0] * len(norms))

    streak = Streak(3)
    assert streak.reached(totals(1, 1.0, math.nan, math.inf)) is None
    assert streak.reached(totals(4, math.nan, 1.0)) == 4
    streak = Streak(3)
    assert streak.reached(totals(1, math.nan, math.nan)) is None
    assert streak.reached(totals(3, 1.0, math.nan, math.nan)) is None
    found = totals(6, 2.0, math.nan)
    assert found.grad_norm == 2.0
    assert found.skipped == [False, True]
