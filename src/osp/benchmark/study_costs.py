"""The costs of one training step of denoisers that are compared: time, operations, distances of attention."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from osp.benchmark.distance import attention_distance
from osp.conditioning import TextEncoder
from osp.data.sources import FeatureClips
from osp.denoiser import Denoiser, Grid
from osp.denoiser.flops import denoiser_flops
from osp.devices import synchronize
from osp.errors import UsageError

MOST_FILLING = 1.25  # places to tokens: beyond that a pattern is not what its name says


def random_batch(source: FeatureClips, text: TextEncoder, size: int) -> dict[str, Tensor]:
    """Inputs of a training step as long as those of the first clips: random latents and times, their captions' text."""
    clips = [source.read(index % len(source), 0) for index in range(size)]
    with torch.no_grad():
        encoded = text([clip["caption"] for clip in clips])
    inputs = {
        "latent": torch.randn(len(clips), *clips[0]["latent"].shape),
        "time": torch.rand(len(clips)) * 1000,
        "text": encoded.text,
        "text_mask": encoded.mask,
    }
    return inputs if encoded.pooled is None else inputs | {"pooled_text": encoded.pooled}


def grid_of(models: Mapping[str, Denoiser], inputs: Mapping[str, Tensor]) -> Grid:
    """The grid of the tokens, which all variants have in common."""
    frames, height, width = inputs["latent"].shape[2:]
    patch = next(iter(models.values())).patch_size
    return Grid(frames, height // patch, width // patch)


def check_filling(models: Mapping[str, Denoiser], grid: Grid) -> None:
    """Raise UsageError for a pattern whose groups are to a large part filled up on this grid."""
    for name, model in models.items():
        for pattern in dict.fromkeys(model.schedule):
            places = math.prod(pattern.split(grid).padded)
            if places > MOST_FILLING * grid.tokens:
                raise UsageError(
                    f"{name}: {pattern} needs {places} places for {grid.tokens} tokens; leave the variant out, or take "
                    "larger clips"
                )


def time_steps(
    models: Mapping[str, Denoiser],
    inputs: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of a forward and backward pass of each model, in turns, so that what slows the machine slows all."""
    placed = {key: value.to(device) for key, value in inputs.items()}
    placed["text"].requires_grad_()  # the text encoder learns along
    for model in models.values():
        model.to(device).train()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 2):
        for name, model in models.items():
            synchronize(device)
            begun = time.perf_counter()
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                loss = model(**placed).float().square().mean()
            loss.backward()
            synchronize(device)
            if number >= 2:  # the first are slower
                seconds[name].append(time.perf_counter() - begun)
            model.zero_grad()
            placed["text"].grad = None
    return seconds


def costs(
    models: Mapping[str, Denoiser], inputs: Mapping[str, Tensor], seconds: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, float]]:
    """Size and costs of each model: `parameters`, `attention_distance`, `step_seconds` (median), `flops` (a step)."""
    grid, made = grid_of(models, inputs), {}
    batch, latent, text = len(inputs["latent"]), inputs["latent"].shape[2:], inputs["text"].shape[1]
    for name, model in models.items():
        flops = denoiser_flops(model, latent, text, batch)
        made[name] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "attention_distance": attention_distance(model, grid),
            "step_seconds": statistics.median(seconds[name]),
            "flops": flops.forward + flops.backward,
        }
    return made
