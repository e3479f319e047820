"""Joint batches of clips and images: the images, and their place behind the frames of the clips.

v1.0 takes evenly spaced frames of the clip itself, v1.1 images of their own (`osp.data.sources.JointClips`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from osp.conditioning import EncodedText
from osp.data.media.video import to_float
from osp.data.sources import ClipSource
from osp.denoiser import Denoiser, Grid
from osp.errors import UsageError
from osp.training.module import Batch
from osp.training.peek import clip_shapes
from osp.vae import LatentCodec


def check_joint(denoiser: Denoiser, source: ClipSource, own_frames: int) -> None:
    """Raise UsageError where clips and denoiser do not suit joint batches, if that is what is asked for."""
    images = own_frames or source.images
    if not images:
        return
    if own_frames and source.images:
        raise UsageError(
            f"module.joint_images={own_frames}: the clips of data.train bring {source.images} images each; "
            "set module.joint_images=0, or give clips without images"
        )
    if source.made_with is not None:
        raise UsageError(
            f"{source.path}: features hold no pixels, of which joint batches encode images; train on videos, or set "
            "module.joint_images=0"
        )
    denoiser.block_grids(Grid(1 + images, 1, 1), images)
    for shape in clip_shapes(source):
        if shape.frames < max(2, own_frames):
            raise UsageError(
                f"module.joint_images={own_frames}: the clips have {shape.frames} frames; ask for fewer images, or "
                "read longer clips"
            )


def images_beside(batch: Batch, own_frames: int) -> int:
    """How many images go with each clip of a batch."""
    found: Any = batch.get("images")
    return own_frames if found is None else int(found.shape[2])


def with_images(
    clean: Tensor, batch: Batch, own_frames: int, codec: LatentCodec, generators: Sequence[torch.Generator]
) -> Tensor:
    """The latents `B C T H W` of a batch's clips, followed by those of n images each: `B C T+n H W`.

    Each image is encoded by itself, a sample of its posterior by the generator of its clip.
    """
    images: Any = batch.get("images")
    if images is None:
        images = batch["video"][:, :, evenly_spaced(batch["video"].shape[2], own_frames)]
    rows = to_float(images).transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (B n) 3 1 H W
    encoded = codec.encode(rows, [one for one in generators for _ in range(images.shape[2])])
    return torch.cat((clean, encoded.squeeze(2).unflatten(0, (len(clean), -1)).transpose(1, 2)), dim=2)


def evenly_spaced(frames: int, count: int) -> list[int]:
    """So many of the frames, from the first to the last one, as v1.0 takes them."""
    return [i * (frames - 1) // max(1, count - 1) for i in range(count)]


def joint_captions(batch: Batch) -> list[str]:
    """The captions of a batch's clips, each followed by those of its images where these have their own."""
    own: Any = batch.get("image_captions")
    if own is None:
        return list(batch["caption"])
    return [text for caption, others in zip(batch["caption"], own, strict=True) for text in (caption, *others)]


def joint_inputs(text: EncodedText, clips: int, images: int) -> dict[str, Any]:
    """The denoiser's inputs of a joint batch: text `B 1+n L D` and its mask, and how many images there are.

    `text` is that of the clips, which their images share, or as `joint_captions` lists it.
    """
    if len(text) == clips:
        shared = (part[:, None].expand(-1, 1 + images, *part.shape[1:]) for part in (text.text, text.mask))
        return dict(zip(("text", "text_mask"), shared, strict=True)) | {"images": images}
    own = (part.unflatten(0, (clips, 1 + images)) for part in (text.text, text.mask))
    return dict(zip(("text", "text_mask"), own, strict=True)) | {"images": images}
