"""Published checkpoints <-> our modules."""

from osp.weights.published import WeightImportError, load_published

__all__ = ["WeightImportError", "load_published"]
