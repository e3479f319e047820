"""The losses and solvers of v1.0 to v1.2 against recorded cases."""

import re
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from osp.audit.case import Case, Comparison, Unsupported, difference
from osp.diffusion import Epsilon, Integration, Solver, discrete, squared_error

BAR = 1e-5  # where a case states no tolerance: of the largest value of a state, else of the values themselves
_SNR_SHARE = 3e-4  # the published products of alphas are float32
_TIMES, _SIGMAS = 1e-4, 3e-4
_SOLVERS = {"pndm": ("pndm", {}), "eulera": ("euler_ancestral", {"timestep_spacing": "linspace"})}


def run_older(case: Case) -> Iterator[Comparison]:
    """A run of a solver, or the losses of training, as the case's settings say."""
    config = case.setting("config")
    if "kind" in config:
        yield from _run_solver(case)
    elif "learn_sigma" in config:
        yield from _run_learned_variance(case)
    elif "snr_gamma" in config:
        yield from _run_training(case)
    else:
        raise Unsupported(f"config {sorted(config)}: is neither a solver's nor that of a loss which is built")


def _run_learned_variance(case: Case) -> Iterator[Comparison]:
    objective = Epsilon(learned_variance=case.setting("config", "learn_sigma"), **_betas(case))
    clean, noise, time, output = (case.tensor(f"in/{key}") for key in ("x_start", "noise", "t", "model_output"))
    mask = case.tensor("in/attention_mask") if case.setting("config").get("masked") else None
    yield case.compare("x_t", objective.corrupt(clean, noise, time), BAR)
    errors, values = objective.error(output, clean, noise, time, mask)
    yield case.compare("loss", errors / values, case.bar("loss"))
    plain, _ = squared_error(objective.predicted(output), noise, mask=mask)
    yield case.compare("mse", plain / values, case.bar("mse"))
    if objective.learned_variance:
        yield case.compare("vb", (errors - plain) / values, case.bar("vb"))


def _run_training(case: Case) -> Iterator[Comparison]:
    config = case.setting("config")
    objective = Epsilon(min_snr=config["snr_gamma"], offset_noise=config.get("noise_offset", 0.0), **_betas(case))
    clean, time = case.tensor("in/x0"), case.tensor("in/t")
    drawn = [case.tensor("in/noise"), *([case.tensor("in/offset")] if objective.offset_noise else [])]
    with (
        patch.object(discrete, "draw_normal", side_effect=drawn[1:]),
        patch("osp.diffusion.objective.draw_normal", return_value=drawn[0]),
    ):
        noise = objective.draw_noise(clean.shape)
    yield case.compare("x_t", objective.corrupt(clean, noise, time), BAR)
    yield case.compare("target", objective.target(clean, noise, time), BAR)
    yield case.compare("snr", objective.clipped_snr(time)[0], BAR, relative=_SNR_SHARE)
    yield case.compare("weight", objective.weight(time), BAR, relative=_SNR_SHARE)
    masks = {"loss": None} | ({"loss_masked": case.tensor("in/mask")} if "in/mask" in case.tensors else {})
    for name, mask in masks.items():
        errors, values = objective.error(case.tensor("in/prediction"), clean, noise, time, mask)
        yield case.compare(name, (errors.sum() / values.sum())[None], BAR)


def _run_solver(case: Case) -> Iterator[Comparison]:
    kind = case.setting("config", "kind")
    if kind not in _SOLVERS:
        raise Unsupported(f"kind={kind}; only {', '.join(_SOLVERS)} are built")
    name, options = _SOLVERS[kind]
    objective = Epsilon(**_betas(case))
    solver = Solver(objective, name, case.setting("config", "num_inference_steps"), options=options)
    run = solver.start(device=case.device)
    yield case.compare("timesteps", run.times, 0 if name == "pndm" else _TIMES)
    yield case.compare("alphas_cumprod", objective.alphas_cumprod.float(), BAR)
    yield case.compare("init_noise_sigma", run.first(torch.ones(1, device=case.device)), BAR, relative=_SIGMAS)
    if "out/sigmas" in case.tensors:
        yield case.compare("sigmas", run.scheduler.sigmas, BAR, relative=_SIGMAS)
    yield from _states(case, run)


def _states(case: Case, run: Integration) -> Iterator[Comparison]:
    """The states that are recorded, of a run whose model is a mixture of the state and of one tensor."""
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as ancestral

    def drawn(*_: object, **__: object) -> Tensor:
        return case.tensor("in/noise")

    state, recorded = run.first(case.tensor("in/x")), _recorded_calls(case)
    for call in range(len(run.times)):
        prediction = 0.6 * run.model_input(state, call) + 0.3 * case.tensor("in/v")
        with patch.object(ancestral, "randn_tensor", drawn):
            state = run.step(prediction, state, call)
        if call in recorded:
            wanted = case.tensor(f"out/state_{call}")
            largest = wanted.abs().max()
            yield difference(f"state_{call}", state / largest, wanted / largest, BAR)


def _recorded_calls(case: Case) -> set[int]:
    return {int(match[1]) for key in case.tensors if (match := re.fullmatch(r"out/state_(\d+)", key))}


def _betas(case: Case) -> dict[str, Any]:
    """Settings of the schedule, where the case says another than the usual. Raises Unsupported for another form."""
    config = case.setting("config")
    steps = {"steps": config["steps"]} if "steps" in config else {}
    if "betas" not in config:
        return steps
    number = r"([\d.]+(?:e-?\d+)?)"
    if (match := re.fullmatch(rf"linear {number}\.\.{number}", config["betas"])) is None:
        raise Unsupported(f"betas={config['betas']}; only linear ones are built")
    return steps | {"beta_start": float(match[1]), "beta_end": float(match[2])}
