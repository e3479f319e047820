"""The clips that a verb other than training reads of `data`: those of one split, as a source."""

from omegaconf import DictConfig

from osp.checks import check_choice
from osp.cli.plain import instantiate
from osp.data.sources import ClipSource
from osp.errors import UsageError


def check_data(cfg: DictConfig) -> None:
    """Raise UsageError unless either `input` or `data` says where the clips come from."""
    if cfg.input is not None and cfg.get("data") is not None:
        raise UsageError("input and data both say where the clips come from; give one of them")
    if cfg.input is None and cfg.get("data") is None:
        raise UsageError("give input=FOLDER or FILE with videos or shards, or data=NAME with a source of clips")
    if cfg.get("data") is not None:
        check_choice("split", cfg.split, [name for name in ("train", "val") if cfg.data.get(name) is not None])


def build_source(cfg: DictConfig) -> ClipSource:
    """The source of clips that `data` and `split` choose. Raises UsageError for features, and for clips mirrored."""
    source = instantiate(cfg.data[cfg.split])
    if not hasattr(source, "read"):
        raise UsageError(f"data.{cfg.split} is a {type(source).__name__}, which is no source of clips (ClipSource)")
    if source.made_with is not None:
        raise UsageError(f"data.{cfg.split} holds features, which are encoded already; give a source of videos")
    if source.mirrors:
        raise UsageError(f"data.{cfg.split} mirrors half of its clips; give data.{cfg.split}.flip=false, or split=val")
    return source
