"""How well one clip was reconstructed: PSNR, SSIM, MS-SSIM, perceptual distance, temporal flicker, and yours."""

import math
import re
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from osp.errors import UsageError
from osp.evaluation.lpips import PerceptualDistance

PSNR_CAP = 100.0  # dB
MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, finest scale first
SSIM_WINDOW = 11  # pixels
MADE_NAMES = ("psnr", "ssim", "ms_ssim", "ms_ssim_4scale", "ms_ssim_3scale", "ms_ssim_2scale", "flicker")
PIXELS_AT_ONCE = 2**22  # bounds the memory of the per-frame metrics: 64 frames of 256 x 256

Measure = Callable[[Tensor, Tensor], Tensor | float | None]
_REGISTERED: dict[str, Measure] = {}


def register_metric(name: str, measure: Measure) -> None:
    """Let `osp eval target=reconstruction` measure one thing more of each clip, under this name.

    `measure` takes a reconstruction and its video, `C T H W` in [-1, 1] in float32 on one device. It gives a number, or
    None where a clip has none. The mean over clips, the table and the contact sheet then have it as all others. A
    module that is run again may register its own name again. Raises UsageError for a name that is taken.
    """
    known = _REGISTERED.get(name)
    same = known is not None and (known.__module__, known.__qualname__) == (measure.__module__, measure.__qualname__)
    if name in MADE_NAMES or (known is not None and not same):
        raise UsageError(f"register_metric: there is another metric {name}; choose another name")
    if not re.fullmatch(r"\w+", name):
        raise UsageError(f"register_metric: {name!r} must be letters, digits and _, as it names a column")
    _REGISTERED[name] = measure


def clip_metrics(
    reconstruction: Tensor, video: Tensor, perceptual: PerceptualDistance | None = None
) -> dict[str, float | None]:
    """The metrics of one clip; both are `C T H W` in [-1, 1], equal in shape and device.

    Keys, in this order:
        psnr: dB over all pixels of the clip together, capped at 100.
        ssim: mean over frames, Gaussian window of 11 px; None where a side is below 11 px.
        ms_ssim: mean over frames, five scales; needs sides of 176 px. On smaller frames the key is `ms_ssim_4scale`
            (99 px), `ms_ssim_3scale` (44 px) or `ms_ssim_2scale` (22 px): other scales, so another metric, with the
            published exponents of the scales that are left made to sum to 1. Absent below that.
        lpips: mean over frames, under the name that `perceptual` has; absent without it.
        flicker: see `flicker`; None for a single frame.
        and those that `register_metric` has added.
    """
    frames, target = (_unit_frames(x) for x in (reconstruction, video))
    scales = ms_ssim_scales(*video.shape[-2:])
    values: dict[str, Tensor | None] = {"psnr": psnr(reconstruction, video)}
    values["ssim"] = _mean_over_frames(_ssim, frames, target) if min(video.shape[-2:]) >= SSIM_WINDOW else None
    if scales:
        total = 1.0 if scales == 5 else sum(MS_SSIM_BETAS[:scales])  # the published five sum to 1.0001: left alone
        betas = tuple(beta / total for beta in MS_SSIM_BETAS[:scales])

        def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
            return multiscale_structural_similarity_index_measure(a, b, reduction="none", data_range=1.0, betas=betas)

        values["ms_ssim" if scales == 5 else f"ms_ssim_{scales}scale"] = _mean_over_frames(ms_ssim, frames, target)
    if perceptual is not None:
        values[perceptual.name] = _mean_over_frames(perceptual, frames * 2 - 1, target * 2 - 1)
    values["flicker"] = flicker(reconstruction, video)
    values |= {name: _measured(name, measure, reconstruction, video) for name, measure in _REGISTERED.items()}
    known = [key for key, value in values.items() if value is not None]
    numbers = torch.stack([value for value in values.values() if value is not None]).tolist()  # one transfer
    return dict.fromkeys(values) | dict(zip(known, numbers, strict=True))


def _measured(name: str, measure: Measure, reconstruction: Tensor, video: Tensor) -> Tensor | None:
    """The number that a registered metric gives. Raises UsageError for what is none."""
    value = measure(reconstruction.float(), video.float())
    if value is None:
        return None
    is_number = isinstance(value, int | float | Tensor)
    number = torch.as_tensor(value if is_number else math.nan, dtype=torch.float32, device=video.device)
    if number.numel() != 1 or not number.isfinite():
        given = f"values of shape {tuple(number.shape)}" if number.numel() != 1 else value
        raise UsageError(f"metric {name} gives {given}; it must give one finite number, or None where there is none")
    return number.reshape(())


def psnr(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over all elements of two tensors in [-1, 1], at most 100 (equal ones)."""
    return peak_signal_noise_ratio(reconstruction.float(), video.float(), data_range=2.0).clamp(max=PSNR_CAP)


def flicker(reconstruction: Tensor, video: Tensor) -> Tensor | None:
    """Mean absolute difference between the frame-to-frame changes of two clips `C T H W` in [-1, 1].

    In grey levels of 0..255; 0 where the reconstruction moves exactly as the input does, whatever its constant error.
    None for a single frame.
    """
    if video.shape[1] < 2:
        return None
    return (reconstruction.float() - video.float()).diff(dim=1).abs().mean() * 127.5


def ms_ssim_scales(height: int, width: int) -> int:
    """How many of the five scales frames of this size have room for, 0 if fewer than two.

    The window must fit the coarsest scale, and torchmetrics asks for sides above 10 (scales - 1)^2.
    """
    side = min(height, width)
    fits = (n for n in (5, 4, 3, 2) if side // (n - 1) ** 2 >= SSIM_WINDOW and side >> (n - 1) >= SSIM_WINDOW)
    return next(fits, 0)


def _unit_frames(video: Tensor) -> Tensor:
    """`C T H W` in [-1, 1] -> `T C H W` in [0, 1]."""
    return (video.float().transpose(0, 1).contiguous() + 1) / 2


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    similarity = structural_similarity_index_measure(a, b, reduction="none", data_range=1.0)
    assert isinstance(similarity, Tensor)  # a tuple only where the full image is asked for
    return similarity


def _mean_over_frames(metric: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Mean of a metric that gives one value a frame of `T C H W`, a bounded number of frames at a time."""
    step = max(1, PIXELS_AT_ONCE // (a.shape[-2] * a.shape[-1]))
    bounds = [*range(0, len(a), step), len(a)]
    return torch.cat([metric(a[i:j], b[i:j]).reshape(-1) for i, j in pairwise(bounds)]).mean()
