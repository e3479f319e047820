"""The record in a run's folder of how it was made: settings, command, versions, and each time that it went on."""

import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch.callbacks import Callback

import osp
from osp.devices.mesh import Mesh
from osp.devices.processes import gathered, this_process
from osp.documents import DocumentError, read_json
from osp.files import write_json, write_whole
from osp.training.runs import CONFIG, TrainingRun

RUN = "run.json"
"""The file of a run's settings and of its starts: when, with what, on which devices."""
_FORMER = "history.jsonl"

log = logging.getLogger(__name__)


class Record(Callback):
    """Writes a run's record when the training really begins or goes on, and not before.

    Args:
        config: the settings as they are written, YAML of a mapping.
        files: texts of further files by their paths in the folder.
        overrides: what the command set.
        changed: what is other than when the run began or went on last.
    """

    def __init__(
        self,
        run: TrainingRun,
        config: str,
        files: Mapping[str, str],
        overrides: Sequence[str],
        changed: Sequence[str] = (),
    ) -> None:
        self.run, self.config, self.files = run, config, files
        self.overrides, self.changed = [*overrides], [*changed]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the files, and add this start to `run.json`."""
        processes = gathered(this_process(trainer.strategy.root_device))
        if not trainer.is_global_zero:
            return
        versions = made_with()
        write_whole(self.run.folder / CONFIG, self.config + yaml.safe_dump({"made_with": versions}, sort_keys=False))
        for name, text in self.files.items():
            path = self.run.folder / name
            path.parent.mkdir(exist_ok=True)
            write_whole(path, text)
        mesh = Mesh.of(trainer)
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "from_step": trainer.global_step,
            "max_steps": trainer.max_steps,
            "command": sys.argv,
            "overrides": self.overrides,
            "changed": self.changed,
            "made_with": versions,
            "strategy": type(trainer.strategy).__name__,
            "precision": trainer.precision,
            "layout": {"data": mesh.data, "sequence": mesh.sequence, "tensor": mesh.tensor},
            "processes": processes,
        }
        starts = [*_starts(self.run.folder), start]
        write_json(self.run.folder / RUN, {"config": yaml.safe_load(self.config), "starts": starts})


def _starts(folder: Path) -> list[Any]:
    """The starts of a run before this one; those of earlier versions are lines of a file of their own."""
    try:
        starts: list[Any] = read_json(folder / RUN, {"starts": [dict]})["starts"]
        return starts
    except FileNotFoundError:
        pass
    except DocumentError as error:
        log.warning("%s; the record of earlier starts is lost", error)
        return []
    try:
        return [json.loads(line) for line in (folder / _FORMER).read_text().splitlines()]
    except (OSError, ValueError):
        return []


def made_with() -> dict[str, Any]:
    """Versions of OSP and what it stands on, and the commit of its checkout (null: it is installed without one)."""
    return {
        "osp": osp.__version__,
        "git": _git_state(),
        "torch": str(torch.__version__),
        "lightning": lightning.__version__,
        "python": platform.python_version(),
    }


def _git_state() -> dict[str, Any] | None:
    package = Path(osp.__file__).resolve().parent
    try:
        top, commit = _git(package, "rev-parse", "--show-toplevel", "HEAD").split("\n")
        if package != Path(top).resolve() / "src" / "osp":  # installed below somebody's repository
            return None
        return {"commit": commit, "dirty": bool(_git(package, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL)
    return done.stdout.strip()
