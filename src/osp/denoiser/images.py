"""Single images in a batch of videos, for models that take each image as a sequence of its own."""

from collections.abc import Callable

import torch
from torch import Tensor

from osp.checks import check_number
from osp.errors import UsageError


def joint_prediction(
    model: Callable[..., Tensor],
    latent: Tensor,
    time: Tensor,
    text: Tensor,
    text_mask: Tensor | None,
    video_mask: Tensor | None,
    images: int,
) -> Tensor:
    """The prediction for latents `B C T+images H W`, of which the last are single images of the sample's time.

    `text` is `B 1+images L D` and `text_mask` `B 1+images L`: one for the video, and one for each image; `video_mask`
    is `B T+images H W`. Raises UsageError for inputs that do not fit.
    """
    frames, batch = latent.shape[2] - images, len(latent)
    check_number("images", images, 1, below=latent.shape[2], whole=True)
    for name, mask, shape in (
        ("text", text, (batch, 1 + images, *text.shape[-2:])),
        ("text_mask", text_mask, (batch, 1 + images, text.shape[-2])),
        ("video_mask", video_mask, (batch, *latent.shape[2:])),
    ):
        if mask is not None and tuple(mask.shape) != shape:
            raise UsageError(f"{name} of shape {tuple(mask.shape)} does not fit images={images}; it must be {shape}")

    video = model(
        latent[:, :, :frames],
        time,
        text[:, 0],
        None if text_mask is None else text_mask[:, 0],
        video_mask=None if video_mask is None else video_mask[:, :frames],
    )
    single = model(
        latent[:, :, frames:].transpose(1, 2).flatten(0, 1)[:, :, None],
        time.repeat_interleave(images),
        text[:, 1:].flatten(0, 1),
        None if text_mask is None else text_mask[:, 1:].flatten(0, 1),
        video_mask=None if video_mask is None else video_mask[:, frames:].flatten(0, 1)[:, None],
    )
    return torch.cat([video, single[:, :, 0].unflatten(0, (batch, images)).transpose(1, 2)], dim=2)
