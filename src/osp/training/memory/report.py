"""A plan in words: for people, and for programs."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from osp.devices.datasheets import DataSheet
from osp.report.tables import markdown_table
from osp.training.memory.advice import Advice
from osp.training.memory.plan import TrainingPlan
from osp.training.memory.speed import Estimate

_GIB = 2**30
_GB = 10**9

RESERVED = 0.06
"""The share of an accelerator's memory that the driver, the framework and an allocator's unused parts are left."""


def available(device: DataSheet) -> int:
    """The bytes of a device that tensors may take."""
    return round(device.memory_gb * _GB * (1 - RESERVED))


def lines(plan: TrainingPlan, device: DataSheet, time: Estimate, mfu: float, advice: Sequence[Advice]) -> list[str]:
    """The plan to read: parts, phases, blocks, time, and what to change."""
    asked, layout = plan.asked, plan.asked.layout
    shape = "x".join(map(str, asked.shape))
    spread = {"one": "one device", "ddp": "all of the model on each", "fsdp": f"weights in {layout.shards} parts"}
    shared = f", {layout.sequence} to a clip" if layout.sequence > 1 else ""
    head = [
        f"{asked.name} on {layout.devices} x {device.name} ({spread[layout.kind]}{shared}), {asked.precision}",
        f"largest batch {asked.batch}x{shape}, {asked.accumulate} a step, {asked.tokens:,} tokens a clip",
        "",
        *markdown_table(["on each device", "GiB"], [[name, _gib(size)] for name, size in plan.parts.items()], 1),
        "",
        *markdown_table(["at once", "GiB"], [[name, _gib(size)] for name, size in plan.phases.items()], 1),
        "",
    ]
    if plan.kept:
        rows = [[name, str(count), _gib(size)] for name, count, size in _alike(plan, layout.sequence)]
        head += [*markdown_table(["kept for the backward pass", "times", "GiB each"], rows, 1), ""]
    verdict = "fits" if plan.peak <= available(device) else "DOES NOT FIT"
    head.append(
        f"{verdict}: {_gib(plan.peak)} of {_gib(available(device))} GiB ({device.memory_gb:g} GB less "
        f"{100 * RESERVED:g} % for driver, framework and fragments)"
    )
    return [*head, *_time_lines(time, mfu, plan), *_advice_lines(advice, device)]


def _alike(plan: TrainingPlan, sequence: int) -> Iterator[tuple[str, int, int]]:
    """Parts that follow each other and keep the same, as one: name, how many, bytes of each."""
    for _, group in groupby(plan.kept.items(), key=lambda item: (item[0].split()[0], round(item[1] / _GIB, 2))):
        same = list(group)
        name = same[0][0] if len(same) == 1 else f"{same[0][0]} to {same[-1][0].split()[-1]}"
        yield name, len(same), same[0][1] // sequence


def _time_lines(time: Estimate, mfu: float, plan: TrainingPlan) -> list[str]:
    cost = "" if time.cost is None else f", cost {time.cost:,.0f}"
    hours, devices = time.run / 3600, plan.asked.layout.devices
    tokens = f", exchange of tokens {time.tokens:.3g} s" if time.tokens else ""
    return [
        f"a step: {time.step:.3g} s, of which computing {time.compute:.3g} s ({plan.flops / 1e12:,.0f} TFLOP each, at "
        f"{100 * mfu:g} % of its peak){tokens}, exchange {time.exchange:.3g} s beside it, update {time.update:.3g} s",
        f"{time.steps:,} steps: {hours:,.1f} hours, {devices * hours:,.0f} hours of a device{cost}",
    ]


def _advice_lines(advice: Sequence[Advice], device: DataSheet) -> list[str]:
    said = []
    for one in advice:
        verdict = "fits" if one.plan.peak <= available(device) else "does not fit"
        said.append(f"with {' '.join(one.settings)}: {_gib(one.plan.peak)} GiB, {verdict}")
    return said


def as_values(plan: TrainingPlan, device: DataSheet, time: Estimate, advice: Sequence[Advice]) -> dict[str, Any]:
    """The plan as plain values, bytes and seconds."""
    asked = plan.asked
    return {
        "name": asked.name,
        "fits": plan.peak <= available(device),
        "peak": plan.peak,
        "available": available(device),
        "device": device.name,
        "layout": asdict(asked.layout),
        "precision": asked.precision,
        "batch": [asked.batch, *asked.shape],
        "accumulate": asked.accumulate,
        "tokens": asked.tokens,
        "parts": dict(plan.parts),
        "phases": dict(plan.phases),
        "kept": dict(plan.kept),
        "flops": plan.flops,
        "step_seconds": time.step,
        "hours": time.run / 3600,
        "device_hours": asked.layout.devices * time.run / 3600,
        "cost": time.cost,
        "advice": [{"settings": list(one.settings), "peak": one.plan.peak} for one in advice],
    }


def _gib(size: int) -> str:
    return f"{size / _GIB:,.2f}"
