"""Models in our own form: a folder with `model.safetensors` and a `config.json` that says how to build it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osp.errors import UsageError
from osp.vae import VideoVAE
from osp.weights.families import FAMILIES, family_of, find_class
from osp.weights.files import WeightImportError, check_keys, open_checkpoint
from osp.weights.folders import CONFIG, read_config, write_model
from osp.weights.lazy import Weights, filled, parse_dtype
from osp.weights.published import published_scaling

_WEIGHTS = "model.safetensors"


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    published: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model: its weights, and settings that build it again. A model that is there already is replaced.

    `published` holds what a published configuration says beyond the model's shape. `weights` are written instead of the
    model's own, one after another, so that they need not be in memory. Raises UsageError for another model and for a
    folder that holds something else.
    """
    name = type(model).__name__
    if family_of(model) is None:
        known = (family.model.__name__ for family in FAMILIES.values())
        raise UsageError(f"a {name} cannot be saved; a {' or '.join(known)} can")
    config = {"model": name, "settings": model.settings, "published": dict(published or {})}
    stored = Weights.of(model.state_dict() if weights is None else weights)
    write_model(Path(folder), _WEIGHTS, stored, config, is_alike=lambda other: "model" in other)


def load_pretrained(path: str | Path | None, dtype: torch.dtype | str = torch.float32) -> nn.Module:
    """The model in a folder of `save_pretrained`, in eval mode.

    Raises UsageError without a path or with another `dtype`, and WeightImportError as `open_pretrained`.
    """
    dtype = parse_dtype(dtype)
    model, weights = open_pretrained(path)
    # One after another, and copied: the file may be replaced
    filled(model, {key: value.to(dtype, copy=True) for key, value in weights.items()})
    if isinstance(model, VideoVAE) and path is not None:
        model.origin = str(path)
        model.scaling = published_scaling(model, published_part(path))
    return model


def open_pretrained(path: str | Path | None) -> tuple[nn.Module, Weights]:
    """The model in a folder of `save_pretrained`, without memory, and its weights, which are read when asked for.

    Raises UsageError without a path, and WeightImportError for a folder that holds no such model or a damaged one.
    """
    if path is None:
        raise UsageError("give path=FOLDER, one of `osp import-weights`")
    config, folder = _config(path), Path(path)
    kind = find_class(config["model"], nn.Module, f"{folder / CONFIG}: model", WeightImportError)
    try:
        with torch.device("meta"):
            model = kind(**config["settings"])
    except (UsageError, KeyError, TypeError, ValueError) as error:
        raise WeightImportError(f"{folder / CONFIG}: its settings build no {kind.__name__} ({error})") from error
    stored = open_checkpoint(folder / _WEIGHTS)
    check_keys(Weights.of(model.state_dict()).shapes, stored, str(folder / _WEIGHTS))
    return model, Weights.of(stored)


def published_part(path: str | Path) -> dict[str, Any]:
    """What `save_pretrained` was told of the published configuration. Raises WeightImportError as `load_pretrained`."""
    published = _config(path).get("published", {})
    if not isinstance(published, dict):
        raise WeightImportError(f"{Path(path) / CONFIG}: published is no object")
    return published


def _config(path: str | Path) -> dict[str, Any]:
    folder = Path(path)
    if not folder.is_dir():
        raise WeightImportError(f"{folder}: no such folder")
    config = read_config(folder)
    if config is None:
        raise WeightImportError(f"{folder}: has no {CONFIG}; give a folder of `osp import-weights`")
    if "_class_name" in config or "model" not in config:
        raise WeightImportError(f"{folder}: is in the published form; run `osp import-weights` first")
    return config
