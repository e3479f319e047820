"""OSP: the Open-Sora Plan recipe as one clean, fast, tested codebase."""

from osp._torchvision import ensure_importable

__version__ = "0.1.0"

ensure_importable()  # before anything of ours imports lightning, torchmetrics or lpips, which import torchvision
