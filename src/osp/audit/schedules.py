"""Objectives, solvers and guidance against recorded cases."""

from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor

from osp.audit.case import Case, Comparison, Unsupported, difference
from osp.diffusion import Flow, Solver, Velocity, guided, guided_prediction, sample, squared_error
from osp.diffusion.flow import shifted

BAR = 1e-5  # the recorded cases state no tolerance of their own
# Settings are those of diffusers' class, whose defaults count where a case is silent.
_BETAS = {"num_train_timesteps": "steps", "beta_start": "beta_start", "beta_end": "beta_end"}
_ONE_VALUE = {"prediction_type": "v_prediction", "beta_schedule": "linear"}
_TRAINING_TIMES = (0, 250, 999)  # of the three recorded samples


def run_v13(case: Case) -> Iterator[Comparison]:
    """Training targets of v1.3, and steps of its sampler."""
    config = case.setting("config")
    for name, known in _ONE_VALUE.items():
        if config.get(name, known) != known:
            raise Unsupported(f"{name}={config[name]}; only {known} is built")
    betas = {ours: config[theirs] for theirs, ours in _BETAS.items() if theirs in config}
    objective = Velocity(zero_terminal_snr=config.get("rescale_betas_zero_snr", False), **betas)
    options = {"timestep_spacing": config.get("timestep_spacing", "linspace")}
    solver = Solver(objective, "euler_ancestral", case.setting("config", "num_inference_steps"), options=options)
    yield case.compare("betas_train", objective.betas.float(), BAR)
    yield case.compare("alphas_cumprod_train", objective.alphas_cumprod.float(), BAR)
    time = torch.tensor(case.settings.get("train_timesteps", _TRAINING_TIMES), device=case.device)
    clean, noise = case.tensor("in/x0"), case.tensor("in/train_noise")
    yield case.compare("train_xt", objective.corrupt(clean, noise, time), BAR)
    yield case.compare("train_v", objective.target(clean, noise, time), BAR)
    yield case.compare("train_minsnr_weight", objective.weight(time), BAR)
    yield from _ancestral_steps(case, solver)


def _ancestral_steps(case: Case, solver: Solver) -> Iterator[Comparison]:
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as ancestral

    run = solver.start(device=case.device)
    yield case.compare("timesteps", run.times, BAR)
    # The largest sigma is 4096, where neighbours in float32 are 2e-4 to 5e-4 apart.
    yield case.compare("sigmas", run.scheduler.sigmas, BAR, relative=1e-6)
    yield case.compare("init_noise_sigma", run.first(torch.ones(1, device=case.device)), BAR, relative=1e-6)
    prediction = case.tensor("in/v")
    for call in sorted(map(int, case.below("out/prev_"))):
        sigma = case.tensor("out/sigmas")[call]
        state = case.tensor("in/x") * (sigma if call == 0 else (sigma.square() + 1).sqrt())
        run = solver.start(device=case.device)
        run.scheduler.set_begin_index(call)
        noisy = run.model_input(state, call)
        yield case.compare(f"scaled_{call}", noisy, BAR)
        with patch.object(ancestral, "randn_tensor", lambda *_, **__: case.tensor("in/noise")):
            after = run.step(prediction, state, call)
        # The first state is in the thousands: float32 keeps 7 digits of it, in the published sampler too.
        yield case.compare(f"prev_{call}", after, max(BAR, 2e-7 * state.abs().max().item()))
        if call:  # the sampler cuts the signal of the first step, which is none, off at 2^-12
            clean, _ = solver.objective.recover(noisy, prediction, run.times[call, None])
            yield case.compare(f"x0_{call}", clean, BAR)


def run_v15(case: Case) -> Iterator[Comparison]:
    """Training targets, guidance, steps and a whole sampling of v1.5."""
    config, tokens = case.setting("config"), case.setting("image_seq_len")
    if config.get("use_linear_quadratic_schedule"):
        raise Unsupported("use_linear_quadratic_schedule=true")
    objective = Flow(shift=None if config.get("use_dynamic_shifting") else case.setting("config", "shift"))
    sigma = shifted(case.tensor("in/train_sigma_u"), objective.shift_at(tokens))
    yield case.compare("train_sigma_shifted", sigma, BAR)
    time, clean, noise = 1000 * sigma, case.tensor("in/x0"), case.tensor("in/noise")
    yield case.compare("train_xt", objective.corrupt(clean, noise, time), BAR)
    target = objective.target(clean, noise, time)
    for name, mask in (("full", None), ("masked", case.tensor("in/mask"))):
        errors, values = squared_error(case.tensor("in/v_text"), target, objective.weight(time), mask)
        yield case.compare(f"train_loss_{name}", (errors.sum() / values.sum())[None], BAR)
    yield from _flow_steps(case, Solver(objective, "euler", case.setting("config", "num_inference_steps")), tokens)


def _flow_steps(case: Case, solver: Solver, tokens: int | None) -> Iterator[Comparison]:
    scale, rescale = case.setting("config", "guidance_scale"), case.setting("config").get("guidance_rescale", 0.0)
    wanted, without = case.tensor("in/v_text"), case.tensor("in/v_uncond")
    yield case.compare("cfg", guided(wanted, without, scale), BAR)
    yield case.compare("cfg_rescaled", guided(wanted, without, scale, rescale), BAR)
    run = solver.start(tokens, case.device)
    yield case.compare("sigmas", run.scheduler.sigmas, BAR)
    yield case.compare("timesteps", run.times, BAR, relative=1e-6)
    for call in sorted(map(int, case.below("out/step_"))):
        run = solver.start(tokens, case.device)
        run.scheduler.set_begin_index(call)
        after = run.step(case.tensor("out/cfg_rescaled"), case.tensor("in/latents"), call)
        yield case.compare(f"step_{call}", after, BAR)

    def model(latent: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        mixed = torch.einsum("dc,bcthw->bdthw", case.tensor("in/W"), latent)
        return (0.5 + time / 2000).view(-1, 1, 1, 1, 1) * mixed + prompt.view(-1, 1, 1, 1, 1)

    no_prompt, prompt = case.tensor("in/prompt").chunk(2)
    for together in (True, False):
        predict = guided_prediction(
            model, {"prompt": prompt}, {"prompt": no_prompt}, scale=scale, rescale=rescale, together=together
        )
        made = sample(predict, case.tensor("in/latents"), solver, tokens=tokens)
        way = "together" if together else "one by one"
        yield difference(f"sample, {way}", made, case.tensor("out/sample"), BAR)
