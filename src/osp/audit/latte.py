"""Latte against recorded cases: clips, images, joint batches, and what its blocks give."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from osp.audit.case import Case, Comparison, difference
from osp.audit.networks import load, recorded_inputs, recorded_sets, with_blocks
from osp.denoiser import Denoiser
from osp.errors import DataError

# Entries of a set of inputs that are no sizes; `text_mask` and `video_mask` say that these are recorded.
_IMAGES, _ALONE, _MODE = "images", "temporal_off", "mode"
_BLOCK = re.compile(r"(spatial|temporal)_(\d+)")


def run_latte(case: Case) -> Iterator[Comparison]:
    """The prediction for each recorded set of inputs, and what the recorded blocks give."""
    model = load(case)
    assert isinstance(model, Denoiser)
    for name in recorded_sets(case):
        said: Mapping[str, Any] = case.setting("input_sets").get(name, {})
        training = _known(said.get(_MODE, "eval"), name)
        model.train(training)
        model.recompute_every = int(training)  # the published training computes all blocks again
        given, images = recorded_inputs(case, name), int(said.get(_IMAGES, 0))
        frames = given["latent"].shape[2]
        if said.get(_ALONE):
            prediction, outputs = with_blocks(model, _frames_alone(given, images))
            prediction = prediction.squeeze(2).unflatten(0, (-1, frames)).transpose(1, 2)
        else:
            prediction, outputs = with_blocks(model, given | ({"images": images} if images else {}))
        yield case.compare(f"{name}/sample", prediction, case.bar(f"{name}/sample"))
        bar = case.bar(f"{name}/blocks", f"{name}/sample")
        for place, recorded in case.below(f"out/{name}/").items():
            if found := _BLOCK.fullmatch(place):
                across, pair = found[1] == "temporal", int(found[2])
                clip = 1 if said.get(_ALONE) else frames - images if across else frames
                got = outputs[2 * pair + across].unflatten(1, (clip, -1))  # B T (h w) D
                got = got.transpose(1, 2) if across else got
                yield difference(f"{name}/{place}", got.flatten(0, 1), recorded, bar)


def _known(mode: Any, name: str) -> bool:
    """Whether a set was recorded in training. Raises DataError for a mode that is not known."""
    if mode not in ("eval", "train"):
        raise DataError(f"{name}: the mode {mode!r} is not known")
    return bool(mode == "train")


def _frames_alone(given: Mapping[str, Tensor], images: int) -> dict[str, Tensor]:
    """Each frame as an image of its own, which is how the blocks within frames see it."""
    frames = given["latent"].shape[2]
    clip = frames - images

    def each(key: str, value: Tensor) -> Tensor:
        if key == "latent":
            return value.transpose(1, 2).flatten(0, 1).unsqueeze(2)
        if key == "video_mask":
            return value.flatten(0, 1).unsqueeze(1)
        if key in ("text", "text_mask") and images:
            index = [0] * clip + list(range(1, 1 + images))
            return value[:, index].flatten(0, 1)
        return value.repeat_interleave(frames, dim=0)

    return {key: each(key, value) for key, value in given.items()}
