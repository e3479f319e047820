"""Patterns of one's own: registered under a name, they are taken wherever a stage names one."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from osp.denoiser import CrossTransformer, Grid, Stage
from osp.denoiser.patterns import Dense, Pattern, Spatial, average_attention_distance, pattern_names, register_pattern
from osp.denoiser.patterns import registry as module
from osp.denoiser.patterns.arrangement import Split
from osp.errors import UsageError


@dataclass(frozen=True)
class Rows(Pattern):
    """Bands of k rows of all frames."""

    k: int = 1

    def split(self, grid: Grid) -> Split:
        """`t (n k) w -> n (t k w)`."""
        padded = (grid.frames, -(-grid.height // self.k) * self.k, grid.width)
        factors = (grid.frames, padded[1] // self.k, self.k, grid.width)
        return Split((grid.frames, grid.height, grid.width), padded, factors, (1,))


def rows_and_frames() -> tuple[Pattern, ...]:
    return Rows(2), Spatial()


@pytest.fixture(autouse=True)
def open_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    monkeypatch.setattr(module, "_ENTRIES", dict(module._ENTRIES))
    monkeypatch.delenv("OSP_IMPORTS", raising=False)
    return


def test_a_pattern_of_ones_own_is_named_by_stages_and_run() -> None:
    register_pattern("rows", Rows)
    register_pattern("rows_and_frames", rows_and_frames)
    assert {"rows", "rows_and_frames"} <= set(pattern_names())
    assert Stage(2, "rows", 3).patterns == [Rows(3), Rows(3)]
    assert Stage(3, "rows_and_frames").patterns == [Rows(2), Spatial(), Rows(2)]
    stages = [{"blocks": 2, "pattern": "rows_and_frames"}]
    model = CrossTransformer(stages, channels=4, out_channels=4, heads=1, head_dim=12, text_channels=8)
    out = model(torch.randn(1, 4, 2, 6, 8), torch.zeros(1), torch.randn(1, 3, 8))
    assert out.isfinite().all()
    assert 1 < average_attention_distance(model.schedule, Grid(2, 3, 4)) < 2


def test_a_module_may_be_run_again_but_no_name_is_taken_twice() -> None:
    register_pattern("rows", Rows)
    register_pattern("rows", Rows)
    with pytest.raises(UsageError, match="there is another pattern rows; choose another name"):
        register_pattern("rows", rows_and_frames)
    with pytest.raises(UsageError, match="there is another pattern dense"):
        register_pattern("dense", Rows)


def test_what_gives_no_patterns_is_refused() -> None:
    with pytest.raises(UsageError, match="takes 2 arguments; it may take the sparsity k, or nothing"):
        register_pattern("two", lambda k, other: Rows(k))
    register_pattern("none", lambda: ())
    register_pattern("text", lambda: "dense")
    for name in ("none", "text"):
        with pytest.raises(UsageError, match=f"stages: pattern={name} gives .*; it must give patterns"):
            Stage(1, name).patterns  # noqa: B018
    register_pattern("plain", lambda: Dense())
    with pytest.raises(UsageError, match="pattern=plain has no sparsity; k=2 must be left out"):
        Stage(1, "plain", 2)
