"""Make `import torchvision` work where its compiled operators do not match the installed torch.

The torchvision wheel on PyPI is built for CUDA. Beside a CPU build of torch its operators cannot load, and its
Python side then fails on two missing operator schemas ("operator torchvision::nms does not exist"). lightning,
torchmetrics and lpips all import torchvision, and none of them needs those operators here, so declaring the two
schemas is enough. Nothing is done where the plain import works.
"""

import torch

_library: torch.library.Library | None = None  # torch drops the schemas when this is garbage-collected


def ensure_importable() -> None:
    """Import torchvision, declaring the missing schemas first if the plain import fails for want of them."""
    global _library
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
