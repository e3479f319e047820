"""Lightning's accelerator `npu`."""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator

from .driver import device_count, driver, is_available, missing
from .precision import on_npu


class NPUAccelerator(Accelerator):
    """Ascend NPUs.

    Devices are counted within ASCEND_RT_VISIBLE_DEVICES. A strategy that would run elsewhere, as Lightning's own for
    one device does, is refused, and mixed precision becomes that of the NPU.
    """

    def setup_device(self, device: torch.device) -> None:
        """Make it the current device. Raises MisconfigurationException where the strategy chose none of ours."""
        if device.type != "npu":
            raise MisconfigurationException(
                f"accelerator=npu, and the strategy puts the model on {device}: give strategy='npu' for one device, "
                "'npu_ddp' or 'npu_fsdp2' for several"
            )
        driver().set_device(device)

    def setup(self, trainer: Trainer) -> None:
        """Give the strategy the precision of this device in place of that of another, and start with free memory."""
        strategy = trainer.strategy
        strategy.precision_plugin = on_npu(strategy.precision_plugin)
        driver().empty_cache()

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """The counters of the allocator, under the names of CUDA's."""
        return dict(driver().memory_stats(device))

    def teardown(self) -> None:
        """Give unused memory back."""
        if missing() is None:
            driver().empty_cache()

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> list[int]:
        """Numbers of devices: N or "N" is the first N, -1 all, a list or "0,2" these.

        Raises MisconfigurationException for devices that are not there, or named twice.
        """
        there = device_count()
        numbers = _numbers(devices, there)
        if not numbers or len({*numbers}) != len(numbers) or not all(0 <= number < there for number in numbers):
            raise MisconfigurationException(
                f"devices={devices!r}: this process sees {there} NPUs; give how many of them, or different numbers "
                "below that (ASCEND_RT_VISIBLE_DEVICES says which ones a process sees)"
            )
        return numbers

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        """The devices of these numbers."""
        return [torch.device("npu", number) for number in devices]

    @staticmethod
    def auto_device_count() -> int:
        """All that the process sees."""
        return device_count()

    @staticmethod
    def is_available() -> bool:
        """Whether there is a device that can be used."""
        return is_available()

    @staticmethod
    def name() -> str:
        """Its name for `Trainer(accelerator=...)`."""
        return "npu"

    @classmethod
    def register_accelerators(cls, accelerator_registry: Any) -> None:
        """Make the name known to Lightning."""
        accelerator_registry.register(cls.name(), cls, description="Ascend NPU", override=True)


def _numbers(devices: int | str | list[int] | tuple[int, ...], there: int) -> list[int]:
    """The numbers meant, not checked yet; none for what cannot be read."""
    if isinstance(devices, str):
        try:
            given = [int(part) for part in devices.split(",") if part.strip()]
        except ValueError:
            return []
        # As Lightning reads it: "2" are two devices, "2," is the device of number 2.
        return given if "," in devices else _numbers(given[0], there) if given else []
    if isinstance(devices, int) and not isinstance(devices, bool):
        return list(range(there if devices == -1 else devices))
    is_list = isinstance(devices, list | tuple) and all(type(number) is int for number in devices)
    return list(devices) if is_list else []  # type: ignore[arg-type]
