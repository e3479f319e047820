"""The same weights under another schedule: how v1.5 goes from dense to sparse and back, and v1.3 gets conditions."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from osp.denoiser.denoiser import Denoiser
from osp.denoiser.schedule import Stage, make_stages
from osp.errors import UsageError

Model = TypeVar("Model", bound=Denoiser)


def restage(model: Model, stages: Sequence[Stage | Mapping[str, Any]] | None = None, **settings: Any) -> Model:
    """A denoiser with the weights of `model`, which it shares, and other stages (None: the same).

    Without memory it comes of one without; what is new is then still to be `reset_parameters` in `neutral_parts`.

    `settings` may change others that leave the blocks as they are: `long_skips`, `frame_channels`. What is new
    starts without effect; what has no place any more is dropped. Long skips stay if the stages have as many blocks as
    before: to make a sparse model dense and keep them, make each of its stages dense. Raises UsageError if the number
    of blocks or the shape of a weight would change.
    """
    made = model.stages if stages is None else make_stages(stages)
    if not model.takes_stages and made != model.stages:
        raise UsageError(f"stages: {type(model).__name__} has one schedule, space and time in turn; leave them out")
    blocks = sum(stage.blocks for stage in made)
    if blocks != len(model.blocks):
        raise UsageError(f"stages have {blocks} blocks, but the model has {len(model.blocks)}")
    with torch.device("meta"):
        chosen = {"stages": made} if model.takes_stages else {}
        new = type(model)(**(model.settings | settings | chosen))
    weights, wanted = model.state_dict(keep_vars=True), new.state_dict()
    # A long skip leads from one stage to another: with other stages it would be another skip.
    if [stage.blocks for stage in made] != [stage.blocks for stage in model.stages]:
        weights = {key: value for key, value in weights.items() if "_skips." not in key}
    for module in new.neutral_parts():
        module.to_empty(device=model.out.weight.device).to(model.out.weight.dtype)
        module.reset_parameters()
    neutral = {id(value) for module in new.neutral_parts() for value in module.state_dict(keep_vars=True).values()}
    added = {key for key, value in new.state_dict(keep_vars=True).items() if id(value) in neutral}
    for key, value in wanted.items():
        if weights[key].shape != value.shape if key in weights else key not in added:
            raise UsageError(f"{settings} would change {key}; only the schedule, skips and conditions may change")
    learned = {key: value.requires_grad for key, value in model.named_parameters()}
    new.load_state_dict({key: value for key, value in weights.items() if key in wanted}, strict=False, assign=True)
    for key, value in new.named_parameters():
        value.requires_grad_(learned.get(key, True))  # loading sets it, on the tensors that are shared
    new.recompute_every = model.recompute_every
    return new.train(model.training)
