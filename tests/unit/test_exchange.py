"""Gradients that travel as bfloat16, through a real process group of one rank."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raybert.train.exchange import compress_gradients


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
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
