"""Which solver integrates an objective from noise to clean: those of diffusers, by name."""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from osp.checks import check_number
from osp.diffusion.discrete import Discrete, Epsilon, Velocity
from osp.diffusion.flow import TIME_SCALE, Flow
from osp.diffusion.noise import Generators, check_generators
from osp.diffusion.objective import Objective
from osp.errors import UsageError

# A class of diffusers and the options that make it this solver.
Entry = tuple[str, dict[str, Any]]
# Solvers that work with log(signal / noise), which does not exist where nothing of the signal is left, start here.
_MOST_NOISE = 1 - 1e-6
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
_DISCRETE_SOLVERS: dict[str, Entry] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),  # the bounds it would clip to are those of pixels
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", _SDE),
    "pndm": ("PNDMScheduler", {"timestep_spacing": "leading"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
# These mix predictions of several times, which must be of the noise:
_OF_NOISE = {"pndm"}
_FLOW_SOLVERS: dict[str, Entry] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "euler_ancestral": ("LTXEulerAncestralRFScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", _FLOW),
    "dpm++_sde": ("DPMSolverMultistepScheduler", _FLOW | _SDE),
    "unipc": ("UniPCMultistepScheduler", _FLOW),
}
# The classes of diffusers differ beside their options. These work with log(signal / noise):
_LOG_SNR = {"DPMSolverMultistepScheduler", "UniPCMultistepScheduler"}
# These step by whole numbers of the objective's steps, and keep no list of noise levels:
_WHOLE_STEPS = {"DDPMScheduler", "DDIMScheduler"}
# This one begins with a Runge-Kutta method, which calls the model four times for each of the first three intervals:
_RUNGE_KUTTA = "PNDMScheduler"
_LEAST_STEPS = 4  # of it
# As much of the clean latent may be left where it begins; the noise that sampling begins with has nothing of it.
_MOST_SIGNAL = 0.05
# These are for flows alone; their state is the model's input, and begins as the drawn noise:
_UNSCALED = {"FlowMatchEulerDiscreteScheduler", "LTXEulerAncestralRFScheduler", "FlowMatchHeunDiscreteScheduler"}
# Options that the objective decides; for a flow also all that shape its times.
_OWNED = {"prediction_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"}
_OWNED |= {"rescale_betas_zero_snr", "use_flow_sigmas", "flow_shift", "shift", "use_dynamic_shifting"}
_TIMES = {"timestep_spacing", "steps_offset", "invert_sigmas", "shift_terminal", "sigma_min", "sigma_max"}
_TIMES |= {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "final_sigmas_type"}


@dataclass(frozen=True)
class Solver:
    """How to sample: an objective, the name of a solver that can integrate it, and in how many steps.

    Discrete objectives take evenly spaced steps from the last one on ("trailing", arXiv 2305.08891), which v1.3 was
    published with: `Solver(Velocity(), "euler_ancestral", 100)`. v1.2 is `Solver(Epsilon(), "euler_ancestral", 100,
    options={"timestep_spacing": "linspace"})`, whose times are fractions of steps. "pndm" (arXiv 2202.09778; v1.0 and
    v1.1) takes multiples of a whole number, down to 0 ("leading"), and calls the model 9 times more than it has steps.

    A flow's sigmas are evenly spaced from 1 to 0 and shifted, by `shift` if it is given and as in training if not: v1.5
    is `Solver(Flow(), "euler", 50, shift=7)`.

    `options` go to the class of diffusers (`solver_order`, `timestep_spacing`, ...). Raises UsageError for a solver
    that does not exist or cannot integrate the objective, and for impossible settings.
    """

    objective: Objective
    name: str
    steps: int
    shift: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        flow = isinstance(self.objective, Flow)
        if self.name not in solvers(self.objective):
            known = self.name in (_FLOW_SOLVERS | _DISCRETE_SOLVERS)
            problem = f"cannot integrate {type(self.objective).__name__}" if known else "is not known"
            raise UsageError(f"solver: name={self.name} {problem}; choose {', '.join(solvers(self.objective))}")
        most = self.objective.steps if isinstance(self.objective, Discrete) else None
        check_number("solver: steps", self.steps, 1, most, whole=True)
        if self.shift is not None and not flow:
            raise UsageError(f"solver: shift={self.shift} is for flows; {type(self.objective).__name__} has none")
        check_number("solver: shift", self.shift, above=0, null="the objective's own")
        owned = (_OWNED | _TIMES if flow else _OWNED) & self.options.keys()
        if owned:
            raise UsageError(f"solver: options.{min(owned)} is decided by the objective, shift and steps; leave it out")

    def start(self, tokens: int | None = None, device: torch.device | str = "cpu") -> "Integration":
        """A new run of the solver, for latents on `device`.

        `tokens`, those of one frame, are for flows whose shift depends on them.

        Raises UsageError for options that the solver does not have, and for steps that it cannot take.
        """
        table = _FLOW_SOLVERS if isinstance(self.objective, Flow) else _DISCRETE_SOLVERS
        name, options = table[self.name]
        # Importing diffusers takes seconds, so it is imported only for sampling.
        kind = getattr(importlib.import_module("diffusers"), name)
        known = inspect.signature(kind.__init__).parameters.keys() - {"self"}
        settings = options | dict(self.options)
        if unknown := settings.keys() - known:
            raise UsageError(
                f"solver: {self.name} has no options.{min(unknown)}; it has "
                f"{', '.join(sorted(known - _OWNED - (_TIMES if isinstance(self.objective, Flow) else set())))}"
            )
        if isinstance(self.objective, Flow):
            return self._start_flow(kind(**settings), self.objective, tokens, device)
        assert isinstance(self.objective, Discrete)
        wanted = _discrete_settings(self.objective, "rescale_betas_zero_snr" in known)
        wanted = {key: wanted[key] for key in wanted.keys() & known}
        return self._start_discrete(kind(**wanted | settings), self.objective, device)

    def _start_flow(
        self, scheduler: Any, objective: Flow, tokens: int | None, device: torch.device | str
    ) -> "Integration":
        shift = objective.shift_at(tokens) if self.shift is None else self.shift
        sigmas = torch.from_numpy(objective.sigmas(self.steps, shift)).float()
        if type(scheduler).__name__ in _LOG_SNR:
            sigmas = sigmas.clamp(max=_MOST_NOISE)
        scheduler.set_timesteps(self.steps)
        # The schedulers differ in how they space their steps, and some do not start from noise alone: they get ours.
        if len(scheduler.timesteps) > self.steps:  # two calls of the model a step, but one for the last
            sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        sigmas = sigmas.to(device)
        scheduler.sigmas, scheduler.timesteps = sigmas, TIME_SCALE * sigmas[:-1]
        return Integration(scheduler, scheduler.timesteps)

    def _start_discrete(self, scheduler: Any, objective: Discrete, device: torch.device | str) -> "Integration":
        if type(scheduler).__name__ == _RUNGE_KUTTA:
            return self._start_runge_kutta(scheduler, objective, device)
        scheduler.set_timesteps(self.steps)
        times = scheduler.timesteps.float()
        distinct = times.unique_consecutive()
        # Rounding makes one step too many of some numbers (61, 103, ...).
        possible = len(distinct) == self.steps and bool((distinct >= 0).all())
        if type(scheduler).__name__ not in _WHOLE_STEPS:
            # Zero signal is cut off at 2^-12 to keep sigma finite. The levels just before have less, where they are
            # used: from some 250 steps on.
            sigmas = scheduler.sigmas.unique_consecutive()
            possible &= bool(sigmas.isfinite().all() and (sigmas.diff() < 0).all())
        else:
            # These step by a whole number, and end in noise where it does not fit.
            possible &= objective.steps % self.steps == 0
        if not possible:
            raise UsageError(
                f"solver: {self.name} cannot space steps={self.steps} evenly; choose others, say 50 or 100"
            )
        return Integration(scheduler, times.to(device))

    def _start_runge_kutta(self, scheduler: Any, objective: Discrete, device: torch.device | str) -> "Integration":
        check_number(f"solver: {self.name}: steps", self.steps, _LEAST_STEPS, whole=True)
        scheduler.set_timesteps(self.steps)
        times = scheduler.timesteps.float()
        signal = objective.levels(times[:1])[0].item()
        if signal > _MOST_SIGNAL:
            raise UsageError(
                f"solver: {self.name} in steps={self.steps} begins at time {times[0]:g}, where the noise is not all; "
                "choose others, say 50, 100 or 250"
            )
        return Integration(scheduler, times.to(device))


class Integration:
    """One run of a solver, from noise to clean; it keeps what multi-step solvers remember.

    `times` are those that the model is called at, `calls` (float32): one a step, or two for solvers of second order;
    nine more than steps for "pndm".
    """

    def __init__(self, scheduler: Any, times: Tensor) -> None:
        self.scheduler = scheduler
        self.times = times
        self._unscaled = type(scheduler).__name__ in _UNSCALED
        self._options = inspect.signature(scheduler.step).parameters.keys()
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    def first(self, noise: Tensor) -> Tensor:
        """Standard normal noise -> the solver's state to start from, in float32."""
        return noise.float() * (1.0 if self._unscaled else float(self.scheduler.init_noise_sigma))

    def model_input(self, state: Tensor, call: int) -> Tensor:
        """The noisy latent that the model is given at a call, of the state."""
        if self._unscaled:
            return state
        return self.scheduler.scale_model_input(state, self.scheduler.timesteps[call])

    def step(self, prediction: Tensor, state: Tensor, call: int, generators: Generators = None) -> Tensor:
        """The next state, from the prediction at this one, in float32. Solvers that add noise draw it from
        `generators`: with one for each sample, a sample gets the same noise in any batch."""
        options: dict[str, Any] = {"return_dict": False}
        if generators is not None and "generator" in self._options:
            if not isinstance(generators, torch.Generator):
                check_generators(generators, len(state))
                generators = list(generators)
            options["generator"] = generators
        return self.scheduler.step(prediction.float(), self.scheduler.timesteps[call], state, **options)[0]


def solvers(objective: Objective) -> list[str]:
    """The names of those that can integrate an objective."""
    if isinstance(objective, Flow):
        return list(_FLOW_SOLVERS)
    return [name for name in _DISCRETE_SOLVERS if name not in _OF_NOISE or isinstance(objective, Epsilon)]


def _discrete_settings(objective: Discrete, rescales: bool) -> dict[str, Any]:
    """The settings of the schedulers for an objective; each takes the settings that it knows."""
    settings: dict[str, Any] = {
        "num_train_timesteps": objective.steps,
        "prediction_type": "v_prediction" if isinstance(objective, Velocity) else "epsilon",
        "timestep_spacing": "trailing",
    }
    if rescales or not objective.zero_snr:
        betas = {"beta_start": objective.beta_start, "beta_end": objective.beta_end, "beta_schedule": "linear"}
        return settings | betas | {"rescale_betas_zero_snr": objective.zero_snr}
    # Those that do not rescale by themselves get the rescaled betas, cut off where the others do it.
    kept = objective.alphas_cumprod.clone()
    kept[-1] = 2**-24
    return settings | {"trained_betas": (1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])).tolist()}
