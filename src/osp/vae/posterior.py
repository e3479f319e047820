"""The Gaussian that a VAE's encoder gives for a latent."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianPosterior:
    """A Gaussian with independent dimensions: `mean` and `logvar`, both `B C T H W`.

    `frames` is the number of video frames it was encoded from, for `decode(latent, frames=...)`; None for a piece.
    """

    mean: Tensor
    logvar: Tensor
    frames: int | None = None

    @classmethod
    def from_moments(cls, moments: Tensor, frames: int | None = None) -> "GaussianPosterior":
        """`B 2C T H W` (mean, then log variance) -> the posterior, with the log variance clamped to [-30, 20]."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0), frames)

    def mode(self) -> Tensor:
        """The most likely latent, `B C T H W`."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None, share: tuple[int, int] = (0, 1)) -> Tensor:
        """A latent drawn with the reparameterisation trick, `B C T H W`.

        With a `share` (i, n) this is the i-th of n equal batches, for all of which the noise is drawn at once.
        """
        index, batches = share
        shape = (batches * len(self.mean), *self.mean.shape[1:])
        noise = torch.randn(shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        noise = noise.unflatten(0, (batches, -1))[index]
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """The divergence from the standard Gaussian, summed over each clip, `B`."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3, 4))
