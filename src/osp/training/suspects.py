"""The clips of a step whose loss or gradients were not finite, in a file, so that somebody can look at them."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from osp.documents import printable
from osp.files import write_json

log = logging.getLogger(__name__)

FOLDER = "not_finite"
_MOST = 20  # files of one process; the first ones say most
_NAMED = 4


class Suspects:
    """The clips of the step under way: `begin` takes its batches, `add` what is known of each, `write` lists them.

    Nothing is computed or copied before there is something to write.
    """

    def __init__(self) -> None:
        self._batches: Sequence[Mapping[str, Any]] = ()
        self._known: list[dict[str, Tensor]] = []
        self._written = 0

    def begin(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Forget the step before."""
        self._batches, self._known = batches, []

    def add(self, **values: Tensor) -> None:
        """Take in values `B` of the next batch's clips: `time`, `loss`, or others."""
        self._known.append({name: value.detach() for name, value in values.items()})

    def write(self, trainer: lightning.Trainer, step: int, norm: float, terms: Mapping[str, Tensor]) -> str:
        """Write `not_finite/step_N_rank_R.json` in the run's folder; gives words for the error's line.

        Every process lists its own clips. A clip is suspect if its own loss is not finite; if there is none, all are.
        """
        self._written += 1
        if self._written > _MOST:
            return ""
        clips = [clip for number in range(len(self._batches)) for clip in self._clips(number)]
        suspect = [clip["key"] for clip in clips if not _is_finite(clip.get("loss", 0.0))]
        path = Path(trainer.default_root_dir) / FOLDER / f"step_{step}_rank_{trainer.global_rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        losses = {name: _number(value.item()) for name, value in terms.items()}
        about = {"step": step, "rank": trainer.global_rank, "gradient_norm": _number(norm), "terms": losses}
        write_json(path, about | {"suspect": suspect or [clip["key"] for clip in clips], "clips": clips})
        return self._told(trainer, step, path, suspect)

    def _clips(self, number: int) -> list[dict[str, Any]]:
        """Plain values of the clips of a batch: key, sample number, shape, and what was added."""
        batch = self._batches[number]
        known = self._known[number] if number < len(self._known) else {}
        values = next((batch[name] for name in ("latent", "video") if name in batch), None)
        clips: list[dict[str, Any]] = []
        for row, key in enumerate(batch["key"]):
            clip: dict[str, Any] = {"key": key, "sample": int(batch["sample"][row])}
            if values is not None:
                clip |= {"shape": list(values[row].shape), "finite": bool(torch.isfinite(values[row]).all())}
            clip |= {name: _number(float(value[row])) for name, value in known.items()}
            clips.append(clip)
        return clips

    def _told(self, trainer: lightning.Trainer, step: int, path: Path, suspect: Sequence[str]) -> str:
        """The words, which stand in a line of the log too, as not every such step ends a run."""
        place = path if trainer.world_size == 1 else path.with_name(f"step_{step}_rank_*.json")
        more = f" and {len(suspect) - _NAMED} more" if len(suspect) > _NAMED else ""
        named = f"{printable(', '.join(suspect[:_NAMED]))}{more}; " if suspect else ""
        log.warning("step %d was not finite and changed nothing: %sits clips are in %s", step, named, place)
        return f", in {named}its clips are listed in {os.fspath(place)}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: float) -> float | str:
    """The number, or the text of one that JSON cannot hold."""
    return value if math.isfinite(value) else str(value)
