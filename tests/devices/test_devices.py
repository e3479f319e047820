"""Choosing a device, and measuring on it."""

import time
from pathlib import Path

import pytest
import torch

from osp.devices import (
    PeakMemory,
    choose_device,
    count_flops,
    describe_device,
    fast_precision,
    matmul_peak,
    measure,
)
from osp.errors import UsageError
from osp.vae.layers import CausalConv3d, FrameAttention

CPU = torch.device("cpu")
MB = 1_000_000


@pytest.mark.parametrize("name", ["gpu", "cpu:0:0", "meta", "npu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_told(name: str) -> None:
    with pytest.raises(UsageError, match=f"device={name}"):
        choose_device(name)


def test_a_device_by_its_name() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert f"{torch.get_num_threads()} thread" in describe_device(CPU)


@pytest.mark.parametrize(("has_amx", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_cpu_is_fast_in_bfloat16_if_it_has_tiles(
    has_amx: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert fast_precision(CPU) == precision


@pytest.mark.parametrize("resets", [True, False])
def test_peak_memory_is_that_of_the_block(resets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not tell the memory of a process as it changes")
    if not resets:
        monkeypatch.setattr(measure, "_can_reset", lambda: False)
    with PeakMemory(CPU) as memory:
        kept = torch.ones(50 * MB)
        time.sleep(0.1)  # a machine with other work to do samples late
        del kept
    assert memory.taken == pytest.approx(200 * MB, abs=10 * MB)
    assert memory.peak > 200 * MB
    with PeakMemory(CPU) as memory:
        pass
    assert memory.taken is not None
    assert memory.taken < 10 * MB


def test_memory_freed_before_the_block_does_not_hide_what_it_takes() -> None:
    if PeakMemory(CPU).how.startswith("the largest resident set since"):
        pytest.skip("this system tells only the peak since the process began")
    blocks = [torch.ones(25_000) for _ in range(1000)]  # small enough to lie in the heap
    del blocks[:-1]  # the last one keeps the heap from shrinking by itself
    with PeakMemory(CPU) as memory:
        again = [torch.ones(25_000) for _ in range(500)]
    assert len(again) + len(blocks) == 501
    assert memory.taken == pytest.approx(50 * MB, abs=10 * MB)


def test_without_proc_there_is_the_peak_of_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "_PROCESS", tmp_path)
    with PeakMemory(CPU) as memory:
        pass
    assert memory.peak > 10 * MB
    assert memory.taken is None


def test_flops_by_hand() -> None:
    with torch.device("meta"):
        convolution, attention = CausalConv3d(3, 5, (3, 3, 3)), FrameAttention(32, norm="group")
        video, frames = torch.empty(2, 3, 4, 6, 8), torch.empty(1, 32, 2, 4, 4)
    assert count_flops(convolution, video) == 2 * (3 * 3 * 3) * 3 * 5 * (2 * 4 * 6 * 8)
    positions = 4 * 4
    assert count_flops(attention, frames) == 2 * 2 * (4 * positions * 32 * 32 + 2 * positions * positions * 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_rate_is_found_in_time(dtype: torch.dtype) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    assert matmul_peak(CPU, dtype, seconds=0.1) > 1e8
    assert torch.backends.cuda.matmul.allow_tf32 == before
