"""patterns.from_mask_mod: exactly the pairs that a function admits, in time and memory that long sequences allow."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tessera import patterns
from tessera.pattern import mask_mod
from torch.nn.attention.flex_attention import create_mask

import torch

DOCUMENTS = torch.arange(200) // 37  # exactly as long as the sequence: reading past it is an error
NOISE = torch.rand(150, 200) < 0.02
REACH = torch.tensor([0, 40, 80])

MODS = {
    "sinks": lambda b, h, q, k: (q >= k) & ((q - k < 70) | (k < 4)),
    "documents": lambda b, h, q, k: (DOCUMENTS[q] == DOCUMENTS[k]) & (q >= k),
    "noise": lambda b, h, q, k: NOISE[q, k],  # no structure that something coarser would find
    "one pair": lambda b, h, q, k: (q == 149) & (k == 199),
    "all but one": lambda b, h, q, k: (q != 77) | (k != 131),
    "heads and batches": lambda b, h, q, k: (q - k).abs() <= REACH[h] + 16 * b,
    "nothing": lambda b, h, q, k: q < 0,
    "everything": lambda b, h, q, k: torch.ones_like(q, dtype=torch.bool),
    "integers": lambda b, h, q, k: (q % 3 == 0) * 2 * (k % 2),
}


# Parts of one block, of parts of a row, of several rows, and of all slabs.
@pytest.mark.parametrize("pairs", [1, 30_000, 1 << 18])
@pytest.mark.parametrize("block", [16, (32, 64), (256, 80), 256])
@pytest.mark.parametrize("name", MODS)
def test_exactly_what_the_function_admits(name, block, pairs, monkeypatch):
    monkeypatch.setattr(mask_mod, "_PAIRS", pairs)
    pattern = patterns.from_mask_mod(MODS[name], 150, 200, block=block, heads=3, batches=2)
    want = create_mask(MODS[name], 2, 3, 150, 200, device="cpu").bool()
    assert torch.equal(pattern.to_token_mask(), want)
    assert pattern == patterns.BlockPattern.from_token_mask(want, block=block)


def test_packing():
    masks = torch.rand(3, 32, 80) < 0.5
    masks[0] = True  # bit 63, the sign
    bits = torch.zeros(3, 32, 128, dtype=torch.int64)
    bits[..., :80] = masks
    assert torch.equal(mask_mod.pack(masks), (bits.view(3, 32, 2, 64) << torch.arange(64)).sum(-1))


def test_lengths_without_tokens():
    for lengths in ((0, 0), (0, 64), (64, 0)):
        assert patterns.from_mask_mod(MODS["sinks"], *lengths).num_blocks == 0


@pytest.mark.parametrize(
    "argument, error, of",
    [
        ("mask_mod", TypeError, lambda: patterns.from_mask_mod("causal", 64)),
        ("mask_mod", TypeError, lambda: patterns.from_mask_mod(lambda b, h, q, k: True, 64)),
        ("mask_mod", ValueError, lambda: patterns.from_mask_mod(lambda b, h, q, k: q * 0.5, 64)),
        ("mask_mod", ValueError, lambda: patterns.from_mask_mod(lambda b, h, q, k: torch.stack([q, k]) > 3, 64)),
        ("seqlen_q", ValueError, lambda: patterns.from_mask_mod(MODS["sinks"], -1)),
        ("block", ValueError, lambda: patterns.from_mask_mod(MODS["sinks"], 64, block=17)),
        ("heads", ValueError, lambda: patterns.from_mask_mod(MODS["sinks"], 64, heads=0)),
    ],
)
def test_errors_name_the_argument(argument, error, of):
    with pytest.raises(error, match=f"^{argument}: got .*; allowed: "):
        of()


def test_long_sequences():
    """16,384 tokens: at most 200 MB, also of those that the allocator loses between temporaries; the bar of a second is
    for a quiet machine, so time is bounded by ten."""
    script = """
import resource, time, torch
from tessera import patterns
torch.set_num_threads(1)
sinks = lambda b, h, q, k: (q >= k) & ((q - k < 1024) | (k < 4))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, begin = peak(), time.perf_counter()
pattern = patterns.from_mask_mod(sinks, 16384)
print((peak() - before) / 1024, time.perf_counter() - begin, pattern.num_blocks)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    megabytes, seconds, blocks = map(float, done.stdout.split())
    # Window and diagonal: nine blocks a row but for the first eight; of the rows past them, the first block too.
    assert blocks == sum(min(i + 1, 9) for i in range(128)) + (128 - 9)
    assert megabytes <= 200 and seconds <= 10
