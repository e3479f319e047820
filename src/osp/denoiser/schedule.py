"""A denoiser's schedule: which attention pattern each of its blocks follows."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from osp.checks import check_choice, check_number
from osp.denoiser.patterns import (
    Dense,
    GroupSkip,
    GroupSkip2D,
    Pattern,
    SingleSkip,
    SingleSkip2D,
    Spatial,
    Temporal,
    Window,
)
from osp.errors import UsageError

# The patterns that the blocks of a stage take in turn.
_CYCLES: dict[str, Callable[[int], tuple[Pattern, ...]]] = {
    "dense": lambda _: (Dense(),),
    "2+1d": lambda _: (Spatial(), Temporal()),
    "skiparse": lambda k: (SingleSkip(k), GroupSkip(k)) if k > 1 else (Dense(),),
    "skiparse_2d": lambda k: (SingleSkip2D(k), GroupSkip2D(k)) if k > 1 else (Dense(),),
    "skip_window": lambda k: (SingleSkip(k), Window(k)),
}
_WITHOUT_SPARSITY = ("dense", "2+1d")


@dataclass(frozen=True)
class Stage:
    """Neighbouring blocks that take the same patterns in turn.

    `pattern` is "dense", "2+1d" (space, time), "skiparse" (single skip, group skip), "skiparse_2d" or "skip_window";
    `k` is the sparsity of the last three. Raises UsageError for values that make no stage.
    """

    blocks: int
    pattern: str = "dense"
    k: int = 1

    def __post_init__(self) -> None:
        check_choice("stages: pattern", self.pattern, _CYCLES)
        for name in ("blocks", "k"):
            check_number(f"stages: {name}", getattr(self, name), 1, whole=True)
        if self.pattern in _WITHOUT_SPARSITY and self.k != 1:
            raise UsageError(f"stages: pattern={self.pattern} has no sparsity; k={self.k} must be left out")

    @property
    def patterns(self) -> list[Pattern]:
        """The pattern of each block, in order."""
        cycle = _CYCLES[self.pattern](self.k)
        return [cycle[i % len(cycle)] for i in range(self.blocks)]


def make_stages(stages: Iterable[Stage | Mapping[str, Any]]) -> tuple[Stage, ...]:
    """Stages of what a configuration says. Raises UsageError for unknown and impossible values."""
    if isinstance(stages, str) or not isinstance(stages, Iterable):
        raise UsageError(f"stages={stages}: must be a list, each of it with blocks=N, pattern=NAME and k=N")
    made = [stage if isinstance(stage, Stage) else _make_stage(stage) for stage in stages]
    if not made:
        raise UsageError("stages=[] leaves no blocks; give at least one stage")
    return tuple(made)


def _make_stage(stage: Mapping[str, Any]) -> Stage:
    if not isinstance(stage, Mapping) or not {"blocks"} <= set(stage) <= {"blocks", "pattern", "k"}:
        raise UsageError(f"stages: {stage} is none; give blocks=N, pattern=NAME and k=N")
    return Stage(**stage)
