"""Released folders as they lie on the hub, with models of a few thousand random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from osp.weights import save_published
from osp.weights.families import find_kind
from osp.weights.releases import RELEASES

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def _recorded(kind: str, case: str) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((GOLDEN / kind / f"{case}.json").read_text())["config"]
    return settings


TEXT = 32  # width of the toy T5's tokens
POOLED = 20  # width of the toy CLIP's vector
_HEADS = {"num_attention_heads": 1, "attention_head_dim": 24, "cross_attention_dim": 24, "caption_channels": TEXT}
_CROSS = {**_HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 3}
_LATTE = {**_HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": [4, 4]}
DENOISERS: dict[str, dict[str, Any]] = {
    "latte_v10": _LATTE,
    "latte_v11": _LATTE,
    "opensora_v12": _CROSS | {"sample_size": [4, 4], "sample_size_t": 2},
    "opensora_inpaint_v12": _CROSS | {"sample_size": [4, 4], "sample_size_t": 2},
    "opensora_v13": _CROSS,
    "opensora_inpaint_v13": _CROSS,
    "ummdit_v15": {
        "num_heads": 1,
        "head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "timestep_embed_dim": 32,
        "caption_channels": TEXT,
        "pooled_projection_dim": POOLED,
        "num_layers": [2, 2, 2],
        "sparse_n": [1, 2, 1],
    },
}
_FRAMES, _BOTH = "ResnetBlock2D", "ResnetBlock3D"
_CAUSAL = {"hidden_size": 32, "z_channels": 4, "embed_dim": 4, "hidden_size_mult": [1, 1, 1, 1], "num_res_blocks": 1}
_MIXED = {
    "encoder_conv_in": "Conv2d",
    "encoder_attention": "AttnBlock3DFix",
    "decoder_attention": "AttnBlock3DFix",
    "encoder_resnet_blocks": [_FRAMES, _FRAMES, _BOTH, _BOTH],
}
_UP = ["", "SpatialUpsample2x", "SpatialUpsample2x", "SpatialUpsample2x"]
_JOINT_DOWN, _JOINT_UP = "Spatial2xTime2x3DDownsample", "Spatial2xTime2x3DUpsample"
VAES: dict[str, tuple[str, dict[str, Any]]] = {
    "v10": (
        "causalvae",
        _CAUSAL
        | {
            "encoder_attention": "AttnBlock3D",
            "decoder_attention": "AttnBlock3D",
            "encoder_temporal_downsample": ["TimeDownsample2x", "TimeDownsample2x", "", ""],
            "decoder_temporal_upsample": ["", "", "TimeUpsample2x", "TimeUpsample2x"],
        },
    ),
    "v11": (
        "causalvae",
        _CAUSAL
        | _MIXED
        | {
            "encoder_spatial_downsample": ["Downsample", "Downsample", "Downsample", ""],
            "encoder_temporal_downsample": ["", "TimeDownsampleRes2x", "TimeDownsampleRes2x", ""],
            "decoder_spatial_upsample": _UP,
            "decoder_temporal_upsample": ["", "", "TimeUpsampleRes2x", "TimeUpsampleRes2x"],
        },
    ),
    "v12": (
        "causalvae",
        _CAUSAL
        | _MIXED
        | {
            "encoder_spatial_downsample": ["Downsample", _JOINT_DOWN, _JOINT_DOWN, ""],
            "encoder_temporal_downsample": ["", "", "", ""],
            "decoder_spatial_upsample": ["", "SpatialUpsample2x", _JOINT_UP, _JOINT_UP],
            "decoder_temporal_upsample": ["", "", "", ""],
        },
    ),
    "v13": ("wfvae_v13", _recorded("wfvae_v13", "d_nearest_noattn_main")),
    "v15": ("wfvae_v15", _recorded("wfvae_v15", "b")),
}


def build(kind: str, settings: dict[str, Any]) -> nn.Module:
    """A model of published settings with random weights."""
    torch.manual_seed(0)
    found = find_kind(kind)[1]
    model = found.build({**found.defaults, **settings}, {})
    for parameter in model.parameters():  # a new denoiser predicts zero
        nn.init.normal_(parameter, std=0.05)
    return model.eval()


def save_release(name: str, folder: Path, denoiser: str | None = None, frames: int = 5) -> nn.Module:
    """A released folder by the name of its generator; gives its denoiser, which lies in the folder of that name.

    That of v1.2 keeps its VAE as a training checkpoint, as released.
    """
    release = RELEASES[name]
    version = next(part for part in name.split("_") if part in VAES)
    settings = DENOISERS[release.denoiser]
    if release.denoiser.startswith("latte"):
        settings = settings | {"video_length": (frames - 1) // 4 + 1}
    model = build(release.denoiser, settings)
    save_published(model, folder / (denoiser or release.folder or "denoiser"), kind=release.denoiser)
    kind, config = VAES[version]
    scaling = {"scale": [0.9] * 4, "shift": [0.1] * 4} if version == "v15" else {}
    vae = build(kind, config)
    save_published(vae, folder / "vae", scaling, kind=kind)
    if version == "v12":
        _as_training_checkpoint(folder / "vae")
    return model


def _as_training_checkpoint(folder: Path) -> None:
    (weights,) = folder.glob("*.safetensors")
    averaged = {f"module.{key}": value for key, value in load_file(weights).items()}
    for other in (weights, folder / "merged.ckpt"):  # the forms that an export has, and a training run has not
        other.unlink(missing_ok=True)
    last = {key.removeprefix("module."): torch.zeros_like(value) for key, value in averaged.items()}
    torch.save({"ema_state_dict": averaged, "state_dict": {"gen_model": last}, "step": 3}, folder / "checkpoint.ckpt")
