"""Whether the devices of this machine can exchange tensors, as one line for each operation."""

from collections.abc import Iterator, Mapping

import torch

from osp.audit.doctor.result import Result, failed, not_applicable, passed
from osp.audit.doctor.subject import Subject
from osp.devices.collectives import BACKENDS, OPERATIONS, START, Operation, exchange

_SHARED = "try again with TORCH_DISTRIBUTED_DEBUG=DETAIL, and see whether a firewall closes local ports"
_MENDS = {
    "gloo": f"say which network interface it is with GLOO_SOCKET_IFNAME=lo; {_SHARED}",
    "nccl": (
        "try NCCL_P2P_DISABLE=1 (PCIe access control, IOMMU), NCCL_SHM_DISABLE=1 (small /dev/shm), "
        f"NCCL_SOCKET_IFNAME=lo, and read what NCCL_DEBUG=INFO says; {_SHARED}"
    ),
    "hccl": (
        "free the ports from HCCL_IF_BASE_PORT (60000 if it is not set) on, set HCCL_WHITELIST_DISABLE=1 and "
        f"HCCL_CONNECT_TIMEOUT=600, and look at hccn_tool -i 0 -link -g; {_SHARED}"
    ),
}


def check_collectives(subject: Subject) -> Iterator[Result]:
    """Lines for the start and for each operation; on the CPU two processes stand for two devices."""
    devices = list(subject.devices)
    if subject.on_accelerator and len(devices) == 1:
        yield not_applicable("collectives.start", "one device has nobody to exchange with")
        return
    devices = devices if subject.on_accelerator else [torch.device("cpu")] * 2
    yield from exchanged(devices, subject.limit)


def exchanged(
    devices: list[torch.device], limit: float, operations: Mapping[str, Operation] = OPERATIONS
) -> Iterator[Result]:
    """A line for each operation; those after one that hangs are not tried."""
    backend = BACKENDS[devices[0].type]
    among = f"{len(devices)} processes over {backend}"
    done = {one.name: one for one in exchange(devices, limit, operations)}
    for operation in (START, *operations):
        name, outcome = f"collectives.{operation}", done.get(operation)
        if outcome is None:
            yield not_applicable(name, "was not tried, since what came before it did not end")
        elif outcome.error:
            yield failed(name, f"{among}: {outcome.error}", _MENDS[backend], measured={"hung": outcome.hung})
        else:
            formats = "" if operation == START else ", float32 and bfloat16"
            yield passed(name, f"{among}{formats}: {outcome.seconds:.2g} s", measured={"seconds": outcome.seconds})
