"""Kill training at random moments, and go on in the same layout or another: `python tools/resume_matrix.py --kills 50`.

A tiny denoiser trains by `osp train` on features of several sizes (buckets), with averaged weights, accumulation,
adaptive clipping and a falling rate: by 1, 2 and 4 processes, as DDP, FSDP2, and with the tokens of a clip split. All
processes, or one of them, are killed (SIGKILL) at moments drawn from the seed; the same command goes on, in the same
layout, or in one that changes from start to start. Every step has to have the samples of an undisturbed run; at the end
the weights and the averaged ones have to be the same to the bit in the same layout, and within 1e-5 of those of one
process else. Where one process is killed, the others have to end by themselves, with one line, within a minute.
Prints a table, and exits with 1 if anything differs.
"""

import argparse
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, cast

import osp  # noqa: F401  (before anything imports lightning)

# isort: split
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from osp.audit.fuzz.media import mp4
from osp.cli import main as command_line
from osp.errors import OspError
from osp.training.resumed import read_resumed
from osp.vae import WFVAE
from osp.weights.lazy import Stored
from osp.weights.pretrained import save_pretrained

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, ["trainer=cpu"]),
    "ddp 2": (2, ["trainer=ddp_cpu"]),
    "fsdp 2": (2, ["trainer=fsdp_cpu"]),
    "sequence 2": (2, ["trainer=ddp_cpu", "trainer.strategy.sequence=2"]),
    "ddp 4": (4, ["trainer=ddp_cpu", "trainer.devices=4"]),
    "fsdp 4": (4, ["trainer=fsdp_cpu", "trainer.devices=4"]),
    "fsdp sequence 4": (4, ["trainer=fsdp_cpu", "trainer.devices=4", "trainer.strategy.sequence=2"]),
}
"""Processes of each layout, and how it is chosen."""

_FORK = multiprocessing.get_context("fork")
_LIMIT = 600.0  # seconds of a run
_GRACE = 60.0  # seconds in which processes end whose fellow was killed
_CLOSE = 1e-5  # of weights that learn at the rate below
_TRAIN = [
    *("train", "experiment=t2v_tiny", "denoiser.heads=2", "denoiser.head_dim=12", "denoiser.text_channels=8"),
    *("denoiser.channels=4", "denoiser.out_channels=4", "text.channels=8", "text.layers=1", "text.heads=2"),
    *("data.batch_size=null", "data.batch_tokens=24", "data.devices=4", "data.workers=0", "data.val_clips=2"),
    *("module.accumulate=2", "module.muon_lr=null", "module.lr=1e-4", "module.warmup_steps=4", "module.ema_decay=0.9"),
    *("logged_clips=0", "logger=[]", "checkpoint_every=3", "trainer.val_check_interval=8", "trainer.precision=32-true"),
    *("+callbacks.samples._target_=resume_matrix.Samples",),
]


class Samples(Callback):
    """Writes the samples of each step, as they come, into a file of each process of each start."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Add a line."""
        place = Path(os.environ["OSP_SAMPLES"])
        numbers = [f"{key}/{n}" for one in batch for key, n in zip(one["key"], one["sample"].tolist(), strict=True)]
        with open(place / f"{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps([trainer.global_step, trainer.world_size, pl_module.mesh.data_rank, numbers]) + "\n")


@dataclass
class Outcome:
    """The starts of a run, and what is wrong with it."""

    kills: int = 0
    starts: list[str] = field(default_factory=list)
    slowest: float = 0.0  # seconds until the processes ended whose fellow was killed
    said: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    difference: float = 0.0


class Start:
    """One start of the command in a layout: its processes, each the leader of a group of its own."""

    def __init__(self, layout: str, arguments: list[str], folder: Path, number: int) -> None:
        count, chosen = LAYOUTS[layout]
        self.samples = folder.with_name(f"{folder.name}-samples") / f"{number:03d}"
        self.samples.mkdir(parents=True)
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        self.logs = [self.samples / f"{rank}.log" for rank in range(count)]
        command = [*arguments, *chosen, f"output={folder}"]
        self.processes = [
            _FORK.Process(target=_work, args=(command, self.samples, rank, count, port, self.logs[rank]))
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def steps(self) -> int:
        """How many steps it has begun."""
        file = self.samples / "0.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def alive(self) -> bool:
        """Whether any process is."""
        return any(process.is_alive() for process in self.processes)

    def kill(self, process: Any) -> None:
        """Kill a process with all that it has started, by the id of its group."""
        if process.is_alive():
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its group yet
                process.kill()

    def wait(self, seconds: float) -> bool:
        """Whether all end in time; else they are killed."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        late = self.alive()
        for process in self.processes:
            self.kill(process)
            process.join()
        return not late

    def said(self) -> str:
        """The error that the first process tells which tells one; else its last line."""
        lines = [line for log in self.logs for line in log.read_text(errors="replace").strip().splitlines()]
        told = [line for line in lines if line.startswith("osp train: ")]
        return (told or lines[-1:] or ["nothing"])[0][-300:]


def _work(arguments: list[str], samples: Path, rank: int, count: int, port: int, log: Path) -> None:
    """In a process of its own: the verb, as torchrun would start it."""
    os.setsid()
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "matrix"}
    if count > 1:
        os.environ.update({key: str(value) for key, value in (own | shared).items()})
    cast(Any, rank_zero_only).rank = rank  # Lightning has looked when it was imported
    os.environ["OSP_SAMPLES"] = str(samples)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["osp", *arguments]
    code = 0
    try:
        command_line()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001  (as the interpreter ends)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a process group may hang


def make_world(folder: Path) -> Path:
    """Features of three sizes."""
    (folder / "videos").mkdir()
    for number in range(18):
        (folder / "videos" / f"{number}.mp4").write_bytes(mp4(number, 5 if number % 3 else 9))
        (folder / "videos" / f"{number}.txt").write_text(f"a red circle, number {number}")
    torch.manual_seed(0)
    small = {"encoder_blocks": 1, "decoder_blocks": 1, "encoder_flow_channels": 16, "decoder_flow_channels": 16}
    save_pretrained(WFVAE(latent_channels=4, base_channels=16, level1="2d", **small), folder / "vae")
    shards = ["shards", f"input={folder / 'videos'}", f"output={folder / 'shards'}", "workers=1", "min_frames=1"]
    sizes = [
        "buckets=shapes",
        "buckets.time_stride=4",
        "buckets.space_stride=8",
        "buckets.shapes=[[9,32,32],[5,32,32]]",
    ]
    cache = ["cache", "vae=pretrained", f"path={folder / 'vae'}", f"input={folder / 'shards'}", *sizes]
    for arguments in (shards, [*cache, f"output={folder / 'features'}", "device=cpu", "min_clips=1"]):
        process = _FORK.Process(target=_work, args=(arguments, folder, 0, 1, 0, folder / "log"))
        process.start()
        process.join()
        if process.exitcode:
            raise OspError(f"osp {' '.join(arguments)}: {(folder / 'log').read_text()[-2000:]}")
    return folder / "features"


def run(layouts: list[str], arguments: list[str], folder: Path, kills: int, draw: Random, steps: int) -> Outcome:
    """Start the command until it ends by itself; of its starts so many are killed, each in the next layout."""
    outcome, done = Outcome(), False
    for number in range(4 * kills + 2):
        layout = layouts[number % len(layouts)]
        start = Start(layout, arguments, folder, number)
        outcome.starts.append(layout)
        if outcome.kills < kills and _killed(start, outcome, draw, steps):
            continue
        if not start.wait(_LIMIT):
            outcome.faults.append(f"{layout}: goes on for {_LIMIT:.0f} s ({start.said()})")
            break
        if any(process.exitcode for process in start.processes):
            codes = [process.exitcode for process in start.processes]
            outcome.faults.append(f"{layout}: start {number} ends with {codes} ({start.said()})")
            break
        done = True
        break
    if not done and not outcome.faults:
        outcome.faults.append("never came to its end")
    return outcome


def _killed(start: Start, outcome: Outcome, draw: Random, steps: int) -> bool:
    """Kill all or one of the processes at some moment; False if they have ended before."""
    after, moment = draw.randint(0, max(2, steps // 4)), draw.uniform(0.0, 0.5)
    alone = len(start.processes) > 1 and draw.random() < 0.5
    end = time.monotonic() + _LIMIT
    while start.alive() and start.steps() < after and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(moment)
    victims = [draw.choice(start.processes)] if alone else start.processes
    if not all(process.is_alive() for process in victims):
        return False
    for process in victims:
        start.kill(process)
    outcome.kills += 1
    begun, waits = time.monotonic(), alone and start.steps() > 0
    # Before they have found each other they wait for all to come, and their launcher has to end them.
    if not start.wait(_GRACE if waits else 0.0) and waits:
        outcome.faults.append(f"{len(start.processes)} processes: hang when one is killed")
    if waits:
        outcome.slowest = max(outcome.slowest, time.monotonic() - begun)
        outcome.said.add(start.said())
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


def matrix(place: Path, given: argparse.Namespace) -> bool:
    """Run and print all; gives whether all is right."""
    arguments = [*_TRAIN, f"data.train.path={make_world(place)}", f"trainer.max_steps={given.steps}"]
    arguments.append(f"module.decay_until={2 * given.steps}")
    chosen, draw = given.layouts or list(LAYOUTS), Random(given.seed)
    rows = [(name, [name]) for name in chosen]
    rows += [(f"changing {n}", draw.sample(chosen, len(chosen)) * 2) for n in range(given.changing)]
    left, is_right, kills = given.kills, True, 0
    for name in dict.fromkeys(["one", *chosen]):
        outcome = run([name], arguments, place / f"whole {name}", 0, draw, given.steps)
        check(outcome, place / f"whole {name}", place / "whole one", _CLOSE, given.steps)
        is_right &= _print(f"{name}, undisturbed", outcome)
    for number, (name, layouts) in enumerate(rows):
        share = -(-left // (len(rows) - number))
        outcome = run(layouts, arguments, place / name, share, draw, given.steps)
        same = len({*layouts}) == 1
        check(outcome, place / name, place / f"whole {name if same else 'one'}", 0.0 if same else _CLOSE, given.steps)
        left, kills = left - outcome.kills, kills + outcome.kills
        is_right &= _print(name, outcome)
    print(f"{kills} kills", flush=True)
    return is_right and kills >= given.kills


def _print(name: str, outcome: Outcome) -> bool:
    said = f", others end in {outcome.slowest:.1f} s" if outcome.said else ""
    about = f"{outcome.kills} kills, {len(outcome.starts)} starts, weights differ by {outcome.difference:.2g}{said}"
    print(f"{name:<28} {about}: {'; '.join(outcome.faults) or 'right'}", flush=True)
    for line in sorted(outcome.said):
        print(f"{'':<28}   {line}", flush=True)
    return not outcome.faults


def main() -> int:
    """Print the table; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="other moments and layouts for each seed (0)")
    parser.add_argument("--kills", type=int, default=50, help="of all rows together (50)")
    parser.add_argument("--steps", type=int, default=24, help="of a run (24)")
    parser.add_argument("--changing", type=int, default=3, help="runs whose layout changes with each start (3)")
    parser.add_argument("--layouts", nargs="+", choices=[*LAYOUTS], help="these only")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a process that is forked has no threads
    sys.path.insert(0, str(Path(__file__).parent))  # for the callback
    with tempfile.TemporaryDirectory() as place:
        return int(not matrix(Path(place), given))


if __name__ == "__main__":
    sys.exit(main())
