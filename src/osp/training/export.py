"""Export of trained weights as a folder: in our own form, or in that of the published code."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osp.checks import check_choice
from osp.data.media.shape import Shape, Strides
from osp.documents import check_form
from osp.errors import UsageError
from osp.files import discard, put_in_place
from osp.training.checkpoints import open_denoiser, open_generator, open_text, open_vae
from osp.training.state import GENERATOR, TEXT, TrainingCheckpoint, is_state, open_state
from osp.vae import VideoVAE
from osp.vae.codec import fingerprint_of
from osp.weights.files import save_weights
from osp.weights.folders import read_config
from osp.weights.lazy import Stored, Weights, parse_dtype
from osp.weights.pretrained import open_pretrained, published_part, save_pretrained
from osp.weights.published import published_scaling
from osp.weights.publishing import find_published_kind, loading_lines, save_published

FORMS = ("osp", "published")


@dataclass(frozen=True)
class Model:
    """A model without memory, and its weights, which are read when they are asked for.

    `text` are those of a text encoder that was trained along. `entries` go into the configuration in our own form,
    `published` is what a published configuration said beyond the model's shape. `size` is that of the
    latents that a denoiser was trained on, if it is known.
    """

    model: nn.Module
    weights: Weights
    text: Weights | None
    entries: dict[str, Any]
    published: dict[str, Any]
    size: Shape | None = None


def export(
    source: str | Path,
    output: str | Path,
    *,
    averaged: bool = True,
    form: str = "osp",
    dtype: str = "float32",
    kind: str | None = None,
    scaling_from: str | Path | None = None,
) -> dict[str, Any]:
    """Write what was trained in a checkpoint of any form, tensor by tensor, as a folder that is whole or not there.

    `source` is a checkpoint, or a folder of `osp import-weights`, which has one kind of weights only. `averaged`
    chooses between the averaged weights and those of the last step. In our own form (`osp`) the folder is one that
    `path=FOLDER` takes; of a denoiser it holds what makes a generator too, so that `checkpoint=FOLDER` and
    `start_from=FOLDER` take it as well. In the published form, `kind` says which published code is to read it, and
    `scaling_from` is a checkpoint of a denoiser that was trained on the latents of this VAE, whose shift and scale are
    written with it. Gives what the folder holds. Raises UsageError for settings that do not fit, for a folder of
    something else and for a model that the published class cannot hold, and errors as the readers.
    """
    check_choice("form", form, FORMS)
    for key, value in (("kind", kind), ("scaling_from", scaling_from)):
        if form == "osp" and value is not None:
            raise UsageError(f"{key}={value}: is of form=published alone")
    type_, place = parse_dtype(dtype), Path(output)
    if not is_state(source) and not averaged:
        raise UsageError(f"averaged=false: {source} holds one kind of weights only; leave it out")
    found = _trained(open_state(source), averaged) if is_state(source) else _pretrained(Path(source))
    if scaling_from is not None:
        _scale(found, str(source), scaling_from)
    _check_output(place, form)
    part = place.with_name(f".{place.name}.part")
    discard(part)
    try:
        settings = _write(found, part, form, type_, kind)
        put_in_place(part, place)
    finally:
        discard(part)
    parameters = sum(parameter.numel() for parameter in found.model.parameters())
    told = {"output": str(place), "parameters": parameters, "settings": settings}
    if form == "osp":
        return told
    kind = find_published_kind(found.model, kind)
    return told | {"kind": kind, "load": loading_lines(found.model, place, kind)}


def _write(found: Model, folder: Path, form: str, dtype: torch.dtype, kind: str | None) -> dict[str, Any]:
    weights = _cast(found.weights, dtype)
    if form == "published":
        return save_published(found.model.to(dtype), folder, found.published, kind, weights, found.size)
    folder.mkdir(parents=True)
    entries = dict(found.entries)
    if found.text is not None:
        entries[TEXT] = save_weights(folder / f"{TEXT}.safetensors", _cast(found.text, dtype))
    save_pretrained(found.model, folder, found.published, weights, entries)
    settings: dict[str, Any] = found.model.settings  # type: ignore[assignment]
    return settings


def _scale(found: Model, source: str, denoiser: str | Path) -> None:
    """Give a VAE the shift and scale that a denoiser was trained with. Raises UsageError if it was with another VAE."""
    if not isinstance(found.model, VideoVAE):
        raise UsageError(f"scaling_from={denoiser}: {source} holds a denoiser, and only a VAE has a scaling")
    _, entry = open_generator(denoiser)
    latent = entry["latent"]
    if fingerprint_of(found.model, found.weights) != latent["vae_fingerprint"]:
        raise UsageError(f"scaling_from={denoiser}: was trained with another VAE than {source}")
    found.model.scaling = latent["shift"], latent["scale"]


def _check_output(folder: Path, form: str) -> None:
    """Raise UsageError for a folder with anything in it that is not a model of this form."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config = read_config(folder) if folder.is_dir() else None
    if config is None or ("model" if form == "osp" else "_class_name") not in config:
        raise UsageError(f"{folder} is of something else; choose another output folder")


def _pretrained(folder: Path) -> Model:
    model, weights = open_pretrained(folder)
    published = published_part(folder)
    if isinstance(model, VideoVAE):
        model.scaling = published_scaling(model, published)
    return Model(model, weights, None, {}, published)


def _trained(state: TrainingCheckpoint, averaged: bool) -> Model:
    if state.entry("vae_settings") is not None:
        vae, weights = open_vae(state, averaged)
        if (scaling := state.entry("vae_scaling")) is not None:
            check_form(scaling, {"shift": [float], "scale": [float]}, f"{state.path}: vae_scaling")
            vae.scaling = scaling["shift"], scaling["scale"]
        return Model(vae, weights, None, {}, {})
    _, entry = open_generator(state.path)
    text = open_text(state, averaged)
    entries = {GENERATOR: {**entry, "step": state.step}}
    return Model(*open_denoiser(state, averaged), text and text[1], entries, {}, _latent_size(entry))


def _latent_size(entry: dict[str, Any]) -> Shape | None:
    """The size of the latents that a denoiser was trained on, where its checkpoint says it."""
    latent, clip = entry["latent"], entry["clip"]
    if clip is None or "time_stride" not in latent or "space_stride" not in latent:
        return None
    return Strides(latent["time_stride"], latent["space_stride"]).latent(**clip)


def _cast(weights: Weights, dtype: torch.dtype) -> Weights:
    def read(stored: Stored) -> Tensor:
        value = stored.read()
        return value.to(dtype) if stored.dtype.is_floating_point else value

    return Weights(
        {
            key: Stored(one.shape, dtype if one.dtype.is_floating_point else one.dtype, partial(read, one))
            for key, one in weights.stored.items()
        }
    )
