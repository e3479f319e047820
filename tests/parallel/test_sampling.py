"""Videos made by several processes together: those of one process, up to rounding."""

import pytest
import torch
from processes import Processes
from sampled import made, refuses
from torch import Tensor

from osp.errors import UsageError
from osp.parallel.launch import on_devices


def all_made(kind: str, guidance: float) -> tuple[Tensor, dict[str, int]]:
    """The same in a process of the pool."""
    return made(torch.device("cpu"), kind, guidance, True)


@pytest.mark.parametrize(("kind", "guidance"), [("cross", 3.0), ("joint", 1.0)])
def test_two_processes_make_the_video_of_one(processes: Processes, kind: str, guidance: float) -> None:
    alone, _ = made(torch.device("cpu"), kind, guidance, False)
    for video, sent in processes.run(2, all_made, kind, guidance):
        torch.testing.assert_close(video, alone, rtol=0, atol=2e-4)
        assert bool(sent) == (guidance != 1)


def test_four_processes_halve_guidance_and_share_the_tokens_of_each_half(processes: Processes) -> None:
    alone, _ = made(torch.device("cpu"), "joint", 3.0, False)
    for video, sent in processes.run(4, all_made, "joint", 3.0):
        torch.testing.assert_close(video, alone, rtol=0, atol=2e-4)
        assert sent["guidance"] > 0


def test_processes_that_are_started_give_the_first_ones_result_or_the_first_error() -> None:
    video, _ = on_devices(2, torch.device("cpu"), made, "cross", 3.0, True)
    alone, _ = made(torch.device("cpu"), "cross", 3.0, False)
    torch.testing.assert_close(video, alone, rtol=0, atol=2e-4)
    with pytest.raises(UsageError, match="rank 1 refuses"):
        on_devices(2, torch.device("cpu"), refuses, 1)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="devices=2: torchrun has started 4 processes; give devices=4"):
        on_devices(2, torch.device("cpu"), refuses, 0)
