"""Load published checkpoints into our modules, refusing whatever does not fit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osp.errors import UsageError
from osp.weights import wfvae
from osp.weights.files import WeightImportError, check_keys, read_checkpoint

# Constructor settings of the published full-size models, in the names of their own config files.
_WFVAE = {
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
    "l2_dowmsample_block": "Spatial2xTime2x3DDownsample",
    "l2_downsample_wavelet": "HaarWaveletTransform3D",
    "l2_upsample_block": "Spatial2xTime2x3DUpsample",
    "l2_upsample_wavelet": "InverseHaarWaveletTransform3D",
}
_PUBLISHED_SETTINGS: dict[str, dict[str, Any]] = {
    "wfvae_v13": _WFVAE
    | {
        "latent_dim": 8,
        "l1_dowmsample_block": "Downsample",
        "l1_downsample_wavelet": "HaarWaveletTransform2D",
        "l1_upsample_block": "Upsample",
        "l1_upsample_wavelet": "InverseHaarWaveletTransform2D",
    },
    "wfvae_v15": _WFVAE
    | {
        "latent_dim": 32,
        "base_channels": 160,
        "l1_dowmsample_block": "Spatial2xTime2x3DDownsample",
        "l1_downsample_wavelet": "HaarWaveletTransform3D",
        "l1_upsample_block": "Spatial2xTime2x3DUpsample",
        "l1_upsample_wavelet": "InverseHaarWaveletTransform3D",
    },
}


def load_published(
    kind: str, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> nn.Module:
    """A published model with its weights, float32 and in eval mode.

    `kind` is "wfvae_v13" or "wfvae_v15". `source` is a `.safetensors`, `.pt` or `.ckpt` file or a state dict with the
    published keys. `config` holds the published constructor settings; None means those of the full-size model.

    Raises UsageError for another kind, WeightImportError for a file that cannot be read safely and for unknown,
    missing or misshapen keys, which it lists.
    """
    if kind not in _PUBLISHED_SETTINGS:
        raise UsageError(f"kind={kind!r} is not known; choose {' or '.join(_PUBLISHED_SETTINGS)}")
    published = read_state_dict(source) if isinstance(source, str | Path) else source
    with torch.device("meta"):
        vae = wfvae.build(_PUBLISHED_SETTINGS[kind] | dict(config or {}))
    pairs = list(wfvae.key_pairs(vae))
    check_keys({key: pair.published_shape for pair in pairs for key in pair.published}, published)
    vae.load_state_dict(wfvae.from_published(iter(pairs), published, vae), assign=True)
    return vae.eval()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint file.

    A training checkpoint's weights lie under `ema_state_dict` (preferred unless empty), `state_dict` or
    `state_dict.gen_model`; the prefix `module.` is dropped. Raises WeightImportError, see `read_checkpoint`.
    """
    loaded = read_checkpoint(path)
    weights = loaded.get("ema_state_dict") or loaded.get("state_dict") or loaded
    if not isinstance(weights, Mapping):
        raise WeightImportError(f"{path}: its state dict is a {type(weights).__name__}, not tensors by name")
    weights = weights.get("gen_model") or weights
    return {key.removeprefix("module."): value for key, value in weights.items() if isinstance(value, Tensor)}
