"""The memory plan against what is measured, and against what the parts are known to hold."""

from collections.abc import Callable

import pytest
import torch

from osp.conditioning import WordText
from osp.denoiser import CrossTransformer, Denoiser, JointTransformer, Stage
from osp.devices import PeakMemory
from osp.devices.live import LiveBytes
from osp.diffusion import Flow, Solver
from osp.errors import UsageError
from osp.sampling import VideoGenerator
from osp.sampling.memory import MemoryPlan, call_bytes, plan_memory
from osp.vae import WFVAE, LatentCodec, Tiling

CPU = torch.device("cpu")
STAGES = [Stage(1), Stage(2, "skiparse", 2), Stage(1)]


def denoiser(kind: str) -> Denoiser:
    common = {"channels": 8, "out_channels": 8, "heads": 4, "head_dim": 48, "text_channels": 32, "stages": STAGES}
    if kind == "cross":
        return CrossTransformer(**common).eval()
    return JointTransformer(**common, pooled_channels=16, modulation_width=32).eval()


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_a_call_of_the_denoiser_takes_what_is_planned(kind: str) -> None:
    model = denoiser(kind)
    pooled = None if model.pooled_channels is None else torch.randn(2, 16)
    inputs = torch.randn(2, 8, 5, 24, 24), torch.rand(2), torch.randn(2, 12, 32), None, pooled
    planned = call_bytes(model, (2, 5, 24, 24), 12)
    with torch.no_grad(), LiveBytes() as live:
        model(*inputs)
    assert live.peak == pytest.approx(planned, rel=0.02)
    assert call_bytes(model.bfloat16(), (2, 5, 24, 24), 12) < 0.75 * planned


def test_the_whole_plan_is_within_a_factor_of_two_of_what_is_measured() -> None:
    torch.manual_seed(0)
    flows = {"encoder_flow_channels": 16, "decoder_flow_channels": 16, "encoder_blocks": 1, "decoder_blocks": 1}
    codec = LatentCodec(WFVAE(latent_channels=8, base_channels=16, level1="2d", **flows), 0.0, 1.0)
    generator = VideoGenerator(denoiser("cross"), WordText(32, None, 1, 2, max_tokens=8), Flow(), codec)
    solver = Solver(Flow(), "euler", 2)
    generator.generate(["a"], 1, 16, 16, seeds=[0], solver=solver)  # loads what is loaded once
    plan = plan_memory(generator, 17, 192, 192, batch=2)
    with PeakMemory(CPU) as memory:
        generator.generate(["a", "b"], 17, 192, 192, seeds=[0, 1], solver=solver)
    weights = plan.parts["text encoder"] + plan.parts["denoiser"] + plan.parts["VAE"]
    assert memory.taken is not None
    assert 0.5 < (plan.peak - weights) / memory.taken < 2
    low = plan_memory(generator, 17, 192, 192, batch=2, low_memory=True)
    assert low.parts["one call of the denoiser"] < 0.7 * plan.parts["one call of the denoiser"]
    assert low.parts["VAE decoder at work"] == plan.parts["VAE decoder at work"] / 2
    tiled = plan_memory(generator, 17, 192, 192, batch=2, tiling=Tiling(96, 32))
    assert tiled.parts["VAE decoder at work"] < 0.5 * plan.parts["VAE decoder at work"]


def test_with_low_memory_an_accelerator_holds_one_part_at_a_time(make_generator: Callable[..., VideoGenerator]) -> None:
    generator = make_generator("joint")
    normal, low = (plan_memory(generator, 9, 32, 48, low_memory=low) for low in (False, True))
    weights = sum(value.numel() * 4 for value in generator.denoiser.parameters())
    assert normal.parts["denoiser"] == low.parts["denoiser"] == weights
    generator.device = torch.device("meta")  # stands for an accelerator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("osp.sampling.memory.available_memory", lambda device: 1 << 20)
        normal, low = (plan_memory(generator, 9, 32, 48, low_memory=low) for low in (False, True))
    assert low.phases["text"] == low.parts["text encoder"]
    assert low.peak < normal.peak
    assert low.phases["decoding"] < normal.phases["decoding"] - weights
    assert (normal.fits, normal.available) == (normal.peak <= 1 << 20, 1 << 20)
    assert "given frames" not in normal.phases
    inpaint = plan_memory(make_generator("inpaint"), 9, 32, 48)
    assert inpaint.phases["given frames"] > inpaint.phases["text"] + inpaint.parts["VAE encoder at work"]
    assert f"at most {normal.peak / 2**30:.2f} of 0.00 GiB free" in normal.lines()[-1]


def test_a_small_video_is_one_line_and_a_large_one_tells_its_parts() -> None:
    def lines(peak: int, available: int | None) -> list[str]:
        return MemoryPlan({"VAE": peak}, {"decoding": peak}, available, low_memory=False).lines()

    assert lines(50 << 20, 4 << 30) == ["at most 50 MiB, of 4.00 GiB free"]
    assert lines(1 << 30, None) == ["at most 1024 MiB"]
    large = ["VAE: 1.50 GiB", "at once, by phase: decoding 1.50; at most 1.50 of 9.00 GiB free"]
    assert lines(3 << 29, 9 << 30) == large
    assert len(lines(3 << 29, None)) == len(lines(50 << 20, 60 << 20)) == len(lines(50 << 20, 40 << 20)) == 2


def test_full_size_models_are_planned_without_their_weights(make_generator: Callable[..., VideoGenerator]) -> None:
    with torch.device("meta"):
        full = JointTransformer().bfloat16()
    needed = call_bytes(full, (1, 16, 72, 128), 512)
    # One block's hidden layer alone, of 16 x 36 x 64 tokens four times 3072 wide.
    assert needed > 16 * 36 * 64 * 4 * 3072 * 2
    assert needed < 40 << 30
    with pytest.raises(UsageError, match=r"frames=2: .*; use 1 or 5"):
        plan_memory(make_generator(), 2, 32, 32)
