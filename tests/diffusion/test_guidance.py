"""Classifier-free guidance, with toy models and a real one."""

import pytest
import torch
from torch import Tensor, nn

from osp.denoiser import CrossTransformer, Stage
from osp.diffusion import guided, guided_prediction
from osp.errors import UsageError


def predictions() -> tuple[Tensor, Tensor]:
    made = torch.randn(2, 3, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return made[0], made[1]


def test_scales_between_and_beyond() -> None:
    wanted, without = predictions()
    torch.testing.assert_close(guided(wanted, without, 1.0), wanted)
    assert torch.equal(guided(wanted, without, 0.0), without)
    torch.testing.assert_close(guided(wanted, without, 3.0), 3 * wanted - 2 * without)


def test_rescaling_gives_the_conditional_spread() -> None:
    wanted, without = predictions()
    dims = (1, 2, 3, 4)
    whole = guided(wanted, without, 8.0, 1.0)
    torch.testing.assert_close(whole.std(dims), wanted.std(dims))
    plain = guided(wanted, without, 8.0)
    torch.testing.assert_close(guided(wanted, without, 8.0, 0.7), 0.7 * whole + 0.3 * plain)
    # Each sample by itself.
    torch.testing.assert_close(guided(wanted[1:2], without[1:2], 8.0, 0.7), guided(wanted, without, 8.0, 0.7)[1:2])


def test_a_constant_prediction_stays_finite() -> None:
    zero = torch.zeros(1, 4, 2, 4, 4)
    assert torch.equal(guided(zero, zero, 8.0, 0.7), zero)


def test_half_precision_is_computed_in_float32() -> None:
    wanted, without = (x.bfloat16() for x in predictions())
    got = guided(wanted, without, 8.0, 0.7)
    assert torch.equal(got, guided(wanted.float(), without.float(), 8.0, 0.7).bfloat16())


@torch.no_grad()
def test_one_batch_and_two_calls_agree_on_a_denoiser() -> None:
    torch.manual_seed(0)
    model = CrossTransformer(
        channels=4, out_channels=4, heads=2, head_dim=12, text_channels=10, stages=[Stage(1), Stage(2, "skiparse", 2)]
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = model.double()
    latent, text, empty = torch.randn(2, 4, 3, 4, 6).double(), torch.randn(2, 5, 10).double(), torch.zeros(2, 5, 10)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    wanted = {"text": text, "text_mask": mask, "video_mask": None}
    without = {"text": empty.double(), "text_mask": torch.tensor([[1, 0, 0, 0, 0]] * 2)}
    time = torch.tensor([500.0, 20.0])
    got = [
        guided_prediction(model, wanted, without, scale=7.5, together=together)(latent, time)
        for together in (True, False)
    ]
    torch.testing.assert_close(got[0], got[1])
    plain = guided_prediction(model, wanted)(latent, time)
    assert torch.equal(plain, model(latent, time, text, mask))


def test_what_makes_no_batch_is_refused() -> None:
    def model(latent: Tensor, time: Tensor, text: Tensor, pooled: Tensor | None = None) -> Tensor:
        return latent * text.mean()

    text, short = torch.ones(2, 5, 3), torch.ones(2, 4, 3)
    with pytest.raises(UsageError, match=r"scale=7\.5 needs the inputs without a prompt"):
        guided_prediction(model, {"text": text}, scale=7.5)
    with pytest.raises(UsageError, match=r"text \(2, 5, 3\) with the prompt and \(2, 4, 3\) without make no batch"):
        guided_prediction(model, {"text": text}, {"text": short}, scale=7.5)
    with pytest.raises(UsageError, match=r"pooled \(2, 5, 3\) with the prompt and \(missing\) without"):
        guided_prediction(model, {"text": text, "pooled": text}, {"text": text}, scale=7.5)
    apart = guided_prediction(model, {"text": text}, {"text": short}, scale=7.5, together=False)
    assert torch.equal(apart(text, torch.ones(2)), text)
