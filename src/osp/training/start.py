"""Where a new run begins: with the weights of another one."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osp.conditioning import WordText
from osp.denoiser import Denoiser, restage
from osp.errors import UsageError
from osp.training.checkpoints import averaged_denoiser, averaged_text, open_generator
from osp.training.state import is_state
from osp.weights import load_pretrained

log = logging.getLogger(__name__)

# Settings that leave the weights as they are, or add weights that start without effect (`osp.denoiser.restage`).
_MAY_DIFFER = ("stages", "long_skips", "frame_channels", "position_scale")


@dataclass(frozen=True)
class StartWeights:
    """The weights that a run begins with: the denoiser's, the text encoder's if there are any, and what is known of the
    latents and of the words of the captions that they were trained on."""

    denoiser: Mapping[str, Tensor]
    text: Mapping[str, Tensor] | None
    latent: dict[str, Any] | None
    words: Sequence[str] | None = None

    def give_to(self, denoiser: Denoiser, text: WordText | None) -> None:
        """Put them into the modules that they were loaded for."""
        denoiser.load_state_dict(self.denoiser)
        if text is not None and self.text is not None:
            text.load_state_dict(self.text)


@torch.no_grad()
def load_start(path: str | Path, denoiser: Denoiser, text: WordText | None) -> StartWeights:
    """The weights of a run's checkpoint, or of a folder, for a denoiser, and a text encoder that learns along.

    Neither of them has to have weights yet. A checkpoint of `osp train` gives its averaged weights; a folder of
    `osp import-weights` has a denoiser only, and the text encoder stays as it is. The denoiser's schedule, long skips
    and conditions may be others: new parts start without effect. Raises UsageError if anything else differs, and errors
    as the files' readers.
    """
    old_text = latent = words = None
    if not is_state(path):
        old: Any = load_pretrained(path)
    else:
        state, entry = open_generator(path)
        latent, words = entry["latent"], entry.get("words")
        old, old_text = averaged_denoiser(state), averaged_text(state)
    if type(old) is not type(denoiser):
        raise UsageError(f"start_from={path} holds a {type(old).__name__}, not a {type(denoiser).__name__}")
    before, now = old.settings, denoiser.settings
    differing = [key for key in now if before[key] != now[key] and key not in _MAY_DIFFER]
    if differing:
        changes = "; ".join(f"denoiser.{key} was {before[key]}, is {now[key]}" for key in differing)
        raise UsageError(f"start_from={path} does not fit: {changes}")
    try:
        started = restage(old, **now)
    except UsageError as error:
        raise UsageError(f"start_from={path} does not fit: {error}") from error
    log.info("starting from %s", path)
    return StartWeights(started.state_dict(), _text_weights(path, text, old_text), latent, words)


def _text_weights(path: str | Path, text: WordText | None, old: WordText | None) -> Mapping[str, Tensor] | None:
    if text is None:
        return None
    if old is None:
        log.info("start_from=%s brings no text encoder; the one trained here begins anew", path)
        return None
    if old.settings != text.settings:
        raise UsageError(
            f"start_from={path} does not fit: its text encoder has {old.settings}, and text {text.settings}"
        )
    return old.state_dict()
