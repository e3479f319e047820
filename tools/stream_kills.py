"""Kill a training over a server that fails, at random moments, and go on: `python tools/stream_kills.py --kills 5`.

A small training reads shards from `flaky_server.py`, which fails one request in ten. It is killed (SIGKILL) at moments
drawn from the seed and goes on from its last checkpoint, each time with other numbers of processes and workers and with
an empty cache now and then. Each step has to see the samples that it sees in a run over a server without faults, to the
pixel, and the weight has to come out the same. Prints a line for each start; exits with 1 if anything differs.
"""

import osp  # isort: skip  # noqa: F401  (mends torchvision, which lightning imports)

import argparse
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from random import Random
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from osp.data.datamodule import ClipDataModule
from osp.data.shards.build import write_rendered
from osp.data.sources import ShardClips, SyntheticClips
from osp.data.streaming import RemoteShards

FlakyServer = runpy.run_path(str(Path(__file__).with_name("flaky_server.py")))["FlakyServer"]

CLIPS, SHARD, GLOBAL_BATCH = 24, 3, 4
_SAVE_EVERY = 4  # steps
_LAYOUTS = [(1, 1), (2, 0), (1, 2), (2, 1), (1, 0)]  # processes, workers of each


class Journal(pl.LightningModule):
    """One weight, which learns the mean of the pixels; each step appends what it saw to a file of its rank."""

    def __init__(self, folder: Path, pause: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.folder, self.pause = folder, pause

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        pixels = [zlib.crc32(video.contiguous().numpy()) for video in batch["video"]]
        seen = [*zip(batch["sample"].tolist(), batch["key"], pixels, strict=True)]
        with open(self.folder / f"rank{self.global_rank}.jsonl", "a") as file:
            print(json.dumps([self.global_step, seen]), file=file)
        time.sleep(self.pause)
        return ((self.weight - batch["video"].double() / 255) ** 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def write_clips(folder: Path) -> None:
    """Shards of a few drawn clips."""
    drawn = SyntheticClips(CLIPS, frames=3, height=16, width=16)
    clips = [drawn.read(number, 0)["video"] for number in range(CLIPS)]
    write_rendered([(f"{n:03d}", clip, {"fps": 8.0}) for n, clip in enumerate(clips)], folder, shard_clips=SHARD)


def train(url: str, folder: Path, steps: int, devices: int = 1, workers: int = 0, pause: float = 0.0) -> float:
    """The weight after so many steps; goes on from the checkpoint in the folder if there is one."""
    shards = RemoteShards(url, folder / "cache", 1_000_000, attempts=20, pause=0.01, slots=4, lanes=2, buffer=5)
    clips = ShardClips(shards, 1, 16, 16, flip=True)
    data = ClipDataModule(clips, None, batch_size=GLOBAL_BATCH // devices, workers=workers)
    keep = ModelCheckpoint(folder, filename="unused", save_top_k=0, save_last=True, every_n_train_steps=_SAVE_EVERY)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=steps,
        callbacks=[keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    module, last = Journal(folder, pause), folder / "last.ckpt"
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    return float(module.weight.detach())


def start(url: str, folder: Path, steps: int, devices: int, workers: int) -> "subprocess.Popen[bytes]":
    """The same in processes of its own, in a session of their own."""
    command = [sys.executable, __file__, "--train", url, str(folder), str(steps), str(devices), str(workers)]
    with open(folder / "told.txt", "ab") as told:
        return subprocess.Popen(command, start_new_session=True, stdout=told, stderr=told)


def steps_seen(folder: Path) -> dict[int, set[str]]:
    """The clips of each step, over all ranks, as JSON; too many for a step that did not see the same each time."""
    ranks = []
    for file in sorted(folder.glob("rank?.jsonl")):
        whole = [line for line in file.read_text().split("\n")[:-1] if line]  # the last line may have been cut
        ranks.append([json.loads(line) for line in whole])
    seen: dict[int, set[str]] = {}
    for step, clips in (entry for rank in ranks for entry in rank):
        seen.setdefault(step, set()).update(json.dumps(clip) for clip in clips)
    return seen


def kill_after(process: "subprocess.Popen[bytes]", folder: Path, steps: int, delay: float, limit: float = 120) -> None:
    """SIGKILL to all processes of a run, a moment after it has done so many more steps, or when it has ended."""
    before, end = len(steps_seen(folder)), time.monotonic() + limit
    while len(steps_seen(folder)) < before + steps and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    """The number of steps that differ, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        url, folder, steps, devices, workers = options.train
        print(repr(train(url, Path(folder), int(steps), int(devices), int(workers), pause=0.05)))
        return 0
    random, steps = Random(options.seed), 8 * (options.kills + 1)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name, "whole"), Path(name, "killed")
        whole.mkdir()
        killed.mkdir()
        write_clips(Path(name, "served"))
        with FlakyServer(Path(name, "served"), 0) as sound:
            weight = train(sound.url, whole, steps)
        with FlakyServer(Path(name, "served"), 10) as flaky:
            for number in range(options.kills):
                if random.random() < 0.5:
                    shutil.rmtree(killed / "cache", ignore_errors=True)
                layout = _LAYOUTS[number % len(_LAYOUTS)]
                after, delay = random.randint(1, 10), random.random() / 5
                kill_after(start(flaky.url, killed, steps, *layout), killed, after, delay)
                done = len(steps_seen(killed))
                print(f"{layout[0]} processes, {layout[1]} workers each: killed, {done} of {steps} steps seen")
            gone_on = train(flaky.url, killed, steps, workers=1)
            print(f"requests: {len(flaky.asked)}, of which failed: {len(flaky.failed)}")
        expected, seen = steps_seen(whole), steps_seen(killed)
        wrong = [step for step in range(steps) if expected[step] != seen.get(step)]
        print(f"steps that differ: {wrong or 'none'}; weight {gone_on!r}, without faults {weight!r}")
        return int(bool(wrong) or abs(gone_on - weight) > 1e-9)


if __name__ == "__main__":
    sys.exit(main())
