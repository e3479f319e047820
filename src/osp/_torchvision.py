"""Make `import torchvision` work where its compiled operators do not match the installed torch.

The torchvision wheel on PyPI is built for CUDA. Beside a CPU build of torch its operators cannot load, and its
Python side then fails on two missing operator schemas ("operator torchvision::nms does not exist"). lightning,
torchmetrics and lpips all import torchvision, and none of them needs those operators here, so declaring the two
schemas is enough. Nothing is done where the operators load. torchvision itself is not imported: that takes a second,
which commands that need none of it would pay too.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

_library: torch.library.Library | None = None  # torch drops the schemas when this is garbage-collected


def ensure_importable() -> None:
    """Load torchvision's operators as its import would, declaring the schemas it insists on if they do not load."""
    global _library
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
