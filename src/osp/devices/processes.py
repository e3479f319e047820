"""Plain values that the processes of a run tell each other."""

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from osp.devices.device import backend, describe_device


def gathered(value: Any) -> list[Any]:
    """The plain values of all processes, by rank; every process has to ask. Of a single process it is its own."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def this_process(device: torch.device) -> dict[str, Any]:
    """The place of this process, as plain values: host, process, device, its name, and its memory in GiB."""
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "device": str(device),
        "name": describe_device(device),
        "memory_gib": _memory(device),
    }


def _memory(device: torch.device) -> float | None:
    """All memory of the device, in GiB; of a CPU that of the machine."""
    if device.type != "cpu":
        return round(backend(device).mem_get_info(device)[1] / (1 << 30), 2)
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    total = next((int(line.split()[1]) for line in lines if line.startswith("MemTotal:")), None)
    return None if total is None else round(total / (1 << 20), 2)
