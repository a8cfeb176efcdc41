"""Packed sequences give the numbers of padded ones, compiled or not, on a CPU or a GPU: vectors, losses, gradients.

Without pytest, Ray or pydantic: `benchmarks.gpu` calls these functions on machines that have none of them. On a GPU
float32 takes the plain attention, and bfloat16 the kernel.
"""

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from raybert.data.block import Columns, take
from raybert.data.packing import pack, packing_for
from raybert.data.spec import SampleSpec
from raybert.data.tensors import packed_to_torch, rows_of, to_torch
from raybert.model import compiler, optimizer, varlen
from raybert.model import layout as layouts
from raybert.model.bert import Bert, Layer
from raybert.model.config import BertConfig
from raybert.model.losses import Pretraining
from raybert.model.objective import Objective
from raybert.tokenizer import CLS_ID, NUM_TEXT_TOKENS, PAD_ID, SEP_ID
from raybert.train import checkpoint
from raybert.train.feed import Feed, choose_packing
from raybert.train.interval import Interval
from raybert.train.step import forward_sums, means, train_step, warm_up

DEVICE = torch.device(os.environ.get("RAYBERT_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
BACKEND = "inductor" if DEVICE.type == "cuda" else "aot_eager"
T = 48
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": T}
ORIGINAL, CONTRAST = SampleSpec(), SampleSpec(halves=True, next_sentence=False, bag_tokens=3, bag_of_neighbour=True)
OBJECTIVES = [(ORIGINAL, Objective()), (CONTRAST, Objective(pair="contrastive", bag_weight=0.5))]
ADAM = {"lr": 1e-3, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6}


def columns(samples: int, seed: int, longest: int = T) -> Columns:
    """Samples [CLS] A [SEP] B [SEP] of random lengths, 15 % of the text predicted."""
    rng = np.random.default_rng(seed)
    length = rng.integers(7, longest + 1, samples).astype(np.int32)
    cut = (3 + rng.integers(0, length - 6)).astype(np.int32)
    place, rows = np.arange(T), np.arange(samples)
    ids = rng.integers(0, NUM_TEXT_TOKENS, (samples, T))
    ids[:, 0], ids[rows, cut - 1], ids[rows, length - 1] = CLS_ID, SEP_ID, SEP_ID
    ids[place >= length[:, None]] = PAD_ID
    text = (place > 0) & (place != cut[:, None] - 1) & (place < length[:, None] - 1)
    positions = np.full((samples, 7), -1, np.int32)
    for row in rows:
        chosen = rng.permutation(np.flatnonzero(text[row]))[: max(1, round(0.15 * (length[row] - 3)))]
        positions[row, : len(chosen)] = np.sort(chosen)
    labels = np.where(positions >= 0, rng.integers(0, NUM_TEXT_TOKENS, positions.shape), PAD_ID)
    return {
        "input_ids": ids.astype(np.uint16),
        "cut": cut,
        "length": length,
        "masked_positions": positions,
        "masked_labels": labels.astype(np.uint16),
        "next_sentence_label": rng.integers(0, 2, samples).astype(np.int8),
        "index": np.arange(samples),
        "document": rng.integers(0, 3 * samples, samples),
    }


def pretraining(objective: Objective, dropout: float = 0.0, **size: float) -> Pretraining:
    torch.manual_seed(0)
    config = BertConfig(**{"dropout": dropout, "initializer_range": 0.2, **SIZE, **size})  # type: ignore[arg-type]
    return Pretraining(Bert(config), objective).to(DEVICE).train()


def gradients(model: torch.nn.Module, sums: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    sums[::3].sum().backward()
    found = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: gradient.float().clone() for name, gradient in found.items()}


def padded_sums(model: torch.nn.Module, parts: list[Columns], spec: SampleSpec) -> Tensor:
    return torch.stack([model(**to_torch(part, DEVICE, spec)) for part in parts]).sum(0)


def packed_sums(model: torch.nn.Module, parts: list[Columns], spec: SampleSpec, micro_batch: int) -> Tensor:
    groups = packed_to_torch(parts, DEVICE, packing_for(micro_batch, T, spec))
    return torch.stack([forward_sums(model, [group], None) for group in groups]).sum(0)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """The largest difference of each tensor against the largest value of it, which is 1 at least."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = float((found[name] - value).detach().abs().max()) / max(1.0, float(value.detach().abs().max()))
        assert difference <= tolerance, f"{name} differs by {difference:.2g}"


def test_losses_and_gradients_are_those_of_padded_rows():
    for spec, objective in OBJECTIVES:
        model = pretraining(objective)
        for seed, (samples, micro_batch) in enumerate([(1, 1), (1, 3), (5, 5), (16, 4), (12, 2), (18, 6)]):
            if spec.halves and micro_batch == 1:
                continue  # a contrast has no negatives
            whole = columns(samples, seed)
            parts = [take(whole, slice(at, at + micro_batch)) for at in range(0, samples, micro_batch)]
            expected, found = padded_sums(model, parts, spec), packed_sums(model, parts, spec, micro_batch)
            assert_equal({"sums": found}, {"sums": expected})
            assert_equal(gradients(model, found), gradients(model, expected))


def test_hidden_states_and_pooler_are_those_of_padded_rows():
    bert = pretraining(Objective()).bert
    for samples, room in ((1, 1), (7, 7), (5, 9)):
        part = columns(samples, samples)
        rows = to_torch(part, DEVICE, ORIGINAL)
        hidden, pooler = bert.encode(rows["input_ids"], rows["token_type_ids"], rows["attention_mask"])
        (group,) = packed_to_torch([part], DEVICE, packing_for(room, T, ORIGINAL))
        layout = layouts.packed(group["starts"], len(group["input_ids"]), T)
        found, vectors = bert.encode_packed(group["input_ids"], group["token_type_ids"], layout)
        expected = {"hidden": hidden[rows["attention_mask"].bool()], "pooler": pooler}
        count = len(expected["hidden"])
        assert_equal({"hidden": found[:count], "pooler": vectors[:samples]}, expected)


def test_the_room_beside_the_samples_changes_nothing():
    for spec, objective in OBJECTIVES:
        model, part = pretraining(objective), columns(3, 0)
        tight, wide = (packed_sums(model, [part], spec, micro_batch) for micro_batch in (3, 40))
        assert_equal({"sums": wide}, {"sums": tight})
        assert_equal(gradients(model, wide), gradients(model, tight))


def test_compiled_losses_and_gradients_are_the_same_and_shapes_are_few():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for spec, objective in OBJECTIVES:
        model = pretraining(objective)
        compiled = torch.compile(model, backend=BACKEND, dynamic=False)
        packing = packing_for(4, T, spec)
        for samples in (2, 4, 12) if objective.pair == "next_sentence" else (12,):
            whole = columns(samples, samples)
            parts = [take(whole, slice(at, at + 4)) for at in range(0, samples, 4)]
            expected, found = padded_sums(model, parts, spec), packed_sums(compiled, parts, spec, 4)
            assert_equal({"sums": found}, {"sums": expected})
            assert_equal(gradients(compiled, found), gradients(model, expected))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs <= len(packing.rungs), f"{graphs} graphs for {len(packing.rungs)} rungs"
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


def relative_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of all tensors as one vector."""
    difference = sum(float((found[name] - value).detach().square().sum()) for name, value in exact.items())
    return (difference / sum(float(value.detach().square().sum()) for value in exact.values())) ** 0.5


def has_kernel() -> bool:
    """False on GPUs that are too old for bfloat16's kernel. On a CPU the plain attention stands for it."""
    if DEVICE.type != "cuda" or torch.cuda.get_device_capability(DEVICE) < varlen.CAPABILITY:
        return DEVICE.type != "cuda"
    reason = varlen.why_not(DEVICE, torch.bfloat16, 64)
    assert not reason, reason
    return True


def test_bfloat16_is_close_to_float32():
    """On a GPU that has it this is the kernel, with heads of the usual 64."""
    if not has_kernel():
        return
    model, parts = pretraining(Objective(), hidden_size=128, initializer_range=0.02), [columns(12, 1)]
    exact = padded_sums(model, parts, ORIGINAL)
    expected = gradients(model, exact)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = packed_sums(model, parts, ORIGINAL, 12)
    assert abs(float((found[0] / exact[0]).detach()) - 1) <= 1e-2
    assert abs(float((found[3] / exact[3]).detach()) - 1) <= 1e-2
    error = relative_error(gradients(model, found), expected)
    assert error <= 1e-2, f"gradients differ by {error:.2g}"


def test_compiled_bfloat16_is_eager_bfloat16():
    """The combination that trains, on a GPU of the size at which its reductions are compiled as those of a real one."""
    if not has_kernel():
        return
    torch._dynamo.reset()
    size, samples = ({"hidden_size": 384, "num_attention_heads": 6}, 400) if DEVICE.type == "cuda" else ({}, 12)
    model, parts = pretraining(Objective(), initializer_range=0.02, **size), [columns(samples, 1)]
    compiled = torch.compile(model, backend=BACKEND, dynamic=False)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected, found = (packed_sums(each, parts, ORIGINAL, samples) for each in (model, compiled))
    assert relative_error({"": found}, {"": expected}) <= 1e-2
    error = relative_error(gradients(compiled, found), gradients(model, expected))
    assert error <= 2e-2, f"gradients differ by {error:.2g}"
    torch._dynamo.reset()


def test_the_kernel_is_the_plain_attention():
    """Of any lengths, with sequences without a token. On a CPU both are the plain one, beside a loop over sequences."""
    kernel = DEVICE.type == "cuda" and has_kernel()
    longest = 512 if kernel else 70  # of several of the kernel's tiles
    for dtype, tolerance in [(torch.float32, 1e-5)] + ([(torch.bfloat16, 1e-2)] if kernel else []):
        for seed in range(4):
            rng = np.random.default_rng(seed)
            lengths = rng.integers(0, longest + 1, 6)
            starts = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32, device=DEVICE)
            tokens = int(starts[-1])
            drawn = torch.tensor(rng.standard_normal((tokens, 3 * 128)), dtype=torch.float32, device=DEVICE).to(dtype)
            weights = torch.tensor(rng.standard_normal((tokens, 128)), dtype=torch.float32, device=DEVICE)
            mine, theirs = drawn.clone().requires_grad_(), drawn.float().requires_grad_()
            found = varlen.varlen_attention(mine, 2, layouts.packed(starts, tokens, longest), 0.0).float()
            exact = torch.cat([one_by_one(own) for own in theirs.split(lengths.tolist()) if len(own)])
            assert relative_error({"": found}, {"": exact}) <= tolerance
            pair = [torch.autograd.grad((out * weights).sum(), of)[0] for out, of in ((found, mine), (exact, theirs))]
            assert relative_error({"": pair[0].float()}, {"": pair[1]}) <= tolerance


def test_attention_s_dropout_leaves_out_probabilities_and_enlarges_the_others():
    """With unit vectors for values the outputs are the probabilities. On a CPU they are the plain attention's."""
    rate, heads, width = 0.25, 2, 64
    dtype = torch.bfloat16 if DEVICE.type == "cuda" and has_kernel() else torch.float32
    lengths = [64, 1, 17, 0, 40]
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=DEVICE)
    rng, tokens = np.random.default_rng(0), sum(lengths)
    drawn = torch.tensor(rng.standard_normal((tokens, 3, heads, width)), dtype=torch.float32, device=DEVICE)
    place = torch.cat([torch.arange(length, device=DEVICE) for length in lengths])
    drawn[:, 2] = torch.eye(width, device=DEVICE)[place][:, None]
    qkv = drawn.to(dtype).flatten(1)
    weights = torch.tensor(rng.standard_normal((tokens, heads * width)), dtype=torch.float32, device=DEVICE)
    layout = layouts.packed(starts, tokens, width)
    torch.manual_seed(3)
    mine, whole = qkv.clone().requires_grad_(), qkv.float().requires_grad_()
    found = varlen.varlen_attention(mine, heads, layout, rate).float()
    kept = found.detach() != 0
    probabilities = torch.cat([one_by_one(own) for own in whole.split(lengths) if len(own)])
    possible = probabilities > 0
    share = float((kept & possible).sum() / possible.sum())
    assert abs(share - (1 - rate)) < 5 * (rate * (1 - rate) / int(possible.sum())) ** 0.5
    exact = probabilities * kept / (1 - rate)
    assert relative_error({"": found}, {"": exact}) <= (1e-5 if dtype == torch.float32 else 1e-2)
    # Gradients for queries and keys; those for values would need the mask beside them alone.
    pair = [torch.autograd.grad((out * weights).sum(), of)[0] for out, of in ((found, mine), (exact, whole))]
    ours, plain = (gradient.float().view(tokens, 3, -1)[:, :2] for gradient in pair)
    assert relative_error({"": ours}, {"": plain}) <= (1e-5 if dtype == torch.float32 else 2e-2)


def test_the_kernels_operators_take_what_they_are_given():
    """Shapes alone, since a CPU has no kernel: forward, backward and compiled, with dropout and without."""
    starts = torch.zeros(5, dtype=torch.int32, device="meta")
    place = torch.zeros(40, dtype=torch.long, device="meta")
    layout = layouts.Packed(starts, 64, place, place)
    for rate in (0.0, 0.1):

        def attend(qkv: Tensor, rate: float = rate) -> Tensor:
            split = qkv.view(40, 3, 2, 64).unbind(1)
            return varlen._kernel(*split, layout, rate).reshape(40, -1)

        for called in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
            qkv = torch.zeros(40, 3 * 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
            mixed = called(qkv)
            assert mixed.shape == (40, 128)
            mixed.sum().backward()
            assert qkv.grad is not None
            assert qkv.grad.shape == qkv.shape


def one_by_one(own: Tensor) -> Tensor:
    """Attention of one sequence: (n, 3 x 128) with two heads -> (n, 128)."""
    query, key, value = own.view(len(own), 3, 2, 64).permute(1, 2, 0, 3)
    mixed = torch.softmax(query @ key.transpose(1, 2) / 8, -1) @ value
    return mixed.transpose(0, 1).reshape(len(own), 128)


def test_dropout_depends_on_the_step_and_the_group_alone():
    model = pretraining(Objective(), dropout=0.3)
    (group,) = packed_to_torch([columns(4, 0)], DEVICE, packing_for(4, T))
    first, again, other = (forward_sums(model, [group], [seed]) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_layers_computed_again_have_the_same_gradients():
    """Dropout included, which has to be drawn again as it was; and compiled."""
    parts = [columns(4, seed) for seed in range(2)]
    (group,) = packed_to_torch(parts, DEVICE, packing_for(8, T))
    for dropout in (0.0, 0.3):
        model = pretraining(Objective(), dropout=dropout)
        for batch in ([group], [to_torch(part, DEVICE) for part in parts][: 2 if DEVICE.type == "cpu" else 1]):
            seeds = [11, 12][: len(batch)]
            kept = gradients(model, forward_sums(model, batch, seeds))
            model.bert.gradient_checkpointing = True
            with mock.patch.object(Layer, "forward", autospec=True, side_effect=Layer.forward) as calls:
                again = gradients(model, forward_sums(model, batch, seeds))
            model.bert.gradient_checkpointing = False
            assert_equal(again, kept)
            assert calls.call_count == 2 * len(model.bert.layers)
    model = pretraining(Objective())
    kept = gradients(model, forward_sums(model, [group], None))
    model.bert.gradient_checkpointing = True
    compiled = torch.compile(model, backend=BACKEND, dynamic=False)
    assert_equal(gradients(compiled, forward_sums(compiled, [group], None)), kept)
    torch._dynamo.reset()


def test_compiled_layers_computed_again_drop_by_the_step_s_seed():
    model = pretraining(Objective(), dropout=0.3)
    (group,) = packed_to_torch([columns(4, 0)], DEVICE, packing_for(4, T))
    model.bert.gradient_checkpointing = True
    compiled = compiler.compiled(model) if DEVICE.type == "cuda" else torch.compile(model, backend=BACKEND)
    first, other, again = (gradients(compiled, forward_sums(compiled, [group], [seed])) for seed in (5, 6, 5))
    assert_equal(again, first)
    assert any(not torch.equal(other[name], value) for name, value in first.items())
    torch._dynamo.reset()


def step(
    model: Pretraining, groups: list[dict[str, Tensor]], samples: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    # Adam's first update is nearly the gradient's sign, and some gradients are rounding alone.
    plain = torch.optim.SGD(model.bert.parameters(), fused=True)
    keys = {"seed": 0, "step": 0, "first_micro_batch": 0, "global_batch": samples, "objective": model.objective}
    return train_step(model, plain, groups, lr=0.1, grad_clip=1e9, dtype=torch.float32, **keys)[0]


def test_a_step_on_packed_groups_is_the_step_on_micro_batches():
    for spec, objective in OBJECTIVES:
        model, whole = pretraining(objective), columns(24, 7, longest=16)
        other, parts = copy.deepcopy(model), [take(whole, slice(at, at + 4)) for at in range(0, 24, 4)]
        groups = packed_to_torch(parts, DEVICE, packing_for(4, T, spec))
        assert len(groups) < len(parts)
        found = means(step(model, groups, 24), objective)
        expected = means(step(other, [to_torch(part, DEVICE, spec) for part in parts], 24), objective)
        assert all(abs(found[name] - value) <= 1e-5 * max(1, abs(value)) for name, value in expected.items())
        weights = [{name: p.detach() for name, p in each.named_parameters()} for each in (model, other)]
        assert_equal(*weights)


def test_a_snapshot_holds_the_weights_of_before_the_next_update():
    model = pretraining(Objective())
    adam = optimizer.build(model.bert, **ADAM)
    keys = {"lr": 1e-2, "grad_clip": 1.0, "dtype": torch.float32, "seed": 0, "first_micro_batch": 0, "global_batch": 4}
    (group,) = packed_to_torch([columns(4, 0)], DEVICE, packing_for(4, T))
    train_step(model, adam, [group], step=0, **keys)
    before = {name: value.clone() for name, value in model.bert.state_dict().items()}
    moment = adam.state_dict()["state"][0]["exp_avg"].clone()
    snap = checkpoint.snapshot(model, adam)
    checkpoint.Gate(adam).hold(snap)
    train_step(model, adam, [group], step=1, **keys)
    snap.wait()
    assert all(torch.equal(snap.weights[name], value.cpu()) for name, value in before.items())
    assert snap.state is not None
    assert torch.equal(snap.state["optimizer"]["state"][0]["exp_avg"], moment.cpu())
    assert not torch.equal(model.bert.pooler.weight, before["pooler.weight"])


def test_only_the_update_after_a_snapshot_waits_for_its_copy():
    weight = torch.nn.Parameter(torch.ones(3))
    plain = torch.optim.SGD([weight], lr=0.1)
    gate, copied, stream = checkpoint.Gate(plain), mock.Mock(), mock.Mock()
    with mock.patch.object(torch.cuda, "current_stream", return_value=stream):
        for held in (False, True, False):
            if held:
                gate.hold(checkpoint.Snapshot({}, BertConfig(), None, None, copied))
            weight.sum().backward()
            plain.step()
    stream.wait_event.assert_called_once_with(copied)


class HostReads(TorchFunctionMode):
    """Counts the methods that read values on the host and are no operators."""

    READING = ("tolist", "cpu", "numpy", "__array__")

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        by_tensor = name == "repeat_interleave" and any(isinstance(value, Tensor) for value in args[1:2])
        if name in self.READING or by_tensor:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts the operators for whose result the host waits on a GPU."""

    WAITING = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            value is not None and value.dtype == torch.bool for value in args[1]
        )
        if name in self.WAITING or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """What the host waits for inside."""
    with Waits() as operators, HostReads(operators.found):
        yield operators.found


def test_no_step_waits_for_the_device():
    for spec, objective in OBJECTIVES:
        model, feed = pretraining(objective, dropout=0.1), Feed(DEVICE, spec, packing_for(4, T, spec))
        parts, interval = [columns(4, seed) for seed in range(3)], Interval(0, objective, DEVICE, 1)
        adam = optimizer.build(model.bert, **ADAM)
        keys = {"lr": 1e-3, "grad_clip": 1.0, "dtype": torch.float32, "seed": 0, "step": 0, "first_micro_batch": 0}
        with waits() as found:
            groups = feed(parts)
            sums, norm = train_step(model, adam, groups, global_batch=12, objective=objective, **keys)
            interval.add(parts, sums, norm)
        assert not found, f"the step waits for {dict(found)}"


def test_what_waits_for_the_device_is_seen():
    values = torch.ones(3, device=DEVICE)
    reads: dict[str, Callable[[], object]] = {
        "tolist": values.tolist,
        "item": values[0].item,
        "cpu": values.cpu,
        "truth": lambda: bool(values[0] > 0),
        "choice": lambda: values[values > 0],
        "repeated": lambda: values.repeat_interleave(torch.ones(3, dtype=torch.long, device=DEVICE)),
        "places": values.nonzero,
    }
    for name, read in reads.items():
        with waits() as found:
            read()
        assert found, f"{name} waits and is not seen"


def rows_in(group: Columns) -> list[tuple[object, ...]]:
    """What is packed of every real row: ids, types, positions and labels, and what it has one of."""
    found = []
    for row in np.flatnonzero(group["next_sentence_label"] != -100):
        start, stop = group["starts"][row : row + 2]
        own = (group["masked_positions"] >= start) & (group["masked_positions"] < stop)
        wide = [
            group[name][row].tolist() for name in ("next_sentence_label", "document", "bag_labels") if name in group
        ]
        flat = [group["input_ids"][start:stop], group["token_type_ids"][start:stop]]
        flat += [group["masked_positions"][own] - start, group["masked_labels"][own]]
        found.append((*map(tuple, flat), str(wide)))
    return found


def rows_of_parts(parts: list[Columns], names: tuple[str, ...]) -> list[tuple[object, ...]]:
    """The same of micro-batches' rows."""
    found = []
    for part in parts:
        for row, length in enumerate(part["length"]):
            wanted = part["masked_positions"][row] >= 0
            types = (np.arange(length) >= part["cut"][row]).astype(int)
            flat = [part["input_ids"][row, :length], types]
            flat += [part["masked_positions"][row][wanted], part["masked_labels"][row][wanted]]
            found.append((*map(tuple, flat), str([part[name][row].tolist() for name in names])))
    return found


def test_every_row_is_packed_once_and_no_sequence_is_longer_than_t():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        spec, micro_batch = (ORIGINAL, CONTRAST)[seed % 2], int(rng.integers(1, 9))
        parts = [rows_of(columns(micro_batch, 100 * seed + i), spec) for i in range(rng.integers(1, 12))]
        packing = packing_for(micro_batch, T, spec)
        groups = pack(parts, packing)
        assert len(groups) <= len(parts)
        of_part: dict[int, set[int]] = {}
        for number, group in enumerate(groups):
            starts, real = group["starts"], int((group["next_sentence_label"] != -100).sum())
            assert (np.diff(starts) >= 0).all()
            assert np.diff(starts).max() <= T
            assert starts[-1] == len(group["input_ids"])
            assert any(starts[-1] == rung.tokens for rung in packing.rungs)
            wanted = group["masked_positions"] >= 0
            assert (group["masked_positions"][wanted] < starts[real]).all()
            assert ((group["masked_labels"] >= 0) == wanted).all()
            for part in group.get("part", np.array([-1])):
                of_part.setdefault(int(part), set()).add(number)
        of_part.pop(-1, None)
        assert all(len(numbers) == 1 for numbers in of_part.values()), "negatives are torn apart"
        names = ("next_sentence_label", "document", "bag_labels") if spec.halves else ("next_sentence_label",)
        assert sorted(row for group in groups for row in rows_in(group)) == sorted(rows_of_parts(parts, names))
        again = pack(parts, packing)
        assert all(
            np.array_equal(one[name], other[name]) for one, other in zip(groups, again, strict=True) for name in one
        )


def test_groups_are_full_of_rows_that_are_more_than_half_as_long_as_they_may_be():
    for micro_batch, count in [(8, 512), (16, 256), (64, 1024)]:
        rng = np.random.default_rng(micro_batch)
        whole = columns(count, micro_batch)
        whole["length"] = rng.integers(T // 2, T + 1, count).astype(np.int32)
        whole["masked_positions"][whole["masked_positions"] >= whole["length"][:, None]] = -1
        parts = [take(whole, slice(at, at + micro_batch)) for at in range(0, count, micro_batch)]
        groups = pack(parts, packing_for(micro_batch, T))
        filled = whole["length"].sum() / sum(len(group["input_ids"]) for group in groups)
        assert filled >= 0.9, f"{filled:.2f} of micro-batches of {micro_batch}"
        assert len(groups) <= 0.85 * len(parts)


def test_rungs_have_few_sequences_and_empty_groups_no_loss():
    for rung in packing_for(64, 512).rungs:
        assert rung.sequences <= 4 * rung.tokens / 512 + rung.tokens / 512 + 10
    for spec, objective in OBJECTIVES:
        model, feed = pretraining(objective), Feed(DEVICE, spec, packing_for(4, T, spec))
        groups = feed.rungs()
        assert [len(group["input_ids"]) for group in groups] == [rung.tokens for rung in packing_for(4, T, spec).rungs]
        shapes = [{name: (value.shape, value.dtype) for name, value in group.items()} for group in groups]
        real = feed([columns(4, seed) for seed in range(5)])
        assert all({name: (value.shape, value.dtype) for name, value in group.items()} in shapes for group in real)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for group in groups:
            sums = forward_sums(model, [group], None)
            assert not sums.detach().any()
            assert not any(gradient.any() for gradient in gradients(model, sums).values())
        model.zero_grad()
        warm_up(model, groups[0], torch.float32, objective)
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_belongs_to_no_sample_is_not_gathered_from_one_row():
    """Zeros too are added up one after the other on the way back."""
    (group,) = packed_to_torch([columns(3, 0)], DEVICE, packing_for(40, T))
    layout = layouts.packed(group["starts"], len(group["input_ids"]), T)
    assert torch.bincount(layout.first).max() <= 2
    lengths = group["starts"].diff()
    assert torch.equal(layout.first[lengths > 0], group["starts"][:-1][lengths > 0].long())


def test_a_device_without_the_kernel_says_why():
    assert "no GPU" in varlen.why_not(torch.device("cpu"), torch.bfloat16, 64)
    card = torch.device("cuda")
    names = {"get_device_capability": (7, 5), "get_device_name": "Tesla T4"}
    with mock.patch.multiple(torch.cuda, **{name: mock.Mock(return_value=value) for name, value in names.items()}):
        assert "7.5" in varlen.why_not(card, torch.float16, 64)
        assert "float32" in varlen.why_not(card, torch.float32, 64)
    names["get_device_capability"] = (9, 0)
    with mock.patch.multiple(torch.cuda, **{name: mock.Mock(return_value=value) for name, value in names.items()}):
        assert "head size" in varlen.why_not(card, torch.bfloat16, 20)
        with mock.patch.object(varlen, "_trial", side_effect=RuntimeError("no kernel image")):
            assert "no kernel image" in varlen.why_not(card, torch.bfloat16, 64)
        with mock.patch.object(varlen, "_trial", return_value=0.5):
            assert "0.5" in varlen.why_not(card, torch.bfloat16, 64)
        with mock.patch.object(varlen, "_trial", return_value=0.004):
            assert varlen.why_not(card, torch.bfloat16, 64) == ""


def test_packing_is_chosen_by_what_the_device_can_do():
    run = {"micro_batch": 4, "seq_len": T, "spec": ORIGINAL, "dtype": torch.bfloat16, "head_size": 64}
    cpu, card = torch.device("cpu"), torch.device("cuda")
    assert choose_packing("auto", device=cpu, **run) == (None, "")
    assert choose_packing(True, device=cpu, **run) == (packing_for(4, T), "")
    for reason, packing in (("", packing_for(4, T)), ("the card is old", None)):
        with mock.patch.object(varlen, "why_not", return_value=reason):
            found, sentence = choose_packing("auto", device=card, **run)
        assert found == packing
        assert reason in sentence
        assert bool(sentence) == bool(reason)
    assert choose_packing(False, device=card, **run) == (None, "")


def test_a_feed_counts_its_shapes_and_how_full_they_are():
    feed = Feed(DEVICE, ORIGINAL, packing_for(4, T))
    parts = [columns(4, seed) for seed in range(3)]
    groups = feed(parts)
    feed.send(parts)  # which is not counted
    feed.rungs()
    filled = sum(int(part["length"].sum()) for part in parts) / sum(len(group["input_ids"]) for group in groups)
    found = feed.lap()
    assert found["filled"] == filled
    assert found["shapes"] == len({len(group["input_ids"]) for group in groups})
    assert feed.lap() == {}
    padded = Feed(DEVICE, ORIGINAL, None)
    assert len(padded(parts)) == 3
    assert padded.lap() == {}
