"""Folders of `osp train`: what a run leaves there, and whether it can go on with given settings."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osp.documents import DocumentError, read_json, read_yaml
from osp.errors import DataError, UsageError
from osp.files import folder_lock
from osp.report.curves import read_curves
from osp.training.former import renamed
from osp.training.state import BEST, LAST, is_stored

RESULT = "result.json"
CONFIG = "config.yaml"
_LOCK = ".lock"

# Settings that a run cannot change half-way. Those that others refer to come first, so that the given key is named.
_FIXED = (
    *("seed", "clip", "vae", "denoiser", "text", "objective", "perceptual", "clipping", "buckets", "latent"),
    *("data", "module"),
)
# Settings among these that may change: the loader refuses another order of the clips, and a denoiser another VAE.
_FREE = {
    *("data.workers", "data.batch_size", "data.batch_tokens", "data.val_batch_size", "data.devices"),
    *("vae.path", "module.vae.path", "latent.vae.path"),
    *("module.recompute_every", "module.offload_activations", "module.compile"),
}
_LIMITS = ".limits."  # limits of files may change as well: the loader compares the list of clips
# Settings that may change from some step on.
_RATES = {
    *("module.lr", "module.discriminator_lr", "module.weight_decay", "module.betas", "module.gradient_clip"),
    *("module.warmup_steps", "module.decay_until", "module.ema_decay", "module.accumulate"),
}
_TOLD = ("trainer", "global_batch", "checkpoint_every")  # these may change as well, and a change is logged


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
        """The file that it writes at the end."""
        return self.folder / RESULT

    @property
    def started(self) -> bool:
        """Whether there is a state to go on from, of its end or before."""
        return is_stored(self.last)

    def config(self) -> dict[str, Any] | None:
        """Its settings as plain values, in today's names; None if the folder does not say.

        Raises DataError for a file that holds none.
        """
        path = self.folder / CONFIG
        try:
            config = read_yaml(path)
        except FileNotFoundError:
            return None
        if not isinstance(config, dict):
            raise DataError(f"{path}: holds no settings of `osp train`")
        return {str(key): value for key, value in renamed(config).items()}

    def name(self) -> str | None:
        """The run's name in its settings; None if the folder does not say."""
        name = (self.config() or {}).get("name")
        return None if name is None else str(name)

    def result(self) -> dict[str, Any] | None:
        """The result at the run's end, perhaps with fewer steps than are asked for now; None if there is no result.

        Raises DataError for a file that is no result.
        """
        try:
            result: dict[str, Any] = read_json(self.result_file, {"steps": int})
        except FileNotFoundError:
            return None
        except DocumentError as error:
            raise DataError(f"{error}; delete it, and the run goes on") from error
        return result

    def finished(self, steps: int) -> bool:
        """Whether it has ended after so many steps or more. Raises DataError as `result`."""
        result = self.result()
        return result is not None and result["steps"] >= steps

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of everything that it logged as a number, by its name; empty without a log."""
        return read_curves(self.folder)

    def other_setting(self, settings: Mapping[str, Any], *, done: bool = True) -> str | None:
        """Why these settings (plain values) are not its own: "KEY=BEFORE, not NOW"; None if they are.

        A run that is `done` has come to what it is with all of them; one that goes on may do so with other rates and
        another split of its batches. A run whose folder does not say its settings can have been any. Raises DataError
        as `config`.
        """
        before = self.config()
        if before is None:
            return None
        found = _differences(before, settings, _FIXED)
        may_change = _is_as_good if done else _can_go_on
        return next((f"{key}={old}, not {new}" for key, old, new in found if not may_change(key, old, new)), None)

    def changes(self, settings: Mapping[str, Any]) -> list[str]:
        """The changed settings among those that it can go on with, as "KEY=NOW (was BEFORE)". Raises as `config`."""
        before = self.config() or settings
        return [f"{key}={new} (was {old})" for key, old, new in _differences(before, settings, (*_FIXED, *_TOLD))]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder, as long as the first process of the run is in the block.

        Raises UsageError if another run is at work there.
        """
        if not is_first_process():
            yield
            return
        try:
            with folder_lock(self.folder, _LOCK, wait=False):
                try:
                    yield
                finally:
                    if not self.started and not (self.folder / CONFIG).exists():
                        (self.folder / _LOCK).unlink(missing_ok=True)  # nothing has begun, and nothing is left
        except BlockingIOError as error:
            raise UsageError(
                f"{self.folder}: another `osp train` is at work in this folder; wait for its end, or choose another "
                "output=DIR"
            ) from error


def is_first_process() -> bool:
    """Whether this is the first process of a run, as far as its launcher has said yet."""
    from lightning.pytorch.utilities import rank_zero_only  # here: what only reads runs needs none of it

    return getattr(rank_zero_only, "rank", 0) == 0


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], parts: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    """(key, before, now) of all values in these parts that differ."""
    for part in parts:
        old, new = (_flat(config.get(part), part) for config in (before, now))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                yield key, old.get(key), new.get(key)


def _is_as_good(key: str, old: Any, new: Any) -> bool:
    """Whether what a run has come to is the same with another value."""
    return key in _FREE or _LIMITS in key


def _can_go_on(key: str, old: Any, new: Any) -> bool:
    """Whether a run can go on with another value. Muon's rate may change where there is one: it is an optimiser."""
    return key in _FREE or _LIMITS in key or key in _RATES or (key == "module.muon_lr" and None not in (old, new))


def _flat(value: Any, key: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for part, inner in value.items() for name, leaf in _flat(inner, f"{key}.{part}").items()}
    return {key: value}
