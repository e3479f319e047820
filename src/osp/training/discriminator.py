"""The 3D patch discriminator that sharpens the VAE's reconstructions."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osp.checks import check_number


class PatchDiscriminator3d(nn.Module):
    """A PatchGAN over space and time: one logit for each patch of the video (Isola et al., arXiv:1611.07004, in 3D).

    `layers` hidden convolutions follow the first one, with widths of 2, 4 and then 8 times `width`. The first
    convolution and the first hidden one halve time and space, the others but the last hidden one halve space.
    """

    def __init__(self, width: int = 64, layers: int = 4, dropout: float = 0.3) -> None:
        super().__init__()
        check_number("module.discriminator.layers", layers, least=2, whole=True)
        self.settings = {"width": width, "layers": layers, "dropout": dropout}
        modules: list[nn.Module] = [nn.Conv3d(3, width, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for layer in range(1, layers + 1):
            outputs = width * min(2**layer, 8)
            stride = (2, 2, 2) if layer == 1 else (1, 2, 2) if layer < layers else (1, 1, 1)
            modules += [
                nn.Conv3d(channels, outputs, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm3d(outputs),
                nn.LeakyReLU(0.2),
                nn.Dropout(dropout),
            ]
            channels = outputs
        modules.append(nn.Conv3d(channels, 1, 3, padding=1))
        self.layers = nn.Sequential(*modules)
        self.apply(_start_small)

    def forward(self, video: Tensor) -> Tensor:
        """`B 3 T H W` in [-1, 1] -> logits `B 1 T' H' W'`, high where the video looks real."""
        return self.layers(video)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss on logits of real and reconstructed videos, a scalar."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def adaptive_weight(
    reconstruction_loss: Tensor,
    generator_loss: Tensor,
    last_layer: Tensor,
    mean: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """How much to weigh the generator's loss so that both losses pull equally at the decoder's last layer.

    ||grad of reconstruction|| / (||grad of generator|| + 1e-6), at most 1e6 (Esser et al., arXiv:2012.09841, eq. 7).
    `mean` averages a gradient over all processes; None: there is one.
    """
    losses = (reconstruction_loss, generator_loss)
    gradients = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in losses)
    pull, push = ((gradient if mean is None else mean(gradient)).norm() for gradient in gradients)
    return (pull / (push + 1e-6)).clamp(max=1e6).detach()


def _start_small(module: nn.Module) -> None:
    """Weights from N(0, 0.02), norm gains from N(1, 0.02), as PatchGAN starts."""
    if isinstance(module, nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm3d):
        nn.init.normal_(module.weight, 1.0, 0.02)
