"""The patch discriminators that sharpen a VAE's reconstructions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osp.checks import check_choice, check_number

Dimensions = Literal["2d", "3d"]


class PatchDiscriminator(nn.Module):
    """A PatchGAN: one logit for each patch of a video (Isola et al., arXiv:1611.07004).

    `layers` hidden convolutions follow the first one, with widths of 2, 4 and then 8 times `width`. "3d" sees patches
    of space and time, with 3x3x3 kernels: the first convolution and the first hidden one halve time and space, the
    others but the last hidden one halve space. "2d" sees each frame alone, with 4x4 kernels, of which all but the last
    hidden one and the last halve space.

    Raises UsageError for other dimensions and for no hidden layer.
    """

    def __init__(self, width: int = 64, layers: int = 4, dropout: float = 0.3, dimensions: Dimensions = "3d") -> None:
        super().__init__()
        check_choice("module.discriminator.dimensions", dimensions, get_args(Dimensions))
        check_number("module.discriminator.layers", layers, least=1, whole=True)
        check_number("module.discriminator.width", width, least=1, whole=True)
        self.settings = {"width": width, "layers": layers, "dropout": dropout, "dimensions": dimensions}
        self.dimensions = dimensions
        flat = dimensions == "2d"
        convolution: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d if flat else nn.Conv3d
        norm: type[nn.BatchNorm2d] | type[nn.BatchNorm3d] = nn.BatchNorm2d if flat else nn.BatchNorm3d
        kernel = 4 if flat else 3
        modules: list[nn.Module] = [convolution(3, width, kernel, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for layer in range(1, layers + 1):
            outputs = width * min(2**layer, 8)
            stride: Any = 1 if layer == layers else (1, 2, 2) if layer > 1 and not flat else 2
            modules += [
                convolution(channels, outputs, kernel, stride=stride, padding=1, bias=False),
                norm(outputs),
                nn.LeakyReLU(0.2),
                nn.Dropout(dropout),
            ]
            channels = outputs
        modules.append(convolution(channels, 1, kernel, padding=1))
        self.layers = nn.Sequential(*modules)
        self.apply(_start_small)

    def forward(self, video: Tensor) -> Tensor:
        """`B 3 T H W` in [-1, 1] -> logits, high where it looks real: `B 1 T' H' W'`, in 2D `(B T) 1 H' W'`."""
        return self.layers(video.transpose(1, 2).flatten(0, 1) if self.dimensions == "2d" else video)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss on logits of real and reconstructed videos, a scalar."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


@dataclass(frozen=True)
class Balance:
    """How the adversarial loss is weighed: `weight` times the ratio of both losses' gradients at the last layer.

    The ratio is ||grad of reconstruction|| / (||grad of adversarial|| + `floor`), at most `most`: with `weight` 1 both
    pull equally there (Esser et al., arXiv:2012.09841, eq. 7).
    """

    weight: float = 0.5
    floor: float = 1e-6
    most: float = 1e6

    def __post_init__(self) -> None:
        check_number("module.discriminator_weight", self.weight, least=0)
        check_number("module.discriminator_floor", self.floor, above=0)
        check_number("module.discriminator_most", self.most, above=0)

    def __call__(
        self,
        reconstruction_loss: Tensor,
        adversarial_loss: Tensor,
        last_layer: Tensor,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The factor of the adversarial loss, a scalar without a graph.

        `last_layer` are the weights of the last layer that learns. `mean` averages a gradient over all processes;
        None: there is one.
        """
        losses = (reconstruction_loss, adversarial_loss)
        gradients = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in losses)
        pull, push = ((gradient if mean is None else mean(gradient)).norm() for gradient in gradients)
        return self.weight * (pull / (push + self.floor)).clamp(max=self.most).detach()


def _start_small(module: nn.Module) -> None:
    """Weights from N(0, 0.02), norm gains from N(1, 0.02), as PatchGAN starts."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
        nn.init.normal_(module.weight, 1.0, 0.02)
