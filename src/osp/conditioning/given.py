"""Frames that a user gives beside the prompt: one image, two images, a clip to go on with, or any frames."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from osp.checks import check_choice, check_number
from osp.conditioning.condition import ConditionInputs
from osp.conditioning.frames import latent_mask, spread
from osp.data.media.shape import Shape
from osp.denoiser import Denoiser
from osp.errors import UsageError
from osp.vae import LatentCodec

MODES: Mapping[str, str] = {
    "text": "no picture",
    "image": "one picture, the first frame",
    "transition": "two pictures, the first frame and the last",
    "continuation": "the first frames of the video, one at least",
}
"""Ways to sample, and the pictures they take; any other set of frames goes to `given_frames` by their numbers."""


@dataclass(frozen=True)
class GivenFrames:
    """The frames that are given, a `Condition`; see there.

    `mask` is `B T H W` (1: to be generated), `video` `B 3 T H W` in [-1, 1], mid-grey where the mask is 1. B is 1 for
    the same frames in all videos.
    """

    mask: Tensor
    video: Tensor

    @property
    def guided(self) -> bool:
        """False: the model is given them with the prompt and without, as published."""
        return False

    def channels(self, codec: LatentCodec) -> int:
        """The channels of the kept video's latent, and one a frame of the time stride for the mask."""
        return sum(frame_channels(codec))

    def check(self, size: Shape, videos: int) -> None:
        """Raise UsageError unless they are for so many videos of this size, or for one."""
        mine = Shape(*self.mask.shape[1:])
        if mine != size:
            raise UsageError(
                f"the given frames are for {_spelled(mine)} (frames, height, width), and the video has {_spelled(size)}"
            )
        if len(self.mask) not in (1, videos):
            raise UsageError(f"the given frames are for {len(self.mask)} videos, and there are {videos}")

    def encode(
        self,
        codec: LatentCodec,
        denoiser: Denoiser | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> ConditionInputs:
        """[latent of the kept video | its mask] as channels: the input of the inpainting model.

        The latent is the mean of the posterior, and the mask's channels are in the order of v1.3. A denoiser whose
        `frame_encoding` is v12 has the order of v1.2 (`latent_mask`) and a sample of the posterior, for which each
        video has a generator; without generators it is the mean too.

        Known are the latent frames that are wholly given, from the first on without a gap: frames after a gap are coded
        together with what is missing.
        """
        encoding = "v13" if denoiser is None else denoiser.frame_encoding
        drawn = generators if encoding == "v12" else None
        clean = codec.encode(self.video.to(codec.device, codec.dtype), drawn)  # of one video a sample for each
        time, (height, width) = codec.strides.time, clean.shape[3:]
        mask = self.mask.to(clean.device)
        whole = (latent_mask(mask, time, height, width).amax(dim=(1, 3, 4)) == 0).long().cumprod(dim=1).bool()
        packed = latent_mask(mask, time, height, width, encoding).expand(len(clean), -1, -1, -1, -1)
        return ConditionInputs(torch.cat((clean, packed), dim=1), clean=clean, known=whole[:, None, :, None, None])

    def without(self) -> "GivenFrames":
        """No frame given: all are to be generated."""
        return GivenFrames(torch.ones_like(self.mask), torch.zeros_like(self.video))


def joined(given: Sequence[GivenFrames]) -> GivenFrames:
    """The given frames of several videos of one size, as one batch."""
    return GivenFrames(torch.cat([each.mask for each in given]), torch.cat([each.video for each in given]))


def frame_channels(codec: LatentCodec) -> tuple[int, int]:
    """The channels beside the noisy latent that an inpainting model has for given frames with this VAE."""
    return codec.latent_channels, codec.strides.time


def frame_numbers(mode: str, pictures: int, frames: int) -> list[int]:
    """Which frames of the video so many pictures are. Raises UsageError if the mode does not take so many."""
    check_choice("mode", mode, MODES)
    match mode:
        case "text":
            numbers = []
        case "image":
            numbers = [0]
        case "transition":
            numbers = [0, frames - 1]
        case _:  # continuation
            numbers = list(range(max(1, pictures)))
    if len(numbers) != pictures:
        raise UsageError(f"mode={mode} takes {MODES[mode]}; {pictures} given")
    return numbers


def given_by_mode(mode: str, pictures: Sequence[Tensor], frames: int, height: int, width: int) -> GivenFrames:
    """The pictures (`3 H W`, in [-1, 1]) where `mode` puts them; a clip to go on with is its frames, one by one.

    Raises UsageError for an unknown mode, and as `given_frames`.
    """
    numbers = frame_numbers(mode, len(pictures), frames)
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"mode={mode} has {len(numbers)} frames given; frames={frames} is too short for it")
    return given_frames(dict(zip(numbers, pictures, strict=True)), frames, height, width)


def given_frames(pictures: Mapping[int, Tensor], frames: int, height: int, width: int) -> GivenFrames:
    """Pictures (`3 H W`, in [-1, 1]) by the numbers of their frames; negative ones count from the end.

    Raises UsageError for a number outside the video or one that comes twice, for a picture of another size, and if no
    frame is left to generate.
    """
    check_number("frames", frames, 1, whole=True)
    mask, video = torch.ones(frames), torch.zeros(1, 3, frames, height, width)
    for number, picture in pictures.items():
        if not -frames <= number < frames:
            raise UsageError(f"frame {number} is given, but the video's {frames} frames are 0 to {frames - 1}")
        if mask[number] == 0:
            raise UsageError(f"frame {number % frames} is given twice")
        if picture.shape != (3, height, width) or not picture.is_floating_point():
            what = f"{tuple(picture.shape)} of {str(picture.dtype).removeprefix('torch.')}"
            raise UsageError(f"the picture for frame {number} is {what}; it must be (3, {height}, {width}), floating")
        mask[number] = 0
        video[0, :, number] = picture
    if not mask.any():
        raise UsageError(f"all {frames} frames are given, so that none is left to generate")
    return GivenFrames(spread(mask[None], height, width), video)


def _spelled(size: Shape) -> str:
    return " x ".join(map(str, size))
