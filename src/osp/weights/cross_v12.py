"""Published denoisers of v1.2, text-to-video and inpainting <-> our cross-attention transformer, dense throughout."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from osp.checks import check_number
from osp.data.media.shape import Shape
from osp.denoiser import CrossTransformer, Stage
from osp.denoiser.patterns import Dense
from osp.errors import UsageError
from osp.weights import cross_keys
from osp.weights.cross_keys import MASK_CHANNELS, SCALES
from osp.weights.keys import KeyPair, check_settings
from osp.weights.layout import Kind, Layout

_SAME_IN_ALL: Mapping[str, Any] = {**cross_keys.SAME_BEFORE_V13, "downsampler": None, "use_rope": True}
_SIZES = ("sample_size_t", "sample_size")
# Entries that do not shape the network.
_NOT_SHAPING = (
    *_SIZES,
    "attention_mode",
    "cross_attention_dim",
    "norm_num_groups",
    "num_embeds_ada_norm",
    "use_additional_conditions",
    "use_stable_fp32",
)
# The latents of the released model for 93x480p.
_SIZE = Shape(24, 60, 80)

DEFAULTS: dict[str, Any] = {**cross_keys.DEFAULTS, "in_channels": 4, "out_channels": 4}
DEFAULTS_INPAINT = DEFAULTS | {MASK_CHANNELS: 4}
FULL_SIZES: tuple[dict[str, Any], ...] = ({},)


def build(published_settings: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> CrossTransformer:
    """The text-to-video transformer of published constructor settings, on the current default device, without weights.

    Raises UsageError for a setting that no published model has.
    """
    check_settings("text-to-video denoiser of v1.2", published_settings, {*DEFAULTS, *_NOT_SHAPING}, _SAME_IN_ALL)
    return _build(published_settings)


def build_inpaint(published_settings: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> CrossTransformer:
    """The image-to-video transformer, built as by `build`; frames are given to it as v1.2 encodes them."""
    known = {*DEFAULTS_INPAINT, *_NOT_SHAPING}
    check_settings("inpainting denoiser of v1.2", published_settings, known, _SAME_IN_ALL)
    return _build(published_settings, frame_encoding="v12")


def _build(c: Mapping[str, Any], **settings: Any) -> CrossTransformer:
    cross_keys.check_sizes(c)
    scales = {key: _derived(key, c) if c[key] is None else c[key] for key in SCALES}
    return cross_keys.build_transformer({**c, **scales}, (Stage(c["num_layers"]),), **settings)


def _derived(key: str, c: Mapping[str, Any]) -> float:
    """A rotary scale that the configuration leaves open: the latent's native rows by 30, columns by 40, frames by 16.

    Raises UsageError where it does not say how large that is, or where how it is derived is not known.
    """
    if key == "interpolation_scale_t":
        frames: Any = c.get("sample_size_t")
        check_number(f"{key}=null: sample_size_t", frames, 1, whole=True)
        if frames % 2 == 0:
            raise UsageError(f"{key}=null: is not known for an even sample_size_t={frames}; give a number")
        return float((frames - 1) // 16 + 1)
    sides, number = c.get("sample_size"), SCALES.index(key) - 1
    if not isinstance(sides, Sequence) or len(sides) != 2:
        raise UsageError(f"{key}=null: is derived from sample_size, which must be [rows, columns], not {sides}")
    side: int = sides[number]
    check_number(f"{key}=null: sample_size[{number}]", side, 1, whole=True)
    return side / (30, 40)[number]


def published_settings(model: CrossTransformer) -> dict[str, Any]:
    """The published constructor settings of a transformer that `held` lets pass."""
    return {**cross_keys.common_settings(model), **_SAME_IN_ALL}


def held(model: CrossTransformer) -> CrossTransformer:
    """The transformer itself. Raises UsageError for what no published one of v1.2 has, naming the nearest."""
    c = model.config
    if other := {type(pattern) for pattern in model.schedule} - {Dense}:
        raise UsageError(
            f"the published code of v1.2 has dense blocks only, not {min(kind.__name__ for kind in other)}; the "
            f"nearest stages are [{{blocks: {len(model.schedule)}, pattern: dense}}]"
        )
    if c.frame_channels and c.frame_encoding != "v12":
        raise UsageError(
            f"the published inpainting code of v1.2 is given frames otherwise: frame_encoding={c.frame_encoding}, "
            "where it has v12; choose kind=opensora_inpaint_v13"
        )
    return model


def further(_model: CrossTransformer, size: Shape | None) -> dict[str, Any]:
    """Settings of the class that do not shape it: the size of its latents, and an attention that runs anywhere."""
    frames, height, width = size or _SIZE
    return {
        "attention_mode": "math",
        "norm_num_groups": 32,
        "num_embeds_ada_norm": 1000,
        "sample_size": [height, width],
        "sample_size_t": frames,
    }


def key_pairs(model: CrossTransformer) -> Iterable[KeyPair]:
    """Every tensor of the transformer with its published key or keys."""
    return cross_keys.key_pairs(model, "pos_embed_masked_video")


def class_name(model: CrossTransformer) -> str:
    """The name of the published class: there is one for text-to-video and one for inpainting."""
    return "OpenSoraInpaint" if model.config.frame_channels else "OpenSoraT2V"


def cached_scales(scales: Sequence[float], lengths: Sequence[int]) -> tuple[float, ...]:
    """The scales by which the published code turns frames, rows and columns of a grid with so many of them.

    Its tables are kept by their length alone, so that an axis as long as one before it gets that one's table. Ours are
    right; see docs/weights.md.
    """
    first: dict[int, float] = {}
    return tuple(first.setdefault(length, scale) for scale, length in zip(scales, lengths, strict=True))


LAYOUT = Layout(class_name, key_pairs, published_settings, held=held, further=further)
KINDS = {
    "opensora_v12": Kind(build, DEFAULTS, FULL_SIZES, LAYOUT),
    "opensora_inpaint_v12": Kind(build_inpaint, DEFAULTS_INPAINT, FULL_SIZES, LAYOUT),
}
