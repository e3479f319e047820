"""Every solver integrates every objective that it is offered for."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from osp.diffusion import Epsilon, Flow, Objective, Predict, Solver, Velocity, draw_normal, sample, solvers
from osp.errors import UsageError

OBJECTIVES: dict[str, Objective] = {
    "epsilon": Epsilon(),
    "velocity": Velocity(),
    "velocity_plain": Velocity(zero_terminal_snr=False),
    "flow": Flow(shift=3.0),
}
CASES = [(kind, name) for kind, objective in OBJECTIVES.items() for name in solvers(objective)]
STOCHASTIC = ("euler_ancestral", "ddpm", "dpm++_sde")
MEAN, STD = 0.7, 0.4


def ideal(objective: Objective, mean: float | Tensor = MEAN, std: float = STD) -> Predict:
    """What a perfect model predicts where latents are Gaussian: the expected clean latent and noise, as a target."""

    def predict(latent: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = objective.along(time, latent)
        surplus = (latent.float() - alpha * mean) / (alpha.square() * std**2 + sigma.square())
        return objective.target(mean + alpha * std**2 * surplus, sigma * surplus, time).to(latent.dtype)

    return predict


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_predictor_that_knows_the_latent_recovers_it(kind: str, name: str) -> None:
    objective = OBJECTIVES[kind]
    clean = draw_normal((2, 4, 3, 4, 4), seeded(1, 2))
    noise = draw_normal(clean.shape, seeded(3, 4))
    # The last call of pndm, at time 0, moves nothing, so that the noise of that time stays, as published.
    left = objective.levels(torch.tensor([0]))[1].item() * noise.abs().max().item() if name == "pndm" else 0.0
    for steps in (10, 50) if name == "pndm" else (1, 2, 10, 50):
        got = sample(ideal(objective, clean, 0.0), noise, Solver(objective, name, steps), seeded(5, 6))
        torch.testing.assert_close(got, clean, rtol=0, atol=2e-3 + left, msg=lambda m, s=steps: f"{s} steps: {m}")


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_noise_becomes_the_latents_that_were_trained_on(kind: str, name: str) -> None:
    # For Gaussian latents the solution is known: without added noise, noise z becomes mean + std * z.
    objective = OBJECTIVES[kind]
    noise = draw_normal((2, 4, 5, 16, 16), seeded(1, 2))
    got = sample(ideal(objective), noise, Solver(objective, name, 100), seeded(3, 4))
    assert got.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert got.std().item() == pytest.approx(STD, abs=0.04)
    if name not in STOCHASTIC:
        # Methods of first order come as near as this; those of second order nearer by far.
        bar = 0.1 if name in ("euler", "ddim") else 0.02
        torch.testing.assert_close(got, MEAN + STD * noise, rtol=0, atol=bar)


@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if case[1] in STOCHASTIC])
def test_a_sample_gets_the_same_noise_in_any_batch(kind: str, name: str) -> None:
    solver = Solver(OBJECTIVES[kind], name, 10)
    predict = ideal(solver.objective)
    together = sample(predict, draw_normal((3, 4, 2, 4, 4), seeded(1, 2, 3)), solver, seeded(4, 5, 6))
    alone = sample(predict, draw_normal((1, 4, 2, 4, 4), seeded(2)), solver, seeded(5))
    assert torch.equal(together[1:2], alone)
    other = sample(predict, draw_normal((1, 4, 2, 4, 4), seeded(2)), solver, seeded(7))
    assert not torch.equal(other, alone)
    with pytest.raises(UsageError, match="2 random generators do not fit a batch of 1"):
        sample(predict, draw_normal((1, 4, 2, 4, 4), seeded(2)), solver, seeded(5, 6))


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_model_sees_the_times_that_it_was_trained_at(kind: str) -> None:
    objective = OBJECTIVES[kind]
    seen: list[float] = []

    def predict(latent: Tensor, time: Tensor) -> Tensor:
        assert time.shape == latent.shape[:1]
        seen.append(time[0].item())
        return ideal(objective)(latent, time)

    sample(predict, torch.zeros(2, 4, 2, 4, 4), Solver(objective, "euler", 4))
    sigmas = [3 * sigma / (1 + 2 * sigma) for sigma in (1, 0.75, 0.5, 0.25)]
    expected = [1000 * sigma for sigma in sigmas] if kind == "flow" else [999, 749, 499, 249]
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_noisy_latent_is_as_noisy_as_in_training(kind: str, name: str) -> None:
    # A model that knows the clean latent is given, at each call, that latent with the noise of the call's time.
    objective, clean = OBJECTIVES[kind], torch.full((1, 4, 9, 16, 16), 2.0)

    def predict(latent: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = objective.along(time, latent)
        assert latent.mean().item() == pytest.approx(2 * alpha.item(), abs=0.05)
        assert latent.std().item() == pytest.approx(sigma.item(), abs=0.05)
        return ideal(objective, clean, 0.0)(latent, time)

    sample(predict, draw_normal(clean.shape, seeded(1)), Solver(objective, name, 20), seeded(2))


def test_flow_takes_its_shift_from_the_solver_or_the_objective() -> None:
    assert Solver(Flow(), "euler", 50, shift=7).start().times[49].item() == pytest.approx(125)
    assert Solver(Flow(7.0), "heun", 50).start().times[-1].item() == pytest.approx(125)
    assert Solver(Flow(), "euler", 2).start(256).times[1].item() == pytest.approx(622.459)
    with pytest.raises(UsageError, match="give tokens, or a shift"):
        Solver(Flow(), "euler", 2).start()


def test_types_progress_and_options() -> None:
    types: set[torch.dtype] = set()
    told: list[tuple[int, int, torch.dtype]] = []

    def predict(latent: Tensor, time: Tensor) -> Tensor:
        types.update({latent.dtype, time.dtype})
        return ideal(Velocity())(latent, time)

    noise = draw_normal((1, 4, 2, 4, 4), seeded(1)).bfloat16()
    solver = Solver(Velocity(), "heun", 3)
    got = sample(predict, noise, solver, callback=lambda *about: told.append((*about[:2], about[2].dtype)))
    assert got.dtype == torch.bfloat16
    assert types == {torch.bfloat16, torch.float32}
    assert told == [(i, 5, torch.float32) for i in range(1, 6)]  # two calls a step, but one for the last
    third = Solver(Velocity(), "dpm++", 20, options={"solver_order": 3}).start()
    assert third.scheduler.config.solver_order == 3
    assert third.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((Flow(), "ddim", 10), "name=ddim cannot integrate Flow; choose euler, euler_ancestral, heun"),
        ((Velocity(), "rk45", 10), "name=rk45 is not known; choose euler"),
        ((Velocity(), "euler", 0), "steps=0: must be a whole number of at least 1"),
        ((Velocity(), "euler", 1001), "steps=1001: must be .* of at most 1000"),
        ((Velocity(), "euler", 10, 3.0), "shift=3.0 is for flows; Velocity has none"),
        ((Flow(), "euler", 10, 0.0), "shift=0.0: must be a number above 0"),
        ((Velocity(), "euler", 10, None, {"prediction_type": "epsilon"}), "options.prediction_type is decided by"),
        ((Flow(1.0), "dpm++", 10, None, {"use_karras_sigmas": True}), "options.use_karras_sigmas is decided by"),
        ((Velocity(), "euler", 10, None, {"order": 2}), "euler has no options.order; it has .*timestep_spacing"),
        ((Epsilon(), "pndm", 3), "pndm: steps=3: must be a whole number of at least 4"),
        ((Epsilon(), "pndm", 334), "pndm in steps=334 begins at time 666, where .* say 50, 100 or 250"),
        ((Velocity(), "pndm", 50), "name=pndm cannot integrate Velocity; choose euler"),
        ((Velocity(), "euler", 61), "euler cannot space steps=61 evenly"),
        ((Velocity(), "dpm++", 500), "dpm.. cannot space steps=500 evenly"),
        ((Velocity(), "ddim", 30), "ddim cannot space steps=30 evenly"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: Any, message: str) -> None:
    objective, name, steps, shift, options = (*settings, None, {})[:5] if len(settings) < 4 else (*settings, {})[:5]
    with pytest.raises(UsageError, match=message):
        Solver(objective, name, steps, shift, options).start()


def test_diffusers_is_imported_only_to_sample() -> None:
    code = "import sys, osp.diffusion as d; d.Solver(d.Flow(), 'euler', 2); sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
