"""What is trained: paths, targets, times, weights and losses."""

import math

import pytest
import torch
from torch import Tensor

from osp.diffusion import Epsilon, Flow, Objective, Velocity, draw_normal, squared_error
from osp.errors import UsageError

OBJECTIVES = pytest.mark.parametrize(
    "objective",
    [Epsilon(), Epsilon(min_snr=5.0), Velocity(), Velocity(zero_terminal_snr=False, min_snr=None), Flow()],
    ids=["epsilon", "epsilon_min_snr", "velocity", "velocity_plain", "flow"],
)
TOKENS = 1024


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pairs(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Clean latents and noise."""
    made = torch.randn(2, batch, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    return made[0], made[1]


@OBJECTIVES
def test_times_can_be_chosen_along_their_span(objective: Objective) -> None:
    drawn = objective.sample_time(1000, torch.Generator().manual_seed(3), TOKENS)
    chosen = objective.time_at(torch.tensor([0.0, 0.25, 0.5, 0.9999999, 1.0]))
    assert chosen.dtype == drawn.dtype
    assert objective.time_span == 1000
    assert 0 <= drawn.min() < drawn.max() <= chosen[-1]
    assert chosen[:3].tolist() == [0, 250, 500]
    objective.levels(chosen)


@OBJECTIVES
def test_a_perfect_prediction_gives_clean_and_noise_back(objective: Objective) -> None:
    time = objective.sample_time(64, torch.Generator().manual_seed(3), TOKENS)
    clean, noise = pairs(64)
    noisy = objective.corrupt(clean, noise, time)
    got = objective.recover(noisy, objective.target(clean, noise, time), time)
    # Where little is left of the clean latent, as little is left of its digits.
    bar = 1e-5 / objective.levels(time)[0].min().item() if isinstance(objective, Epsilon) else 1e-5
    torch.testing.assert_close(got[0], clean, rtol=0, atol=bar)
    torch.testing.assert_close(got[1], noise, rtol=0, atol=1e-5)


@OBJECTIVES
def test_results_have_the_latents_type_and_float32_inside(objective: Objective) -> None:
    clean, noise = pairs(8, torch.bfloat16)
    time = objective.sample_time(8, torch.Generator().manual_seed(3), TOKENS)
    noisy, target = objective.corrupt(clean, noise, time), objective.target(clean, noise, time)
    assert {noisy.dtype, target.dtype} == {torch.bfloat16}
    assert {part.dtype for part in objective.recover(noisy, target, time)} == {torch.bfloat16}
    assert torch.equal(noisy, objective.corrupt(clean.float(), noise.float(), time).bfloat16())
    assert torch.equal(target, objective.target(clean.float(), noise.float(), time).bfloat16())
    assert objective.weight(time).dtype == torch.float32
    assert objective.weight(time).shape == (8,)


def test_zero_terminal_snr_is_zero() -> None:
    clean, noise = pairs(2)
    last = torch.tensor([999, 999])
    assert torch.equal(Velocity().corrupt(clean, noise, last), noise)
    assert torch.equal(Velocity().target(clean, noise, last), -clean)
    alpha, _ = Velocity().levels(last)
    assert alpha.abs().max() == 0
    kept, _ = Velocity(zero_terminal_snr=False).levels(last)
    assert kept.min() > 0.005
    # The first step keeps its level, and the levels between fall.
    assert Velocity().alphas_cumprod[0] == pytest.approx(Epsilon().alphas_cumprod[0].item())
    assert (Velocity().alphas_cumprod.diff() < 0).all()


def test_flow_runs_from_clean_to_noise() -> None:
    clean, noise = pairs(1)
    assert torch.equal(Flow().corrupt(clean, noise, torch.zeros(1)), clean)
    assert torch.equal(Flow().corrupt(clean, noise, torch.full((1,), 1000.0)), noise)


def test_levels_keep_the_variance() -> None:
    time = torch.arange(1000)
    for objective in (Epsilon(), Velocity()):
        alpha, sigma = objective.levels(time)
        torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(1000), rtol=0, atol=1e-6)


def test_min_snr_weights() -> None:
    time = torch.arange(1000)
    alpha, sigma = Velocity().levels(time)
    snr = alpha.square() / sigma.square()
    assert torch.equal(Velocity().weight(time), snr.clamp(max=5) / (snr + 1))
    assert Velocity().weight(time)[-1] == 0
    weight = Epsilon(min_snr=5.0).weight(time)
    assert weight.max() == 1
    assert weight[0] == pytest.approx(5 / 9999, rel=1e-3)
    # In terms of the clean latent's error both weights are the same: that of epsilon counts snr times, that of the
    # velocity snr + 1 times.
    plain = Velocity(zero_terminal_snr=False)
    alpha, sigma = plain.levels(time)
    snr = alpha.square() / sigma.square()
    torch.testing.assert_close(weight * snr, plain.weight(time) * (snr + 1), rtol=1e-5, atol=0)
    assert torch.equal(Velocity(min_snr=None).weight(time), torch.ones(1000))
    assert torch.equal(Flow().weight(time), torch.ones(1000))


def test_discrete_times_are_all_as_likely() -> None:
    time = Velocity().sample_time(20000, torch.Generator().manual_seed(0))
    assert time.dtype == torch.int64
    assert (int(time.min()), int(time.max())) == (0, 999)
    counts = torch.histc(time.float(), 10, 0, 1000) / 20000
    torch.testing.assert_close(counts, torch.full((10,), 0.1), rtol=0, atol=0.01)


@pytest.mark.parametrize(("objective", "tokens", "shift"), [(Flow(7.0), None, 7.0), (Flow(), 256, math.exp(0.5))])
def test_flow_times_are_logit_normal_and_shifted(objective: Flow, tokens: int | None, shift: float) -> None:
    time = objective.sample_time(20000, torch.Generator().manual_seed(0), tokens)
    assert time.dtype == torch.float32
    logit = torch.logit(time.double() / 1000)  # a shift moves the logit by its logarithm
    assert logit.mean().item() == pytest.approx(math.log(shift), abs=0.03)
    assert logit.std().item() == pytest.approx(1, abs=0.03)


def test_the_shift_grows_with_the_resolution() -> None:
    assert Flow().shift_at(256) == pytest.approx(math.exp(0.5))
    assert Flow().shift_at(4096) == pytest.approx(math.exp(1.15))
    assert Flow().shift_at(2176) == pytest.approx(math.exp(0.825))
    assert Flow(3.0).shift_at(4096) == 3.0


@OBJECTIVES
def test_a_sample_gets_its_time_and_noise_in_any_batch(objective: Objective) -> None:
    together = objective.sample_time(3, seeded(5, 6, 7), TOKENS)
    alone = [objective.sample_time(1, seeded(seed), TOKENS) for seed in (5, 6, 7)]
    assert torch.equal(together, torch.cat(alone))
    assert len(together.unique()) == 3
    noise = draw_normal((3, 2, 4), seeded(5, 6, 7))
    assert torch.equal(noise[1:2], draw_normal((1, 2, 4), seeded(6)))


def test_one_generator_and_none_draw_a_batch() -> None:
    first = draw_normal((3, 2), torch.Generator().manual_seed(1))
    assert torch.equal(first, draw_normal((3, 2), torch.Generator().manual_seed(1)))
    torch.manual_seed(1)
    assert torch.equal(first, draw_normal((3, 2)))
    assert Velocity().sample_time(4).shape == Flow(1.0).sample_time(4).shape == (4,)


def test_losses_of_parts_add_up() -> None:
    prediction, target = pairs(4)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0])
    mask = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.4
    errors, values = squared_error(prediction, target, weight, mask)
    squares = (prediction - target).square() * mask[:, None] * weight.view(-1, 1, 1, 1, 1)
    assert values.tolist() == (4 * mask.flatten(1).sum(1)).tolist()
    torch.testing.assert_close(errors, squares.flatten(1).sum(1))
    # Split along the batch, and along the width of each latent, as sequence parallel processes do.
    for parts in (
        [squared_error(prediction[i : i + 2], target[i : i + 2], weight[i : i + 2], mask[i : i + 2]) for i in (0, 2)],
        [
            squared_error(prediction[..., i : i + 1], target[..., i : i + 1], weight, mask[..., i : i + 1])
            for i in range(4)
        ],
    ):
        mean = sum(part[0].sum() for part in parts) / sum(part[1].sum() for part in parts)
        torch.testing.assert_close(mean, errors.sum() / values.sum())


def test_the_plain_loss_is_the_mean_squared_error() -> None:
    prediction, target = pairs(4, torch.bfloat16)
    errors, values = squared_error(prediction, target)
    assert errors.dtype == torch.float32
    torch.testing.assert_close(
        errors.sum() / values.sum(), torch.nn.functional.mse_loss(prediction.float(), target.float())
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Velocity(steps=1), "steps=1: must be a whole number of at least 2"),
        (lambda: Epsilon(beta_start=0.1, beta_end=0.01), "beta_start=0.1, beta_end=0.01"),
        (lambda: Velocity(min_snr=0), "min_snr=0: must be a number above 0"),
        (lambda: Flow(shift=0), "shift=0: must be a number above 0"),
        (lambda: Flow(std=-1), "std=-1"),
        (lambda: Flow(low_tokens=4096), "low_tokens=4096: must be a number below 4096"),
        (lambda: Flow().sample_time(2), "give tokens, or a shift"),
        (lambda: Flow(1.0).sample_time(3, seeded(1, 2)), "2 random generators do not fit a batch of 3"),
        (lambda: Velocity().sample_time(3, seeded(1, 2)), "2 random generators do not fit a batch of 3"),
        (lambda: squared_error(torch.zeros(1, 2, 1, 1, 1), torch.zeros(1, 3, 1, 1, 1)), "has no target"),
        (
            lambda: squared_error(torch.zeros(1, 2, 1, 1, 1), torch.zeros(1, 2, 1, 1, 1), mask=torch.ones(1, 2)),
            "must be B T H W",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
