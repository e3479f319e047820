"""Published checkpoints <-> our modules."""

from osp.weights.files import WeightImportError
from osp.weights.published import load_published

__all__ = ["WeightImportError", "load_published"]
