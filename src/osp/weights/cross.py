"""Published denoisers of v1.3, text-to-video and inpainting <-> our cross-attention transformer; and its family."""

from collections.abc import Iterable, Mapping
from typing import Any

from osp.denoiser import CrossTransformer, Stage
from osp.errors import UsageError
from osp.weights import cross_keys, cross_v12
from osp.weights.cross_keys import MASK_CHANNELS, SAME_IN_ALL
from osp.weights.keys import KeyPair, check_settings
from osp.weights.layout import Family, Kind, Layout

_SCHEDULE = ("sparse1d", "sparse_n")
# Entries that do not shape the network.
_NOT_SHAPING = ("cross_attention_dim", "sample_size_h", "sample_size_t", "sample_size_w")
# The published code has these written into it, whatever the number of blocks.
_FIRST_SPARSE, _FIRST_DENSE_AGAIN = 2, 30

DEFAULTS: dict[str, Any] = {
    **cross_keys.DEFAULTS,
    "in_channels": 8,
    "out_channels": 8,
    "sparse1d": True,
    "sparse_n": 4,
}
DEFAULTS_INPAINT = DEFAULTS | {MASK_CHANNELS: 4}
FULL_SIZES: tuple[dict[str, Any], ...] = ({},)


def class_name(model: CrossTransformer) -> str:
    """The name of the published class: there is one for text-to-video and one for inpainting."""
    return "OpenSoraInpaint_v1_3" if model.config.frame_channels else "OpenSoraT2V_v1_3"


def build(published_settings: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> CrossTransformer:
    """The text-to-video transformer of published constructor settings, on the current default device, without weights.

    Raises UsageError for a setting that no published model has.
    """
    check_settings("text-to-video denoiser of v1.3", published_settings, {*DEFAULTS, *_NOT_SHAPING}, SAME_IN_ALL)
    return _build(published_settings)


def build_inpaint(published_settings: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> CrossTransformer:
    """The inpainting transformer, built as by `build`."""
    known = {*DEFAULTS_INPAINT, *_NOT_SHAPING}
    check_settings("inpainting denoiser of v1.3", published_settings, known, SAME_IN_ALL)
    return _build(published_settings)


def _build(c: Mapping[str, Any]) -> CrossTransformer:
    cross_keys.check_sizes(c)
    return cross_keys.build_transformer(c, _stages(c["num_layers"], c["sparse_n"] if c["sparse1d"] else 1))


def published_settings(model: CrossTransformer) -> dict[str, Any]:
    """The published constructor settings of a transformer. Raises UsageError for a schedule that none of them has."""
    sparsity = max(stage.k for stage in model.config.stages)
    if model.schedule != [pattern for stage in _stages(len(model.schedule), sparsity) for pattern in stage.patterns]:
        raise UsageError("the published code of v1.3 has one schedule: 2 dense blocks, 28 skiparse ones, then dense")
    if _is_v12(model):
        raise UsageError(
            "the published inpainting code of v1.3 is given frames otherwise: frame_encoding=v12, where it has v13; "
            "choose kind=opensora_inpaint_v12"
        )
    return cross_keys.common_settings(model) | dict(zip(_SCHEDULE, (sparsity > 1, sparsity), strict=True))


def key_pairs(model: CrossTransformer) -> Iterable[KeyPair]:
    """Every tensor of the transformer with its published key or keys."""
    return cross_keys.key_pairs(model, "pos_embed_masked_hidden_states")


def _stages(blocks: int, sparsity: int) -> tuple[Stage, ...]:
    if sparsity == 1:
        return (Stage(blocks),)
    sizes = (
        (min(blocks, _FIRST_SPARSE), 1),
        (min(blocks, _FIRST_DENSE_AGAIN) - _FIRST_SPARSE, sparsity),
        (blocks - _FIRST_DENSE_AGAIN, 1),
    )
    return tuple(Stage(size, "skiparse" if k > 1 else "dense", k) for size, k in sizes if size > 0)


def _is_v12(model: CrossTransformer) -> bool:
    """Whether the model is given frames as v1.2's is, and so is of no other published class."""
    return bool(model.config.frame_channels) and model.config.frame_encoding == "v12"


def _layout_of(model: CrossTransformer) -> Layout:
    """The layout of a model whose kind is not given: v1.3's, if that has such models."""
    return cross_v12.LAYOUT if _is_v12(model) else _LAYOUT


_LAYOUT = Layout(class_name, key_pairs, published_settings)
FAMILY = Family(
    "cross",
    CrossTransformer,
    Layout(
        lambda model: _layout_of(model).class_name(model),
        lambda model: _layout_of(model).key_pairs(model),
        lambda model: _layout_of(model).settings(model),
        further=lambda model: _layout_of(model).further(model),
    ),
    {
        "opensora_v13": Kind(build, DEFAULTS, FULL_SIZES, _LAYOUT),
        "opensora_inpaint_v13": Kind(build_inpaint, DEFAULTS_INPAINT, FULL_SIZES, _LAYOUT),
        **cross_v12.KINDS,
    },
)
