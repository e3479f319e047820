"""How far a tiled VAE is from the untiled one: `python tools/tiling_error.py CHECKPOINT`.

CHECKPOINT is one of `osp train`, or a folder of `osp import-weights`. Procedural clips are encoded and decoded whole
and in tiles; the table shows what the tiles cost, against the untiled result and against the clip itself.
"""

import argparse
from pathlib import Path

import torch

from osp.data.media.video import to_float
from osp.data.sources import SyntheticClips
from osp.evaluation.metrics import psnr
from osp.training.checkpoints import load_trained_vae
from osp.vae import Tiling, VideoVAE
from osp.weights import load_pretrained


@torch.no_grad()
def main() -> None:
    """Print one row for each tiling."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--size", type=int, default=256, help="height and width of the clips")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--tiles", type=int, nargs="+", default=[64, 128, 192])
    parser.add_argument("--overlaps", type=int, nargs="+", default=[0, 16, 32, 64])
    args = parser.parse_args()

    vae = load_pretrained(args.checkpoint) if args.checkpoint.is_dir() else load_trained_vae(args.checkpoint)
    if not isinstance(vae, VideoVAE):
        parser.error(f"{args.checkpoint} holds a {type(vae).__name__}, which is no VAE")
    source = SyntheticClips(args.clips, frames=args.frames, height=args.size, width=args.size, fps=8.0, seed=2)
    video = torch.stack([to_float(source.read(index, 0)["video"]) for index in range(args.clips)])

    def through(tiling: Tiling | None) -> torch.Tensor:
        latent = vae.encode(video, tiling=tiling).mode()
        return vae.decode(latent, tiling=tiling, frames=args.frames).clamp(-1, 1)

    def quality(result: torch.Tensor, target: torch.Tensor) -> float:
        return sum(psnr(a, b).item() for a, b in zip(result, target, strict=True)) / len(target)

    whole = through(None)
    print(f"{args.clips} clips of {args.frames}x{args.size}x{args.size}, {args.checkpoint}")
    print("| tile | overlap | tiled to untiled, PSNR | largest difference (of 2) | to the clip, PSNR |")
    print("|---|---|---|---|---|")
    print(f"| whole | | | | {quality(whole, video):.2f} dB |")
    for size in args.tiles:
        for overlap in args.overlaps:
            if overlap >= size or size >= args.size:
                continue
            tiled = through(Tiling(size, overlap))
            worst = (tiled - whole).abs().max().item()
            near, good = quality(tiled, whole), quality(tiled, video)
            print(f"| {size} | {overlap} | {near:.2f} dB | {worst:.3f} | {good:.2f} dB |", flush=True)


if __name__ == "__main__":
    main()
