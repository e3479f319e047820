"""The transformers with cross-attention as published: the keys and settings that versions have in common."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from osp.checks import check_number
from osp.denoiser import CrossTransformer, Stage
from osp.denoiser.rotary import halves_first
from osp.errors import UsageError
from osp.weights.keys import KeyPair, Setting, settings_from_published, settings_to_published

SETTINGS = {
    "in_channels": Setting("channels"),
    "out_channels": Setting("out_channels"),
    "num_attention_heads": Setting("heads"),
    "attention_head_dim": Setting("head_dim"),
    "caption_channels": Setting("text_channels"),
    "patch_size": Setting("patch_size"),
}
SCALES = ("interpolation_scale_t", "interpolation_scale_h", "interpolation_scale_w")
MASK_CHANNELS = "vae_scale_factor_t"
SAME_IN_ALL: Mapping[str, Any] = {
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
SAME_BEFORE_V13: Mapping[str, Any] = {
    **SAME_IN_ALL,
    "attention_type": "default",
    "norm_type": "ada_norm_single",
    "num_vector_embeds": None,
    "use_linear_projection": False,
}
DEFAULTS: Mapping[str, Any] = {
    "num_attention_heads": 24,
    "attention_head_dim": 96,
    "caption_channels": 4096,
    "patch_size": 2,
    "num_layers": 32,
} | dict.fromkeys(SCALES, 1.0)

# Ours -> theirs; the projections of a block, and the masked video's, are below.
TOP = {
    "patch.linear": "pos_embed.proj",
    "condition_patches.1.linear": "pos_embed_mask.0.proj",
    "condition_patches.1.zero": "pos_embed_mask.1",
    "time.up": "adaln_single.emb.timestep_embedder.linear_1",
    "time.down": "adaln_single.emb.timestep_embedder.linear_2",
    "modulation": "adaln_single.linear",
    "text.up": "caption_projection.linear_1",
    "text.down": "caption_projection.linear_2",
    "out": "proj_out",
}
_MASKED = {"condition_patches.0.linear": ".0.proj", "condition_patches.0.zero": ".1"}
IN_BLOCK = {
    "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention_out": ("attn1.to_out.0",),
    "text_q": ("attn2.to_q",),
    "text_kv": ("attn2.to_k", "attn2.to_v"),
    "text_out": ("attn2.to_out.0",),
    "feed_forward.up": ("ff.net.0.proj",),
    "feed_forward.down": ("ff.net.2",),
}


def build_transformer(c: Mapping[str, Any], stages: Sequence[Stage], **settings: Any) -> CrossTransformer:
    """The transformer of published settings with this schedule and these further settings of ours.

    Where there is a setting of mask channels it is one for inpainting. Raises UsageError for impossible values.
    """
    settings |= settings_from_published(SETTINGS, c)
    width = settings["heads"] * settings["head_dim"]
    if c.get("cross_attention_dim", width) != width:
        raise UsageError(f"cross_attention_dim={c['cross_attention_dim']}: must be heads x head_dim, {width}")
    conditions = (c["in_channels"], c[MASK_CHANNELS]) if MASK_CHANNELS in c else ()
    scale = [c[key] for key in SCALES]
    return CrossTransformer(stages, frame_channels=conditions, position_scale=scale, **settings)


def check_sizes(c: Mapping[str, Any]) -> None:
    """Raise UsageError for heads, their channels or blocks that are no whole numbers."""
    for key in ("num_attention_heads", "attention_head_dim", "num_layers"):
        check_number(key, c[key], 1, whole=True)


def common_settings(model: CrossTransformer) -> dict[str, Any]:
    """The published settings of a transformer, but for its schedule.

    Raises UsageError for channels of given frames that none of them has.
    """
    c = model.config
    settings = settings_to_published(SETTINGS, model.settings)
    settings |= {"num_layers": len(model.schedule), **dict(zip(SCALES, c.position_scale, strict=True))}
    if c.frame_channels:
        if len(c.frame_channels) != 2 or c.frame_channels[0] != c.channels:
            raise UsageError(f"no published denoiser has frame_channels={list(c.frame_channels)}")
        settings[MASK_CHANNELS] = c.frame_channels[1]
    return {**settings, **SAME_IN_ALL, "cross_attention_dim": c.width}


def key_pairs(model: CrossTransformer, masked: str) -> Iterator[KeyPair]:
    """Every tensor of the transformer with its published key or keys; `masked` begins the masked video's."""
    c, top = model.config, TOP | {ours: masked + theirs for ours, theirs in _MASKED.items()}
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
            yield KeyPair(name, (f"{top[module]}.{kind}",), shape)
