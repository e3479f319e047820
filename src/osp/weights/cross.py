"""Published denoisers of v1.3, text-to-video and inpainting <-> our cross-attention transformer."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from osp.checks import check_number
from osp.denoiser import CrossTransformer, Stage
from osp.denoiser.rotary import halves_first
from osp.errors import UsageError
from osp.weights.keys import KeyPair, Setting, check_settings, settings_from_published, settings_to_published
from osp.weights.layout import Family, Kind, Layout

_SETTINGS = {
    "in_channels": Setting("channels"),
    "out_channels": Setting("out_channels"),
    "num_attention_heads": Setting("heads"),
    "attention_head_dim": Setting("head_dim"),
    "caption_channels": Setting("text_channels"),
    "patch_size": Setting("patch_size"),
}
_SCALES = ("interpolation_scale_t", "interpolation_scale_h", "interpolation_scale_w")
_SCHEDULE = ("num_layers", "sparse1d", "sparse_n")
_MASK_CHANNELS = "vae_scale_factor_t"
_SAME_IN_ALL = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "double_self_attention": False,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "only_cross_attention": False,
    "patch_size_t": 1,
    "upcast_attention": False,
}
# Entries that do not shape the network.
_NOT_SHAPING = ("cross_attention_dim", "sample_size_h", "sample_size_t", "sample_size_w")
# The published code has these written into it, whatever the number of blocks.
_FIRST_SPARSE, _FIRST_DENSE_AGAIN = 2, 30

DEFAULTS: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 24,
    "attention_head_dim": 96,
    "caption_channels": 4096,
    "patch_size": 2,
    "num_layers": 32,
    "sparse1d": True,
    "sparse_n": 4,
} | dict.fromkeys(_SCALES, 1.0)
DEFAULTS_INPAINT = DEFAULTS | {_MASK_CHANNELS: 4}
FULL_SIZES: tuple[dict[str, Any], ...] = ({},)

# Ours -> theirs; the projections of a block are below.
_TOP = {
    "patch.linear": "pos_embed.proj",
    "condition_patches.0.linear": "pos_embed_masked_hidden_states.0.proj",
    "condition_patches.0.zero": "pos_embed_masked_hidden_states.1",
    "condition_patches.1.linear": "pos_embed_mask.0.proj",
    "condition_patches.1.zero": "pos_embed_mask.1",
    "time.up": "adaln_single.emb.timestep_embedder.linear_1",
    "time.down": "adaln_single.emb.timestep_embedder.linear_2",
    "modulation": "adaln_single.linear",
    "text.up": "caption_projection.linear_1",
    "text.down": "caption_projection.linear_2",
    "out": "proj_out",
}
IN_BLOCK = {
    "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention_out": ("attn1.to_out.0",),
    "text_q": ("attn2.to_q",),
    "text_kv": ("attn2.to_k", "attn2.to_v"),
    "text_out": ("attn2.to_out.0",),
    "feed_forward.up": ("ff.net.0.proj",),
    "feed_forward.down": ("ff.net.2",),
}


def class_name(model: CrossTransformer) -> str:
    """The name of the published class: there is one for text-to-video and one for inpainting."""
    return "OpenSoraInpaint_v1_3" if model.config.frame_channels else "OpenSoraT2V_v1_3"


def build(published_settings: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> CrossTransformer:
    """The text-to-video transformer of published constructor settings, on the current default device, without weights.

    Raises UsageError for a setting that no published model has.
    """
    check_settings("text-to-video denoiser of v1.3", published_settings, {*DEFAULTS, *_NOT_SHAPING}, _SAME_IN_ALL)
    return _build(published_settings)


def build_inpaint(published_settings: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> CrossTransformer:
    """The inpainting transformer, built as by `build`."""
    known = {*DEFAULTS_INPAINT, *_NOT_SHAPING}
    check_settings("inpainting denoiser of v1.3", published_settings, known, _SAME_IN_ALL)
    return _build(published_settings)


def _build(c: Mapping[str, Any]) -> CrossTransformer:
    for key in ("num_attention_heads", "attention_head_dim", "num_layers"):
        check_number(key, c[key], 1, whole=True)
    settings = settings_from_published(_SETTINGS, c)
    width = settings["heads"] * settings["head_dim"]
    if c.get("cross_attention_dim", width) != width:
        raise UsageError(f"cross_attention_dim={c['cross_attention_dim']}: must be heads x head_dim, {width}")
    conditions = (c["in_channels"], c[_MASK_CHANNELS]) if _MASK_CHANNELS in c else ()
    stages = _stages(c["num_layers"], c["sparse_n"] if c["sparse1d"] else 1)
    scale = [c[key] for key in _SCALES]
    return CrossTransformer(stages, frame_channels=conditions, position_scale=scale, **settings)


def published_settings(model: CrossTransformer) -> dict[str, Any]:
    """The published constructor settings of a transformer. Raises UsageError for a schedule that none of them has."""
    c = model.config
    sparsity = max(stage.k for stage in c.stages)
    if model.schedule != [pattern for stage in _stages(len(model.schedule), sparsity) for pattern in stage.patterns]:
        raise UsageError("the published code of v1.3 has one schedule: 2 dense blocks, 28 skiparse ones, then dense")
    settings = settings_to_published(_SETTINGS, model.settings)
    settings |= dict(zip(_SCHEDULE, (len(model.schedule), sparsity > 1, sparsity), strict=True))
    settings |= dict(zip(_SCALES, c.position_scale, strict=True))
    if c.frame_channels:
        if len(c.frame_channels) != 2 or c.frame_channels[0] != c.channels:
            raise UsageError(f"no published denoiser has frame_channels={list(c.frame_channels)}")
        settings[_MASK_CHANNELS] = c.frame_channels[1]
    return settings | _SAME_IN_ALL | {"cross_attention_dim": c.width}


def key_pairs(model: CrossTransformer) -> Iterator[KeyPair]:
    """Every tensor of the transformer with its published key or keys."""
    c = model.config
    head = halves_first(c.rotary_parts)
    rows = tuple(number * c.head_dim + channel for number in range(c.heads) for channel in head)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        module, _, kind = name.rpartition(".")
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            theirs, inner = f"transformer_blocks.{number}", rest.rpartition(".")[0]
            if rest == "table":
                yield KeyPair(name, (f"{theirs}.scale_shift_table",), shape)
                continue
            parts = IN_BLOCK[inner]
            shape = (shape[0] // len(parts), *shape[1:])
            orders = (rows, rows, None) if inner == "qkv" else ()
            yield KeyPair(name, tuple(f"{theirs}.{part}.{kind}" for part in parts), shape, orders)
        elif name == "out_table":
            yield KeyPair(name, ("scale_shift_table",), shape)
        else:
            if module.endswith("linear") and kind == "weight":  # a convolution there
                side = c.patch_size
                shape = (shape[0], math.prod(shape[1:]) // side**2, side, side)
            yield KeyPair(name, (f"{_TOP[module]}.{kind}",), shape)


def _stages(blocks: int, sparsity: int) -> tuple[Stage, ...]:
    if sparsity == 1:
        return (Stage(blocks),)
    sizes = (
        (min(blocks, _FIRST_SPARSE), 1),
        (min(blocks, _FIRST_DENSE_AGAIN) - _FIRST_SPARSE, sparsity),
        (blocks - _FIRST_DENSE_AGAIN, 1),
    )
    return tuple(Stage(size, "skiparse" if k > 1 else "dense", k) for size, k in sizes if size > 0)


FAMILY = Family(
    "cross",
    CrossTransformer,
    Layout(class_name, key_pairs, published_settings),
    {
        "opensora_v13": Kind(build, DEFAULTS, FULL_SIZES),
        "opensora_inpaint_v13": Kind(build_inpaint, DEFAULTS_INPAINT, FULL_SIZES),
    },
)
