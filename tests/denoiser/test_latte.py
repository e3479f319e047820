"""What Latte promises: clips of one length, images that pass by the blocks across frames, and both in one batch."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from osp.denoiser import CrossTransformer, Grid, LatteTransformer, restage
from osp.denoiser.flops import denoiser_flops
from osp.denoiser.latte import space_positions, time_positions
from osp.denoiser.patterns import average_attention_distance
from osp.devices import count_flops
from osp.errors import UsageError

SMALL: dict[str, Any] = {"channels": 4, "out_channels": 8, "heads": 2, "head_dim": 12, "text_channels": 10, "pairs": 2}
SMALL |= {"frames": 3, "native_rows": 4, "position_scale": (1.0, 1.0, 1.0)}
CPU = torch.device("cpu")


def make(**settings: Any) -> LatteTransformer:
    """A small model in float64 of which every weight matters."""
    torch.manual_seed(0)
    model = LatteTransformer(**(SMALL | settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double()


def given(
    frames: int = 3, batch: int = 2, texts: tuple[int, ...] = (), size: tuple[int, int] = (6, 10)
) -> list[Tensor]:
    """Latent, time and text."""
    generator = torch.Generator().manual_seed(1)
    shapes = (batch, 4, frames, *size), (batch,), (batch, *texts, 5, 10)
    latent, time, text = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [latent, 500 + 100 * time, text]


@torch.no_grad()
@pytest.mark.parametrize("rotary", [False, True])
def test_a_joint_batch_gives_what_its_clip_and_its_images_give_alone(rotary: bool) -> None:
    model = make(rotary=rotary)
    latent, time, text = given(frames=5, texts=(3,))
    mask = torch.tensor([[[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], [[1, 1, 1, 1, 0], [1] * 5, [0] * 5]])
    seen = torch.ones(2, 5, 6, 10)
    seen[0, :, 4:], seen[1, 3, :, 6:] = 0, 0
    both = model(latent, time, text, mask, None, seen, images=2)
    assert both.shape == (2, 8, 5, 6, 10)
    clip = model(latent[:, :, :3], time, text[:, 0], mask[:, 0], None, seen[:, :3])
    torch.testing.assert_close(both[:, :, :3], clip, rtol=0, atol=1e-12)
    for i in (0, 1):
        one = model(latent[:, :, 3 + i, None], time, text[:, 1 + i], mask[:, 1 + i], None, seen[:, 3 + i, None])
        torch.testing.assert_close(both[:, :, 3 + i, None], one, rtol=0, atol=1e-12)


def test_the_gradient_of_a_joint_batch_is_the_sum_of_those_of_its_parts() -> None:
    model = make()
    latent, time, text = given(frames=4, texts=(2,))
    weight = torch.randn(2, 8, 4, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (model(latent, time, text, images=1) * weight).sum().backward()
    together = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    model.recompute_every = 1  # as the published training, which computes blocks again
    (model(latent[:, :, :3], time, text[:, 0]) * weight[:, :, :3]).sum().backward()
    (model(latent[:, :, 3:], time, text[:, 1]) * weight[:, :, 3:]).sum().backward()
    assert set(together) == {name for name, _ in model.named_parameters()}
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, together[name], rtol=1e-9, atol=1e-9)
    assert all(value.abs().max() > 0 for value in together.values())


@torch.no_grad()
def test_images_pass_by_the_blocks_across_frames() -> None:
    model = make()
    image = given(frames=1)
    before = model(*image)
    clip = model(*given())
    for block in model.blocks[1::2]:
        nn.init.normal_(block.qkv.weight, std=3.0)
    assert torch.equal(model(*image), before)
    assert (model(*given()) - clip).abs().max() > 0.1


@torch.no_grad()
def test_padding_is_hidden_within_frames_alone() -> None:
    model = make(pairs=1)
    latent, time, text = given()
    seen = torch.ones(2, 3, 6, 10)
    seen[:, 1, :, 6:] = 0
    other = latent.clone()
    other[:, :, 1, :, 6:] += 1
    first, second = (model(one, time, text, None, None, seen) for one in (latent, other))
    shown = seen[0, 1] == 1
    assert torch.equal(first[:, :, 1, shown], second[:, :, 1, shown])  # in its own frame nothing is seen of it
    assert (first - second)[:, :, 0, :, 6:].abs().max() > 1e-3  # in other frames its place is


@torch.no_grad()
def test_text_is_read_by_every_second_block() -> None:
    model = make()
    assert [block.reads_text for block in model.blocks] == [True, False] * 2
    assert not any("text" in name for block in model.blocks[1::2] for name, _ in block.named_parameters())


def test_other_grids_are_stretched_onto_the_native_one() -> None:
    config = make().config
    native, double = (space_positions(config, Grid(3, side, side), CPU) for side in (4, 8))
    assert torch.equal(native, double[::2, ::2])
    wide = space_positions(config, Grid(1, 4, 8), CPU)
    half = config.width // 2
    assert torch.equal(wide[:, :, half:], native[:, :1, half:].expand(4, 8, half))  # the second half encodes the row
    assert torch.equal(wide[:, ::2], native)


def test_time_positions_are_divided_by_their_scale() -> None:
    slow, fast = (
        time_positions(make(frames=7, position_scale=(scale, 1, 1)).config, Grid(7, 1, 1), CPU) for scale in (3, 1)
    )
    assert torch.equal(slow[::3], fast[:3])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"frames": 4}, "latent has 4 frames; this denoiser takes 3, the length that it was trained at, or 1, an image"),
    ({"frames": 2}, "latent has 2 frames; this"),
    ({"frames": 5, "texts": (2,), "images": 1}, "latent has 4 frames beside images=1; this denoiser takes 3"),
    (
        {"frames": 5, "texts": (2,), "images": 2},
        "text of shape 2 2 5 10 does not fit; with images=2 it must be B 3 L D",
    ),
    ({"frames": 5, "images": 2}, "text of shape 2 5 10 does not fit; with images=2 it must be B 3 L D"),
    ({"frames": 5, "texts": (3,), "images": 2, "mask": 2}, "text_mask of shape 2 2 5 does not fit; with images=2 it"),
    ({"texts": (1,)}, "text of shape 2 1 5 10 does not fit; it must be 2 L 10"),
    ({"images": -1}, "images=-1: must be a whole number"),
]


@pytest.mark.parametrize(("inputs", "message"), WRONG)
def test_what_does_not_fit_is_told_in_one_line(inputs: dict[str, Any], message: str) -> None:
    images, texts = inputs.pop("images", 0), inputs.pop("mask", 0)
    mask = torch.ones(2, texts, 5) if texts else None
    with pytest.raises(UsageError, match=re.escape(message)) as raised:
        make()(*given(**inputs), mask, images=images)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 1, "head_dim": 6}, "positions need a width that 4 divides"),
        ({"head_dim": 6, "rotary": True}, "positions need a width that 4 divides"),
        ({"frames": 0}, "frames=0: must be a whole number"),
        ({"stages": [{"blocks": 2}]}, "LatteTransformerConfig has no setting stages"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LatteTransformer(**(SMALL | settings))


def test_its_schedule_is_its_own() -> None:
    model = make()
    again = restage(model)
    assert again.blocks[0].qkv.weight is model.blocks[0].qkv.weight
    assert torch.equal(again.unused_text, model.unused_text)
    with pytest.raises(UsageError, match="stages: LatteTransformer has one schedule, space and time in turn"):
        restage(model, [{"blocks": 4}])


def test_its_distance_is_counted_from_the_gather_of_its_patterns() -> None:
    grid = Grid(3, 2, 4)
    apart = sum(f != g and i != j for f in range(3) for g in range(3) for i in range(8) for j in range(8))
    pairs = grid.tokens * (grid.tokens - 1)
    expected = (pairs + apart) / pairs  # one block for a frame or a place in common, else two
    assert average_attention_distance(make().schedule, grid) == pytest.approx(expected, abs=1e-9)


FLOPS = [((3, 6, 10), 0), ((1, 6, 10), 0), ((5, 8, 8), 2), ((3, 8, 8), 2)]


@pytest.mark.parametrize(("latent", "images"), FLOPS)
def test_operations_are_what_the_counter_counts(latent: tuple[int, int, int], images: int) -> None:
    with torch.device("meta"):
        model = LatteTransformer(**SMALL)
        video, texts = torch.randn(3, 4, *latent), (1 + images,) if images else ()
        more = {"images": images} if images else {}
        inputs = video, torch.rand(3), torch.randn(3, *texts, 7, 10)
        counted = count_flops(lambda *given: model(*given, **more), *inputs)
        with FlopCounterMode(display=False) as counter:
            model(*inputs, **more).sum().backward()
    flops = denoiser_flops(model, latent, 7, 3, images)
    assert flops.forward == counted
    # On the meta device attention keeps its scores: four products in its backward pass, not five.
    kept = (flops.attention + flops.text_attention) // 2
    assert counter.get_total_flops() == flops.forward + flops.backward - kept


def test_other_families_take_no_joint_batches() -> None:
    with torch.device("meta"):
        model = CrossTransformer([{"blocks": 1}], heads=2, head_dim=12)
    with pytest.raises(UsageError, match="images=1: CrossTransformer takes no joint batches of clips and images"):
        denoiser_flops(model, (3, 4, 4), 5, images=1)
