"""Runs with and without a learned variance, by what both learn: `python tools/learned_variance.py FEATURES RUN...`.

FEATURES are held-out clips of `osp cache`, each RUN a folder of `osp train`. Prints for each run the mean squared error
of the predicted noise, by the averaged weights, at one time in every quarter of the times for each clip; a learned
variance is left out. Clips, times and noise are the same for all runs. Standard deviations are over the clips.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from osp.conditioning import call_denoiser, denoiser_inputs
from osp.data.sources import FeatureClips
from osp.diffusion import draw_normal, squared_error
from osp.errors import OspError
from osp.report.tables import markdown_table
from osp.sampling import VideoGenerator
from osp.seeds import seeded
from osp.training.checkpoints import load_trained_generator
from osp.training.denoiser_loss import TIME_PARTS

_BATCH = 32


@torch.no_grad()
def noise_errors(generator: VideoGenerator, clips: FeatureClips) -> Tensor:
    """The mean squared error of the noise that is predicted for each clip, `B`, over the quarters of the times."""
    found = []
    for start in range(0, len(clips), _BATCH):
        batch = clips.collate([clips.read(index, 0) for index in range(start, min(start + _BATCH, len(clips)))])
        clean, draws = batch["latent"], [seeded("held out", key) for key in batch["key"]]
        places, noise = torch.stack([torch.rand((), generator=g) for g in draws]), draw_normal(clean.shape, draws)
        inputs = denoiser_inputs(generator.denoiser, generator.text(batch["caption"]))
        parts = []
        for number in range(TIME_PARTS):
            times = generator.objective.time_at((number + places) / TIME_PARTS)
            noisy = generator.objective.corrupt(clean, noise, times)
            output = generator.objective.predicted(call_denoiser(generator.denoiser, noisy, times, **inputs))
            errors, values = squared_error(output, noise, torch.ones(len(clean)))
            parts.append(errors / values)
        found.append(torch.stack(parts).mean(dim=0))
    return torch.cat(found)


def main() -> int:
    """Print the table; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    try:
        clips = FeatureClips(arguments.features, sample=False)
        rows = []
        for run in arguments.runs:
            generator = load_trained_generator(run / "checkpoints" / "last.ckpt")
            errors = noise_errors(generator, clips)
            learned = getattr(generator.objective, "learned_variance", False)
            spread = f"{errors.mean():.4f} ± {errors.std():.4f}"
            rows.append([run.name, "learned" if learned else "fixed", str(len(errors)), spread])
    except OspError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("\n".join(markdown_table(["run", "variance", "clips", "error of the noise"], rows, left=2)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
