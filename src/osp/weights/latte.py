"""Published denoisers of v1.0 and v1.1 (LatteT2V) <-> our Latte transformer."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from osp.checks import check_number
from osp.data.media.shape import Shape
from osp.denoiser import LatteTransformer
from osp.denoiser.rotary import halves_first
from osp.errors import UsageError
from osp.weights.cross_keys import IN_BLOCK, SAME_BEFORE_V13, SETTINGS, TOP
from osp.weights.keys import KeyPair, Setting, check_settings, settings_from_published, settings_to_published
from osp.weights.layout import Family, Kind, Layout

_SETTINGS = {**SETTINGS, "num_layers": Setting("pairs"), "video_length": Setting("frames")}
_ROTARY = "use_rope"
_TIME_SCALE = "interpolation_scale_1d"
_SAME_IN_V11 = {"compress_kv_factor": 1, "rope_scaling_type": "linear"}
# Entries that do not shape the network; the width follows from the heads.
_NOT_SHAPING = ("attention_mode", "cross_attention_dim", "norm_num_groups", "num_embeds_ada_norm")
_NOT_SHAPING_V11 = ("model_max_length",)

_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 8,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "caption_channels": 4096,
    "patch_size": 2,
    "num_layers": 28,
    "sample_size": [64, 64],
}
DEFAULTS_V10 = _DEFAULTS | {"video_length": 17}
DEFAULTS_V11 = _DEFAULTS | {"video_length": 56, _ROTARY: False, _TIME_SCALE: None}
FULL_SIZES: tuple[dict[str, Any], ...] = ({},)

UNUSED = "caption_projection.y_embedding"
"""A buffer of the published class that nothing reads; checkpoints may lack it."""


def build_v10(published_settings: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> LatteTransformer:
    """The transformer of v1.0's constructor settings, on the current default device, without weights.

    Raises UsageError for a setting that no published model has.
    """
    known = {*DEFAULTS_V10, *_NOT_SHAPING}
    check_settings("denoiser of v1.0", published_settings, known, SAME_BEFORE_V13)
    return _build(published_settings, _time_scale_v10(_length(published_settings)))


def build_v11(published_settings: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> LatteTransformer:
    """The transformer of v1.1's constructor settings, built as by `build_v10`."""
    known = {*DEFAULTS_V11, *_NOT_SHAPING, *_NOT_SHAPING_V11}
    check_settings("denoiser of v1.1", published_settings, known, {**SAME_BEFORE_V13, **_SAME_IN_V11})
    length, scale = _length(published_settings), published_settings[_TIME_SCALE]
    check_number(_TIME_SCALE, scale, above=0, null="that of the length")
    return _build(published_settings, _time_scale_v11(length) if scale is None else scale)


def settings_v10(model: LatteTransformer) -> dict[str, Any]:
    """The constructor settings of v1.0. Raises UsageError for positions that no model of v1.0 has."""
    c = model.config
    if c.rotary or c.position_scale[0] != _time_scale_v10(c.frames):
        raise UsageError(
            f"position_scale={list(c.position_scale)}, rotary={c.rotary}: v1.0 divides the positions of "
            f"{c.frames} frames by {_time_scale_v10(c.frames):g}, and rotates none; export it as kind=latte_v11"
        )
    return _settings(model)


def settings_v11(model: LatteTransformer) -> dict[str, Any]:
    """The constructor settings of v1.1. Raises UsageError for positions of rows or columns that no model has."""
    c, (scale, *_) = model.config, model.config.position_scale
    own = None if scale == _time_scale_v11(c.frames) else int(scale) if scale.is_integer() else scale
    return _settings(model) | _SAME_IN_V11 | {_ROTARY: c.rotary, _TIME_SCALE: own}


def further_v10(_model: LatteTransformer, _size: Shape | None) -> dict[str, Any]:
    """Settings of the class that do not shape it, with an attention that runs anywhere."""
    return {"attention_mode": "math", "norm_num_groups": 32, "num_embeds_ada_norm": 1000}


def further_v11(model: LatteTransformer, size: Shape | None) -> dict[str, Any]:
    """The same of v1.1's class, which knows the most tokens of a text besides."""
    return further_v10(model, size) | {"model_max_length": 300}


def _likely(model: LatteTransformer) -> str:
    """v1.0 where its code alone derives the model's time positions from the length, else v1.1."""
    c, (scale, *_) = model.config, model.config.position_scale
    only_v10 = scale == _time_scale_v10(c.frames) != _time_scale_v11(c.frames)
    return "latte_v10" if only_v10 and not c.rotary else "latte_v11"


def _settings(model: LatteTransformer) -> dict[str, Any]:
    c = model.config
    size = c.native_rows * c.patch_size
    if list(c.position_scale[1:]) != [_space_scale(size)] * 2:
        raise UsageError(
            f"position_scale={list(c.position_scale)}: the published code divides rows and columns by "
            f"{_space_scale(size):g} for native_rows={c.native_rows}"
        )
    settings = settings_to_published(_SETTINGS, model.settings)
    return {**settings, **SAME_BEFORE_V13, "sample_size": [size, size], "cross_attention_dim": c.width}


def key_pairs(model: LatteTransformer) -> Iterator[KeyPair]:
    """Every tensor of the transformer with its published key or keys."""
    side = model.config.patch_size
    for name, value in model.state_dict(keep_vars=True).items():
        shape = tuple(value.shape)
        module, _, kind = name.rpartition(".")
        if name.startswith("blocks."):
            yield _block_pair(model, name, shape)
        elif name == "out_table":
            yield KeyPair(name, ("scale_shift_table",), shape)
        elif name == "unused_text":
            yield KeyPair(name, (UNUSED,), shape)
        elif name == "patch.linear.weight":  # a convolution there
            yield KeyPair(name, (f"{TOP[module]}.{kind}",), (shape[0], model.config.channels, side, side))
        else:
            yield KeyPair(name, (f"{TOP[module]}.{kind}",), shape)


def _block_pair(model: LatteTransformer, name: str, shape: tuple[int, ...]) -> KeyPair:
    """A tensor of a block: the blocks within frames have a list of their own there, and so have those across them."""
    _, number, rest = name.split(".", 2)
    pair, across = divmod(int(number), 2)
    theirs = f"{'temporal_' if across else ''}transformer_blocks.{pair}"
    inner, _, kind = rest.rpartition(".")
    if rest == "table":
        return KeyPair(name, (f"{theirs}.scale_shift_table",), shape)
    parts = IN_BLOCK[inner]
    rows = _rows(model, int(number)) if inner == "qkv" and model.config.rotary else None
    orders = () if rows is None else (rows, rows, None)
    return KeyPair(
        name, tuple(f"{theirs}.{part}.{kind}" for part in parts), (shape[0] // len(parts), *shape[1:]), orders
    )


def _rows(model: LatteTransformer, block: int) -> tuple[int, ...]:
    """Where the rows of queries and keys lie in ours, which rotate all of a head at once."""
    c = model.config
    head = halves_first(c.rotary_parts(block))
    return tuple(number * c.head_dim + channel for number in range(c.heads) for channel in head)


def _build(c: Mapping[str, Any], time_scale: float) -> LatteTransformer:
    settings = settings_from_published(_SETTINGS, c)
    for key in ("num_attention_heads", "attention_head_dim", "num_layers", "patch_size"):
        check_number(key, c[key], 1, whole=True)
    width = settings["heads"] * settings["head_dim"]
    if c.get("cross_attention_dim", width) != width:
        raise UsageError(f"cross_attention_dim={c['cross_attention_dim']}: must be heads x head_dim, {width}")
    size = c["sample_size"]
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise UsageError(f"sample_size={size}: must be two numbers, rows and columns of the latent")
    check_number("sample_size", size[0], settings["patch_size"], whole=True)
    scale = _space_scale(size[0])
    return LatteTransformer(
        **settings,
        native_rows=size[0] // settings["patch_size"],
        position_scale=(time_scale, scale, scale),
        rotary=c.get(_ROTARY, False),
    )


def _length(settings: Mapping[str, Any]) -> int:
    length: int = settings["video_length"]
    check_number("video_length", length, 1, whole=True)
    return length


def _time_scale_v10(frames: int) -> float:
    return float(max(1, frames // 5))


def _time_scale_v11(frames: int) -> float:
    return float(max(1, (frames - frames % 2) // 16))


def _space_scale(size: int) -> float:
    return float(max(1, size // 64))


_V10 = Layout(lambda _: "LatteT2V", key_pairs, settings_v10, absent=lambda _: {UNUSED}, further=further_v10)
_V11 = replace(_V10, settings=settings_v11, further=further_v11)

FAMILY = Family(
    "latte",
    LatteTransformer,
    _V11,
    {
        "latte_v10": Kind(build_v10, DEFAULTS_V10, FULL_SIZES, _V10),
        "latte_v11": Kind(build_v11, DEFAULTS_V11, FULL_SIZES),
    },
    likely=_likely,
)
