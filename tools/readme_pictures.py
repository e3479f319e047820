"""Draw the moving pictures of the README: sampled videos below their prompts, and clips beside their reconstructions.

python tools/readme_pictures.py SAMPLES EVALUATION OUTPUT

SAMPLES is a folder of `osp sample`, EVALUATION one of `osp eval` of a VAE. OUTPUT gets samples.gif and
reconstructions.gif. Videos are taken in the order of their names, whatever they show; none is left out.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from osp.data.media.pictures import animated_gif
from osp.data.media.video import probe, read_clip
from osp.errors import DataError, OspError
from osp.evaluation.reconstruction import PAIRS
from osp.files import write_whole
from osp.sampling.outputs import read_settings

SCALE = 3  # pixels of the picture along a side of a pixel of the videos
GAP = 12  # pixels between videos
TEXT = 15  # size of the prompts
FPS = 6.0
STILL = 4  # times that the last frame is repeated, so that the end is seen

Frames = NDArray[np.uint8]
"""`T H W 3`."""


def read(path: Path) -> Frames:
    """The frames of a video."""
    return read_clip(path, frames=probe(path, decode=True).frames).permute(1, 2, 3, 0).numpy()


def prompt_of(path: Path) -> str:
    """The prompt that a sampled video was made of. Raises DataError if the file does not say it."""
    settings = read_settings(path)
    if settings is None:
        raise DataError(f"{path}: was not made by `osp sample`")
    return str(settings["prompt"])


def mosaic(videos: Sequence[Frames], texts: Sequence[str], columns: int) -> Tensor:
    """uint8 `3 T H W`: the videos in rows, each below its text, all from their first frame on."""
    font = ImageFont.load_default(TEXT)
    height, width = (SCALE * side for side in videos[0].shape[1:3])
    texts = [
        textwrap.fill(text, int(width * len(text) / (1.05 * font.getlength(text)))) if text else "" for text in texts
    ]
    above = max(round(1.35 * TEXT * len(text.splitlines())) + GAP // 2 if text else 0 for text in texts)
    rows = -(-len(videos) // columns)
    size = (GAP + columns * (width + GAP), GAP + rows * (above + height + GAP))
    pictures = []
    for number in range(max(len(video) for video in videos)):
        picture = Image.new("RGB", size, (255, 255, 255))
        draw = ImageDraw.Draw(picture)
        for place, (video, text) in enumerate(zip(videos, texts, strict=True)):
            left, top = GAP + place % columns * (width + GAP), GAP + place // columns * (above + height + GAP)
            draw.multiline_text((left, top), text, fill=(40, 40, 40), font=font)
            frame = Image.fromarray(video[min(number, len(video) - 1)])
            picture.paste(frame.resize((width, height), Image.Resampling.NEAREST), (left, top + above))
            draw.rectangle((left - 1, top + above - 1, left + width, top + above + height), outline=(190, 190, 190))
        pictures.append(np.asarray(picture))
    return torch.from_numpy(np.stack([*pictures, *[pictures[-1]] * STILL])).permute(3, 0, 1, 2)


def main() -> int:
    """Write both pictures; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("samples", "evaluation", "output"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    try:
        sampled = sorted(args.samples.glob("*.mp4"))
        pairs = sorted((args.evaluation / PAIRS).glob("*.mp4"))[:6]
        if not sampled or not pairs:
            raise DataError(f"{args.samples if not sampled else args.evaluation}: holds no MP4 files of `osp`")
        samples = mosaic([read(path) for path in sampled], [prompt_of(path) for path in sampled], columns=4)
        reconstructions = mosaic([read(path) for path in pairs], [""] * len(pairs), columns=3)
    except OspError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    args.output.mkdir(parents=True, exist_ok=True)
    for name, video in (("samples", samples), ("reconstructions", reconstructions)):
        write_whole(args.output / f"{name}.gif", animated_gif(video, FPS))
        print(args.output / f"{name}.gif")
    return 0


if __name__ == "__main__":
    sys.exit(main())
