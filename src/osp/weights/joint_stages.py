"""The stages that the published denoiser of v1.5 can hold, and models of ours brought into them."""

from collections.abc import Sequence
from dataclasses import replace

from osp.denoiser import JointTransformer, Stage, restage
from osp.errors import UsageError

_FEWEST = 3
_RULE = "the published code of v1.5 takes an odd number of stages, three at least, each of an even number of blocks"


def held(model: JointTransformer) -> JointTransformer:
    """The same function, with the same weights, in stages that the published code of v1.5 takes.

    These are an odd number, three at least, each of an even number of blocks. Long skips lead from stage to stage, so a
    model with them has such stages or is refused. Without, blocks that follow each other may be shared out among stages
    at will: n dense blocks in one stage become stages of 2, n - 4 and 2. Raises UsageError naming the nearest stages.
    """
    stages = model.config.stages
    if other := [stage.pattern for stage in stages if stage.pattern not in ("dense", "skiparse")]:
        raise UsageError(f"the published code of v1.5 has no pattern {', '.join(other)}")
    if _fit(stages):
        return model
    nearest = _with_middle(_even(stages)) if len(model.video_skips) else _nearest(_even(_runs(stages)))
    if len(model.video_skips) or sum(stage.blocks for stage in nearest) != len(model.blocks):
        had = ", ".join(str(stage.blocks) for stage in stages)
        wanted = ", ".join(f"{{blocks: {one.blocks}, pattern: {one.pattern}, k: {one.k}}}" for one in nearest)
        raise UsageError(f"stages of {had} blocks have no published form: {_RULE}; the nearest are [{wanted}]")
    return restage(model, nearest, long_skips=False)


def _fit(stages: Sequence[Stage]) -> bool:
    return len(stages) >= _FEWEST and len(stages) % 2 == 1 and all(stage.blocks % 2 == 0 for stage in stages)


def _runs(stages: Sequence[Stage]) -> list[Stage]:
    """The schedule in as few stages as possible."""
    runs: list[Stage] = []
    for stage in stages:
        last = runs[-1] if runs else None
        # A stage of Skiparse begins with single skip, whatever came before.
        if last is not None and last.k == stage.k and (stage.k == 1 or last.blocks % 2 == 0):
            runs[-1] = replace(last, blocks=last.blocks + stage.blocks)
        else:
            runs.append(stage)
    return runs


def _even(stages: Sequence[Stage]) -> list[Stage]:
    return [replace(stage, blocks=stage.blocks + stage.blocks % 2) for stage in stages]


def _with_middle(stages: list[Stage]) -> list[Stage]:
    """An odd number of stages, three at least, with two more blocks in the middle where there was an even number."""
    half = len(stages) // 2
    return stages if len(stages) % 2 else [*stages[:half], replace(stages[half - 1], blocks=2), *stages[half:]]


def _nearest(runs: list[Stage]) -> list[Stage]:
    """Runs of even size in stages that fit: as they are, else the largest split, with more blocks if it is too small.

    A run alone becomes three stages, of which the first and the last have two blocks.
    """
    if _fit(runs):
        return runs
    at = max(range(len(runs)), key=lambda number: runs[number].blocks)
    largest, ends = runs[at], 2 if len(runs) == 1 else 1
    end, rest = replace(largest, blocks=2), replace(largest, blocks=max(2, largest.blocks - 2 * ends))
    return [*runs[:at], end, rest, *[end] * (ends - 1), *runs[at + 1 :]]
