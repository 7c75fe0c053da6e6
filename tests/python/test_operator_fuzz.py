"""Operators as anybody can call them, past Python's checks: right calls with some arguments replaced by random, extreme
and mismatched ones. In child processes: no signal, no hang, and what is refused is refused in words that name an
argument."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys

import pytest
import tessera
from torch.utils._python_dispatch import TorchDispatchMode

import torch

CHILDREN, CALLS = 2, 400


class Recorder(TorchDispatchMode):
    """The calls of our operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tessera":
            self.calls.append((func, tuple(args), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def right_calls():
    """One of each operator that these reach."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 48, 2, 16, generator=generator) for _ in range(3))
    p = tessera.patterns.random(48, block=16, density=0.5, heads=2)
    causal = tessera.patterns.local_window(48, block=16, density=0.6, causal=True)
    bitmaps = tessera.BlockPattern.from_token_mask(torch.rand(48, 48, generator=generator) > 0.5, block=16)
    with Recorder() as recorder:
        qg = q.clone().requires_grad_()
        for pattern in (p, causal, bitmaps):
            tessera.block_sparse_attention(qg, k, v, pattern, attn_bias=torch.zeros(1, 1, 48, 48)).sum().backward()
        tessera.block_sparse_attention(q, k, v, p, softcap=2.0, alibi_slopes=torch.ones(2), sinks=torch.zeros(2))
        tessera.block_sparse_attention(q, k, v, p, key_lengths=torch.tensor([48, 20]), return_lse=True)
        tessera.decode(q[:, :1], k, v, tessera.patterns.dense(1, 48, block=16), key_lengths=torch.tensor([40, 48]))
        cu = torch.tensor([0, 20, 48])
        lengths = [tessera.patterns.dense(n, block=16) for n in (20, 28)]
        tessera.varlen_attention(qg[0], k[0], v[0], cu, cu, lengths).sum().backward()
        tessera.dilated_attention(qg, k, v, segment_lengths=[16, 48], dilation_rates=[1, 3]).sum().backward()
        out, lse = tessera.block_sparse_attention(q, k, v, p, return_lse=True)
        tessera.merge(out, lse, out, lse)
        tessera.attention_weights(q, k, p)
        tessera.analysis.quality(q, k, v, causal)
        mass = tessera.analysis.attention_mass(q, k, block=16, causal=True)
        mass.coverage(causal), mass.oracle_pattern(0.4), mass.oracle_coverage(0.4), mass.oracle_density(0.9)
        mass.bound_pattern(0.4), mass.bound_density(0.9), mass.optimize(0.5, ["local_window"])
        causal.statistics(), causal.transpose(), p | bitmaps, p & bitmaps, p - bitmaps, ~p, causal.without_causality()
        p.slice(rows=slice(0, 2)), causal.for_queries(16, 32), bitmaps.to_json(), p.ascii(), bitmaps._repr_png_()
        tessera.BlockPattern.stack_heads([causal, causal]), tessera.BlockPattern.from_json(p.to_json())
    return list({call[0]: call for call in recorder.calls}.values())


NUMBERS = [-(2**63), -(2**32), -1, 0, 1, 3, 15, 16, 17, 48, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**62 + 1, 2**63 - 1]
REALS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, 3e38, 1e300, float("nan"), float("inf"), float("-inf")]
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.uint8,
]


def other_tensor(rng, like):
    if like is not None and rng.random() < 0.6:  # nearly right
        kind = rng.randrange(8)
        if kind == 0:
            return like.to(rng.choice(DTYPES))
        if kind == 1:
            return like.transpose(0, -1) if like.dim() > 1 else like[None]
        if kind == 2:
            return like[..., :-1] if like.dim() and like.shape[-1] else like
        if kind == 3:
            return like.flatten()
        if kind == 4:
            return like.to("meta")
        if kind == 5 and like.dtype in (torch.int32, torch.int64) and like.numel():
            changed = like.clone().flatten()
            changed[rng.randrange(changed.numel())] = rng.choice(NUMBERS) % 2**31 - rng.randrange(2) * 2**31
            return changed.view(like.shape)
        if kind == 6:
            return like[:1].expand(like.shape) if like.dim() and like.shape[0] else like
        return like[:0] if like.dim() else like[None]
    shape = [rng.choice([0, 1, 2, 3, 16, 48]) for _ in range(rng.randrange(5))]
    return torch.zeros(shape, dtype=rng.choice(DTYPES))


def other(rng, kind, value):
    kind = str(kind)
    if kind.startswith("Optional") and rng.random() < 0.3:
        return None
    if "List[Tensor]" in kind or "List[Optional[Tensor]]" in kind:
        some = list(value or [])
        return rng.choice([[], some[:-1], some + [torch.zeros(3)], [other_tensor(rng, None)], some * 2])
    if "Tensor" in kind:
        return other_tensor(rng, value if isinstance(value, torch.Tensor) else None)
    if "List[int]" in kind:
        some = list(value or [])
        if some and rng.random() < 0.7:
            some[rng.randrange(len(some))] = rng.choice(NUMBERS)
            return some
        return [rng.choice(NUMBERS) for _ in range(rng.randrange(10))]
    if "List[float]" in kind:
        return [rng.choice(REALS) for _ in range(rng.randrange(4))]
    if "bool" in kind:
        return not value
    if "int" in kind:
        return rng.choice(NUMBERS)
    if "float" in kind or "number" in kind:
        return rng.choice(REALS)
    if "str" in kind:
        return rng.choice(["", "dense", "x" * 1000, "\0", "even", "{}", '{"heads":[[[[]]]]}'])
    return value


def fuzz(seed, note):
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    torch.set_num_threads(2)
    calls = right_calls()
    assert len(calls) >= 30, sorted(c[0].name() for c in calls)
    rng = random.Random(seed)
    refused = ran = 0
    for number in range(CALLS):
        func, args, kwargs = rng.choice(calls)
        given = {a.name: value for a, value in zip(func._schema.arguments, args)} | kwargs
        torch.manual_seed(seed * CALLS + number)
        for _ in range(rng.choice([1, 1, 2, 3])):
            argument = rng.choice(func._schema.arguments)
            if argument.name != "path":
                given[argument.name] = other(rng, argument.type, given.get(argument.name))
        os.pwrite(note, f"{number} {func.name()}".ljust(100).encode(), 0)
        try:
            with torch.no_grad():
                func(**{n: x.detach().clone() if isinstance(x, torch.Tensor) else x for n, x in given.items()})
            ran += 1
        except MemoryError:
            refused += 1
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as e:
            refused += 1
            words = str(e).splitlines()[0]
            names = [a.name for a in func._schema.arguments]
            assert "There were no tensor arguments" not in words, (func.name(), words)
            named = any(re.search(rf"\b{re.escape(n)}\b", words) for n in names) or "Meta" in words or "meta" in words
            if isinstance(e, ValueError):
                assert named or re.match(r"(sequence \d+: )?[a-z_0-9]+(\[\d+\])?[:.]", words), (func.name(), words)
    print(ran, refused)


@pytest.mark.parametrize("seed", range(CHILDREN))
def test_no_call_ends_the_process(seed, tmp_path):
    note = tmp_path / "note"
    note.write_bytes(b"")
    program = f"""
import os, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_operator_fuzz
test_operator_fuzz.fuzz({seed}, os.open({str(note)!r}, os.O_WRONLY))
"""
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.fail(f"hangs in call {note.read_text()}")
    assert done.returncode == 0, f"call {note.read_text()}\n{done.stderr[-3000:]}"
    ran, refused = map(int, done.stdout.split())
    assert ran + refused == CALLS and refused > CALLS // 10 and ran > CALLS // 20
