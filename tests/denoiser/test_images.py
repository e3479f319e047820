"""Single images in a batch of videos."""

from typing import Any

import pytest
import torch

from osp.denoiser import CrossTransformer, Stage
from osp.errors import UsageError

SIZES: dict[str, Any] = {"channels": 4, "out_channels": 4, "heads": 2, "head_dim": 12, "text_channels": 10}


def new_model() -> CrossTransformer:
    torch.manual_seed(0)
    model = CrossTransformer([Stage(2)], **SIZES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_each_image_is_a_sequence_of_its_own_with_its_own_text_and_the_sample_s_time() -> None:
    model, draw = new_model().double(), torch.Generator().manual_seed(1)
    latent = torch.randn(2, 4, 3 + 2, 4, 6, generator=draw, dtype=torch.float64)
    text = torch.randn(2, 1 + 2, 5, 10, generator=draw, dtype=torch.float64)
    mask, time = torch.rand(2, 3, 5, generator=draw) > 0.4, torch.tensor([3.0, 700.0])
    seen = torch.ones(2, 5, 4, 6)
    seen[:, 1:, :, 4:] = 0
    got = model(latent, time, text, mask, video_mask=seen, images=2)
    assert got.shape == latent.shape
    video = model(latent[:, :, :3], time, text[:, 0], mask[:, 0], video_mask=seen[:, :3])
    torch.testing.assert_close(got[:, :, :3], video)
    for image in (0, 1):
        at = 3 + image
        alone = model(
            latent[:, :, at, None], time, text[:, 1 + image], mask[:, 1 + image], video_mask=seen[:, at, None]
        )
        torch.testing.assert_close(got[:, :, at, None], alone)
    got.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 5}, "images=5: must be a whole number of at least 1 and below 5"),
        ({"images": 1}, r"text of shape \(1, 3, 5, 10\) does not fit images=1; it must be \(1, 2, 5, 10\)"),
        ({"text": torch.zeros(1, 5, 10)}, r"text of shape \(1, 5, 10\) does not fit images=2"),
        ({"text_mask": torch.ones(1, 5)}, r"text_mask of shape \(1, 5\) does not fit"),
        ({"video_mask": torch.ones(1, 3, 4, 4)}, r"it must be \(1, 5, 4, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    inputs = {
        "latent": torch.zeros(1, 4, 5, 4, 4),
        "time": torch.zeros(1),
        "text": torch.zeros(1, 3, 5, 10),
        "images": 2,
    }
    with pytest.raises(UsageError, match=message):
        new_model()(**inputs | change)
