"""Convolutions that slide over time give what the plain ones give."""

import pytest
import torch
from torch.nn import functional as F

from osp.vae.convolution import convolve_frames, convolve_over_time, worth_sliding


@pytest.mark.parametrize("frames", range(1, 8))
@pytest.mark.parametrize("begun", [False, True])
def test_over_time(frames: int, begun: bool) -> None:
    torch.manual_seed(frames)
    x, past = torch.randn(2, 3, frames, 5, 6).double(), torch.randn(2, 3, 2, 5, 6).double()
    weight, bias = torch.randn(4, 3, 3, 3, 3).double(), torch.randn(4).double()
    before = past if begun else x[:, :, :1].expand(-1, -1, 2, -1, -1)
    joined = torch.cat([before, x], dim=2)
    for each in (None, torch.square):
        out, kept = convolve_over_time(
            x, tuple((each or torch.clone)(past).split(1, dim=2)) if begun else None, weight, bias, each
        )
        seen = joined if each is None else each(joined)
        expected = F.conv3d(seen, weight, bias, padding=(0, 1, 1))
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.cat(kept, dim=2), seen[:, :, -2:], rtol=0, atol=0)
        assert out.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("kernel", [1, 3])
def test_over_frames(kernel: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 4, 5, 6), torch.randn(7, 3, kernel, kernel), torch.randn(7)
    expected = F.conv3d(x.square(), weight[:, :, None], bias, padding=(0, kernel // 2, kernel // 2))
    torch.testing.assert_close(convolve_frames(x, weight, bias, torch.square), expected)


def test_rounding_is_that_of_a_convolution() -> None:
    torch.manual_seed(0)
    x, weight = F.silu(torch.randn(1, 64, 6, 16, 16)), torch.randn(64, 64, 3, 3, 3) * 0.02
    exact = F.conv3d(F.pad(x, (0, 0, 0, 0, 2, 0), mode="replicate").double(), weight.double(), padding=(0, 1, 1))
    slid, _ = convolve_over_time(x, None, weight, None, None)
    assert (slid - exact).std() < 1e-6 * exact.std()


def test_training_does_not_slide() -> None:
    large, small = torch.empty(1, 64, 2, 64, 64), torch.empty(1, 4, 2, 4, 4)
    assert not worth_sliding(large)
    with torch.no_grad():
        assert worth_sliding(large)
        assert not worth_sliding(small)
        assert not worth_sliding(large.to("meta"))
        assert not worth_sliding(large.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert not worth_sliding(large)
