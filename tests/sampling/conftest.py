"""Generators of random weights, small enough to sample with in a blink."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from osp.conditioning import WordText
from osp.denoiser import CrossTransformer, Denoiser, JointTransformer, Stage
from osp.diffusion import Flow, Objective
from osp.sampling import VideoGenerator
from osp.vae import WFVAE, LatentCodec

STAGES = [Stage(1), Stage(1, "skiparse", 2), Stage(1)]


def build_denoiser(kind: str, **settings: Any) -> Denoiser:
    common = {"channels": 4, "out_channels": 4, "heads": 2, "text_channels": 16, "stages": STAGES}
    own: dict[str, dict[str, Any]] = {
        "cross": {"head_dim": 12},
        "inpaint": {"head_dim": 12, "frame_channels": [4, 4]},
        "joint": {"head_dim": 16, "pooled_channels": 16, "modulation_width": 16},
    }
    model = {"joint": JointTransformer}.get(kind, CrossTransformer)(**{**common, **own[kind], **settings})
    for parameter in model.parameters():  # a new one predicts zero
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def build_codec(channels: int = 4) -> LatentCodec:
    flows = {"encoder_flow_channels": 4, "decoder_flow_channels": 4, "encoder_blocks": 1, "decoder_blocks": 1}
    return LatentCodec(WFVAE(latent_channels=channels, base_channels=4, level1="2d", **flows), 0.1, 0.9)


def build_text() -> WordText:
    return WordText(channels=16, pooled_channels=16, layers=1, heads=2, max_tokens=8).eval()


@pytest.fixture
def make_generator() -> Callable[..., VideoGenerator]:
    """Builds a generator with a denoiser of a kind: cross, inpaint, joint."""

    def make(kind: str = "cross", objective: Objective | None = None, **settings: Any) -> VideoGenerator:
        torch.manual_seed(0)
        own = {key: settings.pop(key) for key in ("out_channels",) if key in settings}
        return VideoGenerator(build_denoiser(kind, **own), build_text(), objective or Flow(), build_codec(), **settings)

    return make
