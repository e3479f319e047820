"""Objectives, samplers and guidance give the published numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from osp.diffusion import Flow, Solver, Velocity, guided, guided_prediction, sample, squared_error
from osp.diffusion.flow import shifted

GOLDEN = Path(__file__).parent.parent / "golden"
BAR = 1e-5  # the recorded cases state no tolerance of their own
V13 = ["a_100", "c_leading_20_nozsnr"]
V15 = ["a_shift7_50", "b_dynamic_20"]


def load_case(kind: str, case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    settings = json.loads((GOLDEN / kind / f"{case}.json").read_text())
    return settings, load_file(GOLDEN / kind / f"{case}.safetensors")


def close(got: Tensor, expected: Tensor, relative: float = 0.0) -> None:
    torch.testing.assert_close(got, expected, rtol=relative, atol=BAR)


def v13(case: str) -> tuple[Solver, dict[str, Tensor]]:
    settings, tensors = load_case("sched_v13", case)
    config = settings["config"]
    objective = Velocity(zero_terminal_snr=config["rescale_betas_zero_snr"])
    options = {"timestep_spacing": config["timestep_spacing"]}
    return Solver(objective, "euler_ancestral", config["num_inference_steps"], options=options), tensors


def v15(case: str) -> tuple[Flow, int, dict[str, Any], dict[str, Tensor]]:
    settings, tensors = load_case("sched_v15", case)
    return Flow(shift=settings["config"].get("shift")), settings["image_seq_len"], settings["config"], tensors


@pytest.mark.parametrize("case", V13)
def test_training_targets_of_v13(case: str) -> None:
    solver, tensors = v13(case)
    objective = solver.objective
    assert isinstance(objective, Velocity)
    close(objective.betas.float(), tensors["out/betas_train"])
    close(objective.alphas_cumprod.float(), tensors["out/alphas_cumprod_train"])
    time = torch.tensor([0, 250, 999])
    clean, noise = tensors["in/x0"], tensors["in/train_noise"]
    close(objective.corrupt(clean, noise, time), tensors["out/train_xt"])
    close(objective.target(clean, noise, time), tensors["out/train_v"])
    close(objective.weight(time), tensors["out/train_minsnr_weight"])


@pytest.mark.parametrize("case", V13)
def test_steps_of_v13(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as ancestral

    solver, tensors = v13(case)
    run = solver.start()
    close(run.times, tensors["out/timesteps"])
    # The largest sigma is 4096, where neighbours in float32 are 2e-4 to 5e-4 apart.
    close(run.scheduler.sigmas, tensors["out/sigmas"], relative=1e-6)
    close(run.first(torch.ones(1)), tensors["out/init_noise_sigma"], relative=1e-6)
    monkeypatch.setattr(ancestral, "randn_tensor", lambda *_, **__: tensors["in/noise"])
    for key in sorted(tensors):
        if not key.startswith("out/prev_"):
            continue
        call = int(key.removeprefix("out/prev_"))
        sigma = tensors["out/sigmas"][call]
        state = tensors["in/x"] * (sigma if call == 0 else (sigma.square() + 1).sqrt())
        run = solver.start()
        run.scheduler.set_begin_index(call)
        noisy = run.model_input(state, call)
        close(noisy, tensors[f"out/scaled_{call}"])
        # The first state is in the thousands: float32 keeps 7 digits of it, in the published sampler too.
        bar = max(BAR, 2e-7 * state.abs().max().item())
        torch.testing.assert_close(run.step(tensors["in/v"], state, call), tensors[key], rtol=0, atol=bar)
        if call:  # the sampler cuts the signal of the first step, which is none, off at 2^-12
            clean, _ = solver.objective.recover(noisy, tensors["in/v"], run.times[call, None])
            close(clean, tensors[f"out/x0_{call}"])


@pytest.mark.parametrize("case", V15)
def test_training_targets_of_v15(case: str) -> None:
    objective, tokens, _, tensors = v15(case)
    sigma = shifted(tensors["in/train_sigma_u"], objective.shift_at(tokens))
    close(sigma, tensors["out/train_sigma_shifted"])
    time = 1000 * sigma
    clean, noise = tensors["in/x0"], tensors["in/noise"]
    close(objective.corrupt(clean, noise, time), tensors["out/train_xt"])
    target = objective.target(clean, noise, time)
    for name, mask in (("full", None), ("masked", tensors["in/mask"])):
        errors, values = squared_error(tensors["in/v_text"], target, objective.weight(time), mask)
        close((errors.sum() / values.sum())[None], tensors[f"out/train_loss_{name}"])


@pytest.mark.parametrize("case", V15)
def test_guidance_of_v15(case: str) -> None:
    _, _, config, tensors = v15(case)
    scale, rescale = config["guidance_scale"], config["guidance_rescale"]
    wanted, without = tensors["in/v_text"], tensors["in/v_uncond"]
    close(guided(wanted, without, scale), tensors["out/cfg"])
    close(guided(wanted, without, scale, rescale), tensors["out/cfg_rescaled"])


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("case", V15)
def test_sampling_of_v15(case: str, together: bool) -> None:
    objective, tokens, config, tensors = v15(case)
    solver = Solver(objective, "euler", config["num_inference_steps"])
    run = solver.start(tokens)
    close(run.scheduler.sigmas, tensors["out/sigmas"])
    close(run.times, tensors["out/timesteps"], relative=1e-6)
    for key in sorted(tensors):
        if key.startswith("out/step_"):
            call = int(key.removeprefix("out/step_"))
            run = solver.start(tokens)
            run.scheduler.set_begin_index(call)
            close(run.step(tensors["out/cfg_rescaled"], tensors["in/latents"], call), tensors[key])

    def model(latent: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        mixed = torch.einsum("dc,bcthw->bdthw", tensors["in/W"], latent)
        return (0.5 + time / 2000).view(-1, 1, 1, 1, 1) * mixed + prompt.view(-1, 1, 1, 1, 1)

    without, wanted = tensors["in/prompt"].chunk(2)
    predict = guided_prediction(
        model,
        {"prompt": wanted},
        {"prompt": without},
        scale=config["guidance_scale"],
        rescale=config["guidance_rescale"],
        together=together,
    )
    close(sample(predict, tensors["in/latents"], solver, tokens=tokens), tensors["out/sample"])
