"""The gradient of every weight where processes share the work, against that of one process."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from osp.denoiser import CrossTransformer, Denoiser, JointTransformer
from osp.parallel import Parallelism, Sharding, apply, drawn_weights, fill_model, local, whole
from osp.parallel.pieces import read_like
from osp.vae import WFVAE
from osp.weights.lazy import Stored, Weights

CLIPS, LATENT = 4, (4, 2, 4, 4)
PATTERNS = [{"blocks": 1}, {"blocks": 2, "pattern": "skiparse", "k": 2}, {"blocks": 1}]


def families(dtype: torch.dtype) -> Iterator[tuple[str, Denoiser]]:
    sizes = {"channels": 4, "out_channels": 4, "heads": 2, "text_channels": 6, "stages": PATTERNS}
    with torch.device("meta"):
        models = (
            CrossTransformer(head_dim=12, **sizes),
            JointTransformer(head_dim=16, pooled_channels=6, modulation_width=8, **sizes),
        )
    for model in models:
        yield type(model).__name__, model.to(dtype)


def weights_of(model: nn.Module, dtype: torch.dtype) -> Weights:
    """The same ones in every process, none of which is zero."""
    draw = torch.Generator().manual_seed(1)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    return Weights.of({key: torch.randn(shape, generator=draw).to(dtype) * 0.1 for key, shape in shapes.items()})


def inputs(dtype: torch.dtype, *, padded: bool) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    shapes = {"latent": LATENT, "text": (3, 6), "pooled_text": (6,)}
    given = {key: torch.randn(CLIPS, *shape, generator=draw).to(dtype) for key, shape in shapes.items()}
    given["time"] = torch.rand(CLIPS, generator=draw).to(dtype) * 1000
    if padded:
        given["text_mask"], given["video_mask"] = torch.ones(CLIPS, 3), torch.ones(CLIPS, *LATENT[1:])
        for clip in range(CLIPS):
            given["text_mask"][clip, 1 + clip % 3 :] = 0
            given["video_mask"][clip, :, :, 2 + 2 * (clip % 2) :] = 0
    return given


def backward(model: nn.Module, given: dict[str, Tensor]) -> None:
    latent = given["latent"]
    (model(**given) - latent.flip(1)).square().mean().backward()


def shared(layout: str, model: nn.Module, weights: Weights, **how: Any) -> nn.Module:
    """The model, as a process of this layout runs it."""
    if layout == "ddp":
        model.to_empty(device="cpu")
        fill_model(model, weights)
        apply(model, Parallelism(2, **how))
        return DistributedDataParallel(model, find_unused_parameters=True)
    copies = {"fsdp": 1, "hybrid": 2}[layout]
    mesh = init_device_mesh("cpu", (copies, dist.get_world_size() // copies), mesh_dim_names=("replicate", "shard"))
    sharding = Sharding(mesh if copies > 1 else mesh["shard"], torch.device("cpu"))
    apply(model, Parallelism(2, sharding=sharding, **how))
    fill_model(model, weights)
    return model


def differences(layout: str, dtype: torch.dtype) -> dict[str, float]:
    """The largest difference of any gradient by model, input and weight.

    In double precision it is a part of the weight's own largest gradient. In float32 it is one of the model's, since a
    gradient that nearly cancels (of the queries of a saturated softmax) is rounding noise in any layout.
    """
    found, rank, size = {}, dist.get_rank(), dist.get_world_size()
    share = slice(rank * CLIPS // size, (rank + 1) * CLIPS // size)
    for padded in (False, True):
        for (name, mine), (_, one) in zip(families(dtype), families(dtype), strict=True):
            given, weights = inputs(dtype, padded=padded), weights_of(one, dtype)
            one.to_empty(device="cpu")
            fill_model(one, weights)
            backward(one, given)
            mine = shared(layout, mine, weights, recompute_every=2, offload_activations=padded)
            backward(mine, {key: value[share] for key, value in given.items()})
            largest = max(float(p.grad.abs().max()) for p in one.parameters() if p.grad is not None)
            for (key, expected), parameter in zip(one.named_parameters(), mine.parameters(), strict=True):
                assert (expected.grad is None) == (parameter.grad is None), key
                if expected.grad is not None:
                    own = local(read_like(parameter.grad, Stored.of(expected.grad)))
                    off = (local(parameter.grad) - own).abs().max() if own.numel() else torch.tensor(0.0)
                    place = f"{name}, padded={padded}, {key}"
                    scale = max(float(expected.grad.abs().max()), 1e-3) if dtype == torch.float64 else largest
                    found[place] = float(off) / scale
    return found


@pytest.mark.parametrize(("layout", "count"), [("ddp", 2), ("fsdp", 2), ("hybrid", 4)])
def test_gradients_are_those_of_one_process(processes: Processes, layout: str, count: int) -> None:
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        if dtype == torch.float32 and layout == "hybrid":
            continue
        for found in processes.run(count, differences, layout, dtype):
            assert len(found) > 200
            worst = max(found, key=found.__getitem__)
            assert found[worst] <= limit, (worst, found[worst], dtype)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CrossTransformer(stages=PATTERNS, heads=2, head_dim=12, text_channels=6, frame_channels=[4, 1]),
        lambda: JointTransformer(
            stages=PATTERNS, heads=2, head_dim=16, text_channels=6, pooled_channels=6, modulation_width=8
        ),
        lambda: WFVAE(base_channels=4, encoder_flow_channels=4, decoder_flow_channels=4, encoder_blocks=1),
    ],
)
def test_weights_are_drawn_one_by_one_as_if_at_once(make: Any) -> None:
    torch.manual_seed(5)
    at_once, after = make().state_dict(), torch.rand(3)
    torch.manual_seed(5)
    one_by_one = drawn_weights(make)
    assert torch.equal(torch.rand(3), after)
    assert one_by_one.keys() == at_once.keys()
    for key in reversed(list(at_once)):
        assert torch.equal(one_by_one[key], at_once[key]), key


def steps_of_muon(split: bool) -> list[Tensor]:
    from osp.training.optimisation import Optimisation

    (_, model), dtype = next(families(torch.float32)), torch.float32
    weights = weights_of(model, dtype)
    model = nn.ModuleDict({"denoiser": shared("fsdp" if split else "ddp", model, weights)})
    optimizers = Optimisation(lr=1e-2, weight_decay=0.1).with_muon(model, 1e-2)
    for step in range(3):
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            parameter.grad = read_like(parameter, Stored.of(drawn))
        for optimizer in optimizers:
            optimizer.step()
    return [whole(parameter.detach()) for parameter in model.parameters()]


def test_muon_moves_matrices_that_are_split_as_whole_ones(processes: Processes) -> None:
    split, kept = processes.run(2, steps_of_muon, True)[0], processes.run(2, steps_of_muon, False)[0]
    for ours, theirs in zip(split, kept, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
