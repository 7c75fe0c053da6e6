"""Tessera beside PyTorch, side by side in one process: the table of figures of the README.

    python3 bench/pytorch_table.py [--only WORD ...] [--seconds 2] [--program build/release/cli/tessera]

Both sides of a row get the same tensors ([B, H, S, D] in memory, as SDPA and FlexAttention like them best) and take
turns, so that both see the same machine; each has the median of its turns. Ratios are "how
many times the other one's time" for speed (more is better) and ours / theirs for overhead and memory (less is better).
Without --program there is nothing to measure the overhead of Python against. --only takes words of the names of rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

Call = Callable[[], Any]
MEMORY_SEQLEN, MEMORY_DENSITY = 32768, 0.02


def take_turns(*calls: Call, seconds: float, least: int = 5) -> list[float]:
    """Median seconds of each, measured in turns for about `seconds` in all, after one turn that does not count."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    start = time.perf_counter()
    while len(taken[0]) < least or time.perf_counter() - start < seconds:
        for call, times in zip(calls, taken):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return [statistics.median(times) for times in taken]


class Table:
    def __init__(self, only: list[str], seconds: float) -> None:
        self.only, self.seconds = only, seconds
        print("| case | Tessera | compared with | ratio | bar |\n|---|---|---|---|---|", flush=True)

    def wants(self, name: str) -> bool:
        return not self.only or any(word.lower() in name.lower() for word in self.only)

    def row(
        self, name: str, ours: str, theirs: str, ratio: float | None, bar: float | None, less: bool = False
    ) -> None:
        shown = "" if ratio is None else f"{ratio:.2f} x" if ratio < 100 else f"{ratio:.0f} x"
        sign = "<=" if less else ">="
        met = ratio is None or bar is None or (ratio <= bar if less else ratio >= bar)
        print(
            f"| {name} | {ours} | {theirs} | {shown} | "
            + ("" if bar is None else f"{sign} {bar:g} x{'' if met else ': missed'}")
            + " |",
            flush=True,
        )

    def faster(self, name: str, ours: Call, theirs: Call, who: str, bar: float) -> None:
        """Our time against theirs; the bar is how many times faster."""
        if not self.wants(name):
            return
        a, b = take_turns(ours, theirs, seconds=self.seconds)
        self.row(name, text(a), f"{who} {text(b)}", b / a, bar)


def text(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.1f} us"
        if seconds < 1e-3
        else f"{seconds * 1e3:.2f} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )


def machine() -> str:
    import torch

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def qkv(seqlen: int, heads: int, head_dim: int, dtype: Any, gradient: bool = False) -> tuple[Any, Any, Any]:
    """Three tensors [1, heads, seqlen, head_dim]."""
    import torch

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, seqlen, head_dim).to(dtype).requires_grad_(gradient) for _ in range(3))
    return q, k, v


def backward_of(function: Call, inputs: tuple[Any, Any, Any]) -> Call:
    """The backward pass alone: the graph is made once and kept."""
    import torch

    out = function()
    seed = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, seed, retain_graph=True)


def both_passes(function: Call, inputs: tuple[Any, Any, Any]) -> Call:
    import torch

    seed = torch.ones_like(function())
    return lambda: torch.autograd.grad(function(), inputs, seed)


def attention(inputs: tuple[Any, Any, Any], pattern: Any, **options: Any) -> Call:
    import tessera

    return lambda: tessera.block_sparse_attention(*inputs, pattern, layout="bhsd", **options)


def sdpa(inputs: tuple[Any, Any, Any], **options: Any) -> Call:
    import torch

    return lambda: torch.nn.functional.scaled_dot_product_attention(*inputs, **options)


def overhead(table: Table, program: str | None) -> None:
    import tessera

    import torch

    size = {"seq": 4096, "heads": 8, "head-dim": 64, "density": 0.1, "block": 128}
    if program:
        pattern = tessera.patterns.dilated_sparse(4096, 4096, block=128, density=0.1)
        for name, which, bar in (("forward", "fwd", 1.03), ("forward+backward", "fwdbwd", 1.05)):
            name = f"Python call, S=4096 H=8 D=64 density .1, {name}"
            if not table.wants(name):
                continue
            q, k, v = (torch.randn(1, 4096, 8, 64, requires_grad=which == "fwdbwd") for _ in range(3))
            function = lambda: tessera.block_sparse_attention(q, k, v, pattern)
            call = both_passes(function, (q, k, v)) if which == "fwdbwd" else function
            command = [
                program,
                "bench",
                "--pass",
                which,
                "--dtype",
                "fp32",
                "--pattern",
                "dilated_sparse",
                "--repeat",
                "7",
                "--layout",
                "bshd",
                "--threads",
                str(torch.get_num_threads()),
                "--format",
                "json",
            ]
            command += [word for key, value in size.items() for word in (f"--{key}", str(value))]
            ours, core = [], []
            for _ in range(10):  # the machine changes with time: in turns here as well
                core.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout)[0]["seconds"])
                ours += take_turns(call, seconds=0.3)
            a, b = min(ours), min(core)
            table.row(name, text(a), f"the core alone {text(b)}", a / b, bar, less=True)
    name = "smallest call, S=64 H=1 D=64"
    if table.wants(name):
        inputs = qkv(64, 1, 64, torch.float32)
        one = tessera.patterns.dense(64, 64, block=64)
        a, b = take_turns(attention(inputs, one), sdpa(inputs), seconds=table.seconds, least=2000)
        table.row(name, text(a), f"SDPA {text(b)}", a / b, 3, less=True)


def dense(table: Table) -> None:
    import tessera

    import torch

    pattern = tessera.patterns.dense(4096, 4096, block=128)
    for dtype, what, forward_bar, backward_bar in (
        (torch.float32, "fp32", 1.15, 1.15),
        (torch.bfloat16, "bf16", 2, 1.35),
    ):
        for head_dim in (64, 128):
            name = f"dense, S=4096 H=8 D={head_dim} {what}"
            inputs = qkv(4096, 8, head_dim, dtype)
            table.faster(f"{name} forward", attention(inputs, pattern), sdpa(inputs), "SDPA", forward_bar)
            table.faster(
                f"{name} causal",
                attention(inputs, pattern, causal=True),
                sdpa(inputs, is_causal=True),
                "SDPA",
                forward_bar,
            )
            if table.wants(f"{name} backward"):
                inputs = qkv(4096, 8, head_dim, dtype, True)
                table.faster(
                    f"{name} backward",
                    backward_of(attention(inputs, pattern), inputs),
                    backward_of(sdpa(inputs), inputs),
                    "SDPA",
                    backward_bar,
                )


def sparse(table: Table) -> None:
    import tessera

    import torch

    for name, seqlen, masked in (
        ("density .1 against dense, S=8192 H=8 D=64 fp32", 8192, False),
        ("density .1 against SDPA with a bool mask, S=4096 H=8 D=64 fp32", 4096, True),
    ):
        if not table.wants(f"{name} forward") and not table.wants(f"{name} backward"):
            continue
        pattern = tessera.patterns.dilated_sparse(seqlen, seqlen, block=128, density=0.1)
        mask = token_mask(pattern) if masked else None
        for part in ("forward", "backward"):
            inputs = qkv(seqlen, 8, 64, torch.float32, part == "backward")
            ours, theirs = attention(inputs, pattern), sdpa(inputs, attn_mask=mask)
            if part == "backward":
                ours, theirs = backward_of(ours, inputs), backward_of(theirs, inputs)
            table.faster(f"{name} {part}", ours, theirs, "SDPA", 10)


def kept_blocks(pattern: Any) -> Any:
    """bool [rows, cols] of a pattern of one head without bitmaps."""
    import torch

    rows = -(-pattern.seqlen_q // pattern.block_q)
    kept = torch.zeros(rows, -(-pattern.seqlen_k // pattern.block_k), dtype=torch.bool)
    counts = torch.as_tensor(pattern.indptr).diff()[:rows].long()
    kept[torch.repeat_interleave(torch.arange(rows), counts), torch.as_tensor(pattern.indices).long()] = True
    return kept


def token_mask(pattern: Any) -> Any:
    return kept_blocks(pattern).repeat_interleave(pattern.block_q, 0).repeat_interleave(pattern.block_k, 1)


def flex(table: Table) -> None:
    import tessera

    import torch

    if not table.wants("FlexAttention"):
        return
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    for density in (0.1, 1.0):
        make = lambda: (
            tessera.patterns.dilated_sparse(4096, 4096, block=128, density=density)
            if density < 1
            else tessera.patterns.dense(4096, 4096, block=128)
        )
        pattern = make()
        kept = kept_blocks(pattern)

        def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
            return kept[q // 128, k // 128]

        make_mask = lambda: create_block_mask(mask_mod, None, None, 4096, 4096, "cpu", BLOCK_SIZE=128)
        table.faster(
            f"mask against FlexAttention's, S=4096 density {density:g}", make, make_mask, "create_block_mask", 100
        )
        block_mask = make_mask()
        for dtype, what, bar in ((torch.float32, "fp32", 1.75), (torch.bfloat16, "bf16", 5)):
            for head_dim in (64, 128):
                name = f"density {density:g} against FlexAttention compiled, S=4096 H=8 D={head_dim} {what} forward"
                inputs = qkv(4096, 8, head_dim, dtype)
                try:
                    with torch.no_grad():
                        table.faster(
                            name,
                            attention(inputs, pattern),
                            lambda: compiled(*inputs, block_mask=block_mask),
                            "FlexAttention",
                            bar,
                        )
                except Exception as error:  # what torch.compile throws depends on the machine's compiler
                    table.row(name, "", f"does not run here: {str(error).splitlines()[0][:80]}", None, bar)


def decode(table: Table) -> None:
    import tessera

    import torch

    name = "decode, 32 heads on 8, 16384 keys D=128"
    for dtype, what in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        if not table.wants(f"{name} {what}"):
            continue
        q = torch.randn(1, 32, 1, 128).to(dtype)
        _, k, v = qkv(16384, 8, 128, dtype)
        pattern = tessera.patterns.dense(1, 16384, block=128)
        table.faster(f"{name} {what}", attention((q, k, v), pattern), sdpa((q, k, v), enable_gqa=True), "SDPA", 6)


def memory_child() -> None:
    """Prints bytes at the peak of forward+backward above what was there before q, k, v, and what the tensors hold."""
    import tessera

    import torch

    warm = qkv(256, 8, 64, torch.float32, True)  # threads, allocator, kernels
    attention(warm, tessera.patterns.dense(256, 256, block=128))().sum().backward()
    pattern = tessera.patterns.dilated_sparse(MEMORY_SEQLEN, MEMORY_SEQLEN, block=128, density=MEMORY_DENSITY)
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    q, k, v = (torch.randn(1, MEMORY_SEQLEN, 8, 64, requires_grad=True) for _ in range(3))
    out, lse = tessera.block_sparse_attention(q, k, v, pattern, return_lse=True)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones(1).expand_as(out).contiguous())
    with open("/proc/self/status") as file:  # not ru_maxrss: a child begins with its parent's
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
    tensors = (q, k, v, out, out, lse, *grads)  # out twice: its gradient is the caller's
    print(json.dumps({"peak": peak - before, "tensors": sum(t.numel() * t.element_size() for t in tensors)}))


def child(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


def memory(table: Table) -> None:
    name = f"peak memory, forward+backward, {MEMORY_SEQLEN} tokens density {MEMORY_DENSITY}"
    if table.wants(name):
        got = json.loads(child(__file__, "--memory-child"))
        table.row(
            name,
            f"{got['peak'] / 2**20:.0f} MiB",
            f"q, k, v, out, gradients, lse {got['tensors'] / 2**20:.0f} MiB",
            got["peak"] / got["tensors"],
            1.25,
            less=True,
        )


def imports(table: Table) -> None:
    name = "import time over torch's"
    if table.wants(name):
        program = "import time, torch; a = time.perf_counter(); import tessera; print(time.perf_counter() - a)"
        taken = statistics.median(float(child("-c", program)) for _ in range(7))
        table.row(name, text(taken), "bar: 0.15 s" + ("" if taken <= 0.15 else ", missed"), None, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="rows whose name holds one of these")
    parser.add_argument("--seconds", type=float, default=2, help="for each row")
    parser.add_argument("--program", help="the program `tessera`, for the core's own time")
    parser.add_argument("--memory-child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_child:
        memory_child()
        return
    print(machine() + "\n")
    table = Table(arguments.only, arguments.seconds)
    overhead(table, arguments.program)
    for rows in (dense, sparse, flex, decode, memory, imports):
        rows(table)


if __name__ == "__main__":
    main()
