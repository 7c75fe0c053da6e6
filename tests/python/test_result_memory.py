"""Memory of large results: kept for the next call, never shared by two living tensors."""

from __future__ import annotations

import gc
import os
import threading

import tessera

import torch

SEQLEN, HEADS, DIM = 1024, 32, 64  # 8 MiB in fp32: the least that is kept


def inputs(heads: int = HEADS, **options) -> list[torch.Tensor]:
    return [torch.randn(1, SEQLEN, heads, DIM, **options) for _ in range(3)]


def attend(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tessera.block_sparse_attention(*tensors, tessera.patterns.local_window(SEQLEN, SEQLEN, block=64, window=64))


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_freed_memory_serves_the_next_result():
    tensors = inputs()
    first = attend(tensors)
    place, expected = first.data_ptr(), first.clone()
    del first
    second = attend(tensors)
    assert second.data_ptr() == place
    third = attend(tensors)
    assert third.data_ptr() != place
    torch.testing.assert_close(second, expected)
    torch.testing.assert_close(third, expected)


def test_results_are_ordinary_tensors():
    out = attend(inputs())
    assert out.is_contiguous() and out.untyped_storage().nbytes() == out.nbytes
    expected = out.clone()
    view = out[:, :3]
    del out
    torch.testing.assert_close(view, expected[:, :3])
    out = attend(inputs())
    out.untyped_storage().resize_(2 * out.nbytes)
    out.resize_(2, SEQLEN, HEADS, DIM).fill_(1)
    shared = attend(inputs()).share_memory_()
    assert shared.is_shared() and shared.isfinite().all()


def test_little_is_kept():
    large = inputs(heads=512)  # results of 128 MiB
    attend(large)
    gc.collect()
    before = resident()
    out = attend(large)
    assert resident() - before > out.nbytes // 2
    del out
    assert resident() - before < 16 << 20


def test_threads():
    tensors = inputs()
    expected = attend(tensors)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(10):
            if not torch.equal(attend(tensors), expected):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_profiler_sees_them():
    tensors = inputs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = attend(tensors)
    assert max(event.cpu_memory_usage for event in profile.key_averages()) >= out.nbytes


def test_a_child_has_its_own():
    tensors = inputs()
    out = attend(tensors)
    expected = out.clone()
    del out
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # as workers of a DataLoader do
        ok = torch.equal(attend(tensors), expected)
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    torch.testing.assert_close(attend(tensors), expected)
