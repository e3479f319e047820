"""torch-npu, imported when it is first asked for: the package may be there without Ascend's driver and libraries."""

import importlib
from functools import cache
from importlib.util import find_spec
from types import ModuleType

NO_AUTOLOAD = (
    "torch-npu is installed, but Ascend's driver or libraries (CANN) are not found; without an NPU set the environment "
    "variable TORCH_DEVICE_BACKEND_AUTOLOAD=0, or uninstall torch-npu; with one source CANN's set_env.sh first"
)

try:
    import torch
except RuntimeError as error:  # torch imports the backends that are installed, and ends with the first that fails
    if "backend extension" not in str(error):
        raise
    raise ImportError(f"import torch fails: {NO_AUTOLOAD}") from error


@cache
def missing() -> str | None:
    """The reason in one line why no NPU can be used here; None where torch-npu works."""
    if hasattr(torch, "npu"):
        return None
    if find_spec("torch_npu") is None:
        return "torch-npu is not installed; install the release that has the version of torch"
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        # OSError and ImportError: libraries of Ascend are missing; RuntimeError: torch has another accelerator.
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch-npu is installed but cannot be used ({said[0][:200]}); its release must be that of torch, " + (
            "and Ascend's driver and libraries (CANN) must be found: source their set_env.sh first"
        )
    return None if hasattr(torch, "npu") else "torch-npu is installed but gives torch no npu"


def driver() -> ModuleType:
    """`torch.npu`, which has the functions of torch.cuda. Raises RuntimeError with the line of `missing`."""
    if (reason := missing()) is not None:
        raise RuntimeError(reason)
    module: ModuleType = torch.npu  # type: ignore[attr-defined]
    return module


def device_count() -> int:
    """How many devices this process may use: those of ASCEND_RT_VISIBLE_DEVICES, or all; 0 where none can be used."""
    return 0 if missing() is not None else int(driver().device_count())


def is_available() -> bool:
    """Whether there is a device that can be used."""
    return missing() is None and bool(driver().is_available()) and device_count() > 0
