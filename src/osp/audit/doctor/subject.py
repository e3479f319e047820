"""The machine that is asked, and how."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from osp.devices import fast_precision


def installed_version(package: str) -> str | None:
    """The version of an installed package; None: it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Subject:
    """The machine, the devices that it would train on, and what it would train.

    Args:
        devices: of one kind; on the CPU one.
        folder: where runs are written.
        workers: processes that read clips, for each device.
        limit: seconds that one exchange between devices may take.
        head_dims: those of the denoisers.
        vae_channels: those of the VAEs' finest levels.
        version: of a package; None: it is not installed.
    """

    devices: Sequence[torch.device]
    folder: Path
    workers: int
    limit: float
    head_dims: Sequence[int]
    vae_channels: Sequence[int]
    version: Callable[[str], str | None] = installed_version

    @property
    def device(self) -> torch.device:
        """The first device."""
        return self.devices[0]

    @property
    def on_accelerator(self) -> bool:
        """Whether the devices are not the CPU."""
        return self.device.type != "cpu"


def formats(device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """The number formats that models compute in on a device: float32, and the half precision that it has."""
    has_bfloat16 = device.type == "cpu" or fast_precision(device) == "bf16-mixed"
    return torch.float32, torch.bfloat16 if has_bfloat16 else torch.float16
