"""LPIPS, the learned perceptual distance between frames (Zhang et al. 2018, arXiv:1801.03924).

The `lpips` package ships the trained linear heads but not the ImageNet trunk they sit on. Without a trunk file a
random one, equal in every run, takes its place: a usable training loss, but its numbers are not LPIPS, and they are
never called so.
"""

import http.client
import logging
import math
import socket
import warnings
from pathlib import Path

import lpips
import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn

from osp.errors import UsageError
from osp.weights.files import WeightImportError, load_exactly, read_checkpoint

logger = logging.getLogger(__name__)

# The files that torchvision's `pretrained=True` fetches for the two trunks of the package.
TRUNK_URLS = {
    "alex": torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url,
    "vgg": torchvision.models.VGG16_Weights.IMAGENET1K_V1.url,
}
MIN_SIDE = {"alex": 32, "vgg": 16}  # pixels; below it the trunk's last feature map is empty
DOWNLOAD_TIMEOUT = 10.0  # seconds without an answer

_random_trunk_reported = False


class PerceptualDistance(nn.Module):
    """LPIPS v0.1 per frame, frozen, in float32 also under autocast.

    Attributes:
        name: the metric's key wherever a number of it is written: `lpips`, or `lpips_random_trunk` where no trunk
            weights were found.

    The trunk is looked for in this order: the file `trunk`; torch hub's cache, under torchvision's file name; the
    network, only with `download`; else it is random.

    Raises:
        UsageError: `net` is unknown.
        WeightImportError: `trunk`, or the file in torch hub's cache, cannot be read or is not torchvision's.
    """

    def __init__(self, net: str = "alex", trunk: str | Path | None = None, download: bool = False) -> None:
        super().__init__()
        if net not in TRUNK_URLS:
            raise UsageError(f"net={net}: unknown LPIPS trunk; choose one of {', '.join(TRUNK_URLS)}")
        self.min_side = MIN_SIDE[net]
        # The package would first initialise the whole classifier (138 million weights for vgg): build without memory
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torchvision")  # the package uses an argument deprecated there
            self.lpips = lpips.LPIPS(pretrained=False, net=net, pnet_rand=True, verbose=False)
        heads = read_checkpoint(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth")
        self.lpips.load_state_dict(heads, strict=False, assign=True)
        if torch.get_default_device().type == "meta":  # only sizes are wanted
            self.name = "lpips"
            self.requires_grad_(False).eval()
            return

        path = Path(trunk) if trunk is not None else _cached_trunk(net, download)
        if path is None:
            self.name = "lpips_random_trunk"
            state = _random_trunk(self.lpips.net)
        else:
            self.name = "lpips"
            state = _published_trunk(self.lpips.net, path)
        load_exactly(self.lpips.net, state, path or "random trunk")
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in eval mode (the heads have dropout), whatever the model that holds it does."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances between frames: `B C T H W` -> `B T`, or `N C H W` -> `N`; values in [-1, 1].

        Differentiable in both. Frames with a side below 32 px (alex) or 16 px (vgg) are first enlarged, bilinearly
        and by a whole factor: the trunk halves its maps until nothing is left of smaller ones.
        """
        with torch.autocast(a.device.type, enabled=False):
            distances = self.lpips(self._frames(a), self._frames(b)).flatten()
        return distances.unflatten(0, (a.shape[0], a.shape[2])) if a.ndim == 5 else distances

    def _frames(self, video: Tensor) -> Tensor:
        frames = (video.transpose(1, 2).flatten(0, 1) if video.ndim == 5 else video).float()
        factor = math.ceil(self.min_side / min(frames.shape[-2:]))
        return F.interpolate(frames, scale_factor=factor, mode="bilinear") if factor > 1 else frames


def _cached_trunk(net: str, download: bool) -> Path | None:
    """The trunk in torch hub's cache, put there first if it may be; None, with a warning, if there is none."""
    url = TRUNK_URLS[net]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if cached.is_file():
        return cached
    failure = _download(url, cached) if download else "set download=true"
    if failure is None:
        return cached
    global _random_trunk_reported
    if not _random_trunk_reported:
        _random_trunk_reported = True
        logger.warning(
            "no trunk weights for LPIPS: a random trunk takes their place, its numbers are named lpips_random_trunk "
            "and cannot be compared with LPIPS; to mend it put %s into %s, or set trunk=FILE (%s)",
            url,
            cached.parent,
            failure,
        )
    return None


def _download(url: str, target: Path) -> str | None:
    """Fetch a file as torchvision does: under a temporary name, and with a check of the hash in its name.

    What went wrong is returned, not raised: a machine without a network is no error here.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch hub has no argument for it
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), target.stem.rsplit("-", 1)[-1], progress=False)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        return f"the download failed: {error}"
    finally:
        socket.setdefaulttimeout(timeout)
    return None


def _published_trunk(net: nn.Module, path: Path) -> dict[str, Tensor]:
    """torchvision's `features.N.weight` -> the package's `sliceS.N.weight`; the classifier is not used."""
    file = read_checkpoint(path)
    names = {key: f"features.{key.split('.', 1)[1]}" for key in net.state_dict()}
    missing = [name for name in names.values() if name not in file]
    if missing:
        raise WeightImportError(f"{path}: not torchvision's {type(net).__name__} weights (no {', '.join(missing[:3])})")
    return {key: file[name] for key, name in names.items()}


def _random_trunk(net: nn.Module) -> dict[str, Tensor]:
    """He-normal weights and no biases, drawn on the CPU: the same on every device and in every run."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(value.shape, generator=generator) * math.sqrt(2 / value[0].numel())
        if value.ndim > 1
        else torch.zeros(value.shape)
        for key, value in net.state_dict().items()
    }
