"""Folders of `osp train`: what a run leaves there, and whether it can go on with given settings."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from osp.errors import DataError
from osp.report.curves import read_curves
from osp.training.former import renamed
from osp.training.state import BEST, LAST

RESULT = "result.json"
CONFIG = "config.yaml"

# What a run cannot change half-way. The rest (steps, devices, intervals) may differ when it is continued.
_FIXED = ("vae", "module", "latent", "data", "clip", "seed", "global_batch")
# What of it may: the loader itself refuses another global batch, and a denoiser another VAE.
_FREE = (
    *("data.workers", "data.batch_size", "data.batch_tokens", "data.val_batch_size", "data.devices"),
    *("vae.path", "module.vae.path", "latent.vae.path"),
)


@dataclass(frozen=True)
class TrainingRun:
    """The run in a folder, begun or not; nothing is read before it is asked for."""

    folder: Path

    @classmethod
    def of_checkpoint(cls, checkpoint: str | Path) -> "TrainingRun":
        """The run that a checkpoint lies in."""
        return cls(Path(checkpoint).parent.parent)

    @property
    def last(self) -> Path:
        """Where its last state is."""
        return self.folder / "checkpoints" / LAST

    @property
    def best(self) -> Path:
        """Where its best state by validation is."""
        return self.folder / "checkpoints" / BEST

    @property
    def result_file(self) -> Path:
        """What it writes at the end."""
        return self.folder / RESULT

    @property
    def started(self) -> bool:
        """Whether there is a state to go on from, of its end or before."""
        return self.last.exists()

    def config(self) -> dict[str, Any] | None:
        """Its settings as plain values, in today's names; None if the folder does not say.

        Raises DataError for a file that holds none.
        """
        path = self.folder / CONFIG
        if not path.is_file():
            return None
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: is no YAML ({' '.join(str(error).split())})") from error
        if not isinstance(config, dict):
            raise DataError(f"{path}: holds no settings of `osp train`")
        return {str(key): value for key, value in renamed(config).items()}

    def name(self) -> str | None:
        """What its settings call it; None if the folder does not say."""
        name = (self.config() or {}).get("name")
        return None if name is None else str(name)

    def result(self) -> dict[str, Any] | None:
        """What it has come to at its end, perhaps with fewer steps than are asked for now; None if there is no result.

        Raises DataError for a file that is no result.
        """
        if not self.result_file.exists():
            return None
        try:
            result = json.loads(self.result_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{self.result_file}: is no JSON ({error}); delete it, and the run goes on") from error
        if not isinstance(result, dict) or not isinstance(result.get("steps"), int):
            raise DataError(f"{self.result_file}: is no result of `osp train`; delete it, and the run goes on")
        return result

    def finished(self, steps: int) -> bool:
        """Whether it has ended after so many steps or more. Raises DataError as `result`."""
        result = self.result()
        return result is not None and result["steps"] >= steps

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of everything that it logged as a number, by its name; empty without a log."""
        return read_curves(self.folder)

    def other_setting(self, settings: Mapping[str, Any]) -> str | None:
        """Why it cannot go on with these settings (plain values): "KEY=BEFORE, not NOW"; None if it can.

        A run whose folder does not say its settings can. Raises DataError as `config`.
        """
        before = self.config()
        return None if before is None else _difference(before, settings)


def is_first_process() -> bool:
    """Whether this is the first process of a run, as far as its launcher has said yet."""
    from lightning.pytorch.utilities import rank_zero_only  # here: what only reads runs needs none of it

    return getattr(rank_zero_only, "rank", 0) == 0


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    for part in _FIXED:
        old, new = (_flat(config.get(part), part) for config in (before, now))
        for key in sorted(old.keys() | new.keys()):
            if key not in _FREE and old.get(key) != new.get(key):
                return f"{key}={old.get(key)}, not {new.get(key)}"
    return None


def _flat(value: Any, key: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for part, inner in value.items() for name, leaf in _flat(inner, f"{key}.{part}").items()}
    return {key: value}
