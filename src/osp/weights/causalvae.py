"""Published CausalVideoVAE and OD-VAE checkpoints <-> our modules, by `osp.weights.keys`."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from osp.vae.causalvae import CausalVAEConfig, CausalVideoVAE, MixedTimeDownsample, MixedTimeUpsample
from osp.weights.keys import (
    KeyPair,
    Setting,
    check_settings,
    layer_pairs,
    settings_from_published,
    settings_to_published,
)
from osp.weights.layout import MERGED, Family, Kind, Layout, Reading

# Ours -> theirs, one after another.
_RENAMED = tuple(
    (re.compile(pattern), theirs)
    for pattern, theirs in (
        (r"^encoder\.moments$", "quant_conv"),
        (r"^decoder\.from_latent$", "post_quant_conv"),
        (r"^encoder\.levels\.(\d+)\.resize\.0", r"encoder.down.\1.downsample"),
        # Their strided convolution in time is not wrapped once more, as all others in 3D are.
        (r"^encoder\.levels\.(\d+)\.time\.0(\.conv$)?", r"encoder.down.\1.time_downsample"),
        (r"^decoder\.levels\.(\d+)\.time\.0", r"decoder.up.\1.time_upsample"),
        (r"^decoder\.levels\.(\d+)\.resize\.0", r"decoder.up.\1.upsample"),
        (r"^encoder\.levels\.(\d+)\.blocks", r"encoder.down.\1.block"),
        (r"^decoder\.levels\.(\d+)\.blocks", r"decoder.up.\1.block"),
        (r"\.mid\.0\.", ".mid.block_1."),
        (r"\.mid\.1\.", ".mid.attn_1."),
        (r"\.mid\.2\.", ".mid.block_2."),
        (r"\.shortcut$", ".nin_shortcut"),
        (r"\.output$", ".proj_out"),
    )
)

_KERNELS = {"ResnetBlock2D": "2d", "ResnetBlock3D": "3d"}
_DOWN = {"": "none", "Downsample": "frame", "SpatialDownsample2x": "space", "Spatial2xTime2x3DDownsample": "space_time"}
_UP = {"": "none", "Upsample": "frame", "SpatialUpsample2x": "space", "Spatial2xTime2x3DUpsample": "space_time"}
_TIME_DOWN = {"": "none", "TimeDownsample2x": "plain", "TimeDownsampleRes2x": "mixed"}
_TIME_UP = {"": "none", "TimeUpsample2x": "plain", "TimeUpsampleRes2x": "mixed"}
_ATTENTION = {"AttnBlock3DFix": "frame", "AttnBlock3D": "mixed"}
_SETTINGS = {
    "hidden_size": Setting("base_channels"),
    "z_channels": Setting("inner_channels"),
    "embed_dim": Setting("latent_channels"),
    "hidden_size_mult": Setting("multipliers"),
    "num_res_blocks": Setting("blocks"),
    "dropout": Setting("dropout"),
    "norm_type": Setting("norm", {"groupnorm": "group", "layernorm": "layer"}),
    "encoder_conv_in": Setting("conv_in", {"CausalConv3d": "3d", "Conv2d": "2d"}),
    "encoder_resnet_blocks": Setting("encoder_blocks", _KERNELS),
    "encoder_spatial_downsample": Setting("encoder_resize", _DOWN),
    "encoder_temporal_downsample": Setting("encoder_time", _TIME_DOWN),
    "encoder_attention": Setting("encoder_attention", _ATTENTION),
    "decoder_resnet_blocks": Setting("decoder_blocks", _KERNELS),
    "decoder_spatial_upsample": Setting("decoder_resize", _UP),
    "decoder_temporal_upsample": Setting("decoder_time", _TIME_UP),
    "decoder_attention": Setting("decoder_attention", _ATTENTION),
}
# Entries of their config files that all models share.
_SAME_IN_ALL: dict[str, Any] = {
    "attn_resolutions": [],
    "double_z": True,
    "in_channels": 3,
    "out_channels": 3,
    "encoder_conv_out": "CausalConv3d",
    "encoder_mid_resnet": "ResnetBlock3D",
    "decoder_conv_in": "CausalConv3d",
    "decoder_conv_out": "CausalConv3d",
    "decoder_mid_resnet": "ResnetBlock3D",
    "q_conv": "CausalConv3d",
    "use_quant_layer": True,
}
# Those of them that are written: every version has them.
_WRITTEN = ("attn_resolutions", "double_z", "q_conv")
# Entries that do not shape the network, and the beginnings of such.
_NOT_SHAPING = ("resolution", "lr", "use_tiling", "scale", "shift")
_NOT_SHAPING_BEGIN = ("_", "loss_")

# Our defaults are those of the published class, for settings that a configuration lacks.
DEFAULTS: dict[str, Any] = {}
_FLAT_FIRST = ["ResnetBlock2D", "ResnetBlock2D", "ResnetBlock3D", "ResnetBlock3D"]
# The settings of the full-size models beyond the defaults: of v1.0, v1.1 and v1.2. Those of v1.0 are the ones that it
# was released with. They differ from its class's defaults in what has no weights (where time is halved, and in the
# order of the numbers in attention), so that its keys cannot tell the two apart.
FULL_SIZES: tuple[dict[str, Any], ...] = (
    {
        "encoder_temporal_downsample": ["TimeDownsample2x", "TimeDownsample2x", "", ""],
        "encoder_attention": "AttnBlock3D",
        "decoder_attention": "AttnBlock3D",
    },
    {
        "encoder_conv_in": "Conv2d",
        "encoder_resnet_blocks": _FLAT_FIRST,
        "encoder_spatial_downsample": ["Downsample", "Downsample", "Downsample", ""],
        "encoder_temporal_downsample": ["", "TimeDownsampleRes2x", "TimeDownsampleRes2x", ""],
        "decoder_temporal_upsample": ["", "", "TimeUpsampleRes2x", "TimeUpsampleRes2x"],
    },
    {
        "encoder_conv_in": "Conv2d",
        "encoder_resnet_blocks": _FLAT_FIRST,
        "encoder_spatial_downsample": [
            "Downsample",
            "Spatial2xTime2x3DDownsample",
            "Spatial2xTime2x3DDownsample",
            "",
        ],
        "encoder_temporal_downsample": ["", "", "", ""],
        "decoder_spatial_upsample": [
            "",
            "SpatialUpsample2x",
            "Spatial2xTime2x3DUpsample",
            "Spatial2xTime2x3DUpsample",
        ],
        "decoder_temporal_upsample": ["", "", "", ""],
    },
)


def build(published_settings: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> CausalVideoVAE:
    """The VAE of published constructor settings, on the current default device, without weights.

    Raises UsageError for a setting that no published VAE has, and for a shape that cannot be built.
    """
    c = published_settings
    shaping = {key: value for key, value in c.items() if not key.startswith(_NOT_SHAPING_BEGIN)}
    check_settings("CausalVideoVAE", shaping, {*_SETTINGS, *_NOT_SHAPING}, _SAME_IN_ALL)
    settings = settings_from_published(_SETTINGS, c)
    levels = settings.get("multipliers", CausalVAEConfig.multipliers)
    if len(levels) < len(CausalVAEConfig.multipliers):
        # The published defaults have four entries in each list of levels; a smaller model uses the first of them.
        lists = {f.name: f.default for f in fields(CausalVAEConfig) if isinstance(f.default, tuple)}
        settings = {name: default[: len(levels)] for name, default in lists.items()} | settings
    return CausalVideoVAE(**settings)


def published_settings(vae: CausalVideoVAE) -> dict[str, Any]:
    """The published constructor settings of a VAE; the classes up to v1.2's release have group norm without a word."""
    settings = settings_to_published(_SETTINGS, vae.settings)
    if vae.config.norm == "group":
        del settings["norm_type"]
    return settings | {key: _SAME_IN_ALL[key] for key in _WRITTEN}


def key_pairs(vae: CausalVideoVAE) -> Iterator[KeyPair]:
    """Every tensor of the VAE with its published key."""
    flat = _flat_parts(vae)
    yield from layer_pairs(vae, published_name, lambda name, _: name.startswith(flat))
    for name, module in vae.named_modules():
        if isinstance(module, MixedTimeDownsample | MixedTimeUpsample):
            yield KeyPair(f"{name}.mix_factor", (f"{published_name(name)}.mix_factor",), (1,))


def published_name(name: str) -> str:
    """The published name of a module of ours, without the wrappers of `layer_pairs`."""
    for pattern, theirs in _RENAMED:
        name = pattern.sub(theirs, name)
    return name


def _flat_parts(vae: CausalVideoVAE) -> tuple[str, ...]:
    """The beginnings of the names of what the published models compute with 2D convolutions."""
    c = vae.config
    parts = ["encoder.conv_in"] if c.conv_in == "2d" else []
    for half, blocks, resizes in (
        ("encoder", c.encoder_blocks, c.encoder_resize),
        ("decoder", c.decoder_blocks, c.decoder_resize),
    ):
        parts += [f"{half}.levels.{i}.blocks." for i, kernel in enumerate(blocks) if kernel == "2d"]
        parts += [f"{half}.levels.{i}.resize." for i, resize in enumerate(resizes) if resize == "frame"]
    return tuple(parts)


def reading(vae: CausalVideoVAE) -> Reading:
    """How the class of the version that has such a VAE reads it; layer norms came after v1.2's release."""
    c = vae.config
    if "space_time" in (*c.encoder_resize, *c.decoder_resize) or c.norm == "layer":
        return Reading(torch_file=MERGED, within=("state_dict", "gen_model"))
    # The classes of v1.0 and v1.1 have their loss as a part, which diffusers misses in the file with its defaults.
    return Reading(('model = {name}.from_pretrained("{folder}", low_cpu_mem_usage=False)',))


FAMILY = Family(
    "causalvae",
    CausalVideoVAE,
    # The classes of v1.0 and v1.1 have their loss as a part, with its networks.
    Layout(lambda _: "CausalVAEModel", key_pairs, published_settings, dropped=("loss.",), reading=reading),
    {"causalvae": Kind(build, DEFAULTS, FULL_SIZES)},
)
