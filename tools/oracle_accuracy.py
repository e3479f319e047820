"""How often the oracle reads procedural clips right, and how that falls with noise.

python tools/oracle_accuracy.py [--clips 1000] [--frames 17] [--size 64]
"""

import argparse

import torch
from torch import Tensor

from osp.data.procedural.oracle import Reading, read
from osp.data.sources import SyntheticClips

NOISE = (0, 5, 10, 20, 40, 60, 90)  # grey levels


def noisy(video: Tensor, index: int, sigma: float) -> Tensor:
    """A uint8 clip with Gaussian noise of `sigma` grey levels, the same for the same index."""
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(index))
    return (video + sigma * noise).round().clamp(0, 255).to(torch.uint8)


def main() -> None:
    """Print one line for each level of noise: the part of clips read right, in per cent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small

    clips = SyntheticClips(args.clips, args.frames, args.size, args.size, objects=1)
    videos = [clips.read(index, 0)["video"] for index in range(args.clips)]
    truths = [clips.scene(index).objects[0] for index in range(args.clips)]
    expected = [Reading(truth.colour, truth.shape, truth.motion) for truth in truths]
    print(f"{args.clips} clips of {args.frames} x {args.size} x {args.size}, one object each")
    print("noise   all   colour  shape  motion")
    for sigma in NOISE:
        seen = [read(noisy(video, index, sigma)) for index, video in enumerate(videos)]
        pairs = list(zip(seen, expected, strict=True))
        parts = [
            sum(a == b for a, b in pairs),
            *(sum(getattr(a, name) == getattr(b, name) for a, b in pairs) for name in ("colour", "shape", "motion")),
        ]
        print(f"{sigma:5d} " + "".join(f"{100 * part / args.clips:7.1f}" for part in parts), flush=True)


if __name__ == "__main__":
    main()
