"""Published WF-VAE checkpoints <-> our modules: `osp.weights.keys`, and each wavelet filter is a key of its own."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from osp.data.media.shape import Shape
from osp.errors import UsageError
from osp.vae.wavelet import EXACT_SCALE_3D, PUBLISHED_SCALE_3D, HaarTransform, InverseHaarTransform
from osp.vae.wfvae import WFVAE
from osp.weights.keys import KeyPair, Setting, layer_pairs, settings_from_published, settings_to_published
from osp.weights.layout import MERGED, Family, Kind, Layout, Reading

# Ours, as part of a dotted name -> theirs. The last part of a name decides for the wavelets and inside attention.
_RENAMED = {"flow_l1": "connect_l1", "flow_l2": "connect_l2", "head": "layer", "shortcut": "nin_shortcut"}
_RENAMED_LAST = {"output": "proj_out"}
# Their names of the filters, in our order of bands.
_FILTERS_3D = ("h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v")
_FILTERS_2D = ("aa", "ad", "da", "dd")
_ONE_FILTER = "encoder.wavelet_transform_in.h_conv.conv.weight"

_WITHIN = ("state_dict",)

_BLOCKS = ("dowmsample_block", "downsample_wavelet", "upsample_block", "upsample_wavelet")
_LEVEL_2D = ("Downsample", "HaarWaveletTransform2D", "Upsample", "InverseHaarWaveletTransform2D")
_LEVEL_3D = (
    "Spatial2xTime2x3DDownsample",
    "HaarWaveletTransform3D",
    "Spatial2xTime2x3DUpsample",
    "InverseHaarWaveletTransform3D",
)
_LEVEL1 = {"2d": _LEVEL_2D, "3d": _LEVEL_3D}
_SETTINGS = {
    "latent_dim": Setting("latent_channels"),
    "base_channels": Setting("base_channels"),
    "encoder_num_resblocks": Setting("encoder_blocks"),
    "decoder_num_resblocks": Setting("decoder_blocks"),
    "encoder_energy_flow_hidden_size": Setting("encoder_flow_channels"),
    "decoder_energy_flow_hidden_size": Setting("decoder_flow_channels"),
    "connect_res_layer_num": Setting("flow_blocks"),
    "norm_type": Setting("norm", {"layernorm": "layer", "groupnorm": "group"}),
    "use_attention": Setting("attention"),
    "t_interpolation": Setting("temporal_interpolation"),
    "dropout": Setting("dropout"),
}
# Entries of their config files that do not shape the network.
_NOT_SHAPING = ("attention_type", "scale", "shift", "use_tiling", "vae_scale_factor")


def _level_settings(level1: tuple[str, ...]) -> dict[str, str]:
    levels = {"l1": level1, "l2": _LEVEL_3D}
    return {f"{level}_{block}": names[i] for level, names in levels.items() for i, block in enumerate(_BLOCKS)}


_SHARED = {
    "latent_dim": 8,
    "base_channels": 128,
    "encoder_num_resblocks": 2,
    "decoder_num_resblocks": 2,
    "encoder_energy_flow_hidden_size": 128,
    "decoder_energy_flow_hidden_size": 128,
    "connect_res_layer_num": 1,
    "norm_type": "layernorm",
    "use_attention": True,
    "t_interpolation": "trilinear",
    "dropout": 0.0,
}
DEFAULTS_V13 = _SHARED | _level_settings(_LEVEL_2D)
DEFAULTS_V15 = _SHARED | {"latent_dim": 32, "base_channels": 160} | _level_settings(_LEVEL_3D)
# fmt: off
_SCALE_V15 = [
    0.7031, 0.7109, 1.5391, 1.2969, 0.7109, 1.4141, 1.3828, 2.1719, 1.7266, 1.8281, 1.9141, 1.2031, 0.6875, 0.9609,
    1.6484, 1.1875, 1.5312, 1.1328, 0.8828, 0.6836, 0.8828, 0.9219, 1.6953, 1.4453, 1.5312, 0.6836, 0.7656, 0.8242,
    1.2344, 1.0312, 1.7266, 0.9492,
]
_SHIFT_V15 = [
    -0.2129, 0.1226, 1.6328, 0.6211, -0.8750, 0.6172, -0.5703, 0.1348, -0.2178, -0.9375, 0.3184, 0.3281, -0.0544,
    -0.1826, -0.2812, 0.4355, 0.1621, -0.2578, 0.7148, -0.7422, -0.2295, -0.2324, -1.4922, 0.6328, 1.1250, -0.2578,
    -2.1094, 1.0391, 1.1797, -1.2422, -0.2988, -0.9570,
]
# fmt: on
# The settings of the full-size models beyond the defaults.
FULL_SIZES_V13: tuple[dict[str, Any], ...] = ({}, {"latent_dim": 4}, {"latent_dim": 16, "base_channels": 192})
FULL_SIZES_V15: tuple[dict[str, Any], ...] = (
    {"vae_scale_factor": [8, 8, 8], "scale": _SCALE_V15, "shift": _SHIFT_V15},
)


def build(published_settings: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> WFVAE:
    """The VAE of published constructor settings, on the current default device, without weights.

    `weights` are the published ones if they are at hand: the filters among them say what their size is.
    Raises UsageError for a setting that no published VAE has, and for such a combination of blocks.
    """
    c = published_settings
    known = {*_SETTINGS, *DEFAULTS_V13}
    # `_class_name` and the like are of the framework that wrote the config file.
    if unknown := [key for key in c if key not in {*known, *_NOT_SHAPING} and not key.startswith("_")]:
        raise UsageError(f"a published WF-VAE has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    for level1, names in _LEVEL1.items():
        if all(c[key] == value for key, value in _level_settings(names).items()):
            settings = settings_from_published(_SETTINGS, c)
            return WFVAE(**settings, level1=level1, haar_scale=_haar_scale(weights or {}))
    blocks = ", ".join(f"{key}={c[key]}" for key in _level_settings(_LEVEL_2D))
    raise UsageError(f"no published WF-VAE has these blocks: {blocks}")


def published_settings(vae: WFVAE) -> dict[str, Any]:
    """The published constructor settings of a VAE."""
    return settings_to_published(_SETTINGS, vae.settings) | _level_settings(_LEVEL1[vae.config.level1])


def _further_v15(vae: WFVAE, _size: Shape | None) -> dict[str, Any]:
    return {"vae_scale_factor": [vae.time_stride, vae.space_stride, vae.space_stride]}


def key_pairs(vae: WFVAE) -> Iterator[KeyPair]:
    """Every tensor of the VAE with its published key or keys."""
    yield from layer_pairs(vae, _published_name, lambda _, module: module.kernel_size == (1, 3, 3))
    for name, module in vae.named_modules():
        if isinstance(module, HaarTransform | InverseHaarTransform):
            yield _filter_pair(name, _published_name(name), module)


def _published_name(name: str) -> str:
    parts = [_RENAMED.get(part, part) for part in name.split(".")]
    if parts[-1].startswith("wavelet_"):
        parts[-1] = f"{'' if parts[0] == 'encoder' else 'inverse_'}{parts[-1].replace('_', '_transform_', 1)}"
    parts[-1] = _RENAMED_LAST.get(parts[-1], parts[-1])
    return ".".join(parts)


def _filter_pair(name: str, theirs: str, module: HaarTransform | InverseHaarTransform) -> KeyPair:
    if module.filters.shape[1] == 1:
        return KeyPair(f"{name}.filters", tuple(f"{theirs}.{band}" for band in _FILTERS_2D), (1, 1, 2, 2))
    suffix = "_conv.conv.weight" if isinstance(module, HaarTransform) else ""
    return KeyPair(f"{name}.filters", tuple(f"{theirs}.{band}{suffix}" for band in _FILTERS_3D), (1, 1, 2, 2, 2))


def _haar_scale(weights: Mapping[str, Any]) -> float:
    """The size of the 3D filters' values, so that the settings say what the weights hold."""
    one = weights.get(_ONE_FILTER)
    if not isinstance(one, Tensor) or not one.numel():
        return PUBLISHED_SCALE_3D
    value = one.detach().flatten()[0].float().abs().item()
    for known in (PUBLISHED_SCALE_3D, EXACT_SCALE_3D):
        if torch.tensor(known, device="cpu").item() == value:
            return known
    return value


# The main repository's class sets its wavelets, so that diffusers cannot load it from safetensors with its defaults.
_V13 = Layout(
    lambda _: "WFVAEModel", key_pairs, published_settings, reading=lambda _: Reading(torch_file=MERGED, within=_WITHIN)
)
_READING_V15 = Reading(
    (
        f'weights = torch.load("{{folder}}/{MERGED}", map_location="cpu", weights_only=True)["state_dict"]',
        "model.load_state_dict(weights)  # a {name} of v1.5, made with the settings in config.json",
    ),
    MERGED,
    _WITHIN,
)

FAMILY = Family(
    "wfvae",
    WFVAE,
    _V13,
    {
        "wfvae_v13": Kind(build, DEFAULTS_V13, FULL_SIZES_V13),
        "wfvae_v15": Kind(
            build, DEFAULTS_V15, FULL_SIZES_V15, replace(_V13, reading=lambda _: _READING_V15, further=_further_v15)
        ),
    },
    likely=lambda vae: "wfvae_v15" if vae.config.level1 == "3d" else "wfvae_v13",
)
