"""Operations counted from layers and groups, against torch's counter over what is run."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from osp.denoiser import CrossTransformer, Denoiser, JointTransformer, Stage
from osp.denoiser.flops import denoiser_flops
from osp.denoiser.patterns import Pattern
from osp.devices import count_flops
from osp.errors import UsageError

CROSS = {"heads": 2, "head_dim": 12, "text_channels": 10}
JOINT = {"heads": 2, "head_dim": 16, "text_channels": 10, "pooled_channels": 6, "modulation_width": 8}
ALL_PATTERNS = (
    Stage(1),
    Stage(2, "skiparse", 2),
    Stage(3, "skiparse_2d", 2),
    Stage(2, "skip_window", 3),
    Stage(2, "2+1d"),
)
MODELS: dict[str, Callable[..., Denoiser]] = {
    "cross": lambda **more: CrossTransformer(**CROSS, **more),
    "inpainting": lambda **more: CrossTransformer(frame_channels=(8, 4), **CROSS, **more),
    "joint": lambda **more: JointTransformer(**JOINT, **more),
    "joint without skips": lambda **more: JointTransformer(long_skips=False, **JOINT, **more),
}
# The patterns fill up none of the first's tokens, some of the second's; of the third's they leave groups empty.
LATENTS = [(2, 8, 8), (3, 6, 10), (1, 2, 6)]


def test_no_pattern_is_left_out(pattern_kinds: set[type[Pattern]]) -> None:
    assert {type(pattern) for stage in ALL_PATTERNS for pattern in stage.patterns} == pattern_kinds


def inputs(model: Denoiser, latent: tuple[int, int, int], text: int, batch: int, device: str) -> list[Any]:
    with torch.device(device):
        pooled = None if model.pooled_channels is None else torch.randn(batch, model.pooled_channels)
        video = torch.randn(batch, model.latent_channels, *latent)
        return [video, torch.rand(batch), torch.randn(batch, text, model.text_channels), None, pooled]


@cache
def meta_models(name: str) -> list[Denoiser]:
    """One with all patterns, and one of each pattern alone."""
    with torch.device("meta"):
        return [MODELS[name](stages=stages) for stages in (ALL_PATTERNS, *((stage,) for stage in ALL_PATTERNS))]


@pytest.mark.parametrize(("text", "batch"), [(5, 1), (7, 3)])
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass_is_what_the_counter_counts(
    name: str, latent: tuple[int, int, int], text: int, batch: int
) -> None:
    for model in meta_models(name):
        counted = count_flops(model, *inputs(model, latent, text, batch, "meta"))
        assert denoiser_flops(model, latent, text, batch).forward == counted


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_training_pass_is_what_the_counter_counts(name: str, latent: tuple[int, int, int]) -> None:
    # The counter leaves out the CPU's fused attention unless it is told that it is one.
    aten = torch.ops.aten
    fused = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
            *shapes[:4]
        ),
    }
    torch.manual_seed(0)
    model = MODELS[name](stages=ALL_PATTERNS)
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        model(*inputs(model, latent, 5, 2, "cpu")).sum().backward()
    flops = denoiser_flops(model, latent, 5, 2)
    assert flops.forward + flops.backward == counter.get_total_flops()


def test_attention_that_keeps_its_scores_computes_them_once() -> None:
    # As on the meta device, where attention is not fused: four products in the backward pass, not five.
    with torch.device("meta"):
        model = MODELS["joint"]()
    with FlopCounterMode(display=False) as counter:
        model(*inputs(model, (2, 8, 8), 5, 1, "meta")).sum().backward()
    flops = denoiser_flops(model, (2, 8, 8), 5)
    assert counter.get_total_flops() == flops.forward + flops.backward - flops.attention // 2


def test_a_sparsity_of_k_leaves_a_kth_of_the_attention() -> None:
    with torch.device("meta"):
        sparse, dense = (
            CrossTransformer([Stage(4, pattern, k)], **CROSS) for pattern, k in (("skiparse", 4), ("dense", 1))
        )
    sparse_flops, dense_flops = (denoiser_flops(model, (4, 16, 16), 5) for model in (sparse, dense))
    assert 4 * sparse_flops.attention == dense_flops.attention
    assert dense_flops.attention_share == dense_flops.attention / dense_flops.forward
    assert (sparse_flops.embedding, sparse_flops.linear) == (dense_flops.embedding, dense_flops.linear)
    assert sparse_flops.text_attention == dense_flops.text_attention > 0


@pytest.mark.parametrize(
    ("latent", "text", "message"),
    [((2, 7, 8), 5, "height 7 is no multiple of the patch size 2"), ((2, 8, 8), 0, "text of shape 1 0 10")],
)
def test_what_does_not_fit_the_model_is_told(latent: tuple[int, int, int], text: int, message: str) -> None:
    with torch.device("meta"):
        model = MODELS["joint"]()
    with pytest.raises(UsageError, match=message):
        denoiser_flops(model, latent, text)
