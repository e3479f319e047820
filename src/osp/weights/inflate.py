"""An image VAE's weights as those of a video VAE: the start of CausalVideoVAE and OD-VAE.

The image VAE is a folder of diffusers' `AutoencoderKL`. Its layers are those of `CausalVideoVAE` for single frames, so
that each of its 2D kernels goes into a 3D one of ours (`Kernels`). Layers over time that it has none of stay as drawn.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from osp.checks import check_choice
from osp.documents import printable
from osp.errors import UsageError
from osp.vae import CausalVideoVAE
from osp.vae.causalvae import MixedTimeDownsample, MixedTimeUpsample
from osp.vae.layers import CausalConv3d, Downsample, GroupNorm, LayerNorm
from osp.weights.causalvae import published_name
from osp.weights.files import WeightImportError, sound
from osp.weights.folders import config_path, read_config, read_weights
from osp.weights.lazy import Stored, Weights

Kernels = Literal["tail", "centre", "average"]
"""Where a 2D kernel goes in a 3D one: the last tap in time, the middle one, or a third into each.

Before a causal layer stand repeated first frames, so that with "tail" each frame sees itself alone. With "centre" each
layer of three taps delays by a frame. A single frame fills all taps, and gives the same with all three.
"""

_CLASS = "AutoencoderKL"
_GROUPS = 32

# Names of the layers of latent diffusion's first VAE, which the published video VAEs took over -> diffusers'.
_RENAMED = (
    (r"\bmid\.block_1\b", "mid_block.resnets.0"),
    (r"\bmid\.block_2\b", "mid_block.resnets.1"),
    (r"\bmid\.attn_1\b", "mid_block.attentions.0"),
    (r"\bdown\.(\d+)\.block\b", r"down_blocks.\1.resnets"),
    (r"\bdown\.(\d+)\.downsample\b", r"down_blocks.\1.downsamplers.0"),
    (r"\bup\.(\d+)\.block\b", r"up_blocks.\1.resnets"),
    (r"\bup\.(\d+)\.upsample\b", r"up_blocks.\1.upsamplers.0"),
    (r"\bnin_shortcut\b", "conv_shortcut"),
    (r"^(encoder|decoder)\.norm_out\b", r"\1.conv_norm_out"),
)
# The layers of attention, by diffusers' present names and its former ones.
_ATTENTION = (
    {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
    {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"},
)


@dataclass(frozen=True)
class Inflated:
    """Weights of ours by key, and what of them the image VAE does not have (`drawn`: they stay as they were)."""

    weights: Weights
    drawn: tuple[str, ...]


def inflated(vae: CausalVideoVAE, source: str | Path, kernels: Kernels = "tail") -> Inflated:
    """The weights of an image VAE for this video VAE; `vae` brings those of the layers that only it has.

    `source` is a folder of diffusers' `AutoencoderKL` (`config.json` and its weights), or a file with such weights
    beside that. Keys may be diffusers', present or former, or those of latent diffusion, as the published video VAEs
    have them.

    Raises UsageError for other kernels and for a VAE with layer norms, and WeightImportError for a folder that holds no
    such VAE, and for keys that are missing, left over or of a shape that does not fit.
    """
    check_choice("kernels", kernels, get_args(Kernels))
    if vae.config.norm != "group":
        raise UsageError("vae.norm=layer: an image VAE has group norms; choose a shape with norm=group")
    _check_config(source)
    given = read_weights(source)
    given = sound(given.without(("loss.",)), {key: torch.empty(0) for key in given}, str(source))
    levels, own = len(vae.config.multipliers), Weights.of(vae.state_dict()).stored
    made: dict[str, Stored] = {}
    left, missing, wrong = set(given), [], []
    for module, names in _image_layers(vae, levels):
        for parameter in ("weight", "bias"):
            ours = f"{module}.{parameter}"
            key = next((f"{name}.{parameter}" for name in names if f"{name}.{parameter}" in given), None)
            if key is None:
                missing.append(f"{names[0]}.{parameter}")
                continue
            left.discard(key)
            shape = own[ours].shape
            if not _fits(given.shapes[key], shape):
                wrong.append(f"{key} ({given.shapes[key]} for {shape})")
            made[ours] = Stored(shape, own[ours].dtype, partial(_inflate, given, key, own[ours], kernels))
    _tell(str(source), {"missing": missing, "left over": sorted(left), "of another shape": wrong})
    drawn = tuple(key for key in own if key not in made)
    return Inflated(Weights({key: made.get(key, stored) for key, stored in own.items()}), drawn)


def _check_config(source: str | Path) -> None:
    """Raise WeightImportError unless a configuration beside the weights is of an `AutoencoderKL` that we can hold."""
    config, place = read_config(source), printable(str(config_path(source)))
    if config is None:
        raise WeightImportError(f"{place}: no such file; give a folder of diffusers' {_CLASS}, with its config.json")
    if config.get("_class_name") != _CLASS:
        named = printable(str(config.get("_class_name")))
        raise WeightImportError(f"{place}: is of {named}, where diffusers' {_CLASS} is wanted")
    for key, wanted in (("norm_num_groups", _GROUPS), ("act_fn", "silu"), ("in_channels", 3), ("out_channels", 3)):
        if config.get(key, wanted) != wanted:
            raise WeightImportError(f"{place}: {key}={printable(str(config[key]))}: must be {wanted}")


def _image_layers(vae: CausalVideoVAE, levels: int) -> Iterator[tuple[str, list[str]]]:
    """Each layer of ours that an image VAE has too, and what it may be called there, diffusers' present name first."""
    over_time = tuple(
        f"{name}."
        for name, module in vae.named_modules()
        if isinstance(module, MixedTimeDownsample | MixedTimeUpsample)
    )
    for name, module in vae.named_modules():
        if not isinstance(module, CausalConv3d | GroupNorm | LayerNorm) or name.startswith(over_time or ("\0",)):
            continue
        theirs = published_name(name) + ".conv" * isinstance(module, Downsample)
        yield name, [*_diffusers_names(theirs, levels), theirs]


def _diffusers_names(name: str, levels: int) -> list[str]:
    """A layer's names in diffusers, of which the present one comes first."""
    for pattern, theirs in _RENAMED:
        name = re.sub(pattern, theirs, name)
    # Their decoder counts its levels from the coarsest one.
    name = re.sub(r"\bup_blocks\.(\d+)", lambda found: f"up_blocks.{levels - 1 - int(found[1])}", name)
    before, attention, layer = name.partition("attentions.0.")
    return [f"{before}{attention}{names[layer]}" for names in _ATTENTION] if attention else [name]


def _fits(image: tuple[int, ...], video: tuple[int, ...]) -> bool:
    """Whether weights of an image VAE can become these: a norm, a 2D kernel, or a matrix for a 1x1 kernel."""
    if len(video) == 1:
        return image == video
    return image == (*video[:2], *video[3:]) or (image == video[:2] and set(video[2:]) == {1})


def _inflate(given: Mapping[str, Tensor], key: str, own: Stored, kernels: Kernels) -> Tensor:
    value = given[key].to(own.dtype)
    if len(own.shape) == 1:
        return value.clone()
    image = value.reshape(*own.shape[:2], 1, *own.shape[3:])
    taps = own.shape[2]
    if kernels == "average":
        return (image / taps).expand(own.shape).contiguous()
    kernel = torch.zeros(own.shape, dtype=own.dtype)
    kernel[:, :, -1 if kernels == "tail" else taps // 2] = image[:, :, 0]
    return kernel


def _tell(source: str, wrong: Mapping[str, list[str]]) -> None:
    listed = [
        f"{len(keys)} {what}: {', '.join(map(printable, keys[:5]))}{' and more' if len(keys) > 5 else ''}"
        for what, keys in wrong.items()
        if keys
    ]
    if listed:
        raise WeightImportError(
            f"{source} does not fit the video VAE; {'; '.join(listed)}. vae.base_channels, vae.multipliers, vae.blocks "
            "and the channels of the latent have to be those of the image VAE"
        )
