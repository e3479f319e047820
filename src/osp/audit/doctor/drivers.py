"""Whether the drivers of the accelerators go with what torch is built for."""

from collections.abc import Callable, Iterator

from osp.audit.doctor.conflicts import release
from osp.audit.doctor.result import Result, failed, not_applicable, passed, warning
from osp.audit.doctor.subject import Subject
from osp.devices.inventory import Drivers, find_drivers

_NPU = "torch-npu"
_NVIDIA = "https://pytorch.org has the commands for each CUDA version"


def check_drivers(subject: Subject) -> Iterator[Result]:
    """Lines for CUDA, NCCL, torch-npu and CANN."""
    found = find_drivers(subject.version(_NPU) is not None)
    yield cuda(found)
    yield nccl(found, subject.version)
    yield torch_npu(found, subject.version)
    yield cann(found, subject.version)


def cuda(found: Drivers) -> Result:
    """The driver against the CUDA version that torch is built for."""
    name = "drivers.cuda"
    if found.nvidia_driver is None and not found.usable_gpus:
        return not_applicable(name, "there is no NVIDIA driver")
    here = f"driver {found.nvidia_driver or '?'} for CUDA up to {found.cuda_driver or '?'}"
    if found.cuda_build is None:
        mend = f"install a torch that is built for CUDA ({_NVIDIA})"
        return failed(name, f"{here}, but torch is built without CUDA", mend)
    if found.cuda_driver and release(found.cuda_driver)[:1] < release(found.cuda_build)[:1]:
        mend = f"update the driver, or install a torch built for CUDA {release(found.cuda_driver)[0]} ({_NVIDIA})"
        return failed(name, f"{here}, and torch is built for {found.cuda_build}", mend)
    if not found.usable_gpus:
        mend = "look at nvidia-smi, CUDA_VISIBLE_DEVICES and the container's access to GPUs (docker run --gpus all)"
        return failed(name, f"{here}, but torch sees no GPU", mend)
    return passed(name, f"{here}; torch is built for {found.cuda_build}")


def nccl(found: Drivers, version: Callable[[str], str | None]) -> Result:
    """The NCCL that is loaded against the package that torch brought."""
    name = "drivers.nccl"
    if found.nccl is None:
        return not_applicable(name, "there is no GPU with NCCL")
    for package in ("nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        wanted = version(package)
        if wanted is not None and release(wanted)[:3] != release(found.nccl)[:3]:
            mend = "take other NCCLs out of LD_LIBRARY_PATH and LD_PRELOAD"
            return warning(name, f"{found.nccl} is loaded, not the {wanted} of {package}", mend)
    return passed(name, found.nccl)


def torch_npu(found: Drivers, version: Callable[[str], str | None]) -> Result:
    """The package for Ascend against torch."""
    name, ours, torch = "drivers.torch_npu", version(_NPU), version("torch") or "?"
    if ours is None:
        if not found.ascend_devices:
            return not_applicable(name, "there is no Ascend device, and torch-npu is not installed")
        mend = f"pip install torch-npu=={'.'.join(map(str, release(torch)))}"
        return failed(name, f"there are {found.ascend_devices} Ascend devices, and torch-npu is not installed", mend)
    if release(ours)[:3] != release(torch)[:3]:
        wanted = ".".join(map(str, release(torch)[:3]))
        mend = f"pip install torch-npu=={wanted}, or a torch of the same version as torch-npu"
        return failed(name, f"torch-npu {ours} does not go with torch {torch}; they must be the same", mend)
    if found.npu_error is not None:
        mend = "install CANN and load it (source /usr/local/Ascend/ascend-toolkit/set_env.sh)"
        return failed(name, f"torch-npu {ours} cannot be imported: {found.npu_error}", mend)
    if not found.usable_npus:
        mend = "look at npu-smi info, ASCEND_RT_VISIBLE_DEVICES and the container's access to /dev/davinci*"
        return failed(name, f"torch-npu {ours} sees no device", mend)
    return passed(name, f"torch-npu {ours} with torch {torch}, {found.usable_npus} devices")


def cann(found: Drivers, version: Callable[[str], str | None]) -> Result:
    """CANN, which brings HCCL; which torch-npu goes with which is in torch-npu's own table."""
    name = "drivers.cann"
    if version(_NPU) is None and not found.ascend_devices:
        return not_applicable(name, "there is no Ascend device")
    if found.cann is None:
        mend = "install CANN, load its set_env.sh, or say where it is in ASCEND_TOOLKIT_HOME"
        return failed(name, "CANN, with the operators and HCCL, is not found", mend)
    return passed(name, f"{found.cann}, with HCCL; compare it with the table of releases of torch-npu {version(_NPU)}")
