"""DDP and FSDP on two gloo ranks: gradients of a model with block-sparse attention equal those of one process."""

from __future__ import annotations

import datetime
import os
import tempfile

import pytest
import tessera
import torch.distributed as dist
import torch.multiprocessing as mp
from tessera import patterns
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import torch
from torch import Tensor, nn

RANKS, BATCH, SEQLEN, EMBED, HEADS = 2, 4, 128, 64, 4


class Block(nn.Module):
    """Attention over a pattern with projections of its own, and a learned bias of each kept block."""

    def __init__(self) -> None:
        super().__init__()
        self.pattern = patterns.dilated_sparse(SEQLEN, block=32, density=0.5, causal=True)
        self.qkv, self.out = nn.Linear(EMBED, 3 * EMBED), nn.Linear(EMBED, EMBED)
        self.block_bias = nn.Parameter(torch.randn(1, 1, self.pattern.num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        return x + self.out(
            tessera.block_sparse_attention(q, k, v, self.pattern, causal=True, block_bias=self.block_bias).flatten(2)
        )


def _model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(Block(), Block())


def _data() -> Tensor:
    return torch.randn(BATCH, SEQLEN, EMBED, generator=torch.Generator().manual_seed(4))


def _gradients(kind: str, rank: int) -> dict[str, Tensor]:
    mine = _data().chunk(RANKS)[rank]
    if kind == "ddp":
        model: nn.Module = DistributedDataParallel(_model())
    else:
        model = _model()
        for block in model:
            fully_shard(block)
        fully_shard(model)
    model(mine).square().mean().backward()
    whole = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        grad = p.grad.full_tensor() if kind == "fsdp" else p.grad
        whole[name.removeprefix("module.")] = grad
    return whole


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/group", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60)
    )
    try:
        for kind in ("ddp", "fsdp"):
            torch.save(_gradients(kind, rank), f"{folder}/{kind}.{rank}.pt")
        dist.barrier()  # nobody leaves while another one still talks
    finally:
        dist.destroy_process_group()
    # Without the interpreter's end: seldom a rank was aborted ("terminate called without an active exception"),
    # presumably there and by a thread of torch's that still ran.
    os._exit(0)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as path:
        mp.spawn(_rank, (path,), nprocs=RANKS, join=True)
        yield path


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_equal_one_process(folder, kind):
    model = _model()
    model(_data()).square().mean().backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    for rank in range(RANKS):
        got = torch.load(f"{folder}/{kind}.{rank}.pt")
        assert got.keys() == want.keys()
        for name, grad in got.items():
            torch.testing.assert_close(grad, want[name], atol=1e-5 * want[name].abs().max().item(), rtol=1e-4)
