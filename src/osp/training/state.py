"""The state of a run at one step, as it is read back: `osp.training.saving` writes it.

Whatever reads a checkpoint of `osp train` does so by `TrainingCheckpoint`, and `open_state` alone knows how it is
stored. Another form, such as a folder with the shards of many processes, is one more class here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from osp.errors import DataError
from osp.weights.files import open_checkpoint
from osp.weights.lazy import Weights

LAST = "last.ckpt"
BEST = "best.ckpt"

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

    def weights(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose keys begin so, by the rest of their keys, in memory of their own."""
        ...


@dataclass(frozen=True)
class FileCheckpoint:
    """A `TrainingCheckpoint` in one file."""

    path: Path
    content: Mapping[str, Any]

    @property
    def step(self) -> int:
        """See `TrainingCheckpoint.step`."""
        step = self.content.get("global_step")
        if not isinstance(step, int):
            raise DataError(f"{self.path}: is no checkpoint of `osp train`, as it does not say its step")
        return step

    def entry(self, name: str) -> Any:
        """See `TrainingCheckpoint.entry`."""
        return self.content.get(name)

    def weights(self, prefix: str) -> dict[str, Tensor]:
        """See `TrainingCheckpoint.weights`."""
        inner = self.content.get("state_dict")
        stored = Weights.of(inner if isinstance(inner, Mapping) else {})
        # The tensors are copied: they lie in the file, which may be replaced.
        return {key.removeprefix(prefix): stored[key].clone() for key in stored if key.startswith(prefix)}


def open_state(path: str | Path) -> TrainingCheckpoint:
    """The state that is stored at `path`.

    Raises WeightImportError for what is not a readable checkpoint.
    """
    return FileCheckpoint(Path(path), open_checkpoint(path))


def is_state(path: str | Path) -> bool:
    """Whether what lies at `path` is to be read as a run's state, and not as a folder of `osp import-weights`."""
    return not Path(path).is_dir()


def averaged_weights(state: TrainingCheckpoint, part: str = "") -> dict[str, Tensor]:
    """The averaged weights (EMA) of what was trained, or those of one part of it, by their keys in the model."""
    return state.weights(_AVERAGED + part)
