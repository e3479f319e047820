"""Devices by name: memory, rates and links, as their vendors say."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from osp.checks import check_number
from osp.documents import read_yaml
from osp.errors import UsageError


@dataclass(frozen=True)
class DataSheet:
    """A device.

    Args:
        memory_gb: memory, in 10^9 bytes, as vendors count.
        bf16_tflops, fp32_tflops: the best rate of dense matrix products in bfloat16, and in float32 as torch computes
            it by default (not TF32), in 10^12 FLOP/s.
        bandwidth_gbs: of the memory, in 10^9 bytes a second.
        link_gbs: to a device of the same machine, in one direction, in 10^9 bytes a second.
        network_gbs: to another machine, of each device; ours, as vendors of devices do not say it.
        per_node: devices of a machine.
    """

    name: str
    memory_gb: float
    bf16_tflops: float
    fp32_tflops: float
    bandwidth_gbs: float
    link_gbs: float
    network_gbs: float = 50.0  # 400 Gbit/s for each device, as in DGX H100 and HGX machines
    per_node: int = 8

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            check_number(f"device {self.name}: {field.name}", getattr(self, field.name), above=0)

    def changed(self, **values: float | None) -> "DataSheet":
        """The device with other numbers; None leaves one as it is."""
        return replace(self, **{key: value for key, value in values.items() if value is not None})  # type: ignore[arg-type]


DEVICES = {
    sheet.name: sheet
    for sheet in (
        # NVIDIA H100 data sheet, SXM: 80 GB, 1,979 TFLOPS bfloat16 with sparsity (half of it dense), 67 TFLOPS float32,
        # 3.35 TB/s, NVLink 900 GB/s in both directions together.
        DataSheet("h100", 80, 989.5, 67, 3350, 450),
        # NVIDIA H100 data sheet, PCIe: 80 GB, 1,513 TFLOPS with sparsity, 51 TFLOPS, 2 TB/s, PCIe 5 128 GB/s both ways.
        DataSheet("h100-pcie", 80, 756.5, 51, 2000, 64),
        # NVIDIA H200 data sheet, SXM: 141 GB, 1,979 TFLOPS with sparsity, 67 TFLOPS, 4.8 TB/s, NVLink 900 GB/s.
        DataSheet("h200", 141, 989.5, 67, 4800, 450),
        # NVIDIA A100 data sheet, SXM 40 GB: 312 TFLOPS, 19.5 TFLOPS, 1,555 GB/s, NVLink 600 GB/s; network 200 Gbit/s.
        DataSheet("a100-40", 40, 312, 19.5, 1555, 300, 25),
        # NVIDIA A100 data sheet, SXM 80 GB: 312 TFLOPS, 19.5 TFLOPS, 2,039 GB/s, NVLink 600 GB/s; network 200 Gbit/s.
        DataSheet("a100-80", 80, 312, 19.5, 2039, 300, 25),
        # NVIDIA A800 80 GB: an A100 with NVLink of 400 GB/s.
        DataSheet("a800", 80, 312, 19.5, 2039, 200, 25),
        # NVIDIA L40S data sheet: 48 GB, 362 TFLOPS, 91.6 TFLOPS, 864 GB/s, PCIe 4 64 GB/s both ways.
        DataSheet("l40s", 48, 362, 91.6, 864, 32, 25),
        # NVIDIA Ada architecture white paper, RTX 4090: 24 GB, 165.2 TFLOPS bfloat16 with float32 sums, 82.6 TFLOPS,
        # 1,008 GB/s; PCIe 4 x16 without peer access.
        DataSheet("rtx4090", 24, 165.2, 82.6, 1008, 16, 12.5),
        # Uncertain: Huawei publishes few numbers of the 910B. 64 GB and 376 TFLOPS half precision are those reported of
        # the 910B2 (910B1 about 414, 910B3 313, and the 910B4 280 with 32 GB); bfloat16 is taken to be as fast, float32
        # a quarter. 1.6 TB/s, and seven links of HCCS, 392 GB/s in both directions together; network 200 Gbit/s.
        DataSheet("ascend910b", 64, 376, 94, 1600, 196, 25),
        # A server's CPU, no vendor's: 64 GB, about 1.5 TFLOPS float32 with AVX-512 on 32 cores, bfloat16 as slow where
        # there is no AMX, 8 channels DDR5-4800. Measured values: peak_tflops=, memory_gb=.
        DataSheet("cpu", 64, 1.5, 1.5, 300, 20, 3, 1),
    )
}


def find_device(name: str) -> DataSheet:
    """The device of this name in DEVICES, or that of a YAML or JSON file with the fields of `DataSheet`.

    Raises UsageError for a name that is neither, and DataError for a file that is no such thing.
    """
    if name in DEVICES:
        return DEVICES[name]
    if not Path(name).is_file():
        raise UsageError(
            f"device={name}: is not known; choose {', '.join(DEVICES)}, or give a file with the fields "
            f"{', '.join(field.name for field in fields(DataSheet))}"
        )
    required = dict.fromkeys((field.name for field in fields(DataSheet)[1:6]), float)
    values: dict[str, Any] = read_yaml(Path(name), {"name": str} | required | {"network_gbs?": float, "per_node?": int})
    if unknown := values.keys() - {field.name for field in fields(DataSheet)}:
        raise UsageError(f"{name}: {', '.join(sorted(unknown))} is no field of a device")
    return DataSheet(**values)
