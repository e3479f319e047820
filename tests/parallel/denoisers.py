"""Small denoisers of all families with every pattern, what goes into them, and what comes out of them."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from osp.denoiser import CrossTransformer, Denoiser, JointTransformer, LatteTransformer
from osp.denoiser.patterns import Pattern, Window, register_pattern
from osp.parallel import Parallelism, Sharding, apply, fill_model
from osp.weights.lazy import Weights

CROSS: dict[str, Any] = {"channels": 3, "out_channels": 3, "heads": 4, "head_dim": 6, "text_channels": 5}
JOINT = CROSS | {"head_dim": 16, "pooled_channels": 6, "modulation_width": 8}
FAMILIES: dict[str, tuple[type[Denoiser], dict[str, Any]]] = {
    "cross": (CrossTransformer, CROSS),
    "joint": (JointTransformer, JOINT),
}
LATTE = CROSS | {"pairs": 2, "frames": 5, "native_rows": 4}
OWN_SCHEDULE: dict[str, tuple[type[Denoiser], dict[str, Any]]] = {"latte": (LatteTransformer, LATTE)}


def windows_of_three() -> Sequence[Pattern]:
    """A pattern as a user registers it."""
    return Window(3), Window(5)


register_pattern("windows_of_three", windows_of_three)

EVERY_PATTERN = [
    {"blocks": 1},
    {"blocks": 2, "pattern": "2+1d"},
    {"blocks": 2, "pattern": "skiparse", "k": 4},
    {"blocks": 2, "pattern": "skip_window", "k": 2},
    {"blocks": 2, "pattern": "skiparse_2d", "k": 2},
    {"blocks": 2, "pattern": "windows_of_three"},
]
# As v1.5: sparse towards the middle, with the long skips of published models.
SUV = [{"blocks": 2, "pattern": "skiparse", "k": k} if k > 1 else {"blocks": 1} for k in (1, 2, 4, 2, 1)]
# As v1.3: dense at both ends.
V13 = [{"blocks": 1}, {"blocks": 3, "pattern": "skiparse", "k": 4}, {"blocks": 1}]
STAGES: dict[str, Any] = {"every": EVERY_PATTERN, "suv": SUV, "v13": V13, "own": None}

EVEN, ODD, SMALL = (4, 8, 8), (5, 6, 14), (1, 2, 6)
CLIPS = 4


def make(family: str, stages: Any, dtype: torch.dtype) -> Denoiser:
    """A small model of which every weight matters; in single precision no softmax of it saturates."""
    kind, settings = (FAMILIES | OWN_SCHEDULE)[family]
    generator = torch.Generator().manual_seed(0)
    model = kind(**settings | ({"stages": stages} if kind.takes_stages else {}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if dtype == torch.float64 else 0.1, generator=generator)
    return model.to(dtype)


def inputs_of(model: Denoiser, size: tuple[int, int, int], padded: str, batch: int) -> dict[str, Tensor]:
    """Inputs that go with it; `padded` says of what some is padding: "video", "text", both or neither."""
    generator, dtype = torch.Generator().manual_seed(1), model.out.weight.dtype
    made = {
        "latent": torch.randn(batch, model.latent_channels, *size, generator=generator, dtype=dtype),
        "time": 1000 * torch.rand(batch, generator=generator, dtype=dtype),
        "text": torch.randn(batch, 5, model.text_channels, generator=generator, dtype=dtype),
    }
    if model.pooled_channels is not None:
        made["pooled_text"] = torch.randn(batch, model.pooled_channels, generator=generator, dtype=dtype)
    if "text" in padded:
        made["text_mask"] = (torch.arange(5) < torch.tensor([3, 5, 1, 4])[:batch, None]).to(dtype)
    if "video" in padded:
        made["video_mask"] = torch.ones(batch, *size, dtype=dtype)
        made["video_mask"][0, :, :, size[2] // 2 :] = 0
        made["video_mask"][-1, size[0] // 2 :] = 0
    return made


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference to the largest value; a gradient that ought to be zero must be."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


class Case(NamedTuple):
    """A denoiser, what it is given, and in which precision; all by the names here."""

    family: str
    stages: str
    size: tuple[int, int, int]
    padded: str
    dtype: torch.dtype = torch.float64
    recompute_every: int = 0

    def model(self) -> Denoiser:
        """See `make`."""
        return make(self.family, STAGES[self.stages], self.dtype)

    def inputs(self, model: Denoiser) -> dict[str, Tensor]:
        """Those of all clips."""
        return inputs_of(model, self.size, self.padded, CLIPS)


class Layout(NamedTuple):
    """So many processes, of which `sequence` share a clip; `copies` of the weights, None: one in each (DDP)."""

    processes: int
    sequence: int
    copies: int | None


LAYOUTS = {
    "ddp": Layout(2, 1, None),
    "fsdp": Layout(2, 1, 1),
    "sequence": Layout(2, 2, None),
    "fsdp among those that share a clip": Layout(2, 2, 1),
    "sequence of four": Layout(4, 4, None),
    "hybrid": Layout(4, 1, 2),
    "fsdp, sequence": Layout(4, 2, 1),
    "hybrid, sequence": Layout(4, 2, 2),
}


def shared(layout: Layout, model: Denoiser, **how: Any) -> nn.Module:
    """The model as a process of this layout runs it; `how` is the rest of `Parallelism`."""
    if layout.sequence > 1:
        sizes = (layout.processes // layout.sequence, layout.sequence)
        how["sequence"] = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "sequence"))["sequence"].get_group()
    if layout.copies is None:
        apply(model, Parallelism(layout.processes, **how))
        return DistributedDataParallel(model, find_unused_parameters=True)
    sizes = (layout.copies, layout.processes // layout.copies)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
    sharding = Sharding(mesh if layout.copies > 1 else mesh["shard"], torch.device("cpu"))
    split = copy.deepcopy(model).to("meta")
    apply(split, Parallelism(layout.processes, sharding=sharding, **how))
    fill_model(split, Weights.of(model.state_dict()))
    return split
