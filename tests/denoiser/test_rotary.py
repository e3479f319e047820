"""Rotary positions: what tables hold, and that our order of channels gives the published rotation."""

import torch
from torch import Tensor

from osp.denoiser import Grid
from osp.denoiser.rotary import halves_first, rotary_tables, rotate


def test_rotary_tables_are_cached_by_grid_and_scale() -> None:
    def tables(grid: Grid, *scale: float) -> tuple[Tensor, Tensor]:
        return rotary_tables((4, 4, 4), grid, scale, torch.device("cpu"), torch.float32)

    one = tables(Grid(2, 3, 4), 1.0, 1.0, 1.0)
    assert tables(Grid(2, 3, 4), 1.0, 1.0, 1.0)[0] is one[0]
    assert not torch.equal(tables(Grid(2, 3, 4), 1.0, 2.0, 1.0)[0], one[0])
    assert not torch.equal(tables(Grid(2, 4, 3), 1.0, 1.0, 1.0)[0], one[0])
    # A scale of 2 is every other position of a grid twice as large.
    large = tables(Grid(2, 6, 4), 1.0, 2.0, 1.0)[1].unflatten(0, (2, 6, 4))[:, ::2].flatten(0, 2)
    torch.testing.assert_close(large, one[1])


def test_rotation_is_the_published_one_in_another_order() -> None:
    parts, grid = (4, 6, 6), Grid(2, 3, 5)
    x = torch.randn(1, grid.tokens, 2, sum(parts), dtype=torch.float64)
    order = halves_first(parts)
    assert sorted(order) == list(range(16))
    cos, sin = rotary_tables(parts, grid, (1.0, 1.0, 1.0), x.device, x.dtype)
    got = rotate(x[..., order], cos, sin)
    places = [(t, h, w) for t in range(2) for h in range(3) for w in range(5)]
    for n, place in enumerate(places):
        start, expected = 0, torch.empty(2, 16, dtype=torch.float64)
        for part, position in zip(parts, place, strict=True):
            angle = position * 10000.0 ** (-torch.arange(0, part, 2, dtype=torch.float64) / part)
            first, second = x[0, n, :, start : start + part].chunk(2, dim=-1)
            rotated = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
            expected[:, start : start + part] = torch.cat(rotated, dim=-1)
            start += part
        torch.testing.assert_close(got[0, n], expected[:, order])
