"""Make `import torchvision` work where its compiled operators do not match the installed torch.

The torchvision wheel on PyPI is built for CUDA. Beside a CPU build of torch its operators cannot load, and its
Python side then fails on two missing operator schemas ("operator torchvision::nms does not exist"). lightning,
torchmetrics and lpips all import torchvision, and none of them needs those operators here, so declaring the two
schemas is enough. Nothing is done where the operators load. All this happens when somebody imports torchvision: it
takes torch, which takes seconds that `osp --help` and refused commands need not wait.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_library: Any = None  # torch drops the schemas when this is garbage-collected


class _BeforeImport(MetaPathFinder):
    """Finds nothing, but makes torchvision importable before others find it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            ensure_importable()


def prepare_import() -> None:
    """See to it that `ensure_importable` runs before torchvision is imported."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _BeforeImport())


def ensure_importable() -> None:
    """Load torchvision's operators as its import would, declaring the schemas it insists on if they do not load."""
    global _library
    import torch

    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        for compiled in Path(spec.origin).parent.glob("_C.*"):
            torch.ops.load_library(compiled)
    except OSError:
        pass
    if not hasattr(torch.ops.torchvision, "nms"):
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
