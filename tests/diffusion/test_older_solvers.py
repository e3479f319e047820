"""PNDM and the ancestral sampler with fractional times against their formulas in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from osp.diffusion import Epsilon, Solver, draw_normal, sample

KEPT = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
Model = Callable[[np.ndarray, float], np.ndarray]


def wave(latent: np.ndarray, time: float) -> np.ndarray:
    """A model that is not linear, so that each call counts."""
    return np.sin(1.3 * latent + time / 300) + 0.2 * latent


def predict(latent: Tensor, time: Tensor) -> Tensor:
    return torch.from_numpy(wave(latent.double().numpy(), float(time[0]))).float()


def moved(x: np.ndarray, noise: np.ndarray, time: int, to: int) -> np.ndarray:
    """The latent at another time, by the transfer of PNDM (Liu et al., arXiv 2202.09778, equation 11)."""
    now, then = KEPT[time], KEPT[max(to, 0)]
    share = now * np.sqrt(1 - then) + np.sqrt(now * (1 - now) * then)
    return np.sqrt(then / now) * x - (then - now) * noise / share


def pndm(model: Model, x: np.ndarray, steps: int) -> tuple[np.ndarray, list[int]]:
    """The last state, and the times of all calls."""
    stride = 1000 // steps
    half, called, newest = stride // 2, [], []

    def call(latent: np.ndarray, time: int) -> np.ndarray:
        called.append(time)
        return model(latent, time)

    times = [(steps - 1 - k) * stride for k in range(steps)]
    for time in times[:3]:  # Runge-Kutta
        to = time - stride
        first = call(x, time)
        second = call(moved(x, first, time, time - half), to + half)
        third = call(moved(x, second, time, to + half), to + half)
        fourth = call(moved(x, third, time, to), to)
        x = moved(x, (first + 2 * second + 2 * third + fourth) / 6, time, to)
        newest.append(first)
    for time in times[3:]:  # linear multistep
        newest.append(call(x, time))
        last = newest[-1:-5:-1]
        x = moved(x, sum(w * e for w, e in zip((55, -59, 37, -9), last, strict=True)) / 24, time, time - stride)
    return x, called


def ancestral(model: Model, x: np.ndarray, steps: int, noises: list[np.ndarray]) -> tuple[np.ndarray, list[float]]:
    times = np.linspace(0, 999, steps)[::-1]
    levels = np.interp(times, np.arange(1000), np.sqrt((1 - KEPT) / KEPT))
    x = x * levels[0]
    for time, sigma, to, noise in zip(times, levels, [*levels[1:], 0.0], noises, strict=True):
        e = model(x / np.sqrt(sigma**2 + 1), time)
        up = np.sqrt(to**2 * (sigma**2 - to**2) / sigma**2)
        x = x + e * (np.sqrt(to**2 - up**2) - sigma) + up * noise
    return x, list(times)


@pytest.mark.parametrize("steps", [5, 7, 50, 150])
def test_pndm_is_runge_kutta_for_three_intervals_and_then_linear_multistep(steps: int) -> None:
    noise = draw_normal((1, 4, 2, 3, 3), torch.Generator().manual_seed(1))
    wanted, called = pndm(wave, noise.double().numpy(), steps)
    told: list[tuple[int, int]] = []
    solver = Solver(Epsilon(), "pndm", steps)
    assert solver.start().times.tolist() == called
    got = sample(predict, noise, solver, callback=lambda call, calls, _: told.append((call, calls)))
    # Progress counts the calls of the model.
    assert told == [(call + 1, steps + 9) for call in range(steps + 9)]
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("steps", [3, 61, 100])
def test_the_ancestral_sampler_takes_linearly_spaced_times_between_steps(steps: int) -> None:
    noise, seed = draw_normal((1, 4, 2, 3, 3), torch.Generator().manual_seed(1)), 7
    draw = torch.Generator().manual_seed(seed)
    noises = [torch.randn(noise.shape, generator=draw).double().numpy() for _ in range(steps)]
    wanted, times = ancestral(wave, noise.double().numpy(), steps, noises)
    solver = Solver(Epsilon(), "euler_ancestral", steps, options={"timestep_spacing": "linspace"})
    assert solver.start().times.tolist() == pytest.approx(times, rel=1e-6)
    assert solver.start().first(torch.ones(1)).item() == pytest.approx(157.407, rel=1e-4)
    got = sample(predict, noise, solver, [torch.Generator().manual_seed(seed)])
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


def test_between_two_steps_the_noise_is_as_large_as_the_solver_has_it() -> None:
    objective = Epsilon()
    solver = Solver(objective, "euler_ancestral", 100, options={"timestep_spacing": "linspace"})
    run = solver.start()
    alpha, sigma = objective.levels(run.times)
    torch.testing.assert_close(sigma / alpha, run.scheduler.sigmas[:-1].float(), rtol=3e-4, atol=0)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(100), rtol=0, atol=1e-6)
    whole = torch.arange(1000)
    for own, same in zip(objective.levels(whole), objective.levels(whole.float()), strict=True):
        assert torch.equal(own, same)
