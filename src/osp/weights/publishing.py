"""Our modules to published checkpoints: the folders that the published classes read."""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from osp.data.media.shape import Shape
from osp.denoiser import Denoiser
from osp.errors import UsageError
from osp.files import discard
from osp.vae import VideoVAE
from osp.weights.families import family_of, find_kind
from osp.weights.files import open_checkpoint
from osp.weights.folders import write_model
from osp.weights.keys import to_published as _to_published
from osp.weights.layout import MERGED, TORCH, Layout, Reading
from osp.weights.lazy import Weights
from osp.weights.torch_writing import write_torch

WEIGHTS = "diffusion_pytorch_model.safetensors"
_CLASS = "_class_name"


def to_published(model: nn.Module, kind: str | None = None) -> dict[str, Tensor]:
    """The state dict of a model as the published code names it, copied.

    `kind` says which published code where a family has several; None: see `find_published_kind`. Raises UsageError for
    a model that is not known there, or that the published class cannot hold.
    """
    layout = _layout(model, kind)
    held = layout.held(model)
    own = Weights.of(held.state_dict())
    return {key: value.clone() for key, value in _to_published(layout.key_pairs(held), own).items()}


def published_settings(model: nn.Module, kind: str | None = None) -> dict[str, Any]:
    """The constructor settings of a model as the published code names them. Raises UsageError as `to_published`."""
    layout = _layout(model, kind)
    return layout.settings(layout.held(model))


def save_published(
    model: nn.Module,
    folder: str | Path,
    further_settings: Mapping[str, Any] | None = None,
    kind: str | None = None,
    weights: Weights | None = None,
    latent_size: Shape | None = None,
) -> dict[str, Any]:
    """Write a model for the published code: `config.json`, the weights, and a torch file for classes that need one.

    `further_settings`, of the kind that the model was read as, go into its configuration. `kind` is as in
    `to_published`. `weights` are written in place of the model's own, which need not be in memory then. `latent_size`
    is that of the clips that a denoiser is made for, where the class asks for it. The shift and scale of a VAE's
    latents are those that it is known for (`VideoVAE.scaling`), else 0 and 1. Gives what the configuration says. Raises
    UsageError as `to_published`, and for a folder that holds something else.
    """
    folder = Path(folder)
    name = find_published_kind(model, kind)
    layout = _layout(model, name)
    held = layout.held(model)
    further = layout.further(held, latent_size)
    if isinstance(model, VideoVAE):
        further |= scaling_entries(model)
    if isinstance(model, Denoiser | VideoVAE) and model.published_kind in (None, name):
        further |= further_settings or {}
    config = {_CLASS: layout.class_name(held), **further, **layout.settings(held)}
    own = Weights.of(held.state_dict()) if weights is None else weights
    stored = _to_published(layout.key_pairs(held), own)
    beside = partial(_write_beside, folder, layout.reading(held))
    write_model(folder, WEIGHTS, stored, config, is_alike=lambda other: _CLASS in other, beside=beside)
    return config


def loading_lines(model: nn.Module, folder: str | Path, kind: str | None = None) -> list[str]:
    """The Python that reads a folder of `save_published` in the published code; arguments as there."""
    layout = _layout(model, kind)
    name, place = layout.class_name(model), json.dumps(str(folder))[1:-1]
    return [line.replace("{name}", name).replace("{folder}", place) for line in layout.reading(model).lines]


def find_published_kind(model: nn.Module, kind: str | None = None) -> str:
    """The kind that a model is written as: the one asked for, else the one it was read as, else the likeliest.

    Raises UsageError for a model that has no published form, and for a kind of another family.
    """
    family = family_of(model)
    if family is None:
        raise UsageError(f"there is no published form of a {type(model).__name__}")
    if kind is not None and (other := find_kind(kind)[0]) is not family:
        raise UsageError(f"kind={kind}: is of {other.model.__name__}; choose {', '.join(family.kinds)}")
    read_as = model.published_kind if isinstance(model, Denoiser | VideoVAE) else None
    if kind is None and read_as in family.kinds:
        kind = read_as
    if kind is None:
        kind = next(iter(family.kinds)) if family.likely is None else family.likely(model)
    return kind


def _layout(model: nn.Module, kind: str | None) -> Layout:
    family, found = find_kind(find_published_kind(model, kind))
    return family.layout_of(found)


def scaling_entries(vae: VideoVAE) -> dict[str, list[float]]:
    """Shift and scale of a VAE's latents as its configuration has them: one entry a channel."""
    values = zip(("shift", "scale"), vae.scaling or (0.0, 1.0), strict=True)
    return {
        name: [float(value)] * vae.latent_channels if isinstance(value, int | float) else [float(one) for one in value]
        for name, value in values
    }


def _write_beside(folder: Path, reading: Reading, weights: Path) -> None:
    """The torch file of a class that takes no other, and no such file where the folder needs none any more."""
    for name in (MERGED, TORCH):
        discard(folder / name)
    if reading.torch_file is None:
        return
    content: dict[str, Any] = dict(open_checkpoint(weights))
    for key in reversed(reading.within):
        content = {key: content}
    part = folder / f".{reading.torch_file}.part"
    discard(part)
    write_torch(part, content)
    os.replace(part, folder / reading.torch_file)
