"""The cases that `osp bench` measures: a target gives them, and each is a row of the table."""

import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from osp.benchmark.models import ModelSource
from osp.devices import PeakMemory, choose_device, free_unused, synchronize


class Case(Protocol):
    """One row: what to run, and how. It can be sent to another process."""

    @property
    def about(self) -> Mapping[str, Any]:
        """The row's first columns."""

    @property
    def note(self) -> str:
        """Why this cannot be measured, or nothing."""

    @property
    def group(self) -> tuple[Any, ...]:
        """The settings that rows share if they are compared with each other."""

    @property
    def is_reference(self) -> bool:
        """Whether the others of the group are compared with this one."""

    @property
    def work(self) -> Mapping[str, float]:
        """The amounts of work of one run, by unit; the table gives each per second."""

    @property
    def flops(self) -> int:
        """Nominal operations of one run."""

    @property
    def counted(self) -> Mapping[str, float | None]:
        """Further columns that are known without a run; None: nobody can tell."""

    @property
    def precision(self) -> str:
        """The name that the settings give to `dtype`."""

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the arithmetic."""

    def load(self, device: torch.device) -> Any:
        """The model, ready to run."""

    def inputs(self, model: Any) -> Any:
        """The inputs of a run; they count as its memory."""

    def run(self, model: Any, inputs: Any) -> None:
        """One run."""


@dataclass(frozen=True)
class Target:
    """Something to measure: `cases` makes rows of settings (plain values) and a model, and says what the model is.

    `notes` stand under the table. The plot shows the column `speed` in a panel for each value of the column `panel`,
    over the column `x`, with a line style for each combination of the columns `style` and a colour for each of the
    others.
    """

    cases: Callable[[Mapping[str, Any], ModelSource], tuple[Sequence[Case], str]]
    notes: tuple[str, ...]
    speed: str
    panel: str
    x: str
    style: tuple[str, ...]


def measure(case: Case, device_name: str, repeats: int, threads: int) -> dict[str, Any]:
    """The costs of a case's runs: `first_seconds`, `seconds` of each later run, `peak_bytes`, `taken_bytes`.

    If the runs fail, there is only a `note` that says why.
    """
    torch.set_num_threads(threads)
    device = choose_device(device_name)
    seconds = []
    try:
        model = case.load(device)
        first = _seconds(case, model, case.inputs(model), device)
        with PeakMemory(device) as memory:
            inputs = case.inputs(model)
            for _ in range(repeats):
                seconds.append(_seconds(case, model, inputs, device))
    except Exception as error:
        if (note := _note(error)) is None:
            raise
        return {"note": note}
    finally:
        model = inputs = None
        free_unused(device)
    return {
        "first_seconds": first,
        "seconds": seconds,
        "peak_bytes": memory.peak,
        "taken_bytes": memory.taken,
    }


def measure_apart(case: Case, device_name: str, repeats: int, threads: int) -> dict[str, Any]:
    """`measure` in a process of its own, which a lack of memory may cost."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, case, device_name, repeats, threads).result()
        except BrokenProcessPool:
            return {"note": "the system ended the process, as it does when memory runs out"}


def start_compiler() -> None:
    """Make torch.compile begin anew."""
    torch._dynamo.reset()  # or the shapes of earlier rows would count towards its limit of recompilations,
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # beyond which it would run uncompiled


def _seconds(case: Case, model: Any, inputs: Any, device: torch.device) -> float:
    synchronize(device)
    begun = time.perf_counter()
    case.run(model, inputs)
    synchronize(device)
    return time.perf_counter() - begun


def _note(error: Exception) -> str | None:
    """The note in the table for an error that belongs there; None for a bug."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        return "out of memory"
    compiler = sys.modules.get("torch._dynamo.exc")  # loaded if anything was compiled
    if compiler is not None and isinstance(error, compiler.TorchDynamoException):
        return f"does not compile: {str(error).strip().splitlines()[0]}"
    return None
