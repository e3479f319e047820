"""From noise to a latent: a prediction, a solver, and nothing else."""

from collections.abc import Callable

import torch
from torch import Tensor

from osp.diffusion.guidance import Predict
from osp.diffusion.noise import Generators
from osp.diffusion.solver import Solver

# Calls of the model done, calls in all, and the solver's state after the last one.
Progress = Callable[[int, int, Tensor], None]


@torch.no_grad()
def sample(
    predict: Predict,
    noise: Tensor,
    solver: Solver,
    generators: Generators = None,
    *,
    tokens: int | None = None,
    callback: Progress | None = None,
) -> Tensor:
    """Standard normal noise `B C T H W` -> a latent of the same shape and type.

    `predict` takes the noisy latent in the noise's type and the time `B`; the solver works in float32. Solvers that
    add noise draw it from `generators`: with one for each sample, the same seeds give the same latents in any batch,
    if the model does. `tokens`, those of one frame, set the shift of flows that take it from the resolution.
    """
    run = solver.start(tokens, noise.device)
    state = run.first(noise)
    for call, time in enumerate(run.times):
        prediction = predict(run.model_input(state, call).to(noise.dtype), time.expand(len(noise)))
        state = run.step(prediction, state, call, generators)
        if callback is not None:
            callback(call + 1, len(run.times), state)
    return state.to(noise.dtype)
