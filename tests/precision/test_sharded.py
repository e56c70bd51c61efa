"""Ternary weights over two processes: one scale for all of a matrix, whoever holds which rows."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from plait.ops.quant import quantize_ternary
from plait.precision.linear import Linear
from plait.precision.ternary import BITLINEAR


def compare(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    w, x = torch.randn(16, 8), torch.randn(4, 8)
    w[:8] *= 5  # the rows of one process are larger than those of the other
    codes, descale = quantize_ternary(distribute_tensor(w, init_device_mesh("cpu", (2,)), [Shard(0)]))
    whole_codes, whole_descale = quantize_ternary(w)
    assert torch.equal(codes.full_tensor(), whole_codes)  # type: ignore[attr-defined]
    torch.testing.assert_close(descale.full_tensor(), whole_descale)  # type: ignore[attr-defined]
    layers = []
    for sharded in (False, True):
        layer = Linear(8, 16, number_format=BITLINEAR)
        layer.weight.data.copy_(w)
        y = (fully_shard(torch.nn.Sequential(layer)) if sharded else layer)(x)
        y.square().sum().backward()
        layers.append((y.detach(), layer.weight.grad))
    (plain, grad), (ours, sharded_grad) = layers
    assert torch.equal(ours, plain) and torch.equal(sharded_grad.full_tensor(), grad)
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_mean_of_a_sharded_matrix_is_over_all_of_it() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(compare, (port,), nprocs=2)
