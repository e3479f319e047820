"""Several processes that work together over gloo, started once and kept for all tests that want some."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import import_module, util
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_LIMIT = 240.0  # seconds for one call
_IMPORTED = ["osp", "lightning", "torch.distributed.fsdp", "osp.training.vae_module", "osp.parallel.strategy"]
"""What is imported once for all processes, in this order; they are forked from the one that has done it."""


class Processes:
    """`run(count, function, *arguments)` gives the results of the function in so many processes, by rank.

    The function stands at the top of a test file, and finds a process group of `count` ranks on gloo, and the variables
    of torchrun. An exception in any of them is raised here, with its traceback. Processes that do not answer in time
    are killed.
    """

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, count: int, function: Callable[..., Any], *arguments: Any, group: bool = True) -> list[Any]:
        """See the class; with `group=False` the process group is left to the function."""
        while len(self._workers) < count:
            self._workers.append(_start())
        file = sys.modules[function.__module__].__file__
        port = _free_port()
        for rank, (_, pipe) in enumerate(self._workers[:count]):
            pipe.send((file, function.__name__, arguments, rank, count, port, group))
        answers = []
        for _, pipe in self._workers[:count]:
            if not pipe.poll(_LIMIT):
                self.close()
                raise TimeoutError(f"{function.__name__} did not end within {_LIMIT:.0f} s in {count} processes")
            answers.append(pipe.recv())
        if failed := [text for text, _ in answers if text]:
            self.close()  # the others may still wait for the one that failed
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    def close(self) -> None:
        """End them all."""
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers = []


def _start() -> tuple[Any, Connection]:
    context = get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    import osp  # noqa: F401  (before anything imports lightning)

    for call in _calls(pipe):
        try:
            pipe.send(("", _answer(*call)))
        except BaseException:  # noqa: BLE001  (the caller raises it)
            pipe.send((traceback.format_exc(), None))


def _calls(pipe: Connection) -> Iterator[Any]:
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


def _answer(file: str, name: str, arguments: Any, rank: int, count: int, port: int, group: bool) -> Any:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update({key: str(value) for key, value in (own | shared).items()})
    if group:
        dist.init_process_group("gloo", rank=rank, world_size=count, timeout=timedelta(seconds=_LIMIT / 2))
    try:
        return getattr(_module(file), name)(*arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _module(file: str) -> Any:
    """The test file as a module, under a name of its own."""
    name = f"tests_in_processes_{Path(file).stem}"
    if name not in sys.modules:
        spec = util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return import_module(name)
