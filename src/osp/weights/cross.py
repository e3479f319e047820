"""Published denoisers of v1.3, text-to-video and inpainting <-> our cross-attention transformer; and its family."""

from collections.abc import Iterable, Mapping
from typing import Any

from osp.data.media.shape import Shape
from osp.denoiser import CrossTransformer, Stage
from osp.errors import UsageError
from osp.weights import cross_keys, cross_v12
from osp.weights.cross_keys import MASK_CHANNELS, SAME_IN_ALL
from osp.weights.keys import KeyPair, check_settings
from osp.weights.layout import Family, Kind, Layout

_SCHEDULE = ("sparse1d", "sparse_n")
# Entries that do not shape the network.
_NOT_SHAPING = ("cross_attention_dim", "sample_size_h", "sample_size_t", "sample_size_w")
# The published code has these written into it, whatever the number of blocks, and knows Skiparse with one k alone.
_FIRST_SPARSE, _FIRST_DENSE_AGAIN, _K = 2, 30, 4
# The latents of the released model, for 93x352x640.
_SIZE = Shape(24, 44, 80)

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
    """The published constructor settings of a transformer that `held` lets pass."""
    sparsity = max(stage.k for stage in model.config.stages)
    return cross_keys.common_settings(model) | dict(zip(_SCHEDULE, (sparsity > 1, sparsity), strict=True))


def held(model: CrossTransformer) -> CrossTransformer:
    """The transformer itself. Raises UsageError for frames given otherwise, and for a schedule that is not published.

    With a schedule it names the nearest that is.
    """
    if _is_v12(model):
        raise UsageError(
            "the published inpainting code of v1.3 is given frames otherwise: frame_encoding=v12, where it has v13; "
            "choose kind=opensora_inpaint_v12"
        )
    blocks = len(model.schedule)
    for stages in (_stages(blocks, 1), nearest := _stages(blocks, _K)):
        if model.schedule == [pattern for stage in stages for pattern in stage.patterns]:
            return model
    wanted = ", ".join(f"{{blocks: {one.blocks}, pattern: {one.pattern}, k: {one.k}}}" for one in nearest)
    raise UsageError(
        f"the published code of v1.3 has one schedule beside dense blocks alone: Skiparse with k={_K}, but for the "
        f"first two blocks and those from the 31st on, which are dense; the nearest stages are [{wanted}]"
    )


def further(_model: CrossTransformer, size: Shape | None) -> dict[str, Any]:
    """The size of the latents that the published code makes where it is not told."""
    frames, height, width = size or _SIZE
    return {"sample_size_h": height, "sample_size_t": frames, "sample_size_w": width}


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


def _likely(model: CrossTransformer) -> str:
    """The last version that has such models: v1.3, but for frames given as v1.2 has it."""
    return f"opensora_inpaint_{model.config.frame_encoding}" if model.config.frame_channels else "opensora_v13"


FAMILY = Family(
    "cross",
    CrossTransformer,
    Layout(class_name, key_pairs, published_settings, held=held, further=further),
    {
        "opensora_v13": Kind(build, DEFAULTS, FULL_SIZES),
        "opensora_inpaint_v13": Kind(build_inpaint, DEFAULTS_INPAINT, FULL_SIZES),
        **cross_v12.KINDS,
    },
    likely=_likely,
)
