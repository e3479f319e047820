"""Models in our own form: a folder with `model.safetensors` and a `config.json` that says how to build it."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osp.denoiser import Denoiser
from osp.documents import check_form, printable
from osp.errors import DataError, UsageError
from osp.vae import VideoVAE
from osp.weights.built import build_empty, check_plain
from osp.weights.families import FAMILIES, family_of, find_class
from osp.weights.files import WeightImportError, check_keys, checksum, open_checkpoint, sound
from osp.weights.folders import CHECKSUMS, CONFIG, SEAL, check_seal, read_config, write_model
from osp.weights.lazy import Stored, Weights, filled, parse_dtype
from osp.weights.published import published_scaling

_WEIGHTS = "model.safetensors"
_FORM = {
    "model": Any,
    "settings": Any,
    "kind?": str,  # the published kind that it was read as
    "published?": dict,
    "generator?": dict,  # what belongs to a denoiser that was trained here (`osp.training.export`)
    "text?": {...: str},  # the checksums of the weights of a text encoder that was trained along
    f"{CHECKSUMS}?": {...: str},
    f"{SEAL}?": str,
}
_KNOWN = {key.removesuffix("?") for key in _FORM}


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    published: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    entries: Mapping[str, Any] | None = None,
) -> None:
    """Write a model: its weights, and settings that build it again. A model that is there already is replaced.

    `published` holds what a published configuration says beyond the model's shape. `weights` are written instead of the
    model's own, one after another, so that they need not be in memory. `entries` go into `config.json` too. Raises
    UsageError for another model and for a folder that holds something else.
    """
    name = type(model).__name__
    if family_of(model) is None:
        known = (family.model.__name__ for family in FAMILIES.values())
        raise UsageError(f"a {name} cannot be saved; a {' or '.join(known)} can")
    config = {"model": name, "settings": model.settings, "published": dict(published or {}), **(entries or {})}
    if isinstance(model, Denoiser | VideoVAE) and model.published_kind is not None:
        config["kind"] = model.published_kind
    stored = Weights.of(model.state_dict() if weights is None else weights)
    # Each tensor is read once: to be written, and for its checksum.
    write_model(Path(folder), _WEIGHTS, stored, config, is_alike=lambda other: "model" in other, seals=True)


def load_pretrained(path: str | Path | None, dtype: torch.dtype | str = torch.float32) -> nn.Module:
    """The model in a folder of `save_pretrained`, in eval mode; its weights are read later under a device "meta".

    Raises UsageError without a path or with another `dtype`, and WeightImportError as `open_pretrained`.
    """
    dtype = parse_dtype(dtype)
    model, weights = open_pretrained(path)
    model = filled(model.to(dtype), weights)
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
    stored = Weights.of(open_checkpoint(folder / _WEIGHTS))
    model = build_empty(kind, config["settings"], len(stored), str(folder / CONFIG), WeightImportError)
    model.published_kind = config.get("kind")  # type: ignore[assignment]
    wanted = model.state_dict()
    check_keys(Weights.of(wanted).shapes, stored, str(folder / _WEIGHTS))
    check_seal(config, str(folder / CONFIG))
    return model, sound(as_written(stored, config.get(CHECKSUMS), folder / _WEIGHTS), wanted, str(folder / _WEIGHTS))


def as_written(stored: Weights, checksums: Mapping[str, str] | None, file: Path) -> Weights:
    """The weights of a file, each of which is compared with its checksum when it is read, if there are any.

    Raises WeightImportError, then, for one that is another.
    """
    if checksums is None:
        return stored

    def read(key: str, one: Stored) -> Tensor:
        value = one.read()
        if checksum(value) != checksums.get(key):
            raise WeightImportError(
                f"{file}: {printable(key)} is not what was written; its checksum is another. "
                "Import or copy the weights again"
            )
        return value

    return Weights({key: Stored(one.shape, one.dtype, partial(read, key, one)) for key, one in stored.stored.items()})


def read_entries(path: str | Path) -> dict[str, Any]:
    """The `config.json` of a folder of `save_pretrained`. Raises WeightImportError as `load_pretrained`."""
    config = _config(path)
    check_seal(config, str(Path(path) / CONFIG))
    return config


def published_part(path: str | Path) -> dict[str, Any]:
    """The published configuration that `save_pretrained` was given. Raises WeightImportError as `load_pretrained`."""
    published: dict[str, Any] = read_entries(path).get("published", {})
    return published


def _config(path: str | Path) -> dict[str, Any]:
    folder = Path(path)
    if folder.is_file():
        raise WeightImportError(
            f"{folder}: is a file, where a folder of `osp import-weights` is wanted; a checkpoint of `osp train` is "
            "read by load_generator or load_vae of osp.training.checkpoints, published weights by load_published"
        )
    if not folder.is_dir():
        raise WeightImportError(f"{folder}: no such folder")
    config = read_config(folder)
    if config is None:
        raise WeightImportError(f"{folder}: has no {CONFIG}; give a folder of `osp import-weights`")
    if "_class_name" in config or "model" not in config:
        raise WeightImportError(f"{folder}: is in the published form; run `osp import-weights` first")
    place = str(folder / CONFIG)
    try:
        check_form(config, _FORM, place)
    except DataError as error:
        raise WeightImportError(str(error)) from error
    if odd := [key for key in config if key not in _KNOWN]:
        raise WeightImportError(f"{place}: {printable(odd[0])[:60]} is no entry of such a file")
    check_plain(config.get("published", {}), f"{place}: published", WeightImportError)
    return config
