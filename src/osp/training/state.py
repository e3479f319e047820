"""The state of a run at one step, as it is read back: `osp.training.checkpoint_io` writes it.

Whatever reads a checkpoint of `osp train` does so by `TrainingCheckpoint`, and `open_state` alone knows how it is
stored: in one file, or in a folder with the pieces of many processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from osp.errors import DataError
from osp.files import whole_at
from osp.training.sharded import WEIGHTS
from osp.weights.files import open_checkpoint
from osp.weights.folders import CONFIG, read_json
from osp.weights.lazy import Weights
from osp.weights.pretrained import as_written, open_pretrained, read_entries
from osp.weights.sharded import INDEX, Sharded, open_sharded

LAST = "last.ckpt"
BEST = "best.ckpt"

GENERATOR, TEXT = "generator", "text"
"""Entries of the configuration of an exported denoiser; `text.safetensors` is the text encoder that learned along."""

_AVERAGED = "ema.model."


class TrainingCheckpoint(Protocol):
    """A run's saved state; nothing in it is read before it is asked for."""

    @property
    def path(self) -> Path:
        """Where it is stored."""
        ...

    @property
    def step(self) -> int:
        """The steps done. Raises DataError if it does not say."""
        ...

    def entry(self, name: str) -> Any:
        """The plain values that a module has written under this name; None if there are none."""
        ...

    def stored(self, prefix: str) -> Weights:
        """The tensors whose keys begin so, by the rest of their keys; they may lie in a mapped file."""
        ...


@dataclass(frozen=True)
class FileCheckpoint:
    """A `TrainingCheckpoint` in one file."""

    path: Path
    content: Mapping[str, Any]

    @property
    def step(self) -> int:
        """See `TrainingCheckpoint.step`."""
        return _step(self.path, self.content.get("global_step"))

    def entry(self, name: str) -> Any:
        """See `TrainingCheckpoint.entry`."""
        return self.content.get(name)

    def stored(self, prefix: str) -> Weights:
        """See `TrainingCheckpoint.stored`."""
        inner = self.content.get("state_dict")
        return _below(Weights.of(inner if isinstance(inner, Mapping) else {}), prefix)


@dataclass(frozen=True)
class FolderCheckpoint:
    """A `TrainingCheckpoint` in a folder, of which each process of the run has written a file."""

    path: Path
    content: Sharded

    @property
    def step(self) -> int:
        """See `TrainingCheckpoint.step`."""
        return _step(self.path, self.content.entries.get("global_step"))

    def entry(self, name: str) -> Any:
        """See `TrainingCheckpoint.entry`."""
        return self.content.entries.get(name)

    def stored(self, prefix: str) -> Weights:
        """See `TrainingCheckpoint.stored`."""
        return _below(self.content.weights, WEIGHTS + prefix)


@dataclass(frozen=True)
class ExportedCheckpoint:
    """A `TrainingCheckpoint` as `osp export` keeps it: a denoiser, and what makes a generator of it."""

    path: Path
    config: Mapping[str, Any]

    @property
    def step(self) -> int:
        """See `TrainingCheckpoint.step`."""
        return _step(self.path, self.config.get(GENERATOR, {}).get("step"))

    def entry(self, name: str) -> Any:
        """See `TrainingCheckpoint.entry`."""
        return self.config.get(GENERATOR) if name == GENERATOR else None

    def stored(self, prefix: str) -> Weights:
        """See `TrainingCheckpoint.stored`; the weights that were written count as the averaged ones."""
        if not prefix.startswith(_AVERAGED):
            return Weights({})
        _, weights = open_pretrained(self.path)
        parts = {"denoiser.": weights}
        if (file := self.path / f"{TEXT}.safetensors").exists():
            parts["text."] = as_written(Weights.of(open_checkpoint(file)), self.config.get(TEXT, {}), file)
        named = {_AVERAGED + part + key: one for part, held in parts.items() for key, one in held.stored.items()}
        return _below(Weights(named), prefix)


def _step(path: Path, step: Any) -> int:
    if not isinstance(step, int):
        raise DataError(f"{path}: is no checkpoint of `osp train`, as it does not say its step")
    return step


def _below(weights: Weights, prefix: str) -> Weights:
    return Weights({key.removeprefix(prefix): one for key, one in weights.stored.items() if key.startswith(prefix)})


def open_state(path: str | Path) -> TrainingCheckpoint:
    """The state that is stored at `path`, or aside where a run was killed while it replaced it.

    Raises WeightImportError for what is not a readable checkpoint.
    """
    path = Path(path)
    if (place := whole_at(path)).is_dir():
        if not (place / INDEX).exists() and (place / CONFIG).exists():
            return ExportedCheckpoint(path, read_entries(path))
        return FolderCheckpoint(path, open_sharded(place))
    return FileCheckpoint(path, open_checkpoint(place))


def is_stored(path: str | Path) -> bool:
    """Whether there is a run's state at `path`, readable or not."""
    return whole_at(Path(path)).exists() and is_state(path)


def is_state(path: str | Path) -> bool:
    """Whether what lies at `path` is to be read as a run's state, and not as a folder of `osp import-weights`."""
    place = whole_at(Path(path))
    if not place.is_dir() or (place / INDEX).exists() or any(place.glob("rank-*.safetensors")):
        return True
    return (place / CONFIG).is_file() and GENERATOR in read_json(place / CONFIG)


def averaged_weights(state: TrainingCheckpoint, part: str = "") -> Weights:
    """The averaged weights (EMA) of what was trained, or those of one part of it, by their keys in the model."""
    return state.stored(_AVERAGED + part)
