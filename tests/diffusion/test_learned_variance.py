"""The loss of a learned variance, its gradients, and the noise of training."""

import math

import pytest
import torch
from torch import Tensor

from osp.diffusion import Epsilon, Objective, Velocity
from osp.errors import UsageError

LEARNED = Epsilon(learned_variance=True)


def drawn(time: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, which is not far from the noise, clean latent, noise and times of two samples."""
    draw = torch.Generator().manual_seed(time)
    clean, noise, off, v = torch.randn(4, 2, 3, 2, 3, 3, generator=draw)
    return torch.cat([noise + 0.3 * off, v], dim=1), clean, noise, torch.full((2,), time)


def reference(output: Tensor, clean: Tensor, noise: Tensor, step: int) -> Tensor:
    """The bound's term of each sample in bits, in float64, from the distributions themselves."""
    output, clean, noise = output.double(), clean.double(), noise.double()
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - beta).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    posterior = beta * (1 - before) / (1 - kept)
    noisy = kept[step].sqrt() * clean + (1 - kept[step]).sqrt() * noise

    def mean(x0: Tensor) -> Tensor:
        first = beta[step] * before[step].sqrt() / (1 - kept[step])
        return first * x0 + (1 - before[step]) * (1 - beta[step]).sqrt() / (1 - kept[step]) * noisy

    predicted, v = output.chunk(2, dim=1)
    low = posterior[max(step, 1)].log()
    log_variance = low + (v + 1) / 2 * (beta[step].log() - low)
    found = mean((noisy - (1 - kept[step]).sqrt() * predicted) / kept[step].sqrt())
    if step:
        own = torch.distributions.Normal(mean(clean), low.div(2).exp())
        theirs = torch.distributions.Normal(found, log_variance.div(2).exp())
        return torch.distributions.kl_divergence(own, theirs).flatten(1).sum(1) / math.log(2)
    normal = torch.distributions.Normal(found, log_variance.div(2).exp())
    above, below = normal.cdf(clean + 1 / 255), normal.cdf(clean - 1 / 255)
    share = torch.where(clean < -0.999, above, torch.where(clean > 0.999, 1 - below, above - below))
    return -share.clamp(min=1e-12).log().flatten(1).sum(1) / math.log(2)


@pytest.mark.parametrize("step", [0, 1, 2, 250, 999])
def test_the_bound_is_the_divergence_of_the_two_distributions_in_bits(step: int) -> None:
    output, clean, noise, time = drawn(step)
    errors, values = LEARNED.error(output, clean, noise, time)
    plain = (output[:, :3] - noise).square().flatten(1).sum(1)
    assert values.tolist() == [54.0, 54.0]
    # The cumulative normal distribution of the likelihood is an approximation, good to 3e-4.
    torch.testing.assert_close((errors - plain).double(), reference(output, clean, noise, step), rtol=2e-3, atol=2e-3)


def test_only_the_squared_error_moves_the_noise_and_only_the_bound_moves_the_variance() -> None:
    for step in (0, 1, 500):
        output, clean, noise, time = drawn(step)
        output.requires_grad_()
        errors, _ = LEARNED.error(output, clean, noise, time)
        (gradient,) = torch.autograd.grad(errors.sum(), output)
        torch.testing.assert_close(gradient[:, :3], 2 * (output[:, :3] - noise).detach())
        exact = output.detach().double().requires_grad_()
        (wanted,) = torch.autograd.grad(reference(exact, clean, noise, step).sum(), exact)
        torch.testing.assert_close(gradient[:, 3:].double(), wanted[:, 3:], rtol=2e-2, atol=2e-3)


def test_a_variance_far_out_of_its_bounds_leaves_finite_gradients() -> None:
    output, clean, noise, _ = drawn(0)
    output = output * torch.tensor([1.0, 4.0]).repeat_interleave(3).view(1, 6, 1, 1, 1)
    output.requires_grad_()
    errors, _ = LEARNED.error(output, clean, noise, torch.tensor([0, 1]))
    errors.sum().backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()


def test_sampling_takes_the_first_half_and_the_sizes_must_fit() -> None:
    output, *_ = drawn(1)
    assert torch.equal(LEARNED.predicted(output), output[:, :3])
    assert Epsilon().predicted(output) is output
    assert (LEARNED.prediction_channels(4), Epsilon().prediction_channels(4), Velocity().prediction_channels(4)) == (
        8,
        4,
        4,
    )
    LEARNED.check_channels(4, 8)
    with pytest.raises(UsageError, match=r"^denoiser.out_channels=4: Epsilon with learned_variance .* set .*=8$"):
        LEARNED.check_channels(4, 4)
    with pytest.raises(UsageError, match=r"=8: Velocity of denoiser.channels=4 predicts 4 .* such as ddpm_v10$"):
        Velocity().check_channels(4, 8)


def test_masked_places_count_as_values_without_error() -> None:
    output, clean, noise, time = drawn(250)
    mask = torch.rand(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    errors, values = LEARNED.error(output, clean, noise, time, mask)
    kept = (mask[:, None] * (output[:, :3] - noise).square()).flatten(1).sum(1)
    assert values.tolist() == [54.0, 54.0]
    assert (errors > kept).all()
    assert LEARNED.error(output, clean, noise, time, torch.zeros_like(mask))[0].tolist() == [0.0, 0.0]
    # Without a learned variance only real places are counted.
    assert Epsilon().error(output[:, :3], clean, noise, time, mask)[1].tolist() == (3 * mask.flatten(1).sum(1)).tolist()


@pytest.mark.parametrize(
    "objective", [Epsilon(offset_noise=0.5), Velocity(offset_noise=0.5)], ids=["epsilon", "velocity"]
)
def test_offset_noise_is_one_number_a_channel_of_a_sample_in_any_batch(objective: Objective) -> None:
    def seeded(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    shape = (3, 4, 2, 3, 3)
    together = objective.draw_noise(shape, seeded(5, 6, 7))
    plain = Epsilon().draw_noise(shape, seeded(5, 6, 7))
    offset = together - plain
    torch.testing.assert_close(offset, offset[:, :, :1, :1, :1].expand(shape))
    assert offset[:, :, 0, 0, 0].unique().numel() == 12
    assert torch.equal(together[1:2], objective.draw_noise((1, *shape[1:]), seeded(6)))
    many = objective.draw_noise((4000, 2, 1, 1, 1), torch.Generator().manual_seed(0))
    assert many.var().item() == pytest.approx(1 + 0.5**2, rel=0.05)
    with pytest.raises(UsageError, match="offset_noise=-1: must be a number of at least 0"):
        Epsilon(offset_noise=-1)
