"""A training checkpoint as a folder of pieces (`osp.weights.sharded`), which each process writes its own of.

Weights lie in it as `state_dict.KEY`, and the states of optimisers by the names of their parameters, as
`optimizers.NUMBER.PARAMETER.exp_avg`. All else are plain values among the entries of its index; settings of optimisers
are those of the run that goes on, and are not written.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from osp.documents import check_form, printable
from osp.errors import DataError
from osp.parallel.pieces import is_sharded, own_rows
from osp.weights.lazy import Stored
from osp.weights.sharded import Piece, Sharded

WEIGHTS = "state_dict."
_OPTIMIZERS = "optimizers"
_STATES = "module_states"  # of modules, in the state dict, that are plain values
_MOST_OPTIMIZERS = 16
_STATE_KEY = re.compile(rf"{_OPTIMIZERS}\.(?P<number>\d{{1,2}})\.(?P<parameter>.+)\.(?P<name>[^.]+)")
_NOT_WRITTEN = {"state_dict", "optimizer_states", "lr_schedulers"}


def parameter_names(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[int, str]]:
    """The names of each optimiser's parameters, by their numbers in its state."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        {n: names[id(one)] for n, one in enumerate(one for group in optimizer.param_groups for one in group["params"])}
        for optimizer in optimizers
    ]


def pieces_of(checkpoint: Mapping[str, Any], names: Sequence[Mapping[int, str]], first: bool) -> Iterator[Piece]:
    """The pieces of a checkpoint that this process writes: its rows of sharded tensors, and the rest if it is first."""
    for key, value in checkpoint["state_dict"].items():
        if isinstance(value, Tensor):
            yield from _own(WEIGHTS + key, value, first)
    for number, state in enumerate(checkpoint["optimizer_states"]):
        for parameter, values in state["state"].items():
            for name, value in values.items():
                yield from _own(f"{_OPTIMIZERS}.{number}.{names[number][parameter]}.{name}", value, first)


def _own(key: str, tensor: Tensor, first: bool) -> Iterator[Piece]:
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        if first:
            yield Piece(key, Stored.of(tensor), shape)
    elif (own := own_rows(tensor)) is not None and len(own[0]):
        yield Piece(key, Stored.of(own[0]), shape, own[1])


def entries_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a checkpoint. Numbers that are not finite become None, and what is not plain is left out."""
    states = {key: value for key, value in checkpoint["state_dict"].items() if not isinstance(value, Tensor)}
    entries = {key: value for key, value in checkpoint.items() if key not in _NOT_WRITTEN}
    found: dict[str, Any] = _plain(entries)
    return found | {_STATES: _plain(states), _OPTIMIZERS: len(checkpoint["optimizer_states"])}


_LEFT_OUT = object()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | int | None):
        return value
    if isinstance(value, list | tuple):
        return [one for one in map(_plain, value) if one is not _LEFT_OUT]
    if isinstance(value, Mapping):
        return {str(key): one for key, inner in value.items() if (one := _plain(inner)) is not _LEFT_OUT}
    return _LEFT_OUT


def checkpoint_of(sharded: Sharded) -> dict[str, Any]:
    """The checkpoint as it was given to be written; its tensors are `Stored`, and optimisers' states go by names.

    Raises DataError for a folder of something else.
    """
    place = f"{sharded.folder}: is no checkpoint of `osp train`"
    check_form(sharded.entries, {_OPTIMIZERS: range(_MOST_OPTIMIZERS), _STATES: dict}, place)
    optimizers: list[dict[str, Any]] = [{"state": {}} for _ in range(sharded.entries[_OPTIMIZERS])]
    weights: dict[str, Any] = dict(sharded.entries[_STATES])
    for key, stored in sharded.weights.stored.items():
        if key.startswith(WEIGHTS):
            weights[key.removeprefix(WEIGHTS)] = stored
        elif (found := _STATE_KEY.fullmatch(key)) and int(found["number"]) < len(optimizers):
            state = optimizers[int(found["number"])]["state"]
            state.setdefault(found["parameter"], {})[found["name"]] = stored
        else:
            raise DataError(f"{place} ({printable(key)[:200]})")
    plain = {key: value for key, value in sharded.entries.items() if key not in (_STATES, _OPTIMIZERS)}
    return plain | {"state_dict": weights, "optimizer_states": optimizers}
