"""Gradients that travel as bfloat16, through a real process group of one rank."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raybert.data.packing import packing_for
from raybert.data.tensors import packed_to_torch
from raybert.model import optimizer
from raybert.model.bert import Bert
from raybert.model.losses import Pretraining
from raybert.train.exchange import compress_gradients
from raybert.train.ledger import sum_over_ranks
from raybert.train.step import all_reduce_sums, forward_sums, train_step
from tests.unit import test_packed as packed
from tests.unit.test_step import CONFIG, batch


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_gradients_travel_as_bfloat16_and_arrive_as_float32():
    torch.manual_seed(0)
    model, data = nn.Linear(20, 20), torch.randn(5, 20)
    plain = copy.deepcopy(model)
    plain(data).square().sum().backward()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    compress_gradients(wrapped)
    wrapped(data).square().sum().backward()
    for ours, exact in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert torch.equal(ours.grad, exact.grad.bfloat16().float())
        assert not torch.equal(ours.grad, exact.grad)


def test_a_model_with_no_one_to_exchange_with_is_left_alone():
    compress_gradients(nn.Linear(2, 2))


@pytest.mark.usefixtures("one_rank")
def test_a_rank_whose_group_is_taken_away_does_not_go_on_alone():
    """Ray Train takes it away while it ends the workers; one still at a step would train on its part of the batch."""
    bert = Bert(CONFIG)
    adam = optimizer.build(bert, lr=1e-3, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-6)
    model = DistributedDataParallel(Pretraining(bert))
    keys = {"lr": 1e-3, "grad_clip": 1.0, "dtype": torch.float32, "seed": 0, "step": 0, "first_micro_batch": 0}
    train_step(model, adam, [batch(2)], global_batch=2, **keys)
    before = copy.deepcopy(bert.state_dict())
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="process group"):
        train_step(model, adam, [batch(2)], global_batch=4, **keys)
    for name, value in bert.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(ValueError, match="process group"):
        all_reduce_sums(torch.zeros(6), world_size=2)
    with pytest.raises(ValueError, match="process group"):
        sum_over_ranks([1], torch.device("cpu"), world_size=2)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("spec", "objective"), packed.OBJECTIVES)
def test_a_compiled_model_exchanges_the_gradients_of_a_plain_one(spec, objective, again):
    """As a run on several GPUs has it, and in more buckets than one: torch cuts the graph at their ends."""
    model = packed.pretraining(objective, hidden_size=128).to("cpu")
    groups = packed_to_torch([packed.columns(4, 0)], torch.device("cpu"), packing_for(4, packed.T, spec))
    expected = packed.gradients(model, forward_sums(model, groups, None))
    model.bert.gradient_checkpointing = again
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    wrapped = DistributedDataParallel(compiled, gradient_as_bucket_view=True, bucket_cap_mb=1)
    found = packed.gradients(wrapped, forward_sums(wrapped, groups, None))
    torch._dynamo.reset()
    packed.assert_equal({name.removeprefix("module._orig_mod."): value for name, value in found.items()}, expected)
