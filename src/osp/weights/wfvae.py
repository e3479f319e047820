"""Published WF-VAE checkpoints <-> our modules.

The two layouts differ in names only: a published 3D convolution is wrapped once more (`.conv`), a 2D one has no time
dimension, and each wavelet filter is a key of its own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from osp.errors import UsageError
from osp.vae.layers import CausalConv3d, Downsample, GroupNorm, LayerNorm
from osp.vae.wavelet import PUBLISHED_SCALE_3D, HaarTransform, InverseHaarTransform
from osp.vae.wfvae import WFVAE

# Ours, as part of a dotted name -> theirs. The last part of a name decides for the wavelets.
_RENAMED = {"flow_l1": "connect_l1", "flow_l2": "connect_l2", "head": "layer", "shortcut": "nin_shortcut"}
_RENAMED_IN_ATTENTION = {"output": "proj_out"}
# Their names of the filters, in our order of bands.
_FILTERS_3D = ("h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v")
_FILTERS_2D = ("aa", "ad", "da", "dd")

_DOWN_3D, _UP_3D = "Spatial2xTime2x3DDownsample", "Spatial2xTime2x3DUpsample"
_HAAR_3D, _INVERSE_3D = "HaarWaveletTransform3D", "InverseHaarWaveletTransform3D"
_LEVEL1 = {
    ("Downsample", "HaarWaveletTransform2D", "Upsample", "InverseHaarWaveletTransform2D"): "2d",
    (_DOWN_3D, _HAAR_3D, _UP_3D, _INVERSE_3D): "3d",
}
_LEVEL2 = (_DOWN_3D, _HAAR_3D, _UP_3D, _INVERSE_3D)
_BLOCKS = ("dowmsample_block", "downsample_wavelet", "upsample_block", "upsample_wavelet")
_SETTINGS = {
    "latent_dim": "latent_channels",
    "base_channels": "base_channels",
    "encoder_num_resblocks": "encoder_blocks",
    "decoder_num_resblocks": "decoder_blocks",
    "encoder_energy_flow_hidden_size": "encoder_flow_channels",
    "decoder_energy_flow_hidden_size": "decoder_flow_channels",
    "connect_res_layer_num": "flow_blocks",
    "use_attention": "attention",
    "t_interpolation": "temporal_interpolation",
    "dropout": "dropout",
}
# Entries of their config files that do not shape the network.
_NOT_SHAPING = ("attention_type", "scale", "shift", "use_tiling", "vae_scale_factor")


@dataclass(frozen=True)
class KeyPair:
    """One tensor of ours and the keys that hold it in a published checkpoint (several for a wavelet's filters)."""

    ours: str
    published: tuple[str, ...]
    published_shape: tuple[int, ...]


def build(published_settings: Mapping[str, Any]) -> WFVAE:
    """The VAE of published constructor settings, on the current default device, without weights.

    Raises UsageError for a setting that no published VAE has, and for such a combination of blocks.
    """
    c = published_settings
    known = {*_SETTINGS, "norm_type", *(f"{level}_{block}" for level in ("l1", "l2") for block in _BLOCKS)}
    # `_class_name` and the like are of the framework that wrote the config file.
    if unknown := [key for key in c if key not in {*known, *_NOT_SHAPING} and not key.startswith("_")]:
        raise UsageError(f"a published WF-VAE has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    level1 = tuple(c[f"l1_{block}"] for block in _BLOCKS)
    level2 = tuple(c[f"l2_{block}"] for block in _BLOCKS)
    if level1 not in _LEVEL1 or level2 != _LEVEL2:
        raise UsageError(f"no published WF-VAE has these blocks: level 1 {level1}, level 2 {level2}")
    norms = {"layernorm": "layer", "groupnorm": "group"}
    if c["norm_type"] not in norms:
        raise UsageError(f"norm_type={c['norm_type']!r} is not known; choose layernorm or groupnorm")
    settings = {ours: c[theirs] for theirs, ours in _SETTINGS.items()}
    return WFVAE(**settings, level1=_LEVEL1[level1], norm=norms[c["norm_type"]], haar_scale=PUBLISHED_SCALE_3D)


def key_pairs(vae: WFVAE) -> Iterator[KeyPair]:
    """Every tensor of the VAE with its published key or keys."""
    for name, module in vae.named_modules():
        theirs = _published_name(name)
        if isinstance(module, HaarTransform | InverseHaarTransform):
            yield _filter_pair(name, theirs, module)
        elif isinstance(module, CausalConv3d):
            for parameter, shape, suffix in _convolution_keys(module):
                yield KeyPair(f"{name}.{parameter}", (f"{theirs}{suffix}.{parameter}",), shape)
        elif isinstance(module, LayerNorm | GroupNorm):
            for parameter in ("weight", "bias"):
                yield KeyPair(f"{name}.{parameter}", (f"{theirs}.norm.{parameter}",), tuple(module.weight.shape))


def from_published(pairs: Iterator[KeyPair], published: Mapping[str, Tensor], vae: nn.Module) -> dict[str, Tensor]:
    """The state dict of ours with the values of a published one whose keys and shapes have been checked."""
    own = vae.state_dict()
    return {
        pair.ours: torch.stack([published[key].float() for key in pair.published]).reshape(own[pair.ours].shape)
        for pair in pairs
    }


def _published_name(name: str) -> str:
    parts = name.split(".")
    if parts[-1].startswith("wavelet_"):
        prefix = "wavelet_transform_" if parts[0] == "encoder" else "inverse_wavelet_transform_"
        parts[-1] = parts[-1].replace("wavelet_", prefix)
    renamed = [_RENAMED.get(part, part) for part in parts]
    renamed[-1] = _RENAMED_IN_ATTENTION.get(renamed[-1], renamed[-1])
    return ".".join(renamed)


def _filter_pair(name: str, theirs: str, module: HaarTransform | InverseHaarTransform) -> KeyPair:
    if module.filters.shape[1] == 1:
        return KeyPair(f"{name}.filters", tuple(f"{theirs}.{band}" for band in _FILTERS_2D), (1, 1, 2, 2))
    suffix = "_conv.conv.weight" if isinstance(module, HaarTransform) else ""
    return KeyPair(f"{name}.filters", tuple(f"{theirs}.{band}{suffix}" for band in _FILTERS_3D), (1, 1, 2, 2, 2))


def _convolution_keys(module: CausalConv3d) -> Iterator[tuple[str, tuple[int, ...], str]]:
    flat = module.kernel_size == (1, 3, 3)
    suffix = ".conv" * (isinstance(module, Downsample) + (not flat))
    shape = tuple(module.weight.shape)
    yield "weight", (*shape[:2], *shape[3:]) if flat else shape, suffix
    yield "bias", shape[:1], suffix
