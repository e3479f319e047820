"""Published checkpoints <-> our modules, and our own form of saved models."""

from osp.weights.files import WeightImportError
from osp.weights.pretrained import load_pretrained, save_pretrained
from osp.weights.published import load_published
from osp.weights.publishing import published_settings, save_published, to_published

__all__ = [
    "WeightImportError",
    "load_pretrained",
    "load_published",
    "published_settings",
    "save_pretrained",
    "save_published",
    "to_published",
]
