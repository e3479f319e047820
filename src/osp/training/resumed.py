"""The parts of a checkpoint that a run goes on with, checked one by one.

A run's folder may come from somebody else. So nothing in it is acted upon but numbers: weights and states of optimisers
of the sizes that the models have, counts, and the best score. Texts, paths among them, stay in the file; settings of
optimisers, the places of files and what else Lightning would restore are those of the run that goes on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from osp.documents import check_form, printable
from osp.errors import DataError
from osp.files import whole_at
from osp.parallel.pieces import fill, is_finite_here, is_sharded, read_like
from osp.training.sharded import checkpoint_of
from osp.weights.files import WeightImportError, check_keys, open_checkpoint, read_checkpoint
from osp.weights.lazy import Opened, Stored, Weights
from osp.weights.sharded import open_sharded

_LARGEST = 2**53  # of counts
_NUMBERS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "step"}
_NEEDED = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}
_FORMER_BEST = "ModelCheckpoint{"  # Lightning's class kept the best before
_BEST = "BestCheckpoint"
_NAMES = "names"  # of the module's parameters, for the states of optimisers that go by names

_FORM = {
    "global_step": int,
    "state_dict": dict,
    "loops": {"fit_loop": dict},
    "callbacks?": dict,
    "optimizer_states": [{"state": dict}],
}


def read_resumed(path: str | Path, *, in_parts: bool = False) -> dict[str, Any]:
    """The checkpoint at `path` without what no run takes over. Raises WeightImportError, and DataError naming it.

    The tensors of a folder are `Stored`: they are read when `take_over` and `own_settings` know what they are for.
    Those of a file are in memory, or, `in_parts`, in the mapped file, of which each process reads what it holds.
    """
    place = whole_at(Path(path))
    if place.is_dir():
        content: Any = checkpoint_of(open_sharded(place))
    else:
        content = _plain(open_checkpoint(place)) if in_parts else read_checkpoint(place)
    check_form(content, _FORM, f"{path}: is no checkpoint of `osp train`")
    dropped = ("lr_schedulers", "native_amp_scaling_state", "MixedPrecision", "hyper_parameters")
    kept = {key: value for key, value in content.items() if key not in dropped}
    # Migrations of Lightning are for versions older than any that OSP ran with.
    return kept | {"pytorch-lightning_version": lightning.__version__, "lr_schedulers": [], "epoch": 0}


def _plain(content: Any) -> Any:
    """The mappings of an opened file as dictionaries, with tensors that are read when they are asked for."""
    return {key: _plain(content.peek(key)) for key in content} if isinstance(content, Opened) else content


def take_over(checkpoint: dict[str, Any], module: lightning.LightningModule) -> None:
    """Leave in a checkpoint that is about to be restored only what fits the module and its Trainer.

    Raises WeightImportError or DataError if weights, counts or the states of callbacks are not such.
    """
    trainer: Any = module.trainer
    place = "the checkpoint to go on from"
    checkpoint["state_dict"] = _take_weights(checkpoint["state_dict"], module, place)
    for state in checkpoint["optimizer_states"]:
        state[_NAMES] = {name: id(parameter) for name, parameter in module.named_parameters()}
    loops = {name: getattr(trainer, name) for name in ("fit_loop", "validate_loop", "test_loop", "predict_loop")}
    stored = {name: checkpoint["loops"].get(name, {}) for name in loops}
    counts = {name: _counts(stored[name], loop.state_dict(), f"{place}: loops.{name}") for name, loop in loops.items()}
    loaders = _loader_states(stored["fit_loop"], place)
    if loaders is not None:
        counts["fit_loop"]["state_dict"]["combined_loader"] = loaders
    known = {"global_step", "pytorch-lightning_version", "state_dict", "optimizer_states", "lr_schedulers", "epoch"}
    if trainer.datamodule is not None and (name := type(trainer.datamodule).__qualname__) in checkpoint:
        check_form(checkpoint[name], {...: (float, str, bool, None)}, f"{place}: {name}")
        known.add(name)
    callbacks = _callback_states(checkpoint.get("callbacks", {}), trainer)
    for key in [key for key in checkpoint if key not in known]:
        del checkpoint[key]
    checkpoint |= {"loops": counts, "callbacks": callbacks}


def _loader_states(fit_loop: Mapping[str, Any], place: str) -> list[dict[str, Any]] | None:
    state = fit_loop.get("state_dict")
    loaders = state.get("combined_loader") if isinstance(state, dict) else None
    check_form(loaders, ([{...: (float, str, bool, None)}], None), f"{place}: loops.fit_loop.combined_loader")
    return loaders


def _take_weights(stored: Mapping[str, Any], module: lightning.LightningModule, place: str) -> Mapping[str, Any]:
    """The weights, to be loaded into the module; those that still lie in a file are there already then.

    Raises WeightImportError for keys, sizes or dtypes of another model, and DataError for weights without values.
    """
    wanted = module.state_dict()
    states = {key: value for key, value in wanted.items() if not isinstance(value, Tensor)}  # of modules, plain values
    check_form({key: stored.get(key, value) for key, value in states.items()}, _form_of(states), place)
    found = {key: value for key, value in stored.items() if key not in states}
    tensors = {key: value for key, value in wanted.items() if key not in states}
    if odd := [key for key, value in found.items() if not isinstance(value, Tensor | Stored)]:
        raise WeightImportError(f"{place}: {printable(odd[0])} is no tensor")
    check_keys({key: value.shape for key, value in tensors.items()}, _shaped(found), place)
    for key, value in found.items():
        if value.dtype != tensors[key].dtype or (isinstance(value, Tensor) and value.layout != tensors[key].layout):
            raise WeightImportError(f"{place}: {key} is {value.dtype}, not {tensors[key].dtype}")
    for key, value in found.items():
        if isinstance(value, Stored):
            fill(tensors[key], value)
        if not is_finite_here(tensors[key] if isinstance(value, Stored) else value):
            raise DataError(f"{place}: {key} has numbers that are not finite; start another run")
    return {**stored, **{key: tensors[key] for key, value in found.items() if isinstance(value, Stored)}}


def _shaped(values: Mapping[str, Any]) -> Weights:
    """Tensors, of which some are still to be read."""
    return Weights({key: value if isinstance(value, Stored) else Stored.of(value) for key, value in values.items()})


def _form_of(value: Any) -> Any:
    """The form (`osp.documents.check_form`) of plain values like these."""
    if isinstance(value, dict):
        return {f"{key}?": _form_of(inner) for key, inner in value.items()}
    return (float, bool, None) if isinstance(value, bool | int | float | None) else type(value)


def _counts(stored: Any, ours: Any, place: str) -> Any:
    """The counts of a loop, which has the same ones: from the checkpoint where they are in it, else as they are."""
    if isinstance(ours, dict):
        if not isinstance(stored, dict):
            raise DataError(f"{place}: is no mapping of counts")
        found = {key: stored.get(key, value) for key, value in ours.items()}
        return {key: _counts(found[key], value, f"{place}.{key}") for key, value in ours.items()}
    fits = isinstance(stored, type(ours)) if isinstance(ours, bool) else type(stored) is int and 0 <= stored < _LARGEST
    if isinstance(ours, bool | int) and not fits:
        raise DataError(f"{place}: is no count")
    return stored if isinstance(ours, bool | int) else ours


def _callback_states(stored: Mapping[str, Any], trainer: Any) -> dict[str, Any]:
    """The states of the Trainer's callbacks that are numbers alone; those of Lightning's ModelCheckpoint are paths."""
    found = {}
    for callback in trainer.callbacks:
        key = callback.state_key
        if key == _BEST and key not in stored:
            former = next((value for name, value in stored.items() if str(name).startswith(_FORMER_BEST)), None)
            state: Any = {"score": former.get("best_model_score")} if isinstance(former, dict) else None
        else:
            state = stored.get(key)
        if isinstance(state, dict) and not isinstance(callback, ModelCheckpoint) and (plain := _numbers(state)):
            found[key] = plain
    return found


def _numbers(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """A state of plain numbers; None if there is anything else in it."""
    plain = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, bool | int | float | None):
            return None
        plain[str(key)] = value if value is None or abs(value) < float("inf") else None  # NaN is none either
    return plain


def own_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimiser as it is taken over: its tensors from a checkpoint, its settings as they are now.

    Parameters go by their numbers, or by their names in the module. Raises DataError for tensors of other sizes than
    those of the parameters.
    """
    kind = type(optimizer).__name__
    place = f"the checkpoint to go on from: the state of {kind}"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    names = state.get(_NAMES, {})
    taken: dict[int, dict[str, Tensor]] = {}
    for key, values in state["state"].items():
        number = key if isinstance(key, int) else numbers.get(names.get(key))
        if number is None or not 0 <= number < len(parameters) or not isinstance(values, dict):
            raise DataError(f"{place} is of another model")
        if not values.keys() <= _NUMBERS or not _NEEDED.get(kind, set()) <= values.keys():
            raise DataError(f"{place} is of another optimiser")
        like = parameters[number]
        taken[number] = {name: _as_parameter(value, like, name, place) for name, value in values.items()}
    return {"state": taken, "param_groups": optimizer.state_dict()["param_groups"]}


def _as_parameter(value: Any, parameter: Tensor, name: str, place: str) -> Tensor:
    shape = torch.Size() if name == "step" else parameter.shape
    if not isinstance(value, Tensor | Stored) or value.shape != shape or not value.dtype.is_floating_point:
        raise DataError(f"{place} does not fit the model's sizes")
    if name == "step":
        return value.read().clone() if isinstance(value, Stored) else value
    if isinstance(value, Stored) or is_sharded(parameter):
        return read_like(parameter, value if isinstance(value, Stored) else Stored.of(value))
    if value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
