"""Processes that are started for several devices end together, also where one dies before they have met."""

import multiprocessing
import threading
import time

import pytest
import torch
import torch.distributed as dist

from osp.errors import DataError
from osp.parallel.launch import on_devices

CPU = torch.device("cpu")


def number(own: torch.device) -> int:
    return dist.get_rank()


def test_one_that_is_killed_before_all_have_met_ends_the_others() -> None:
    before = {*multiprocessing.active_children()}
    started: list[multiprocessing.process.BaseProcess] = []

    def kill_the_second() -> None:
        while len(started) < 2:
            time.sleep(0.01)
            started[:] = [process for process in multiprocessing.active_children() if process not in before]
        max(started, key=lambda process: process.pid or 0).kill()

    threading.Thread(target=kill_the_second, daemon=True).start()
    with pytest.raises(DataError, match="devices=2: the process of device 1 ended without a word"):
        on_devices(2, CPU, number)
    assert not any(process.is_alive() for process in started)


def test_processes_that_do_not_find_each_other_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(key, value)

    def never_met(*args: object, **kwargs: object) -> None:
        raise dist.DistStoreError("Timed out after 1801 seconds\nwaiting for clients")

    monkeypatch.setattr(dist, "init_process_group", never_met)
    with pytest.raises(DataError, match=r"do not find each other \(Timed out after 1801 seconds waiting for clients\)"):
        on_devices(2, CPU, number)
