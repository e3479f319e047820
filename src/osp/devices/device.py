"""Choosing a device, and what is done to one as a whole."""

import ctypes
import gc
import platform
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from osp.errors import UsageError

KNOWN = ("cpu", "cuda", "npu")


def choose_device(name: str) -> torch.device:
    """`auto` (an NPU, else a GPU, else the CPU), `cpu`, `cuda`, `cuda:N`, `npu` or `npu:N` -> the device.

    Raises UsageError for another name, and for a device that this machine does not have.
    """
    if name == "auto":
        return torch.device(_best_kind())
    kind = str(name).split(":")[0]
    if kind == "npu" and (reason := _npu_missing()) is not None:
        raise UsageError(f"device={name}: {reason}")
    try:
        if kind not in KNOWN:
            raise RuntimeError(f"no device of ours: {kind}")
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device={name}: is not known; choose auto, cpu, cuda, cuda:N, npu or npu:N") from error
    count = 1 if kind == "cpu" else backend(device).device_count()
    if (device.index or 0) >= count:
        raise UsageError(f"device={name}: this machine has {count} {kind.upper()} devices")
    return device


def accelerator_device(accelerator: str) -> torch.device:
    """The device that Lightning's name of an accelerator means, where `gpu` is `cuda`. Raises UsageError as above."""
    return choose_device("cuda" if accelerator == "gpu" else accelerator)


def placed_trainer(accelerator: str, strategy: Any, devices: Any) -> dict[str, Any]:
    """The arguments `accelerator` and `strategy` of a Trainer, where `auto` is decided here, as Lightning never takes
    NPUs.

    A strategy that is no name but settings is left out. Raises UsageError for an NPU that is not there.
    """
    chosen = _best_kind() if accelerator == "auto" else accelerator
    if chosen == "npu":
        choose_device(chosen)
        from osp.devices import npu  # noqa: F401  (it makes the names known to Lightning, and brings it)

        if strategy == "auto":
            strategy = "npu" if devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1) else "npu_ddp"
    return {"accelerator": chosen} | ({"strategy": strategy} if isinstance(strategy, str) else {})


def _npu_missing() -> str | None:
    """The reason why there is no NPU; None where torch-npu is there, which gives torch the name."""
    if not hasattr(torch, "npu") and find_spec("torch_npu") is None:
        return "needs the package torch-npu (pip install 'osp[npu]'), which is not installed here"
    from osp.devices import npu  # here: it brings Lightning

    return npu.missing()


def _best_kind() -> str:
    if _npu_missing() is None and backend(torch.device("npu")).is_available():
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def backend(device: torch.device) -> ModuleType:
    """torch.cuda or torch.npu, which have the same functions."""
    return getattr(torch, device.type)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type != "cpu":
        backend(device).synchronize(device)


def free_unused(device: torch.device) -> None:
    """Give memory that nothing uses any more back to the system, or on an accelerator to the driver."""
    gc.collect()
    if device.type != "cpu":
        backend(device).empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if platform.system() == "Linux" else None:
        trim(0)  # glibc keeps what was freed between blocks still in use


def describe_device(device: torch.device) -> str:
    """The accelerator's name, or the processor's with the number of threads that torch runs there."""
    if device.type != "cpu":
        return str(backend(device).get_device_name(device))
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
