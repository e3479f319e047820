"""The memory that `osp plan` predicts beside that of real training steps, in processes of their own on the CPU.

    python tools/check_plan.py [--only NAME] [--limit 0.10]

Each configuration trains for three steps. Measured is the largest resident set of a process less that before the model
was made, after a warm-up with a tiny model that brings all that is loaded on first use. glibc gives large blocks back
to the system when they are freed (MALLOC_MMAP_THRESHOLD_), so that its own reserves count as little as they can. The
exit code is 1 if an error is above the limit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from osp.report.tables import markdown_table

MIB = 2**20
_DENOISER = (
    "module=denoiser", "denoiser=cross_tiny", "text=words", "objective=flow_tiny", "vae=pretrained", "data=synthetic",
    "trainer=cpu", "denoiser.heads=8", "clip.frames=9", "clip.height=64", "clip.width=64", "data.batch_size=24",
    "text.max_tokens=8",  # so that each batch has as many, which the plan counts
)  # fmt: skip
_HEAVY = (*_DENOISER, "denoiser.heads=24", "data.batch_size=2")
_JOINT = (*_DENOISER, "denoiser=suv_tiny", "data.batch_size=24")
_VAE = (
    "module=vae", "vae=wfvae_tiny", "data=synthetic", "trainer=cpu", "module.loss.perceptual=null",
    "clip.frames=9", "clip.height=64", "clip.width=64", "data.batch_size=16",
)  # fmt: skip
_TWO = ("trainer=fsdp_cpu",)

CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "cross": _DENOISER,
    "cross, recomputed": (*_DENOISER, "module.recompute_every=1", "data.batch_size=64"),
    "cross, large weights": _HEAVY,
    "cross, accumulated": (*_HEAVY, "module.accumulate=3", "data.batch_size=4"),
    "cross, larger clips": (*_DENOISER, "clip.frames=17", "clip.height=96", "data.batch_size=10"),
    "cross, FSDP2 x2": (*_HEAVY, "trainer=fsdp_cpu"),
    "cross, DDP x2": (*_HEAVY, "trainer=ddp_cpu"),
    "joint": _JOINT,
    "joint, recomputed": (*_JOINT, "module.recompute_every=1", "data.batch_size=64"),
    "joint, Muon": (*_JOINT, "module.muon_lr=1e-3", "denoiser.heads=16", "data.batch_size=2"),
    "VAE": _VAE,
    "VAE, accumulated": (*_VAE, "vae.base_channels=32", "module.accumulate=2", "data.batch_size=8"),
    "VAE with discriminator": (*_VAE, "module.discriminator_start=0", "data.batch_size=8"),
}
WARM_UP = ("denoiser.heads=2", "vae.base_channels=8", "clip.frames=5", "clip.height=32", "clip.width=32")


def main() -> int:
    """Print the table; 1 if an error is above the limit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="configurations whose names hold this")
    parser.add_argument("--limit", type=float, default=0.10)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(measured_here(json.loads(arguments.child))))
        return 0
    rows, worst = [], 0.0
    for name, overrides in CONFIGURATIONS.items():
        if arguments.only is None or arguments.only in name:
            predicted, measured = compare(overrides)
            error = predicted / measured - 1
            worst = max(worst, abs(error))
            rows.append([name, f"{predicted / MIB:.0f}", f"{measured / MIB:.0f}", f"{100 * error:+.1f} %"])
            print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join(markdown_table(["configuration", "predicted MiB", "measured MiB", "error"], rows, left=1)))
    return int(worst > arguments.limit)


def compare(overrides: Sequence[str]) -> tuple[int, int]:
    """The bytes predicted and measured; of several processes the one that took most."""
    with tempfile.TemporaryDirectory() as folder:
        given = [*overrides, f"path={folder}/vae"] if "vae=pretrained" in overrides else list(overrides)
        save_vae(Path(folder, "vae"))
        return predicted(given), max(_measured(given, folder))


def predicted(overrides: Sequence[str]) -> int:
    """The bytes of the plan for a CPU."""
    from osp.cli.plan import asked_of
    from osp.training.memory.plan import plan_training

    return plan_training(asked_of(composed("plan", [*overrides, "device=cpu"]))).peak


def _measured(overrides: Sequence[str], folder: str) -> list[int]:
    """The bytes that each process took."""
    world = 2 if any(one in overrides for one in ("trainer=ddp_cpu", *_TWO)) else 1
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 17), "MALLOC_TRIM_THRESHOLD_": str(1 << 17), "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "check",
    }  # fmt: skip
    command = [sys.executable, __file__, "--child", json.dumps([*overrides, f"output={folder}/run"])]
    children = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError(f"{overrides}: a child failed")
    return [int(output.splitlines()[-1]) for output in outputs]


def measured_here(overrides: Sequence[str]) -> int:
    """The bytes that training took in this process."""
    from osp.devices import PeakMemory

    torch.set_num_threads(1)
    small = [one for one in WARM_UP if not one.startswith("denoiser") or "module=denoiser" in overrides]
    small = [one for one in small if not one.startswith("vae") or "module=vae" in overrides]
    train([*overrides, *small])
    with PeakMemory(torch.device("cpu")) as memory:
        train(overrides)
    assert memory.taken is not None
    return memory.taken


def train(overrides: Sequence[str], steps: int = 3) -> None:
    """Train for so many steps, and for nothing else."""
    import lightning

    from osp.cli.plain import instantiate
    from osp.cli.train import _module
    from osp.training.fit import quiet_lightning

    quiet_lightning()
    cfg = composed("train", [*overrides, "data.workers=0", "logged_clips=0"])
    data = instantiate(cfg.data)
    module = _module(cfg, data)
    module.prepare(data)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": steps}
    trainer: lightning.Trainer = instantiate(cfg.trainer, limit_val_batches=0, val_check_interval=steps, **options)
    trainer.fit(module, data)


def composed(verb: str, overrides: Sequence[str]) -> Any:
    """The configuration of a verb with these overrides."""
    from hydra import compose, initialize_config_dir

    from osp.cli import config_folder

    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose(verb, list(overrides))


def save_vae(folder: Path) -> None:
    """A small VAE with random weights, to encode videos with."""
    from osp.vae import WFVAE
    from osp.weights.pretrained import save_pretrained

    vae = WFVAE(
        latent_channels=16, base_channels=16, encoder_blocks=1, decoder_blocks=1,
        encoder_flow_channels=16, decoder_flow_channels=16,
    )  # fmt: skip
    save_pretrained(vae, folder)


if __name__ == "__main__":
    sys.exit(main())
