"""Memory of each process that begins to train a denoiser in parts: `python tools/meta_start.py [--denoiser NAME]`.

Random weights of a full-size model are written as `osp import-weights` leaves them. So many processes then begin as
`osp train trainer=fsdp denoiser=pretrained` does: each builds the model without memory, keeps memory for its part of
the weights and of their averages, and reads its part tensor by tensor. Printed is the largest anonymous memory of each
(`RssAnon`, looked at every millisecond: the pages of the weight file, which the system takes back when it likes, do not
count), beside the size of the whole.

`--in-turn` lets one process after the other read and let go, for machines that do not hold all parts at once.
"""

import argparse
import gc
import os
import tempfile
import threading
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from osp.cli import config_folder
from osp.cli.plain import instantiate
from osp.denoiser import Denoiser
from osp.devices.device import free_unused
from osp.diffusion import Flow
from osp.parallel import Parallelism, Sharding
from osp.parallel.launch import on_devices
from osp.training.denoiser_module import DenoiserModule
from osp.weights import load_pretrained, save_pretrained
from osp.weights.lazy import Stored, Weights, parse_dtype

CPU = torch.device("cpu")
GB = 1e9


class AnonymousPeak:
    """The most anonymous memory of this process during the block, `peak`, and that before it, `before`, in bytes."""

    def __enter__(self) -> "AnonymousPeak":
        gc.collect()
        free_unused(CPU)
        self.before = self.peak = _anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, _anonymous())

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, _anonymous())


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


class InParts(DenoiserModule):
    """The module as a Trainer with a sharded strategy finds it."""

    mesh_of_all: DeviceMesh

    def parallelism(self) -> Parallelism:
        """Split over all processes."""
        return Parallelism(self.mesh_of_all.size(), sharding=Sharding(self.mesh_of_all, CPU))


def write_random(denoiser: Denoiser, folder: Path, dtype: torch.dtype) -> int:
    """Write random weights of a denoiser without memory, one tensor after another; gives their bytes."""
    stored = {
        key: Stored(tuple(value.shape), dtype, partial(_random, value.shape, dtype))
        for key, value in denoiser.state_dict().items()
    }
    save_pretrained(denoiser, folder, weights=Weights(stored))
    return sum(value.numel() for value in denoiser.state_dict().values()) * dtype.itemsize


def _random(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape).normal_(std=0.02).to(dtype)


def begun(folder: str, dtype: torch.dtype, mesh: DeviceMesh) -> DenoiserModule:
    """The module with its weights and averages, of which this process holds a part."""
    with torch.device("meta"):
        denoiser = load_pretrained(folder, dtype)
    assert isinstance(denoiser, Denoiser)
    module = InParts(denoiser, None, Flow())
    module.mesh_of_all = mesh
    module.configure_model()
    return module


def measured(device: torch.device, folder: str, dtype: torch.dtype, in_turn: bool) -> list[tuple[int, int]]:
    """The peak of anonymous memory of each process, and what it had before, by rank."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    for turn in range(ranks) if in_turn else [dist.get_rank()]:
        if turn == dist.get_rank():
            with AnonymousPeak() as memory:
                module = begun(folder, dtype, mesh)
            if in_turn:
                del module
                gc.collect()
                free_unused(CPU)
        if in_turn:
            dist.barrier()
    found: list[tuple[int, int]] = [(0, 0)] * ranks
    dist.all_gather_object(found, (memory.peak, memory.before))
    return found


def main() -> None:
    """Print a row for each process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoiser", default="opensora_v13", metavar="NAME", help="of conf/denoiser")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--dtype", default="float32", help="of the weights: float32, bfloat16 or float16")
    parser.add_argument("--in-turn", action="store_true", help="one process after the other")
    args = parser.parse_args()
    dtype = parse_dtype(args.dtype)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("train", ["module=denoiser", f"denoiser={args.denoiser}"])
    with torch.device("meta"):
        denoiser = instantiate(cfg.denoiser)
    # Memory that is let go goes back to the system
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 17), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)}
    with tempfile.TemporaryDirectory(prefix="meta_start") as folder:
        weights = write_random(denoiser, Path(folder) / "weights", dtype)
        found = on_devices(args.processes, CPU, measured, str(Path(folder) / "weights"), dtype, args.in_turn)
    whole = 2 * weights
    print(f"{args.denoiser}, {args.dtype}: weights {weights / GB:.2f} GB, with averages {whole / GB:.2f} GB\n")
    print("| process | peak GB | before GB | taken GB | of the whole |\n|---:|---:|---:|---:|---:|")
    for rank, (peak, before) in enumerate(found):
        taken = peak - before
        print(f"| {rank} | {peak / GB:.2f} | {before / GB:.2f} | {taken / GB:.2f} | {taken / whole:.1%} |")


if __name__ == "__main__":
    main()
