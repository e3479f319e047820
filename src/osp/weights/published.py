"""Published checkpoints to our modules, refusing whatever does not fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osp.errors import UsageError
from osp.vae import VideoVAE
from osp.weights.built import build_empty
from osp.weights.families import find_kind
from osp.weights.files import check_keys, sound
from osp.weights.folders import config_path, read_config, read_weights
from osp.weights.keys import from_published
from osp.weights.layout import Family, Kind
from osp.weights.lazy import Stored, Weights, filled, parse_dtype, unwrapped

SCALE_4X8X8 = 0.18215


@dataclass(frozen=True)
class Opened:
    """A published model: the module without memory, its weights, which are read one by one when they are asked for.

    `further_settings` is what its configuration says beyond the model's shape (as `scale`).
    """

    model: nn.Module
    weights: Weights
    further_settings: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """How many parameters it has, our settings, and what is published beyond them."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"parameters": parameters, "settings": self.model.settings, "published": self.further_settings}


def load_published(
    kind: str,
    source: str | Path | Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> nn.Module:
    """A published model with its weights, in eval mode; they are read later under a device "meta".

    `kind` is one of a family (`osp.weights.families`), as "wfvae_v13". `source` is a checkpoint file (safetensors or
    torch), a folder with one, with shards or with the ranks of a Megatron run, or a state dict with the published keys.
    `config` holds the published constructor settings; None means those of the `config.json` in the folder or beside the
    file, else those of the published full-size model that the keys are most like.

    Raises UsageError for another kind and for settings that no published model has, WeightImportError for files that
    cannot be read safely and for unknown, missing or misshapen keys, which it lists.
    """
    opened = open_published(kind, source, config, dtype)
    model = filled(opened.model.to(parse_dtype(dtype)), opened.weights, copy=False)
    if isinstance(model, VideoVAE):
        model.origin = None if isinstance(source, Mapping) else str(source)
        model.scaling = published_scaling(model, opened.further_settings)
    return model


def published_scaling(vae: VideoVAE, published: Mapping[str, Any]) -> Any:
    """Shift and scale of a VAE's latents by what its published configuration says beyond its shape.

    Without a word about them it is the scale of all models of 4x8x8 compression; None for others.
    """
    if published.get("scale") is not None:
        return published.get("shift") or 0.0, published["scale"]
    return (0.0, SCALE_4X8X8) if vae.time_stride == 4 else None


def open_published(
    kind: str,
    source: str | Path | Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> Opened:
    """The model that `load_published` makes, without its weights, of which only the keys are read yet."""
    dtype = parse_dtype(dtype)
    family, found = find_kind(kind)
    origin, name = "config", "the checkpoint"
    if isinstance(source, str | Path):
        name = str(source)
        if config is None and (config := read_config(source)) is not None:
            origin = str(config_path(source))
            if "model" in config and "settings" in config:
                raise UsageError(
                    f"{source} is no published model but one of `osp import-weights`; use vae=pretrained or "
                    "denoiser=pretrained"
                )
    if config is None:
        name += " (read with the full-size settings, as there is no config.json; give config=FILE for others)"
    sizes = found.full_sizes if config is None else (config,)
    if isinstance(source, str | Path):
        # The full-size models of a kind have the same number of blocks
        weights = read_weights(source, {**found.defaults, **sizes[0]}.get("num_layers"))
    else:
        weights = unwrapped(source)
    weights = weights.without(family.layout.dropped)
    candidates = [Candidate(family, found, size, weights, origin) for size in sizes]
    best = min(candidates, key=lambda candidate: candidate.misfits)
    weights = best.completed(weights)
    check_keys(best.expected, weights, name, optional=best.ignored)
    weights = sound(weights, best.expected, name.split(" (read with")[0])
    best.model.published_kind = kind  # type: ignore[assignment]
    return Opened(best.model, from_published(best.pairs, weights, best.model, dtype), best.further_settings)


class Candidate:
    """A model that weights may be of: what it expects of them, and by how much they differ (`misfits`, in keys).

    Raises UsageError naming `origin` for settings that no published model has.
    """

    def __init__(self, family: Family, kind: Kind, settings: Mapping[str, Any], weights: Weights, origin: str) -> None:
        self.model, layout = build_published(family, kind, settings, weights, origin), family.layout_of(kind)
        self.pairs = list(layout.key_pairs(self.model))
        if forgotten := self.model.state_dict().keys() - {pair.ours for pair in self.pairs}:
            raise RuntimeError(f"family {family.name}: its layout has no key for {', '.join(sorted(forgotten))}")
        self.expected = {key: pair.published_shape for pair in self.pairs for key in pair.published}
        self.ignored = layout.ignored(self.model)
        self.absent = {key: self.expected[key] for key in layout.absent(self.model)}
        shaping = layout.settings(self.model)
        self.further_settings = {
            key: value for key, value in settings.items() if key not in shaping and not key.startswith("_")
        }
        ignored = {key: shape for key, shape in self.ignored.items() if key in weights}
        self.misfits = len((self.expected | ignored).items() ^ self.completed(weights).shapes.items())

    def completed(self, weights: Weights) -> Weights:
        """The weights, with zeros for what a checkpoint may lack and these do."""

        def zeros(shape: tuple[int, ...]) -> Stored:
            return Stored(shape, torch.float32, lambda: torch.zeros(shape, device="cpu"))

        lacking = {key: zeros(shape) for key, shape in self.absent.items() if key not in weights}
        return Weights(lacking | weights.stored)


def build_published(
    family: Family, kind: Kind, settings: Mapping[str, Any], weights: Weights, origin: str
) -> nn.Module:
    """The model of published settings, without memory. Raises UsageError naming `origin` for impossible ones."""

    def build(**all_settings: Any) -> nn.Module:
        return kind.build(all_settings, weights)

    build.__name__ = family.model.__name__
    return build_empty(build, {**kind.defaults, **settings}, len(weights), origin, UsageError, "these settings make no")
