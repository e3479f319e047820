"""The devices themselves, and the machine around them: memory, disks, limits, processors, clock."""

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from osp.audit.doctor.result import Result, failed, not_applicable, passed, warning
from osp.audit.doctor.subject import Subject
from osp.devices.inventory import VISIBLE, name_and_capability, not_built_for, total_memory
from osp.devices.measure import available_memory

_GIB = 1 << 30
_PREFETCH = 2  # batches that a worker reads ahead
_BATCH = 93 * 3 * 352 * 640  # bytes of a batch of one clip of v1.3, 93 frames of 352x640
_SHM = Path("/dev/shm")
_CLOCK = 5.0  # seconds that a file system's clock may be apart


def check_devices(subject: Subject) -> Iterator[Result]:
    """A line for each device, and one for the variables that hide devices."""
    for device in subject.devices:
        yield _device(device)
    hidden = {name: os.environ[name] for name in VISIBLE if name in os.environ}
    told = ", ".join(f"{name}={value}" for name, value in hidden.items())
    yield passed("devices.visible", told or "no variable hides a device", measured=hidden)


def check_host(subject: Subject) -> Iterator[Result]:
    """Lines for memory, disks, shared memory, open files, processors and clock."""
    yield _memory(subject)
    yield disk("host.disk_runs", subject.folder, 20)
    yield disk("host.disk_temporary", Path(tempfile.gettempdir()), 5)
    yield _shared_memory(subject)
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield _processors(subject)
    yield _clock(subject.folder)


def _device(device: torch.device) -> Result:
    total, free = total_memory(device), available_memory(device)
    sizes = {"total_bytes": total, "free_bytes": free}
    about = f"{name_and_capability(device)}, {_gib(free)} of {_gib(total)} free"
    if reason := not_built_for(device):
        return failed("devices.found", f"{about}; {reason}", "install a torch built for it", device=str(device))
    if device.type != "cpu" and total and free is not None and free < total / 2:
        mend = "another program is on it; end that, or choose other devices"
        return warning("devices.found", about, mend, device=str(device), measured=sizes)
    return passed("devices.found", about, device=str(device), measured=sizes)


def _memory(subject: Subject) -> Result:
    free = available_memory(torch.device("cpu"))
    wanted = 4 * _GIB * max(1, len(subject.devices))
    detail = f"{_gib(free)} free, for {len(subject.devices)} processes that train"
    if free is not None and free < wanted / 4:
        return failed("host.memory", detail, f"at least {_gib(wanted // 4)} are needed, {_gib(wanted)} are better")
    if free is not None and free < wanted:
        return warning("host.memory", detail, f"{_gib(wanted)} are better; use fewer data.workers")
    return passed("host.memory", detail, measured={"free_bytes": free})


def disk(name: str, folder: Path, wanted: int) -> Result:
    """Whether a folder's disk has `wanted` GiB free, and can be written to."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not os.access(there, os.W_OK):
        return failed(name, f"{there} cannot be written to", "choose another folder, or get the right to write there")
    free = shutil.disk_usage(there).free
    detail, measured = f"{_gib(free)} free in {there}", {"free_bytes": free}
    if free < _GIB:
        return failed(name, detail, "make room, or choose a folder on another disk", measured=measured)
    if free < wanted * _GIB:
        return warning(name, detail, f"a run may need {wanted} GiB and more", measured=measured)
    return passed(name, detail, measured=measured)


def _shared_memory(subject: Subject) -> Result:
    name, workers = "host.shared_memory", subject.workers * len(subject.devices)
    if not _SHM.exists():
        return not_applicable(name, "this system has no /dev/shm")
    return shared_memory(shutil.disk_usage(_SHM).free, workers)


def shared_memory(free: int, workers: int) -> Result:
    """Whether /dev/shm, through which workers hand over clips, has room for those that they read ahead."""
    needed = workers * (_PREFETCH + 1) * _BATCH
    detail = f"{_gib(free)} free in /dev/shm, and {workers} workers that read clips of v1.3 need {_gib(needed)}"
    measured = {"free_bytes": free, "needed_bytes": needed}
    if free < needed:
        mend = "docker run --ipc=host or --shm-size=16g, or fewer data.workers; else workers die with a bus error"
        return failed("host.shared_memory", detail, mend, measured=measured)
    return passed("host.shared_memory", detail, measured=measured)


def open_files(limit: int) -> Result:
    """Whether a process may have enough files open: shards, and a descriptor for each tensor of a worker."""
    name, infinite = "host.open_files", limit == resource.RLIM_INFINITY
    detail = f"at most {'any number of' if infinite else limit} files can be open"
    if infinite or limit >= 4096:
        return passed(name, detail)
    mend = "ulimit -n 65536, or in limits.conf for good"
    return failed(name, detail, mend) if limit < 512 else warning(name, detail, mend)


def _processors(subject: Subject) -> Result:
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    cores = min(here, quota) if quota else here
    threads = torch.get_num_threads()
    given = os.environ.get("OMP_NUM_THREADS", "not set")
    detail = f"{cores:g} cores for this process, {threads} threads of torch, OMP_NUM_THREADS {given}"
    measured = {"cores": cores, "threads": threads}
    wanted = len(subject.devices) * (1 + subject.workers)
    if subject.on_accelerator and cores < wanted:
        mend = f"{wanted} processes train and read clips; give more cores, or fewer data.workers"
        return warning("host.processors", detail, mend, measured=measured)
    if threads > cores:
        return warning("host.processors", detail, f"OMP_NUM_THREADS={max(1, int(cores))}", measured=measured)
    return passed("host.processors", detail, measured=measured)


def _quota() -> float | None:
    """The cores that a container may use; None: no limit is known."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _clock(folder: Path) -> Result:
    """This machine's clock against that of the disk of runs, which may be another machine's."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not os.access(there, os.W_OK):
        return not_applicable("host.clock", f"{there} cannot be written to")
    with tempfile.NamedTemporaryFile(dir=there, prefix=".doctor") as file:
        file.write(b"now")
        file.flush()
        return clock(time.time(), os.fstat(file.fileno()).st_mtime, Path(torch.__file__).stat().st_mtime)


def clock(now: float, on_disk: float, installed: float) -> Result:
    """Three times in seconds: now, of a file written now, and of a file of torch, which is older."""
    name, said = "host.clock", time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now))
    if now < installed:
        return failed(name, f"{said}, which is before torch was installed", "set the clock (timedatectl set-ntp true)")
    if abs(now - on_disk) > _CLOCK:
        detail = f"{said}; the disk of runs is {on_disk - now:+.0f} s apart"
        return warning(name, detail, "let both machines set their clocks by NTP")
    return passed(name, said)


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / _GIB:.3g} GiB"
