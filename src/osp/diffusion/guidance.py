"""Classifier-free guidance: away from what the model predicts without the prompt (arXiv 2207.12598)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from osp.diffusion.objective import Objective
from osp.errors import UsageError

# Noisy latent `B C T H W`, time `B` -> prediction `B C T H W`.
Predict = Callable[[Tensor, Tensor], Tensor]


def guided(conditional: Tensor, unconditional: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Two predictions `B C T H W` -> one, `scale` times as far from the unconditional one.

    `rescale` mixes in the same with the conditional one's standard deviation, which guidance inflates (arXiv
    2305.08891, section 3.4). Computed in float32.
    """
    wanted, without = conditional.float(), unconditional.float()
    result = without + scale * (wanted - without)
    if rescale:
        dims = tuple(range(1, result.ndim))
        # A constant prediction (an output layer that starts at zero) stays what it is.
        tiny = torch.finfo(torch.float32).tiny
        ratio = wanted.std(dims, keepdim=True) / result.std(dims, keepdim=True).clamp(min=tiny)
        result = rescale * (result * ratio) + (1 - rescale) * result
    return result.to(conditional.dtype)


def guided_prediction(
    model: Callable[..., Tensor],
    conditional: Mapping[str, Any],
    unconditional: Mapping[str, Any] | None = None,
    *,
    scale: float = 1.0,
    rescale: float = 0.0,
    together: bool = True,
) -> Predict:
    """The prediction to sample with, from a model `(latent, time, **inputs)` and the inputs with and without a prompt.

    `together` runs both as one batch of twice the size, without the prompt first; otherwise one after the other, in
    half the memory. A scale of 1 is no guidance and runs the model once. Raises UsageError for inputs that do not fit
    together, and where there is a scale but nothing without a prompt.
    """
    if scale == 1:
        return lambda latent, time: model(latent, time, **conditional)
    if unconditional is None:
        raise UsageError(f"guidance: scale={scale} needs the inputs without a prompt; only scale=1 does without")
    if not together:
        return lambda latent, time: guided(
            model(latent, time, **conditional), model(latent, time, **unconditional), scale, rescale
        )
    both = _joined(conditional, unconditional)

    def predict(latent: Tensor, time: Tensor) -> Tensor:
        without, wanted = model(torch.cat([latent, latent]), torch.cat([time, time]), **both).chunk(2)
        return guided(wanted, without, scale, rescale)

    return predict


def held_prediction(predict: Predict, objective: Objective, clean: Tensor, known: Tensor) -> Predict:
    """The same prediction, but right where the clean latent is `known`, so that sampling ends in it there.

    `clean` is `B C T H W`, `known` a mask that broadcasts to it.
    """
    return lambda latent, time: torch.where(known, objective.toward(clean, latent, time), predict(latent, time))


def _joined(conditional: Mapping[str, Any], unconditional: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of both, the unconditional ones first, as one batch."""
    joined: dict[str, Any] = {}
    for key in conditional.keys() | unconditional.keys():
        wanted, without = conditional.get(key), unconditional.get(key)
        if wanted is None and without is None:
            continue
        if wanted is None or without is None or wanted.shape != without.shape:
            raise UsageError(
                f"guidance: {key} {_shape(wanted)} with the prompt and {_shape(without)} without make no batch; pad "
                f"them to one shape, or set together=false"
            )
        joined[key] = torch.cat([without, wanted])
    return joined


def _shape(value: Tensor | None) -> str:
    return "(missing)" if value is None else str(tuple(value.shape))
