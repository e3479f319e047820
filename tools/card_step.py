"""Training steps of a denoiser at full size on one device, sparse and dense attention in turn (A-B-B-A).

    python tools/card_step.py                                  # v1.3 on clips of 93x352x640 and 93x480x640
    python tools/card_step.py 93x720x1280:offload --steps 1    # what is kept waits in the memory of the CPU
    python tools/card_step.py 9x64x64 --set denoiser=cross_tiny trainer=cpu

The steps are those of `osp train experiment=v13_stage3 data=features`: one clip each, bfloat16 by autocast, AdamW,
averaged weights, each block computed again. Latents and text are drawn. Dense attention has the same weights. Seconds
are the median of the steps, after one of each case that is not counted. Memory is the most that torch's allocator has
handed out (on a CPU the resident set); beside it stands what `osp plan` says. MFU counts forward and backward pass,
HFU also what is computed again, both by the peak of matrix products that is measured first.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import osp  # isort: skip  # noqa: F401  (mends torchvision, which lightning imports)
import lightning
import torch
from lightning.pytorch.callbacks import Callback

from check_plan import composed
from osp.cli.plain import instantiate, plain
from osp.cli.plan import asked_of
from osp.cli.train import _module
from osp.data.features.format import FeatureIdentity, Features, TextIdentity
from osp.data.features.writer import FeatureWriter
from osp.data.media.shape import Shape, Strides
from osp.denoiser import Denoiser, Stage
from osp.denoiser.flops import denoiser_flops
from osp.denoiser.schedule import make_stages
from osp.devices import PeakMemory, describe_device, matmul_peak
from osp.devices.device import synchronize
from osp.report.tables import markdown_table
from osp.training.fit import quiet_lightning
from osp.training.memory.asked import DenoiserWork
from osp.training.memory.plan import plan_training

WORDS, GIB = 512, 2**30
ORDER = ("sparse", "dense", "dense", "sparse")
_STRIDES = Strides(4, 8)
HEADINGS = [
    "clip", "tokens", "attention", "seconds", "to dense", "tokens/s", "TFLOP", "MFU, %", "HFU, %", "GiB", "planned GiB",
]  # fmt: skip


@dataclass
class Case:
    """A size of clip with one kind of attention, and what was measured."""

    size: Shape
    offload: bool
    schedule: str
    seconds: list[float] = field(default_factory=list)
    peak: int = 0


class Turns(Callback):
    """Gives each step its clip and its attention, and measures it."""

    def __init__(self, steps: Sequence[tuple[Case, bool]]) -> None:
        self.steps, self.counted = steps, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Put the clip of the step in the place of the batch's own."""
        case, _ = self.steps[trainer.global_step]
        denoiser: Denoiser = pl_module.denoiser
        set_schedule(denoiser, case.schedule)
        denoiser.offload_activations = case.offload
        for one in batch:
            one["latent"] = torch.randn(1, denoiser.config.channels, *_STRIDES.latent(*case.size))
            one["latent"] = one["latent"].to(pl_module.device)
        self.memory = PeakMemory(pl_module.device)
        self.memory.__enter__()
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Note what the step took."""
        synchronize(pl_module.device)
        taken = time.perf_counter() - self.begun
        self.memory.__exit__(None, None, None)
        case, counts = self.steps[trainer.global_step - 1]
        if counts:
            case.seconds.append(taken)
            case.peak = max(case.peak, self.memory.peak)
        print(f"{case.size} {case.schedule}: {taken:.2f} s, {self.memory.peak / GIB:.1f} GiB", file=sys.stderr)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("clips", nargs="*", default=["93x352x640", "93x480x640"], help="FxHxW, or FxHxW:offload")
    parser.add_argument("--steps", type=int, default=2, help="steps of each turn")
    parser.add_argument("--set", nargs="*", default=[], help="further settings of osp train")
    arguments = parser.parse_args()
    cases = []
    for clip in arguments.clips:
        size, _, how = clip.partition(":")
        frames, height, width = map(int, size.split("x"))
        cases += [Case(Shape(frames, height, width), how == "offload", each) for each in ("sparse", "dense")]
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            "experiment=v13_stage3", "after=null", "data=features", "~text", f"data.train.path={folder}",
            "data.batch_size=1", "global_batch=1", "data.workers=0", "logged_clips=0", "module.text_dropout=0",
            "trainer=gpu", *arguments.set,
        ]  # fmt: skip
        device, denoiser = train(composed("train", settings), cases, arguments.steps, Path(folder))
        report(cases, device, denoiser, settings)
    return 0


def train(cfg: Any, cases: Sequence[Case], steps: int, folder: Path) -> tuple[torch.device, Denoiser]:
    """Train through all cases; gives where, and the denoiser."""
    turns = [(case, False) for case in cases]
    for sparse, dense in zip(cases[::2], cases[1::2], strict=True):
        turns += [(sparse if name == "sparse" else dense, True) for name in ORDER for _ in range(steps)]
    write_features(folder, cfg.denoiser.channels, cfg.denoiser.text_channels)
    quiet_lightning()
    data = instantiate(cfg.data)
    module = _module(cfg, data)
    module.prepare(data)
    kept = {key: value for key, value in plain(cfg.trainer).items() if key not in ("max_steps", "val_check_interval")}
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer: lightning.Trainer = instantiate(kept | options | {"max_steps": len(turns)}, callbacks=[Turns(turns)])
    trainer.fit(module, data)
    return trainer.strategy.root_device, cast(Denoiser, module.denoiser)


def write_features(folder: Path, channels: int, text_channels: int) -> None:
    """A tiny clip of random features; the steps put larger latents in the place of its own."""
    scaling = (0.0,) * channels, (1.0,) * channels
    text = TextIdentity("random", "0", text_channels)
    identity = FeatureIdentity("random", "0", _STRIDES.time, _STRIDES.space, channels, *scaling, text=text)
    writer, size = FeatureWriter(folder, identity, clips=1, origin="random"), Shape(1, 16, 16)
    mean = torch.randn(identity.latent_shape(size))
    words = [torch.randn(WORDS, text_channels)]
    with writer.shard(0) as shard:
        shard.add(0, Features("random", size, mean, mean - 3, ["random"], words, fps=16.0))


def set_schedule(denoiser: Denoiser, schedule: str) -> None:
    """Let the blocks attend as the model was configured to, or densely."""
    stages = make_stages(denoiser.config.stages)
    denoiser.stages = stages if schedule == "sparse" else tuple(Stage(one.blocks) for one in stages)
    denoiser.schedule = [pattern for stage in denoiser.stages for pattern in stage.patterns]


def report(cases: Sequence[Case], device: torch.device, denoiser: Denoiser, settings: Sequence[str]) -> None:
    """Print a row a case."""
    peak = matmul_peak(device, torch.bfloat16)
    rows, dense = [], {case.size: case for case in cases if case.schedule == "dense"}
    for case in cases:
        set_schedule(denoiser, case.schedule)
        latent = _STRIDES.latent(*case.size)
        flops, seconds = denoiser_flops(denoiser, latent, WORDS), statistics.median(case.seconds)
        tokens = latent.frames * latent.height * latent.width // denoiser.patch_size**2
        useful = flops.forward + flops.backward
        again = useful + flops.forward - flops.embedding
        planned = f"{planned_peak(case, settings) / GIB:.1f}"
        ratio = seconds / statistics.median(dense[case.size].seconds)
        rows.append([
            f"{case.size}{', offloaded' if case.offload else ''}", f"{tokens:,}", case.schedule, f"{seconds:.2f}",
            f"{ratio:.2f}", f"{tokens / seconds:,.0f}", f"{useful / 1e12:,.0f}", f"{100 * useful / seconds / peak:.1f}",
            f"{100 * again / seconds / peak:.1f}", f"{case.peak / GIB:.1f}", planned,
        ])  # fmt: skip
    print("\n".join(markdown_table(HEADINGS, rows, left=1)))
    print(f"\n{describe_device(device)}, torch {torch.__version__}, bfloat16 peak measured {peak / 1e12:.0f} TFLOP/s")


def planned_peak(case: Case, settings: Sequence[str]) -> int:
    """The bytes that `osp plan` says of such a step."""
    asked = asked_of(composed("plan", [*settings, "device=h100"]))
    assert isinstance(asked.work, DenoiserWork)
    set_schedule(asked.work.denoiser, case.schedule)
    return plan_training(replace(asked, shape=case.size, work=replace(asked.work, offloads=case.offload))).peak


if __name__ == "__main__":
    sys.exit(main())
