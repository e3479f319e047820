"""Measure the stream of shards beside the local reader: `python tools/stream_throughput.py --clips 512`.

Both read the same shards, of drawn videos and of random features: the local reader from the disk, the stream from a
server on this machine, with an empty cache (cold) and with all shards in it (warm). They take turns as local, cold,
warm, warm, cold, local, after a run that is not counted, so that what drifts in the machine falls on all alike. Prints
clips and MB a second of each run of a pass, and the mean of both.
"""

import osp  # isort: skip  # noqa: F401  (mends torchvision, which a loader imports)

import argparse
import itertools
import os
import platform
import runpy
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from osp.data.features.format import FeatureIdentity, Features, shard_path
from osp.data.features.writer import FeatureWriter
from osp.data.loader import ResumableLoader
from osp.data.media.shape import Shape
from osp.data.shards.build import write_rendered
from osp.data.sources import ClipSource, FeatureClips, ShardClips, SyntheticClips
from osp.data.streaming import RemoteShards

FlakyServer = runpy.run_path(str(Path(__file__).with_name("flaky_server.py")))["FlakyServer"]

BATCH, SHARD = 8, 32
SIZE = Shape(17, 128, 128)
_ORDER = ("local", "cold", "warm", "warm", "cold", "local")


def write_videos(folder: Path, clips: int) -> None:
    """Drawn clips of 17x128x128 as H.264."""
    drawn = SyntheticClips(clips, frames=SIZE.frames, height=SIZE.height, width=SIZE.width)
    read = (drawn.read(number, 0) for number in range(clips))
    write_rendered(((f"{n:05d}", c["video"], {"fps": 8.0}) for n, c in enumerate(read)), folder, shard_clips=SHARD)


def write_features(folder: Path, clips: int) -> None:
    """Random latents of 64x5x32x32 (mean and log variance, float16), as of clips of 17x256x256."""
    identity = FeatureIdentity("random", "0", 4, 8, 64, (0.0,) * 64, (1.0,) * 64)
    writer, size = FeatureWriter(folder, identity, clips=clips, origin="random", shard_clips=SHARD), Shape(17, 256, 256)
    latent = torch.randn(identity.latent_shape(size))
    for number in range(-(-clips // SHARD)):
        with writer.shard(number) as shard:
            for index in shard.clips:
                shard.add(index, Features(f"{index:05d}", size, latent, latent - 3, fps=8.0))
    assert shard_path(folder, 0).exists()


def videos(shards: object) -> ClipSource:
    """As they are read in training."""
    return ShardClips(shards, *SIZE, flip=True)  # type: ignore[arg-type]


def features(shards: object) -> ClipSource:
    """As they are read in training."""
    return FeatureClips(shards)  # type: ignore[arg-type]


def seconds_of_a_pass(source: ClipSource, workers: int) -> float:
    """From the first batch to the last of a pass; the workers have started before."""
    loader = ResumableLoader(source, batch_size=BATCH, seed=0, workers=workers)
    batches = itertools.chain.from_iterable(loader for _ in itertools.count())
    begun = time.perf_counter()
    for _ in range(len(source) // BATCH):
        next(batches)
    taken = time.perf_counter() - begun
    loader.close()
    return taken


def measure(name: str, folder: Path, make: Callable[[object], ClipSource], workers: int) -> None:
    """Prints the table of one kind of shards."""
    size = sum(tar.stat().st_size for tar in folder.glob("*.tar"))
    cache = folder.with_name("cache")
    runs: dict[str, list[float]] = {}
    with FlakyServer(folder, 0) as server:

        def run(kind: str) -> float:
            if kind == "cold":
                shutil.rmtree(cache, ignore_errors=True)
            shards = folder if kind == "local" else RemoteShards(server.url, cache, slots=8, lanes=2, buffer=32)
            return seconds_of_a_pass(make(shards), workers)

        run("local")
        for kind in _ORDER:
            runs.setdefault(kind, []).append(run(kind))
    shutil.rmtree(cache)
    clips = len(make(folder))
    print(f"\n{name}: {clips} clips, {size / clips / 1e3:.0f} kB each, batches of {BATCH}, {workers} workers")
    print("| read | seconds of a pass | clips a second | MB a second |\n|---|---|---|---|")
    for kind, seconds in runs.items():
        mean = sum(seconds) / len(seconds)
        shown = ", ".join(f"{each:.2f}" for each in seconds)
        print(f"| {kind} | {shown} | {clips / mean:.0f} | {size / mean / 1e6:.1f} |")


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_videos(folder / "videos", options.clips)
        measure(f"videos, uint8 3x{SIZE}", folder / "videos", videos, options.workers)
        write_features(folder / "features", options.clips)
        measure("features, float32 64x5x32x32", folder / "features", features, options.workers)


if __name__ == "__main__":
    main()
