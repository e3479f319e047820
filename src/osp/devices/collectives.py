"""Exchange between the devices of this machine, tried out: each operation against the known answer, in limited time.

Every device gets a process. Processes that do not answer in time are killed, so that a hang ends too.
"""

import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from osp.devices.device import backend, synchronize

BACKENDS: Mapping[str, str] = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
START = "start"
"""The name of what comes before the operations: the processes find each other."""

_ELEMENTS = 1 << 16  # from each process to each other; large enough to leave the path of the small messages
_FORMATS = (torch.float32, torch.bfloat16)

Operation = Callable[[int, int, torch.device, torch.dtype], tuple[Tensor, Tensor]]
"""Of rank, processes, device and number format: what came, and what should have come."""


@dataclass(frozen=True)
class Exchanged:
    """An operation that all processes did, or what went wrong; empty `error`: nothing. `hung`: the limit was over."""

    name: str
    error: str = ""
    hung: bool = False
    seconds: float = 0.0


def all_reduce(rank: int, processes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sum over all processes."""
    given = _pattern(rank, device, dtype)
    dist.all_reduce(given)
    return given, torch.stack([_pattern(other, device, dtype) for other in range(processes)]).sum(0)


def all_gather(rank: int, processes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The parts of all processes."""
    out = torch.empty(processes * _ELEMENTS, device=device, dtype=dtype)
    dist.all_gather_into_tensor(out, _pattern(rank, device, dtype))
    return out, torch.cat([_pattern(other, device, dtype) for other in range(processes)])


def reduce_scatter(rank: int, processes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This process's part of the sum over all processes."""
    given = torch.cat([_pattern(rank + part, device, dtype) for part in range(processes)])
    out = torch.empty(_ELEMENTS, device=device, dtype=dtype)
    dist.reduce_scatter_tensor(out, given)
    return out, torch.stack([_pattern(other + rank, device, dtype) for other in range(processes)]).sum(0)


def all_to_all(rank: int, processes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The parts that the processes have for this one."""
    given = torch.cat([_pattern(rank + 2 * part, device, dtype) for part in range(processes)])
    out = torch.empty_like(given)
    dist.all_to_all_single(out, given)
    return out, torch.cat([_pattern(other + 2 * rank, device, dtype) for other in range(processes)])


def broadcast(rank: int, processes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tensor of the last process."""
    given = _pattern(rank, device, dtype)
    dist.broadcast(given, src=processes - 1)
    return given, _pattern(processes - 1, device, dtype)


OPERATIONS: Mapping[str, Operation] = {
    "all_reduce": all_reduce,
    "all_gather": all_gather,
    "reduce_scatter": reduce_scatter,
    "all_to_all": all_to_all,
    "broadcast": broadcast,
}


def exchange(
    devices: Sequence[torch.device], limit: float, operations: Mapping[str, Operation] = OPERATIONS
) -> list[Exchanged]:
    """The outcome of the start and of each operation, in order, up to the first that hangs or breaks a process.

    `devices` has one for each process; `limit` is in seconds, for the start and for each operation. The operations are
    functions that other processes can import.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", __name__])  # so that it is imported once for all of them
    port, names = _free_port(), [START, *operations]
    processes: list[Any] = []
    pipes: list[Connection] = []
    try:
        for rank, device in enumerate(devices):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (rank, len(devices), str(device), port, limit, dict(operations), theirs)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _collect(pipes, names, limit)
    finally:
        for process in processes:
            process.join(timeout=1)
            process.kill()
            process.join()


def _collect(pipes: Sequence[Connection], names: Sequence[str], limit: float) -> list[Exchanged]:
    done: list[Exchanged] = []
    for name in names:
        outcome = _outcome(name, pipes, limit + (60 if name == START else 0))  # importing torch may take long
        done.append(outcome)
        if outcome.hung or (outcome.error and name == START):
            break
    return done


def _outcome(name: str, pipes: Sequence[Connection], limit: float) -> Exchanged:
    """The answers of all processes about one operation."""
    begun, waiting = time.monotonic(), dict(enumerate(pipes))
    errors: list[str] = []
    while waiting:
        left = begun + limit - time.monotonic()
        ready = wait(list(waiting.values()), timeout=max(0.0, left))
        if not ready:
            silent = ", ".join(map(str, waiting))
            said = "; ".join([f"no answer within {limit:g} s from process {silent} of {len(pipes)}", *errors])
            return Exchanged(name, said, hung=True)
        for rank, pipe in [*waiting.items()]:
            if pipe in ready:
                del waiting[rank]
                try:
                    error = pipe.recv()
                except EOFError:
                    return Exchanged(name, f"process {rank} of {len(pipes)} died", hung=True)
                errors += [f"process {rank}: {error}"] if error else []
    return Exchanged(name, errors[0] if errors else "", seconds=time.monotonic() - begun)


def _work(
    rank: int,
    processes: int,
    name: str,
    port: int,
    limit: float,
    operations: Mapping[str, Operation],
    pipe: Connection,
) -> None:
    """One process: an empty text for each thing that went well, else what went wrong."""
    try:
        warnings.simplefilter("ignore")  # of names that only newer releases have others for
        torch.set_num_threads(1)
        if name.startswith("npu"):
            __import__("torch_npu")
        device = torch.device(name)
        if device.type != "cpu":
            backend(device).set_device(device)
        dist.init_process_group(
            BACKENDS[device.type],
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=processes,
            timeout=timedelta(seconds=10 * limit),  # the process that started this one ends it long before
        )
    except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
        pipe.send(_said(error))
        return
    pipe.send("")
    for operation in operations.values():
        try:
            pipe.send(_tried(operation, rank, processes, device))
        except Exception as error:  # noqa: BLE001  as above
            pipe.send(_said(error))
    pipe.close()
    os._exit(0)  # a group that was hurt may hang when it is taken down


def _tried(operation: Operation, rank: int, processes: int, device: torch.device) -> str:
    for dtype in _FORMATS:
        ours, theirs = operation(rank, processes, device, dtype)
        synchronize(device)
        if wrong := int((ours != theirs).sum()):
            return f"{wrong} of {ours.numel()} values are wrong in {str(dtype).removeprefix('torch.')}"
    return ""


def _pattern(number: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Small whole numbers that differ from process to process; sums of them are exact in every number format."""
    return ((torch.arange(_ELEMENTS, device=device) + number) % 5).to(dtype)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
