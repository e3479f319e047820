"""Kill training at random moments, and go on in the same layout or another: `python tools/resume_matrix.py --kills 50`.

Tiny runs of `osp train`: a denoiser on features of several sizes (buckets) with averaged weights, accumulation,
adaptive clipping and a falling rate; the same with Muon; and a VAE with its discriminator. They train by 1, 2 and 4
processes, as DDP, FSDP2, and with the tokens of a clip split. All processes, or one of them, are killed (SIGKILL) at
moments drawn from the seed; the same command goes on, in the same layout, or in one that changes from start to start.
Every step has to have the samples of an undisturbed run; at the end the weights and the averaged ones have to be the
same to the bit in the same layout, and within 1e-5 of those of one process else. Where one process is killed, the
others have to end by themselves within a minute, also before they have met. Then runs are ended by signals that ask for
it, sent to all processes or to one: all have to end with the code of the signal, and with a checkpoint of the step that
was under way.

Prints a table, and exits with 1 if anything differs.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for the starts, here and as their callback is found

from resume_starts import LAYOUTS, Start, make_features

# isort: split
from torch import Tensor

from osp.training.resumed import read_resumed
from osp.training.state import open_state
from osp.weights.lazy import Stored

_LIMIT = 600.0  # seconds of a run
_GRACE = 60.0  # seconds in which processes end whose fellow was killed, or that are asked to
_CLOSE = 1e-5  # of weights that learn at the rates below
_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ALL = [
    *("train", "data.workers=0", "data.val_clips=2", "module.accumulate=2", "module.warmup_steps=4"),
    *("module.ema_decay=0.9", "logged_clips=0", "logger=[]", "checkpoint_every=3", "trainer.val_check_interval=8"),
    *("trainer.precision=32-true", "+callbacks.samples._target_=resume_starts.Samples"),
]
_DENOISER = [
    *("experiment=t2v_tiny", "denoiser.heads=4", "denoiser.head_dim=6", "denoiser.text_channels=8"),
    *("denoiser.channels=4", "denoiser.out_channels=4", "text.channels=8", "text.layers=1", "text.heads=2"),
    *("data.batch_size=null", "data.batch_tokens=24", "data.devices=4", "module.lr=1e-4"),
    *("clipping.warmup=3", "clipping.deviations=0.2"),
]
_VAE = [
    *("experiment=wfvae_tiny", "clip.frames=5", "clip.height=16", "clip.width=16", "module.lr=1e-4"),
    *("vae.base_channels=4", "vae.latent_channels=4", "vae.encoder_flow_channels=4", "vae.decoder_flow_channels=4"),
    *("data.train.clips=24", "module.discriminator_start=2", "module.discriminator.width=4"),
    *("module.discriminator.layers=2", "module.discriminator.dropout=0.0"),
]
RECIPES: dict[str, tuple[list[str], list[str]]] = {
    "denoiser": ([*_DENOISER, "module.muon_lr=null"], list(LAYOUTS)),
    "muon": (
        [*_DENOISER, "module.muon_lr=1e-5"],
        ["fsdp 2", "ddp 2", "one", "fsdp 4"],
    ),  # whose steps are rounded to bfloat16
    "gan": (_VAE, ["fsdp 2", "ddp 2", "one", "fsdp 4"]),
}
"""What is trained, and in which layouts."""


@dataclass
class Outcome:
    """The starts of a run, and what is wrong with it."""

    times: int = 0  # that it was disturbed
    starts: list[str] = field(default_factory=list)
    slowest: float = 0.0  # seconds until the processes ended whose fellow was killed
    said: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    difference: float = 0.0


@dataclass(frozen=True)
class Row:
    """A run that is disturbed: its layouts and how, for each start in turn."""

    name: str
    recipe: str
    layouts: Sequence[str]
    how: Sequence[str] = ("kills",)

    @property
    def same(self) -> bool:
        """Whether all starts have the same layout."""
        return len({*self.layouts}) == 1


def run(row: Row, arguments: list[str], folder: Path, times: int, draw: Random, steps: int) -> Outcome:
    """Start the command until it ends by itself; of its starts so many are disturbed, each in the next layout."""
    outcome, ways = Outcome(), {"kills": _killed, "early kills": _killed_early, "signals": _asked}
    for number in range(4 * times + 2):
        layout = row.layouts[number % len(row.layouts)]
        start = Start(layout, arguments, folder, number, double=row.recipe == "gan")
        outcome.starts.append(layout)
        disturbed = ways[row.how[number % len(row.how)]]
        if outcome.times < times and disturbed(start, outcome, draw, steps):
            if outcome.faults:
                return outcome
            continue
        if not start.wait(_LIMIT):
            outcome.faults.append(f"{layout}: goes on for {_LIMIT:.0f} s ({start.said()})")
        elif any(start.codes()):
            outcome.faults.append(f"{layout}: start {number} ends with {start.codes()} ({start.said()})")
        return outcome
    outcome.faults.append("never came to its end")
    return outcome


def _wait(happened: Callable[[], bool], start: Start) -> None:
    end = time.monotonic() + _LIMIT
    while start.alive() and not happened() and time.monotonic() < end:
        time.sleep(0.02)


def _killed(start: Start, outcome: Outcome, draw: Random, steps: int) -> bool:
    """Kill all or one of the processes at some moment; False if they have ended before."""
    after, moment = draw.randint(0, max(2, steps // 4)), draw.uniform(0.0, 0.5)
    victims = [draw.choice(start.processes)] if draw.random() < 0.5 else start.processes
    _wait(lambda: start.steps() >= after, start)
    time.sleep(moment)
    return _kill(start, victims, outcome)


def _killed_early(start: Start, outcome: Outcome, draw: Random, steps: int) -> bool:
    """Kill one of the processes before they can have met."""
    victim = draw.choice(start.processes)
    _wait(lambda: start.has_said(victim), start)
    return _kill(start, [victim], outcome)


def _kill(start: Start, victims: Sequence[Any], outcome: Outcome) -> bool:
    if not all(process.is_alive() for process in victims):
        return False
    # A process that has not said a word is known to its launcher alone, which would end the others.
    waits = len(victims) < len(start.processes) and start.has_said(victims[0])
    for process in victims:
        start.kill(process)
    outcome.times += 1
    begun = time.monotonic()
    if not start.wait(_GRACE if waits else 0.0) and waits:
        outcome.faults.append(f"{start.layout}: {start.steps()} steps, the others hang when one is killed")
    if waits:
        outcome.slowest = max(outcome.slowest, time.monotonic() - begun)
        outcome.said.add(start.said())
    return True


def _asked(start: Start, outcome: Outcome, draw: Random, steps: int) -> bool:
    """Ask all or one of the processes to end, by a signal in a step; False if they have ended before."""
    after, number = draw.randint(1, max(2, steps // 6)), _ASKING[outcome.times % len(_ASKING)]
    asked = [draw.choice(start.processes)] if draw.random() < 0.5 else start.processes
    with start.held(after):
        _wait(lambda: start.steps() >= after, start)
        if not start.alive():
            return False
        start.send(number, asked)
    outcome.times += 1
    in_time = start.wait(_GRACE)
    outcome.said.add(f"{number.name}: {start.said()}")
    whom = f"{start.layout}, {number.name} to {len(asked)} of {len(start.processes)}"
    if not in_time or start.codes() != [128 + number] * len(start.processes):
        outcome.faults.append(f"{whom}: ends with {start.codes()} ({start.said()})")
    elif (saved := open_state(start.folder / "checkpoints" / "last.ckpt").step) != start.last_step() + 1:
        outcome.faults.append(f"{whom} in step {start.last_step() + 1}: the checkpoint is of step {saved}")
    return True


def samples(folder: Path) -> dict[int, set[tuple[str, ...]]]:
    """The samples of each step, once for each start that had all of them."""
    found: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for start in sorted(folder.with_name(f"{folder.name}-samples").iterdir()):
        steps: dict[int, dict[int, list[str]]] = defaultdict(dict)
        world, groups = 0, set()
        for file in start.glob("*.jsonl"):
            for line in file.read_text().splitlines():
                try:
                    step, world, group, numbers = json.loads(line)
                except json.JSONDecodeError:  # cut off by the kill
                    continue
                groups.add(group)
                steps[step][group] = numbers
        for step, by_group in steps.items():
            if by_group.keys() == groups and world:
                found[step].add(tuple(sorted(n for numbers in by_group.values() for n in numbers)))
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the last checkpoint and the averaged ones."""
    stored = read_resumed(folder / "checkpoints" / "last.ckpt")["state_dict"]
    read = {key: value.read() if isinstance(value, Stored) else value for key, value in stored.items()}
    return {key: value for key, value in read.items() if isinstance(value, Tensor)}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest one of any weight."""
    if ours.keys() != theirs.keys():
        return float("inf")
    return max(float((value.double() - theirs[key].double()).abs().max()) for key, value in ours.items())


def check(outcome: Outcome, folder: Path, whole: Path, close: float, steps: int) -> None:
    """Compare a run with an undisturbed one."""
    if outcome.faults:
        return
    found, wanted = samples(folder), samples(whole)
    odd = [step for step in range(steps) if not found[step] or found[step] != wanted[step]]
    if odd:
        outcome.faults.append(f"other samples in step {odd[0]} ({len(odd)} of {steps} steps)")
    outcome.difference = difference(weights(folder), weights(whole))
    if not outcome.difference <= close:
        outcome.faults.append(f"weights differ by {outcome.difference:.2g}, more than {close:g}")


def rows_of(recipe: str, chosen: list[str], changing: int, draw: Random) -> list[Row]:
    """The runs of a recipe: all layouts of the denoiser, one of the others, and some that change."""
    same = chosen if recipe == "denoiser" else chosen[:1]
    rows = [Row(f"{recipe}: {name}", recipe, [name]) for name in same]
    for number in range(changing if recipe == "denoiser" else min(1, changing)):
        rows.append(Row(f"{recipe}: changing {number + 1}", recipe, draw.sample(chosen, len(chosen)) * 2))
    return rows


class Matrix:
    """All runs, and their table; `right` says whether all are."""

    def __init__(self, place: Path, given: argparse.Namespace) -> None:
        self.place, self.given, self.draw = place, given, Random(given.seed)
        self.right, self.kills, self.bitwise, self.worst = True, 0, 0, 0.0
        self._features = make_features(place) if {"denoiser", "muon"} & {*given.recipes} else None

    def run_all(self) -> None:
        """Run and print all."""
        given = self.given
        chosen = {recipe: [one for one in RECIPES[recipe][1] if one in given.layouts] for recipe in given.recipes}
        rows = [row for recipe in chosen for row in rows_of(recipe, chosen[recipe], given.changing, self.draw)]
        for number, row in enumerate(rows):
            self.disturb(row, -(-(given.kills - self.kills) // (len(rows) - number)))
        recipe = given.recipes[0]
        several = [layout for layout in chosen[recipe] if layout != "one"]
        for layout in several[-1:] if given.early else []:
            self.disturb(Row(f"{recipe}: {layout}, early", recipe, [layout], ["early kills"]), given.early)
        for layout in [one for one in several if one.startswith("fsdp")][:1] if given.signals else []:
            self.disturb(Row(f"{recipe}: {layout}, signals", recipe, [layout], ["signals"]), given.signals)
        self.right &= self.kills >= given.kills
        print(
            f"seed {given.seed}: {self.kills} kills; {self.bitwise} runs in one layout the same to the bit; weights of "
            f"changing layouts within {self.worst:.2g}; {'all right' if self.right else 'NOT RIGHT'}",
            flush=True,
        )

    def disturb(self, row: Row, kills: int) -> None:
        """One that is killed or asked to end, beside one of the same layout, or of one process, that is not."""
        whole = self._whole(row.recipe, row.layouts[0] if row.same else "one")
        outcome = run(row, self._arguments(row.recipe), self.place / row.name, kills, self.draw, self.given.steps)
        check(outcome, self.place / row.name, whole, 0.0 if row.same else _CLOSE, self.given.steps)
        if [*row.how] == ["kills"]:
            self.kills += outcome.times
        self.bitwise += row.same and not outcome.faults
        self.worst = self.worst if row.same else max(self.worst, outcome.difference)
        self._print(row.name, outcome, " and ".join(row.how))

    def _whole(self, recipe: str, layout: str) -> Path:
        """An undisturbed run, which is made and compared with that of one process when it is first asked for."""
        folder = self.place / f"whole {recipe} {layout}"
        if not folder.exists():
            close = self.place / f"whole {recipe} one" if layout == "one" else self._whole(recipe, "one")
            name = f"{recipe}: {layout}, undisturbed"
            outcome = run(Row(name, recipe, [layout]), self._arguments(recipe), folder, 0, self.draw, self.given.steps)
            check(outcome, folder, close, _CLOSE, self.given.steps)
            self.worst = max(self.worst, outcome.difference)
            self._print(name, outcome, "kills")
        return folder

    def _arguments(self, recipe: str) -> list[str]:
        steps = self.given.steps
        data = [] if recipe == "gan" else [f"data.train.path={self._features}"]
        return [*_ALL, *RECIPES[recipe][0], *data, f"trainer.max_steps={steps}", f"module.decay_until={2 * steps}"]

    def _print(self, name: str, outcome: Outcome, kind: str) -> None:
        self.right &= not outcome.faults
        said = f", others end in {outcome.slowest:.1f} s" if outcome.slowest else ""
        about = (
            f"{outcome.times} {kind}, {len(outcome.starts)} starts, weights differ by {outcome.difference:.2g}{said}"
        )
        print(f"{name:<30} {about}: {'; '.join(outcome.faults) or 'right'}", flush=True)
        for line in sorted(outcome.said):
            print(f"{'':<30}   {line}", flush=True)


def main() -> int:
    """Print the table; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="other moments and layouts for each seed (0)")
    parser.add_argument("--kills", type=int, default=50, help="of all runs together (50)")
    parser.add_argument("--early", type=int, default=2, help="kills of one process before all have met (2)")
    parser.add_argument("--signals", type=int, default=6, help="that ask FSDP2 to end, of one run (6)")
    parser.add_argument("--steps", type=int, default=18, help="of a run (18)")
    parser.add_argument("--changing", type=int, default=3, help="runs whose layout changes with each start (3)")
    parser.add_argument("--layouts", nargs="+", choices=[*LAYOUTS], default=[*LAYOUTS], help="these only")
    parser.add_argument("--recipes", nargs="+", choices=[*RECIPES], default=[*RECIPES], help="these only")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        matrix = Matrix(Path(place), given)
        matrix.run_all()
    return int(not matrix.right)


if __name__ == "__main__":
    sys.exit(main())
