"""The hardware and drivers that there are, asked without using them."""

import ctypes
import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from osp.devices.device import backend, describe_device

VISIBLE = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
"""The variables that hide devices from a process."""

_NVIDIA = Path("/proc/driver/nvidia/version")
_ASCEND = Path("/dev")
_CANN = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
_CANN_FOLDERS = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann")


@dataclass(frozen=True)
class Drivers:
    """The drivers of a machine's accelerators; None: not here, or not known.

    Args:
        cuda_build: the CUDA version that torch is built for.
        cuda_driver: the newest CUDA version that the driver can run.
        nvidia_driver: the version of the kernel's module.
        nccl: the version of NCCL that torch has.
        npu_error: why torch_npu cannot be imported.
        cann: the version of Ascend's CANN.
        ascend_devices: device files of Ascend.
        usable: devices that torch can use, by kind.
    """

    cuda_build: str | None = None
    cuda_driver: str | None = None
    nvidia_driver: str | None = None
    nccl: str | None = None
    npu_error: str | None = None
    cann: str | None = None
    ascend_devices: int = 0
    usable: Mapping[str, int] | None = None

    @property
    def usable_gpus(self) -> int:
        """GPUs that torch can use."""
        return (self.usable or {}).get("cuda", 0)

    @property
    def usable_npus(self) -> int:
        """NPUs that torch can use."""
        return (self.usable or {}).get("npu", 0)


def find_drivers(has_torch_npu: bool) -> Drivers:
    """The drivers of this machine; torch_npu is imported if it is installed."""
    error = _import_error("torch_npu") if has_torch_npu else None
    npus = int(backend(torch.device("npu")).device_count()) if has_torch_npu and error is None else 0
    return Drivers(
        cuda_build=torch.version.cuda,
        cuda_driver=_cuda_driver(),
        nvidia_driver=_nvidia_driver(),
        nccl=_nccl(),
        npu_error=error,
        cann=_cann(),
        ascend_devices=len([*_ASCEND.glob("davinci[0-9]*")]),
        usable={"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0, "npu": npus},
    )


def all_devices(device: torch.device) -> list[torch.device]:
    """A device itself if it has a number or is the CPU, else all of its kind that this process sees."""
    if device.type == "cpu" or device.index is not None:
        return [device]
    return [torch.device(device.type, index) for index in range(backend(device).device_count())]


def total_memory(device: torch.device) -> int | None:
    """Bytes of an accelerator's memory; of the CPU those of the machine, None if it does not say."""
    if device.type != "cpu":
        return int(backend(device).mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def name_and_capability(device: torch.device) -> str:
    """The device's name, and of an NVIDIA GPU the version of its instructions, which kernels are compiled for."""
    name = describe_device(device)
    if device.type != "cuda":
        return name
    major, minor = torch.cuda.get_device_capability(device)
    return f"{name} (sm_{major}{minor})"


def not_built_for(device: torch.device) -> str | None:
    """Why this torch has no kernels for a GPU; None: it has, or nobody can tell."""
    if device.type != "cuda" or not (built := torch.cuda.get_arch_list()):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    known = [tuple(map(int, found.groups())) for one in built if (found := re.match(r"sm_(\d+)(\d)", one))]
    intermediate = any(one.startswith("compute_") for one in built)
    fits = any(one[0] == major and one[1] <= minor for one in known)
    return None if fits or intermediate else f"torch has kernels for {', '.join(built)}, not for sm_{major}{minor}"


def _cuda_driver() -> str | None:
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):  # no driver, or one without this call
        return None
    return None if failed else f"{version.value // 1000}.{version.value % 1000 // 10}"


def _nvidia_driver() -> str | None:
    try:
        found = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", _NVIDIA.read_text())
    except OSError:
        return None
    return found[1] if found else "unknown"


def _nccl() -> str | None:
    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # of its libraries, or of its versions
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def _cann() -> str | None:
    folders = [os.environ[name] for name in _CANN if os.environ.get(name)]
    for folder in map(Path, (*folders, *_CANN_FOLDERS)):
        for file in (*folder.glob("*_toolkit_install.info"), *folder.glob("*/ascend_toolkit_install.info")):
            if found := re.search(r"^version=(\S+)", file.read_text(errors="replace"), re.MULTILINE):
                return found[1]
        for file in (folder / "version.cfg", folder / "version.info"):
            if file.exists() and (found := re.search(r"(\d+\.\d+[\w.]*)", file.read_text(errors="replace"))):
                return found[1]
    return None
