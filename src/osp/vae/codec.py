"""Pixels <-> the latents that a denoiser works on: a frozen VAE, and a shift and scale for each of its channels."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from osp.checks import check_finite
from osp.errors import UsageError
from osp.files import weights_digest
from osp.vae.autoencoder import VideoVAE
from osp.vae.streaming import PieceProgress

_Numbers = float | Sequence[float]


class LatentCodec:
    """A frozen VAE whose latents are handed on as (z - shift) * scale, which a denoiser finds near the unit Gaussian.

    Args:
        vae: any of the family; it is put into eval mode and learns no more.
        shift, scale: one number for all channels, or one a channel: 0.18215 up to v1.3, those of `measure_scaling` for
            a VAE trained here. None for both: those that the VAE was published with (`vae.scaling`), if any.

    Raises UsageError for other numbers of values, and if there are neither values nor published ones.
    """

    def __init__(self, vae: VideoVAE, shift: _Numbers | None = None, scale: _Numbers | None = None) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.name = type(vae).__name__
        if shift is None and scale is None and vae.scaling is not None:
            shift, scale = vae.scaling
        self.shift, self.scale = self._values("shift", shift, 0.0), self._values("scale", scale, None)
        self.strides = vae.strides
        self.latent_channels = vae.latent_channels

    def _values(self, name: str, given: _Numbers | None, default: float | None) -> tuple[float, ...]:
        channels = self.vae.latent_channels
        values = default if given is None else given
        if values is None:
            raise UsageError(
                f"the latents' {name} is not known for this VAE; give latent.{name}, one number or one a channel, "
                "or measure it with `osp cache`"
            )
        listed = [float(values)] * channels if isinstance(values, int | float) else [float(value) for value in values]
        if len(listed) != channels or (name == "scale" and not all(value > 0 for value in listed)):
            raise UsageError(f"latent.{name} has {len(listed)} values; {channels} are needed, all above 0 for a scale")
        if not all(map(math.isfinite, listed)):
            raise UsageError(f"latent.{name}={listed}: must be finite numbers")
        return tuple(listed)

    @property
    def origin(self) -> str | None:
        """The file or folder that the VAE was read from, if it was."""
        return self.vae.origin

    @property
    def device(self) -> torch.device:
        """Where the VAE is."""
        return next(self.vae.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the VAE's weights."""
        return next(self.vae.parameters()).dtype

    def to(self, device: torch.device | str) -> Self:
        """The codec itself, with its VAE on that device."""
        self.vae.to(device)
        return self

    def scaled(self, latent: Tensor) -> Tensor:
        """The VAE's latent `B C T H W` -> the denoiser's."""
        shift, scale = self._factors(latent)
        return (latent - shift) * scale

    def unscaled(self, latent: Tensor) -> Tensor:
        """The denoiser's latent `B C T H W` -> the VAE's."""
        shift, scale = self._factors(latent)
        return latent / scale + shift

    @torch.no_grad()
    def encode(self, video: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """`B 3 T H W` in [-1, 1] -> the denoiser's latent `B C T' H' W'`, in float32.

        With a generator for each clip it is a sample of the posterior, else its mean. Raises UsageError for a size that
        the VAE does not take, and NotFiniteError for numbers that are not finite.
        """
        posterior = self.vae.encode(video)
        latent = posterior.mean.float()
        if generators is not None:
            noise = [torch.randn(latent.shape[1:], generator=g, device=g.device).to(latent) for g in generators]
            latent = latent + torch.exp(0.5 * posterior.logvar.float()) * torch.stack(noise)
        check_finite(f"the latents that the VAE ({self.name}) gives", latent)
        return self.scaled(latent)

    @torch.no_grad()
    def decode(self, latent: Tensor, frames: int | None = None, progress: PieceProgress | None = None) -> Tensor:
        """The denoiser's latent `B C T' H' W'` -> video `B 3 T H W` in [-1, 1], float32.

        `frames` and `progress` are as in `VideoVAE.decode`.
        """
        video = self.vae.decode(self.unscaled(latent).to(self.dtype), frames=frames, progress=progress)
        return self.pixels(video)

    def pixels(self, video: Tensor) -> Tensor:
        """Pixels as float32 in [-1, 1], of the VAE's output. Raises NotFiniteError for numbers that are not finite."""
        check_finite(f"the pixels that the VAE ({self.name}) gives", video)
        return video.float().clamp(-1.0, 1.0)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """`C T H W` of the latent of such a clip. Raises UsageError for a size that the VAE does not take."""
        self.vae.check_size(frames, height, width)
        return self.latent_channels, *self.strides.latent(frames, height, width)

    def fingerprint(self) -> str:
        """A hash of the VAE's settings and weights; its precision and device do not count."""
        return fingerprint_of(self.vae, self.vae.state_dict())

    def identity(self) -> dict[str, Any]:
        """The identity of the latents as plain values: `vae`, `vae_fingerprint`, strides, channels, shift, scale."""
        return {
            "vae": self.name,
            "vae_fingerprint": self.fingerprint(),
            "time_stride": self.strides.time,
            "space_stride": self.strides.space,
            "latent_channels": self.latent_channels,
            "shift": list(self.shift),
            "scale": list(self.scale),
        }

    def _factors(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, 1, 1, 1)
        shift, scale = (torch.tensor(values, device=latent.device).view(shape) for values in (self.shift, self.scale))
        return shift.to(latent.dtype), scale.to(latent.dtype)


def fingerprint_of(vae: VideoVAE, weights: Mapping[str, Tensor]) -> str:
    """As `LatentCodec.fingerprint`, of a VAE whose weights are these."""
    return weights_digest(repr(sorted(vae.settings.items())), weights)


@torch.no_grad()
def measure_scaling(vae: VideoVAE, videos: Iterable[Tensor]) -> tuple[list[float], list[float]]:
    """Shift and scale of each channel that give the latents of `videos` (`B 3 T H W` in [-1, 1]) mean 0 and variance 1.

    Raises UsageError without any video.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for video in videos:
        posterior = vae.encode(video)
        mean, variance = posterior.mean.double().cpu(), posterior.logvar.double().exp().cpu()
        count += mean[:, 0].numel()
        total = total + mean.sum(dim=(0, 2, 3, 4))
        squares = squares + (mean.square() + variance).sum(dim=(0, 2, 3, 4))
    if not count:
        raise UsageError("the latents' scale cannot be measured without clips")
    shift = total / count
    spread = (squares / count - shift.square()).clamp(min=1e-12).sqrt()
    # The values are rounded, so that they read well and are the same however the sums were taken.
    return [round(v, 6) for v in shift.tolist()], [float(f"{1 / v:.6g}") for v in spread.tolist()]
