"""Both modules train on two NPUs, replicated and sharded, as one process does, and go on from a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Processes
from tiny import fit, new_module

NPUS = {"accelerator": "npu", "devices": 2}


def train(kind: str, sharded: bool, folder: str, steps: int, resume: str | None) -> tuple[list[float], list[str], int]:
    """The losses, the devices, and how many numbers of the model this process holds."""
    from osp.devices import choose_device
    from osp.parallel import ReplicatedStrategy, ShardedStrategy, local

    choose_device("npu")
    module = new_module(kind)
    strategy = ShardedStrategy() if sharded else ReplicatedStrategy()
    path = None if resume is None else Path(resume)
    record = fit(module, Path(folder), steps, resume=path, batch_size=1, strategy=strategy, **NPUS)
    held = sum(local(weight).numel() for weight in module.learned.parameters())
    return record.losses, sorted(record.devices), held


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], int]]:
    """The losses of one process on the CPU by module, and the numbers of the model."""
    found = {}
    for kind in ("vae", "denoiser"):
        module = new_module(kind)
        record = fit(module, tmp_path_factory.mktemp(kind), 3, accelerator="cpu", devices=1)
        found[kind] = record.losses, sum(weight.numel() for weight in module.learned.parameters())
    return found


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["denoiser", "vae"])
def test_two_devices_train_as_one_process_and_go_on(
    kind: str, sharded: bool, tmp_path: Path, processes: Processes, alone: dict[str, Any]
) -> None:
    first = processes.run(2, train, kind, sharded, str(tmp_path), 2, None, group=False)
    last = str(tmp_path / "last.ckpt")
    then = processes.run(2, train, kind, sharded, str(tmp_path), 3, last, group=False)
    assert [devices for _, devices, _ in first] == [["npu:0"], ["npu:1"]]
    losses, numbers = alone[kind]
    ours = first[0][0] + then[0][0]
    if kind == "denoiser":
        assert ours == pytest.approx(losses, rel=1e-4)
    else:  # once there is a discriminator, processes drop out units of their own
        assert ours[0] == pytest.approx(losses[0], rel=1e-4)
        whole = processes.run(2, train, kind, sharded, str(tmp_path / "whole"), 3, None, group=False)
        assert [run for run, _, _ in whole] == [a + b for (a, _, _), (b, _, _) in zip(first, then, strict=True)]
    held = [held for _, _, held in then]
    assert sum(held) == numbers * (1 if sharded else 2)
    if sharded:
        assert max(held) < 0.6 * numbers


def reduce_on_the_cpu() -> str:
    """The error of a collective over a tensor of the CPU."""
    import torch.distributed as dist

    from osp.devices import choose_device
    from osp.devices.npu import driver

    choose_device("npu")
    driver().set_device(int(__import__("os").environ["RANK"]))
    dist.init_process_group("hccl")
    total = torch.ones(1, device="npu")
    dist.all_reduce(total)
    assert total.item() == 2
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        return str(error)
    return ""


def test_collectives_take_tensors_of_the_device_only(processes: Processes) -> None:
    for said in processes.run(2, reduce_on_the_cpu, group=False):
        assert "npu" in said or "cpu" in said
