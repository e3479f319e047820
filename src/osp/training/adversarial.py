"""The losses of a VAE and of the discriminator against it, in which each of them sees the other."""

from collections.abc import Callable

import torch
from torch import Tensor

from osp.parallel import passing_through
from osp.training.discriminator import Balance, PatchDiscriminator, hinge_loss
from osp.training.losses import VAELoss
from osp.vae import VideoVAE
from osp.vae.autoencoder import Autoencoding

Through = Callable[[Tensor], Autoencoding]
"""A pass of videos `B 3 T H W` through a VAE."""


def vae_loss(
    vae: VideoVAE,
    through: Through,
    loss: VAELoss,
    video: Tensor,
    discriminator: PatchDiscriminator | None = None,
    balance: Balance = Balance(),  # noqa: B008 (it is frozen)
    mean: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The VAE's loss on videos `B 3 T H W`, a scalar, and its terms by name.

    With a discriminator its opinion counts as much as the `balance` says, over all processes by `mean`. Nothing but the
    graph of the loss stays in memory.
    """
    weights: list[Tensor] = []  # of the last layer, as the pass has them: between passes they may be split
    last = None if discriminator is None else vae.last_layer
    hook = last and last.register_forward_hook(lambda layer, *_: weights.append(layer.weight))
    result = through(video)
    if hook:
        hook.remove()
    losses = loss(video, result)
    total, terms = losses.total, dict(losses.terms)
    if discriminator is not None:
        adversarial = -discriminator(result.reconstruction).float().mean()
        with passing_through(vae, discriminator):
            pulls = balance(losses.reconstruction, adversarial, weights[0], mean)
        total = total + pulls * adversarial
        terms |= {"adversarial": adversarial, "adversarial_weight": pulls}
    return total, terms


def discriminator_loss(through: Through, discriminator: PatchDiscriminator, video: Tensor) -> Tensor:
    """The discriminator's loss on videos `B 3 T H W` and what the VAE makes of them, a scalar."""
    with torch.no_grad():
        reconstruction = through(video).reconstruction
    return hinge_loss(discriminator(video).float(), discriminator(reconstruction).float())
