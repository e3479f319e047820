"""A denoiser's schedule: which attention pattern each of its blocks follows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from osp.checks import check_number
from osp.denoiser.patterns import Pattern
from osp.denoiser.patterns.registry import check_pattern, make_patterns
from osp.errors import UsageError


@dataclass(frozen=True)
class Stage:
    """Neighbouring blocks that take the same patterns in turn.

    `pattern` is "dense", "2+1d" (space, time), "skiparse" (single skip, group skip), "skiparse_2d", "skip_window", or a
    name of one's own (`osp.denoiser.patterns.register_pattern`); `k` is the sparsity of those that have one. Raises
    UsageError for values that make no stage.
    """

    blocks: int
    pattern: str = "dense"
    k: int = 1

    def __post_init__(self) -> None:
        for name in ("blocks", "k"):
            check_number(f"stages: {name}", getattr(self, name), 1, whole=True)
        check_pattern(self.pattern, self.k)

    @property
    def patterns(self) -> list[Pattern]:
        """The pattern of each block, in order."""
        cycle = make_patterns(self.pattern, self.k)
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
