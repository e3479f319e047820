"""The check before step 1 that a training run fits the devices that are here."""

from collections.abc import Mapping
from typing import Any

import lightning
import torch

from osp.devices.inventory import total_memory
from osp.devices.measure import available_memory
from osp.errors import OspError
from osp.training.memory.advice import advise
from osp.training.memory.asked import Build, read_asked
from osp.training.memory.bound import at_most
from osp.training.memory.layout import Layout
from osp.training.memory.plan import plan_training
from osp.training.memory.refusal import GIB, refusal
from osp.training.memory.report import RESERVED

_SURELY = 0.5
"""The share of the memory below which a bound is low enough to look no further."""


def check_fits(config: Mapping[str, Any], build: Build, trainer: lightning.Trainer) -> str | None:
    """Refuse a run with the settings `config` of `osp train`, in plain values, that cannot fit its Trainer's devices.

    Gives a line for the log: what the plan says, or that the machine or the run allow none; None for a run so small
    that it was not planned. Raises DoesNotFitError.
    """
    device, here = trainer.strategy.root_device, trainer.world_size // trainer.num_nodes
    room = _room(device, here)
    if room is None:
        return "check_memory: not checked, as this machine does not say how much memory it has"
    accelerated, precision = device.type != "cpu", str(trainer.precision)
    try:
        layout = Layout.of(config["trainer"], trainer.world_size, here)
        asked = read_asked(config, build, layout, precision=precision, accelerated=accelerated)
        if at_most(asked) <= _SURELY * room:
            return None
        plan = plan_training(asked)
        advice = [] if plan.peak <= room else advise(asked, room)
    except OspError as error:  # what is wrong with settings or files is said where they are used
        return f"check_memory: not checked, as the run cannot be planned: {error}"
    if plan.peak > room:
        raise refusal(plan, room, advice, "; check_memory=false trains all the same")
    return f"check_memory: {plan.peak / GIB:.2f} of {room / GIB:.2f} GiB, by the plan (osp plan)"


def _room(device: torch.device, here: int) -> int | None:
    """Bytes that the tensors of this process may take; `here` processes share the memory of a CPU."""
    if device.type == "cpu":
        free = available_memory(device)
        return None if free is None else free // here
    total = total_memory(device)
    return None if total is None else round(total * (1 - RESERVED))
