"""Kill verbs at random moments and run them again: `python tools/kills.py --seed 7 --kills 30`.

`osp shards`, `cache`, `train`, `sample` and `export-weights` work on small files that this tool makes. Each is killed
(SIGKILL) at moments drawn from the seed, twice in a row in the same folder, and run again; then it is stopped by ^C
(SIGINT), and by SIGTERM. Afterwards the same command has to give what an undisturbed run gives: the same bytes, and of
checkpoints the same values to the bit. Prints a line for each verb. Exits with 1 if anything differs, if a file is
there that an undisturbed run does not leave, or if the verb ends with another code than 130 after ^C, or 143 after
SIGTERM.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch

from osp.audit.fuzz.media import mp4
from osp.audit.fuzz.subject import digest
from osp.cli import main as osp
from osp.data.shards.build import write_rendered
from osp.data.sources import SyntheticClips
from osp.errors import OspError
from osp.files import file_digest
from osp.vae import WFVAE
from osp.weights.files import read_checkpoint
from osp.weights.pretrained import save_pretrained

_FORK = multiprocessing.get_context("fork")
_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
_VOLATILE = ("seconds", "overrides")  # of a result
_OWN = (".lock", "config.yaml", "run.json")  # other in each folder, or after each start
_CHECKED = frozenset({"loops", "callbacks", "hparams_name", "pytorch-lightning_version"})  # not part of the state
_SIZE = ["clip.frames=9", "clip.height=32", "clip.width=32"]
_TRAIN = [
    *("train", "experiment=t2v_tiny", "denoiser.heads=1", "denoiser.head_dim=12", "denoiser.text_channels=8"),
    *("denoiser.channels=4", "denoiser.out_channels=4", "text.channels=8", "text.layers=1", "text.heads=2"),
    *("data.batch_size=2", "data.workers=0", "data.val_clips=4", "logged_clips=2", "logger=[]", "trainer=cpu"),
    *("trainer.val_check_interval=10", "module.decay_until=null"),
]


@dataclass(frozen=True)
class Command:
    """A verb with its arguments, without the output folder."""

    verb: str
    arguments: list[str]
    seconds: float = 0.0  # that an undisturbed run takes
    begins: float = 0.0  # seconds until it has made its folder
    content: Mapping[str, str] = field(default_factory=dict)  # that it leaves, see `content`


@dataclass
class Tally:
    """The outcomes of the runs of a command."""

    kills: int = 0
    stops: int = 0
    faults: list[str] = field(default_factory=list)


def make_world(folder: Path) -> list[Command]:
    """The files that the commands read, and the commands."""
    drawn = SyntheticClips(24, frames=9, height=32, width=32, objects=1, plain=True)
    clips = [drawn.read(number, 0) for number in range(24)]
    write_rendered(
        [(f"{n:03d}", c["video"], {"fps": 8.0, "caption": c["caption"]}) for n, c in enumerate(clips)],
        folder / "shards",
    )
    (folder / "videos").mkdir()
    for number in range(8):
        (folder / "videos" / f"{number}.mp4").write_bytes(mp4(number, 36))
    torch.manual_seed(0)
    small = {"encoder_blocks": 1, "decoder_blocks": 1, "encoder_flow_channels": 16, "decoder_flow_channels": 16}
    save_pretrained(WFVAE(latent_channels=4, base_channels=16, level1="2d", **small), folder / "vae")
    vae = ["vae=pretrained", f"path={folder / 'vae'}"]
    cache = ["cache", *vae, f"input={folder / 'shards'}", *_SIZE, "device=cpu", "shard_clips=4", "batch_size=2"]
    train = [*_TRAIN, f"data.train.path={folder / 'features'}"]
    for arguments in (
        [*cache, f"output={folder / 'features'}"],
        [*train, f"output={folder / 'run'}", "trainer.max_steps=2"],
    ):
        _check(_run(arguments, folder / "log"), arguments, folder / "log")
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a red circle, number {n}\n" for n in range(8)))
    checkpoint = folder / "run" / "checkpoints" / "last.ckpt"
    return [
        Command("shards", ["shards", f"input={folder / 'videos'}", "clip_seconds=1", "shard_clips=3", "workers=1"]),
        Command("cache", cache),
        Command("train", [*train, "trainer.max_steps=40", "checkpoint_every=5"]),
        Command("sample", ["sample", f"checkpoint={checkpoint}", f"prompts={prompts}", "solver.steps=8", "device=cpu"]),
        Command("export-weights", ["export-weights", f"source={folder / 'vae'}"]),
    ]


def undisturbed(command: Command, output: Path) -> Command:
    """The command with what it gives when nothing disturbs it, and how long that takes."""
    begun, log = time.monotonic(), output.with_suffix(".log")
    process = _started([*command.arguments, f"output={output}"], log)
    begins = 0.0
    while process.is_alive():
        begins = begins or (time.monotonic() - begun if output.exists() else 0.0)
        process.join(0.005)
    seconds = time.monotonic() - begun
    _check(process.exitcode, command.arguments, log)
    return Command(command.verb, command.arguments, seconds, begins, content(output))


def content(folder: Path) -> dict[str, str]:
    """A digest of each file that a verb leaves, and of each part of a checkpoint; of logs that they are there."""
    found: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".ckpt":
            for part, value in read_checkpoint(path).items():
                found[f"{name}: {part}"] = "" if part in _CHECKED else digest(value)
        elif path.name == "result.json":
            result = json.loads(path.read_text())
            found[name] = digest({key: value for key, value in result.items() if key not in (*_VOLATILE, "output")})
        elif (
            path.suffix == ".log"
            or path.name in (".lock", "run.json")
            or ".hydra" in path.parts
            or path.name == "config.yaml"
        ):
            found[name] = ""
        else:
            found[name] = file_digest(path)
    return found


def killed(command: Command, output: Path, draw: Random, tally: Tally, kills: int) -> None:
    """Kill the command so often in one folder, run it to the end, and compare."""
    for _ in range(kills):
        process = _started([*command.arguments, f"output={output}"], output.with_suffix(".log"))
        process.join(draw.uniform(command.begins * 0.7, command.seconds * 0.95))
        tally.kills += process.is_alive()
        process.kill()
        process.join()
    _finish(command, output, tally, "SIGKILL")


def stopped(command: Command, output: Path, draw: Random, tally: Tally, how: signal.Signals) -> None:
    """Stop the command by a signal; its exit code, and what the same command gives then."""
    process = _started([*command.arguments, f"output={output}"], output.with_suffix(".log"))
    process.join(draw.uniform(command.begins * 0.7, command.seconds * 0.8))
    if not process.is_alive():
        return
    assert process.pid is not None
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
    else:
        os.kill(process.pid, how)
    process.join(60)
    if process.is_alive():
        tally.faults.append(f"{how.name}: goes on for 60 s")
        process.kill()
        process.join()
    code = process.exitcode or 0
    if code == 0:
        return  # it had done everything
    tally.stops += 1
    if code not in (_CODES[how], -how):
        tally.faults.append(f"{how.name}: exit code {code}, not {_CODES[how]} ({_said(output.with_suffix('.log'))})")
    _finish(command, output, tally, how.name)


def _finish(command: Command, output: Path, tally: Tally, how: str) -> None:
    """Run the command to its end and compare what is there with what an undisturbed run leaves."""
    log = output.with_suffix(".log")
    for wait in (0.5, 2, 5, 0):  # a worker whose parent was killed may hold a lock for a moment
        if (code := _run([*command.arguments, f"output={output}"], log)) == 0:
            break
        time.sleep(wait)
    if code:
        tally.faults.append(f"{how}: the same command ends with {code} ({_said(log)})")
        return
    found = content(output)
    if more := sorted(found.keys() - command.content.keys()):
        tally.faults.append(f"{how}: leaves {', '.join(more[:3])}")
    other = sorted(name for name, value in command.content.items() if found.get(name) != value)
    if other:
        tally.faults.append(f"{how}: {len(other)} files differ ({', '.join(other[:3])})")


def _started(arguments: list[str], log: Path) -> "multiprocessing.context.ForkProcess":
    process = _FORK.Process(target=_work, args=(arguments, log))
    process.start()
    return process


def _run(arguments: list[str], log: Path) -> int:
    process = _started(arguments, log)
    process.join()
    return process.exitcode or 0


def _work(arguments: list[str], log: Path) -> None:
    """In a process of its own: the verb, as its own process would run it."""
    os.setsid()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["osp", *arguments]
    try:
        osp()
    except Exception:  # noqa: BLE001  (as the interpreter ends)
        traceback.print_exc()
        sys.exit(1)


def _check(code: int | None, arguments: list[str], log: Path) -> None:
    if code:
        raise OspError(f"osp {' '.join(arguments)}: ends with {code} ({_said(log)})")


def _said(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1][:300]


def disturb(command: Command, place: Path, seed: int, kills: int) -> Tally:
    """All that is done to a command."""
    draw, tally, rounds = Random(f"{seed}/{command.verb}"), Tally(), 0
    while tally.kills < kills and rounds < 3 * kills:
        killed(command, place / f"{command.verb}-kill-{rounds}", draw, tally, min(2, kills - tally.kills))
        rounds += 1
    for how in _CODES:
        before = tally.stops
        for number in range(8):
            stopped(command, place / f"{command.verb}-{how.name}-{number}", draw, tally, how)
            if tally.stops > before:
                break
        else:
            tally.faults.append(f"{how.name}: never came in time")
    return tally


def main() -> int:
    """Print the lines; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="other moments for each seed (0)")
    parser.add_argument("--kills", type=int, default=30, help="of all verbs together (30)")
    parser.add_argument("--only", nargs="+", help="these verbs")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a process that is forked has no threads
    is_right = True
    with tempfile.TemporaryDirectory() as place:
        commands = make_world(Path(place))
        for command in commands:
            if given.only is None or command.verb in given.only:
                known = undisturbed(command, Path(place) / f"{command.verb}-whole")
                tally = disturb(known, Path(place), given.seed, -(-given.kills // len(commands)))
                is_right &= not tally.faults
                took = f"{known.seconds:.1f} s undisturbed"
                print(f"{command.verb:<16} {tally.kills} kills, {tally.stops} stops, {took}: ", end="")
                print("; ".join(dict.fromkeys(tally.faults)) or "all as undisturbed", flush=True)
    return int(not is_right)


if __name__ == "__main__":
    sys.exit(main())
