"""Where a new run begins: with the weights of another one, which are read when its models are built."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from osp.conditioning import WordText
from osp.denoiser import Denoiser, restage
from osp.errors import UsageError
from osp.parallel import drawn_weights
from osp.training.checkpoints import open_denoiser, open_generator, open_text
from osp.training.state import is_state
from osp.weights.lazy import Weights
from osp.weights.pretrained import open_pretrained

log = logging.getLogger(__name__)

# Settings that leave the weights as they are, or add weights that start without effect (`osp.denoiser.restage`).
_MAY_DIFFER = (
    *("stages", "long_skips", "frame_channels", "frame_encoding", "position_scale"),
    *("frames", "native_rows"),  # Latte's positions, which have no weights
)


@dataclass(frozen=True)
class StartWeights:
    """The weights that a run begins with: the denoiser's, the text encoder's if there are any, and what is known of the
    latents and of the words of the captions that they were trained on."""

    denoiser: Weights
    text: Weights | None
    latent: dict[str, Any] | None
    words: Sequence[str] | None = None


def open_start(path: str | Path, denoiser: Denoiser, text: WordText | None) -> StartWeights:
    """The weights of a run's checkpoint, or of a folder, for a denoiser, and a text encoder that learns along.

    Neither of them has to have weights yet, and nothing is read but what says how the others are built. A checkpoint
    of `osp train` gives its averaged weights; a folder of `osp import-weights` has a denoiser only, and the text
    encoder stays as it is. The denoiser's schedule, long skips and conditions may be others: new parts start without
    effect. Raises UsageError if anything else differs, and errors as the files' readers.
    """
    old: Any
    old_text = latent = words = None
    if not is_state(path):
        old, weights = open_pretrained(path)
    else:
        state, entry = open_generator(path)
        latent, words = entry["latent"], entry.get("words")
        (old, weights), old_text = open_denoiser(state), open_text(state)
    if type(old) is not type(denoiser):
        raise UsageError(f"start_from={path} holds a {type(old).__name__}, not a {type(denoiser).__name__}")
    before, now = old.settings, denoiser.settings
    differing = [key for key in now if before[key] != now[key] and key not in _MAY_DIFFER]
    if differing:
        changes = "; ".join(f"denoiser.{key} was {before[key]}, is {now[key]}" for key in differing)
        raise UsageError(f"start_from={path} does not fit: {changes}")
    try:
        started = _restaged(old, weights, now)
    except UsageError as error:
        raise UsageError(f"start_from={path} does not fit: {error}") from error
    log.info("starting from %s", path)
    return StartWeights(started, _text_weights(path, text, old_text), latent, words)


def _restaged(old: Denoiser, weights: Weights, settings: dict[str, Any]) -> Weights:
    """The weights of a model without memory under other settings; those of parts that it lacks are drawn from now on.

    Raises UsageError as `restage`.
    """
    new = restage(old, **settings)
    before, after = old.state_dict(keep_vars=True), new.state_dict(keep_vars=True)
    kept = {key for key, value in after.items() if value is before.get(key)}
    drawn = drawn_weights(partial(_without_effect, new))
    return Weights({key: (weights if key in kept else drawn).stored[key] for key in after})


def _without_effect(model: Denoiser) -> Denoiser:
    for part in model.neutral_parts():
        part.to_empty(device="meta")
        part.reset_parameters()
    return model


def _text_weights(path: str | Path, text: WordText | None, opened: tuple[WordText, Weights] | None) -> Weights | None:
    if text is None:
        return None
    if opened is None:
        log.info("start_from=%s brings no text encoder; the one trained here begins anew", path)
        return None
    old, weights = opened
    if old.settings != text.settings:
        raise UsageError(
            f"start_from={path} does not fit: its text encoder has {old.settings}, and text {text.settings}"
        )
    return weights
