"""Videos made by several processes together: those of one process, up to rounding."""

from typing import Any

import pytest
import torch
from processes import Processes
from sampled import SIZE, made, refuses
from torch import Tensor

from osp.errors import UsageError
from osp.parallel.launch import on_devices
from osp.vae import Tiling

CPU = torch.device("cpu")
TILES = Tiling(24, 8)  # 2 x 3 of them in a frame


def all_made(*how: Any) -> tuple[Tensor, dict[str, int], int]:
    """The same in a process of the pool."""
    return made(CPU, how[0], how[1], True, *how[2:])


@pytest.mark.parametrize(("kind", "guidance"), [("cross", 3.0), ("joint", 1.0)])
def test_two_processes_make_the_video_of_one(processes: Processes, kind: str, guidance: float) -> None:
    alone, *_ = made(CPU, kind, guidance, False)
    for video, sent, decoded in processes.run(2, all_made, kind, guidance):
        torch.testing.assert_close(video, alone, rtol=0, atol=2e-4)
        assert ("guidance" in sent) == (guidance != 1)
        assert decoded == SIZE[0]  # each has decoded one of the two


@pytest.mark.parametrize(("count", "low"), [(2, False), (4, True)])
def test_processes_share_the_tiles_to_decode(processes: Processes, count: int, low: bool) -> None:
    alone, *_ = made(CPU, "cross", 3.0, False, TILES)
    whole, *_ = made(CPU, "cross", 3.0, False)
    assert (alone - whole).abs().max() > 0.01  # tiles see nothing beyond their edges
    for video, sent, decoded in processes.run(count, all_made, "cross", 3.0, TILES, low):
        torch.testing.assert_close(video, alone, rtol=0, atol=2e-4)
        assert sent["tiles"] > 0
        assert decoded == SIZE[0] * 2 * 6 // count


def test_four_processes_halve_guidance_and_share_the_tokens_of_each_half(processes: Processes) -> None:
    alone, *_ = made(CPU, "joint", 3.0, False)
    for video, sent, decoded in processes.run(4, all_made, "joint", 3.0):
        torch.testing.assert_close(video, alone, rtol=0, atol=2e-4)
        assert sent["guidance"] > 0
        assert decoded in (0, SIZE[0])


def test_processes_that_are_started_give_the_first_ones_result_or_the_first_error() -> None:
    video, *_ = on_devices(2, CPU, made, "cross", 3.0, True)
    alone, *_ = made(CPU, "cross", 3.0, False)
    torch.testing.assert_close(video, alone, rtol=0, atol=2e-4)
    with pytest.raises(UsageError, match="rank 1 refuses"):
        on_devices(2, CPU, refuses, 1)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="devices=2: torchrun has started 4 processes; give devices=4"):
        on_devices(2, CPU, refuses, 0)
