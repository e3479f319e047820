"""Masks of given frames: the video that is kept by them, noise on it, and the mask on the latent's grid."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from osp.data.media.shape import Strides
from osp.denoiser.denoiser import FrameEncoding
from osp.errors import UsageError

# The logarithm of the noise that is added to condition frames (Yang et al., CogVideoX, arXiv:2408.06072, image to
# video): the model must not rely on them to the last bit, and is then not upset by what is drawn or compressed.
NOISE_MEAN, NOISE_STD = -3.0, 0.5


def spread(mask: Tensor, height: int, width: int) -> Tensor:
    """A frame mask `B T` as one of pixels, `B T H W` (a view)."""
    return mask[:, :, None, None].expand(-1, -1, height, width)


def masked_video(video: Tensor, mask: Tensor) -> Tensor:
    """The video `B C T H W` with 0, mid-grey, wherever its mask `B T H W` is 1 (to be generated).

    Raises UsageError if the mask has another size.
    """
    _check_mask(video, mask)
    return video * (1 - mask.to(video))[:, None]


def add_condition_noise(
    video: Tensor,
    mask: Tensor,
    generators: Sequence[torch.Generator],
    mean: float = NOISE_MEAN,
    std: float = NOISE_STD,
) -> Tensor:
    """Noise on the frames of a video `B C T H W` of which anything is kept by its mask `B T H W`; for training.

    Its strength exp(normal(mean, std)) is one for each sample. Strength and noise come from the sample's generator,
    with as many numbers as kept frames need. Raises UsageError if the mask has another size.
    """
    _check_mask(video, mask)
    noisy = []
    for clip, clip_mask, generator in zip(video, mask, generators, strict=True):
        kept = (clip_mask < 1).flatten(1).any(dim=1)
        strength = torch.exp(mean + std * torch.randn((), generator=generator, device=generator.device))
        noise = torch.randn(clip[:, kept].shape, generator=generator, device=generator.device) * strength
        clip = clip.clone()
        clip[:, kept] += noise.to(clip)
        noisy.append(clip)
    return torch.stack(noisy)


def latent_mask(mask: Tensor, time_stride: int, height: int, width: int, encoding: FrameEncoding = "v13") -> Tensor:
    """A mask `B T H W` of a video on the grid of its latent: `B time_stride T' height width`.

    In space it is scaled bilinearly. A latent frame stands for `time_stride` frames, whose masks are its channels; the
    first one stands for the first frame alone, which is repeated (v1.3's inpainting model). A clip that is not 1 + a
    multiple of the stride long goes on with its last frame, as VAEs encode it. v1.2's image-to-video model has the same
    frames in another order: channel c of latent frame i is that of frame c T' + i. Raises UsageError without frames.
    """
    if mask.ndim != 4 or not mask.shape[1]:
        raise UsageError(f"the mask has the shape {tuple(mask.shape)}; it must be B T H W")
    mask = F.interpolate(mask.float(), size=(height, width), mode="bilinear", align_corners=False)
    before, after = time_stride - 1, Strides(time_stride, 1).missing_frames(mask.shape[1])
    parts = [mask[:, :1].expand(-1, before, -1, -1), mask, mask[:, -1:].expand(-1, after, -1, -1)]
    frames = torch.cat(parts, dim=1)
    if encoding == "v12":
        return frames.unflatten(1, (time_stride, -1))
    return frames.unflatten(1, (-1, time_stride)).transpose(1, 2).contiguous()


def _check_mask(video: Tensor, mask: Tensor) -> None:
    if video.ndim != 5 or mask.shape != (video.shape[0], *video.shape[2:]):
        raise UsageError(f"the mask has the shape {tuple(mask.shape)}, the video {tuple(video.shape)} (B C T H W)")
