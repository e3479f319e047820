"""Which settings each verb reads itself, and when."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Where:
    """When a verb reads a key itself, and how to `say` so; else it does where what it reads refers to the key."""

    say: str = ""
    holds: Callable[[Config], bool] = lambda config: False


def _is_on_clips(config: Config) -> bool:
    clips = config["data"].get("train") or {}
    return "denoiser" in config["module"] and not str(clips.get("_target_")).endswith("FeatureClips")


def _is_read_here(config: Config) -> bool:
    return config["input"] is not None and config["target"] == "reconstruction"


BY_REFERENCE = Where()
_DENOISER = Where("module=denoiser", lambda config: "denoiser" in config["module"])
_ON_CLIPS = Where("module=denoiser on clips, not on features", _is_on_clips)
_BUCKETS = Where("buckets=tokens or buckets=shapes", lambda config: config.get("buckets") is not None)
_ONE_SIZE = Where(
    "input=DIR and one size for all clips, not with buckets",
    lambda config: config.get("buckets") is None and config["input"] is not None,
)
_FOLDER = Where("input=DIR", lambda config: config["input"] is not None)
_DRAWN = Where(
    "synthetic.clips=N and no input and no annotations",
    lambda config: config["input"] is None and config["annotations"] is None,
)
_ANNOTATED = Where("annotations=FILE", lambda config: config["annotations"] is not None)
_UNANNOTATED = Where(
    "input=DIR and no annotations", lambda config: config["input"] is not None and config["annotations"] is None
)
_FILES = Where(
    "input=DIR or annotations=FILE", lambda config: config["input"] is not None or config["annotations"] is not None
)
_RECONSTRUCTED = Where("target=reconstruction", lambda config: config["target"] == "reconstruction")
_GENERATED = Where("a generator, not generated=DIR", lambda config: config["generated"] is None)

_DATA = Where("data=NAME and no input", lambda config: config.get("data") is not None)
_LOADING = (
    *("_target_", "batch_size", "val_batch_size", "batch_tokens", "image_ratio", "devices"),
    *("train_clips", "val_clips", "workers", "seed"),
)
_CHOSEN_CLIPS = dict.fromkeys((f"data.{key}" for key in _LOADING), Where("osp train")) | {
    "data.train": Where("split=train", lambda config: config.get("split") == "train"),
    "data.val": Where("split=val", lambda config: config.get("split") != "train"),
}
"""The clips in `data` that other verbs than training read; `split` chooses them."""

_TRAINING = (
    dict.fromkeys(("limits", "denoiser", "text", "objective", "clipping", "perceptual", "buckets"), BY_REFERENCE)
    | dict.fromkeys(("clip", "path", "checkpoint", "checkpoint_every", "watchdog", "peak_flops"), BY_REFERENCE)
    | {"vae": _DENOISER, "latent": _ON_CLIPS}
)

SOMETIMES: Mapping[str, Mapping[str, Where]] = {
    "shards": {"synthetic": _DRAWN, "strip": _ANNOTATED}
    | dict.fromkeys(("captions", "clip_seconds", "min_frames"), _UNANNOTATED)
    | dict.fromkeys(("drop_gone", "limits"), _FILES),
    "cache": {"min_clips": _BUCKETS}
    | dict.fromkeys(("where", "aesthetic_words"), _FOLDER)
    | dict.fromkeys(("clip.frames", "clip.height", "clip.width"), _ONE_SIZE)
    | dict.fromkeys(("clip.stride", "clip.fps"), _FOLDER)
    | dict.fromkeys(("path", "checkpoint", "seed"), BY_REFERENCE)
    | {"buckets": _FOLDER, "limits": _FOLDER, "split": _DATA}
    | _CHOSEN_CLIPS,
    "train": _TRAINING,
    "plan": _TRAINING,
    "eval": dict.fromkeys(("path", "checkpoint", "denoiser", "text"), BY_REFERENCE)
    | dict.fromkeys(("generator", "solver", "guidance", "rescale", "hold_given"), _GENERATED)
    | dict.fromkeys(("template", "negative_prompt", "usual_negative", "negative_template"), _GENERATED)
    | {"vae": _RECONSTRUCTED, "split": _DATA}
    | {"where": Where("target=reconstruction and input=...", _is_read_here)}
    | {"clip": Where("input=...", lambda config: config["input"] is not None or config["target"] == "generation")}
    | {"seed": Where("target=generation", lambda config: config["target"] == "generation")}
    | _CHOSEN_CLIPS,
    "sample": dict.fromkeys(("checkpoint", "path", "denoiser", "vae", "text"), BY_REFERENCE),
    "bench": dict.fromkeys(("path", "checkpoint"), BY_REFERENCE),
    "inflate": dict.fromkeys(("path", "checkpoint"), BY_REFERENCE),
}
"""The keys of each verb, or paths one level below, that it does not always read itself; all others it does."""
