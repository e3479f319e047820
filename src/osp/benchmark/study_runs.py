"""The study's variants, and its runs: each variant trained and judged with each seed, in processes of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from osp.checks import check_choice
from osp.denoiser import Stage
from osp.denoiser.patterns import pattern_names
from osp.errors import DataError, UsageError
from osp.evaluation.output import METRICS
from osp.extensions import import_named
from osp.training.runs import TrainingRun

EXPERIMENT = "t2v_tiny"
DENOISER = "joint_tiny"
BLOCKS = 6
NAMES = ("2+1d", "dense", "skip_window_k2", "skiparse_k2", "skiparse_k4", "suv", "dense_u")


@dataclass(frozen=True)
class Variant:
    """A denoiser of the configurations with other stages, and the variant that its costs are divided by.

    `long_skips` is None where the denoiser has no such setting.
    """

    name: str
    reference: str
    stages: tuple[Stage, ...]
    long_skips: bool | None
    denoiser: str = DENOISER

    @property
    def overrides(self) -> list[str]:
        """The overrides of `osp train` that set the variant's denoiser."""
        stages = ",".join(
            "{" + ",".join(f"{key}:{value!r}" for key, value in asdict(stage).items()) + "}" for stage in self.stages
        )
        skips = [] if self.long_skips is None else [f"denoiser.long_skips={str(self.long_skips).lower()}"]
        return [f"denoiser={self.denoiser}", f"denoiser.stages=[{stages}]", *skips]


@dataclass(frozen=True)
class Run:
    """One variant with one seed, in a folder of its own."""

    variant: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    steps: int
    evaluation: tuple[str, ...]  # overrides of `osp eval`, without those that name the run's folders

    @property
    def name(self) -> str:
        """The run's name in messages."""
        return f"{self.variant}, seed {self.seed}"

    @property
    def training(self) -> TrainingRun:
        """The training run that `osp train` makes in the folder."""
        return TrainingRun(self.folder)

    def trained(self) -> bool:
        """Whether it has come to its last step."""
        return self.training.finished(self.steps)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise UsageError if its folder holds a run of other settings, or one meant for other steps.

        `settings` are what its overrides make of those of `osp train`. The learning rate may fall towards the last
        step, so that a run which goes on further is another.
        """
        if (before := self.training.config()) is None:
            return
        other = self.training.other_setting(settings)
        if other is None and before["trainer"]["max_steps"] != self.steps:
            other = f"trainer.max_steps={before['trainer']['max_steps']}, not {self.steps}"
        if other is not None:
            raise UsageError(f"{self.folder} holds a run with {other}; delete it, or choose another output=DIR")

    def evaluated(self) -> bool:
        """Whether its last state has been judged, by the same prompts."""
        path = self.folder / "eval" / METRICS
        if not path.exists() or path.stat().st_mtime < self.training.result_file.stat().st_mtime:
            return False
        settings = json.loads(path.read_text())["settings"]
        return f"prompts={settings['prompts']}" in self.evaluation and f"input='{settings['input']}'" in self.evaluation

    def commands(self) -> list[list[str]]:
        """The commands that are still to be run, as words of `osp`."""
        judged = [f"checkpoint='{self.training.last}'", f"output='{self.folder / 'eval'}'", *self.evaluation]
        train = [] if self.trained() else [["train", *self.overrides]]
        return train if not train and self.evaluated() else [*train, ["eval", "target=generation", *judged]]


def variants(
    blocks: int, denoiser: str = DENOISER, has_skips: bool = True, names: Sequence[str] = ()
) -> dict[str, Variant]:
    """All that there are, of so many blocks each, and those of `names` that are patterns: PATTERN or PATTERN_kN.

    Without long skips in the denoiser there is no sparse U. Raises UsageError for too few blocks to make a sparse U of
    them, and for a name that is neither a variant nor a registered pattern.
    """
    if blocks < 5:
        raise UsageError(f"{blocks} blocks make no sparse U; it needs 5 at least")
    dense, side = Stage(1), (blocks - 2) // 3
    inner = blocks - 2 - 2 * side
    u = (dense, Stage(side, "skiparse", 2), Stage(inner, "skiparse", 4), Stage(side, "skiparse", 2), dense)
    straight = {
        "2+1d": (Stage(blocks, "2+1d"),),
        "dense": (Stage(blocks),),
        "skip_window_k2": (dense, Stage(blocks - 2, "skip_window", 2), dense),
        "skiparse_k2": (dense, Stage(blocks - 2, "skiparse", 2), dense),
        "skiparse_k4": (dense, Stage(blocks - 2, "skiparse", 4), dense),
    }
    # The dense variant has as many stages, so that it has the same long skips.
    skipping = {"suv": u, "dense_u": tuple(Stage(stage.blocks) for stage in u)}
    known = [*straight, *skipping] if has_skips else [*straight]
    straight |= {name: (dense, _stage_of(name, blocks - 2, known), dense) for name in names if name not in known}
    off = False if has_skips else None
    made = {name: Variant(name, "dense", stages, off, denoiser) for name, stages in straight.items()}
    if has_skips:
        made |= {name: Variant(name, "dense_u", stages, True, denoiser) for name, stages in skipping.items()}
    return made


def _stage_of(name: str, blocks: int, known: Sequence[str]) -> Stage:
    """Blocks of a registered pattern that is called PATTERN or PATTERN_kN."""
    import_named()
    if name in pattern_names():
        return Stage(blocks, name)
    pattern, _, k = name.rpartition("_k")
    if pattern not in pattern_names() or not k.isdecimal():
        check_choice("--variants", name, [*dict.fromkeys([*known, *pattern_names()]), "PATTERN_kN"])
    return Stage(blocks, pattern, int(k))


def train_overrides(variant: Variant, features: Path) -> list[str]:
    """The overrides of `osp train` that make the variant, trained on these features."""
    return [f"experiment={EXPERIMENT}", *variant.overrides, f"data.train.path='{features}'"]


def run_all(runs: Sequence[Run], jobs: int, threads: int) -> None:
    """Do what the runs lack, `jobs` at a time. Raises DataError at the end if some have failed."""
    children: set[subprocess.Popen[bytes]] = set()

    def finish(run: Run) -> str | None:
        begun = time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        log = run.folder / "study.log"
        for command in run.commands():
            with open(log, "ab") as said:
                child = subprocess.Popen(
                    [sys.executable, "-m", "osp.cli", *command],
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                )
                children.add(child)
                code = child.wait()
                children.remove(child)
            if code or not run.trained():  # a training that is told to stop ends well, but early
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                return f"{run.name}: osp {command[0]} ended with exit code {code} ({log}): {''.join(last)}"
        print(f"{run.name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        return None

    print(f"{len(runs)} runs to do", file=sys.stderr, flush=True)
    pool = ThreadPoolExecutor(jobs)
    try:
        failures = [failure for failure in pool.map(finish, runs) if failure is not None]
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in list(children):
            child.terminate()
        raise
    if failures:
        raise DataError("; ".join(failures))
