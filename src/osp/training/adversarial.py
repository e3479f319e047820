"""The losses of a VAE and of the discriminator against it, in which each of them sees the other."""

from collections.abc import Callable

import torch
from torch import Tensor

from osp.parallel import passing_through
from osp.training.discriminator import PatchDiscriminator3d, adaptive_weight, hinge_loss
from osp.training.losses import VAELoss
from osp.vae import WFVAE
from osp.vae.wfvae import Autoencoding

Through = Callable[[Tensor], Autoencoding]
"""A pass of videos `B 3 T H W` through a VAE."""


def vae_loss(
    vae: WFVAE,
    through: Through,
    loss: VAELoss,
    video: Tensor,
    discriminator: PatchDiscriminator3d | None = None,
    weight: float = 1.0,
    mean: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The VAE's loss on videos `B 3 T H W`, a scalar, and its terms by name.

    With a discriminator its opinion counts with `weight` times what `adaptive_weight` finds, over all processes by
    `mean`. Nothing but the graph of the loss stays in memory.
    """
    weights: list[Tensor] = []  # of the last layer, as the pass has them: between passes they may be split
    hook = vae.last_layer.register_forward_hook(lambda layer, *_: weights.append(layer.weight))
    result = through(video)
    hook.remove()
    losses = loss(video, result)
    total, terms = losses.total, dict(losses.terms)
    if discriminator is not None:
        adversarial = -discriminator(result.reconstruction).float().mean()
        with passing_through(vae, discriminator):
            pulls = weight * adaptive_weight(losses.reconstruction, adversarial, weights[0], mean)
        total = total + pulls * adversarial
        terms |= {"adversarial": adversarial, "adversarial_weight": pulls}
    return total, terms


def discriminator_loss(through: Through, discriminator: PatchDiscriminator3d, video: Tensor) -> Tensor:
    """The discriminator's loss on videos `B 3 T H W` and what the VAE makes of them, a scalar."""
    with torch.no_grad():
        reconstruction = through(video).reconstruction
    return hinge_loss(discriminator(video).float(), discriminator(reconstruction).float())
