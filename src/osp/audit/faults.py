"""Faults of the published code that recorded cases show and that we do not repeat, as docs/weights.md says."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from osp.audit.case import Case
from osp.denoiser import CrossTransformer
from osp.weights.cross_keys import MASK_CHANNELS, SCALES
from osp.weights.cross_v12 import KINDS, cached_scales


class Fault(NamedTuple):
    """A fault that one set of recorded inputs meets: a `config` with which our model repeats it, and why."""

    name: str
    config: Mapping[str, Any]
    reason: str


def model_kind(case: Case) -> str:
    """The kind of a case's model: v1.2's for inpainting are recorded beside those for text."""
    inpaints = case.kind == "opensora_v12" and MASK_CHANNELS in case.setting("config")
    return "opensora_inpaint_v12" if inpaints else case.kind


def known_fault(case: Case, name: str) -> Fault | None:
    """The fault that a set of inputs meets by the case's configuration and the set's sizes; None if it meets none."""
    kind = KINDS.get(model_kind(case))
    if kind is None:
        return None
    config = {**kind.defaults, **case.setting("config")}
    with torch.device("meta"):
        model = kind.build(config, {})
    assert isinstance(model, CrossTransformer)
    images = case.setting("input_sets").get(name, {}).get("images", 0)
    _, _, frames, rows, columns = case.tensor(f"in/{name}/hidden_states").shape
    patch, right = model.patch_size, model.config.position_scale
    cached = cached_scales(right, (frames - images, rows // patch, columns // patch))
    if cached == right:
        return None
    reason = "axes of equal length share the rotary table of the first one there, whatever their scales"
    return Fault("tables as published", {**config, **dict(zip(SCALES, cached, strict=True))}, reason)
