"""A function run in one process for each of several devices: started here, or by torchrun."""

import logging
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from logging.handlers import QueueHandler
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from osp.devices import choose_device
from osp.errors import DataError, OspError, UsageError

NOT_MET = (dist.DistNetworkError, dist.DistStoreError)
"""Errors of processes that have not found each other."""


def on_devices(count: int, device: torch.device, function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `function(own device, *arguments)`, which runs in one process for each of `count` devices.

    A single one runs here. Several are started here, unless torchrun has started them already. The function stands at
    the top of a module and finds a process group of them all. Only the first one's result counts and only its log is
    told; the other processes of torchrun get None. An exception of any of them is raised here, and ends the others.
    Raises UsageError for more devices than there are, and where torchrun has started another number of processes.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if started > 1:
        if started != count:
            raise UsageError(f"devices={count}: torchrun has started {started} processes; give devices={started}")
        rank, own = int(os.environ["RANK"]), _own(device, int(os.environ["LOCAL_RANK"]))
        logging.getLogger().setLevel(logging.ERROR if rank else logging.getLogger().level)
        with _together(own, rank, count):
            value = function(own, *arguments)
        return None if rank else value
    if count == 1:
        return function(device, *arguments)
    devices = [_own(device, rank) for rank in range(count)]
    return _started(devices, function, arguments)


def _own(device: torch.device, number: int) -> torch.device:
    """The device of a process: the CPU is one for all."""
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise UsageError(f"device={device}: is one device; with several give their kind, device={device.type}")
    return choose_device(f"{device.type}:{number}")


def _started(devices: list[torch.device], function: Callable[..., Any], arguments: Any) -> Any:
    """The first one's result of processes that are started and ended here."""
    context, count = get_context("spawn"), len(devices)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = int(server.getsockname()[1])
    pipes, processes = [], []
    try:
        for rank, own in enumerate(devices):
            ours, theirs = context.Pipe(duplex=False)
            place = rank, count, port
            process = context.Process(target=_serve, args=(theirs, own, place, function, arguments), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        return _results(pipes)[0]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _results(pipes: list[Connection]) -> dict[int, Any]:
    """The results by rank. Raises the first exception of a process; one that the user can mend before others."""
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        failed: list[BaseException] = []
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        for pipe in wait(waiting):
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                kind, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                failed.append(DataError(f"devices={len(pipes)}: the process of device {rank} ended without a word"))
                continue
            if kind == "log":
                logging.getLogger(value.name).handle(value)
            elif kind == "error":
                failed.append(value)
            else:
                results[rank] = value
        if failed:
            raise min(failed, key=lambda error: (not isinstance(error, OspError), isinstance(error, DataError)))
    return results


def _serve(
    pipe: Connection, own: torch.device, place: tuple[int, int, int], function: Callable[..., Any], arguments: Any
) -> None:
    rank, count, port = place
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(max(1, torch.get_num_threads() // count) if own.type == "cpu" else torch.get_num_threads())
    root = logging.getLogger()
    root.addHandler(logging.NullHandler() if rank else _Told(pipe))  # type: ignore[arg-type]
    root.setLevel(logging.INFO)
    with ExitStack() as group:
        try:
            group.enter_context(_together(own, rank, count))
            _send(pipe, "result", function(own, *arguments))
        except BaseException as error:  # noqa: BLE001  (it is raised where this process was started)
            _send(pipe, "error", error)


class _Told(QueueHandler):
    """Sends log lines to the process that started this one."""

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send one."""
        _send(self.queue, "log", record)  # type: ignore[arg-type]


def _send(pipe: Connection, kind: str, value: Any) -> None:
    """Send plain bytes: `pipe.send` leaves tensors with the sender, which may be gone when they are read."""
    pipe.send_bytes(pickle.dumps((kind, value)))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


@contextmanager
def _together(own: torch.device, rank: int, count: int) -> Iterator[None]:
    """Inside there is the process group of all. Raises DataError where they do not find each other."""
    if own.type != "cpu":
        torch.accelerator.set_device_index(own.index)
    try:
        dist.init_process_group(dist.get_default_backend_for_device(own), rank=rank, world_size=count)
    except NOT_MET as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"devices={count}: the processes of the devices do not find each other ({reason})") from error
    try:
        yield
    finally:
        dist.destroy_process_group()
