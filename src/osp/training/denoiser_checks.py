"""Whether a denoiser, its text, its latents and the clips go together, before any work is lost."""

from typing import Any

from osp.conditioning import MaskMix, TextEncoder
from osp.data.datamodule import ClipDataModule
from osp.data.features.format import FeatureIdentity
from osp.data.media.shape import Shape
from osp.data.sources import ClipSource
from osp.denoiser import Denoiser
from osp.diffusion import Objective
from osp.errors import UsageError
from osp.sampling.generator import check_length
from osp.training.encode_features import text_identities
from osp.training.peek import clip_shapes, has_captions
from osp.vae import LatentCodec


def check_parts(
    denoiser: Denoiser,
    objective: Objective,
    text: TextEncoder | None,
    codec: LatentCodec | None,
    masks: MaskMix | None,
) -> None:
    """Raise UsageError for parts that do not fit together, whatever the data."""
    config = denoiser.config
    if text is not None:
        _check_text(denoiser, f"text ({text.name})", text.channels, text.pooled_channels)
    conditions = denoiser.latent_channels > config.channels
    if conditions and masks is None:
        raise UsageError(
            f"denoiser.frame_channels={list(config.frame_channels)} are for given frames; "
            "choose module.masks, such as stage2"
        )
    if masks is not None and not conditions:
        raise UsageError(
            "module.masks gives frames, and the denoiser has no frame_channels for them; "
            "choose another denoiser, such as cross_inpaint_tiny, or module.masks=null"
        )
    if codec is not None:
        _check_channels(denoiser, masks, codec.latent_channels, codec.strides.time, f"the VAE ({codec.name})")
    objective.check_channels(config.channels, config.out_channels)


def check_data(
    data: ClipDataModule,
    denoiser: Denoiser,
    text: TextEncoder | None,
    codec: LatentCodec | None,
    masks: MaskMix | None,
    text_dropout: float,
) -> None:
    """Raise UsageError for clips that do not suit the parts, naming the setting to change."""
    for source in (data.train_source, data.val_source):
        if source is None:
            continue
        if source.made_with is not None:
            _check_features(source, source.made_with, denoiser, text, codec, masks)
        elif codec is None:
            raise UsageError(
                "these clips are videos, and there is no VAE to encode them; give vae=trained checkpoint=FILE or "
                "vae=pretrained path=FOLDER, or features of `osp cache` by data=features"
            )
        elif text is None:
            raise UsageError("these clips have captions only, and there is no text encoder; choose text=NAME")
        for shape in clip_shapes(source):
            _check_size(source, denoiser, codec, shape)
    train = data.train_source
    if data.val_source is not None and _encoders(train) != _encoders(data.val_source):
        raise UsageError(
            "data.train and data.val are not encoded alike: one holds videos, or features of another VAE, scaling or "
            "text encoder; write those of data.val with `osp cache scaling_from=FOLDER` and the same encoders"
        )
    if text_dropout < 1 and not has_captions(train):
        raise UsageError(
            "the clips of data.train have no captions; caption them, or set module.text_dropout=1 to train without"
        )
    if text_dropout < 1 and train.mirrors:
        raise UsageError(
            "data.train mirrors half of the clips, and captions say left and right; set data.train.flip=false, or "
            "module.text_dropout=1 to train without captions"
        )
    if text_dropout and uses_embeddings(train, text) and not train.empty:
        raise UsageError(
            f"{train.path}: holds no embedding of the empty text, which text dropout needs; run `osp cache` again, "
            "or set module.text_dropout=0"
        )


def _encoders(source: ClipSource) -> tuple[Any, ...]:
    """The fingerprints and settings of the encoders that made features; none for videos."""
    made = source.made_with
    return () if made is None else (made.vae_fingerprint, made.shift, made.scale, made.text, made.pooled_text)


def uses_embeddings(source: ClipSource, text: TextEncoder | None) -> bool:
    """Whether text comes as the embeddings in features, not from captions."""
    return source.made_with is not None and (text is None or not text.trained)


def _check_text(denoiser: Denoiser, whose: str, channels: int, pooled_channels: int | None) -> None:
    if channels != denoiser.text_channels:
        raise UsageError(
            f"{whose} gives tokens {channels} wide, but denoiser.text_channels={denoiser.text_channels}; "
            "set one of them like the other"
        )
    if denoiser.pooled_channels not in (None, pooled_channels):
        raise UsageError(
            f"{whose} gives {f'pooled text {pooled_channels} wide' if pooled_channels else 'no pooled text'}, but "
            f"denoiser.pooled_channels={denoiser.pooled_channels}; set one of them like the other"
        )


def _check_channels(denoiser: Denoiser, masks: MaskMix | None, channels: int, time_stride: int, whose: str) -> None:
    config = denoiser.config
    if channels != config.channels:
        raise UsageError(
            f"latents of {whose} have {channels} channels, but denoiser.channels={config.channels}; "
            f"set denoiser.channels={channels}, and denoiser.out_channels with it, or use another VAE"
        )
    if masks is not None and tuple(config.frame_channels) != (channels, time_stride):
        raise UsageError(
            f"denoiser.frame_channels={list(config.frame_channels)} are not those of given frames with "
            f"{whose}; set [{channels},{time_stride}]"
        )


def _check_features(
    source: ClipSource,
    identity: FeatureIdentity,
    denoiser: Denoiser,
    text: TextEncoder | None,
    codec: LatentCodec | None,
    masks: MaskMix | None,
) -> None:
    path = source.path
    _check_channels(denoiser, masks, identity.latent_channels, identity.time_stride, f"{path} ({identity.vae})")
    if masks is not None:
        raise UsageError(
            f"{path}: given frames have to be encoded by themselves, which features do not allow; train on videos "
            "(data=shards, data=buckets), or set module.masks=null"
        )
    if codec is not None and codec.fingerprint() != identity.vae_fingerprint:
        raise UsageError(
            f"{path}: its features were made with another VAE ({identity.vae} of {source.vae_origin}) than "
            f"{codec.origin or 'the one given'}; give that one, or none"
        )
    if not uses_embeddings(source, text):
        return
    if identity.text is None:
        raise UsageError(
            f"{path}: its features hold no text; train with text=words, or run `osp cache` with the text encoder that "
            "the denoiser is for"
        )
    pooled = identity.pooled_text
    if text is not None and text_identities(text) != (identity.text, pooled):
        raise UsageError(
            f"{path}: its texts were encoded by {identity.text.name} {identity.text.width} wide, not by this "
            f"{text.name}; use that encoder with the same weights, none (~text), or other features"
        )
    _check_text(denoiser, str(path), identity.text.width, None if pooled is None else pooled.width)


def _check_size(source: ClipSource, denoiser: Denoiser, codec: LatentCodec | None, shape: Shape) -> None:
    if codec is not None:
        (_, frames, rows, columns), time_stride = codec.latent_shape(*shape), codec.strides.time
    else:
        assert source.made_with is not None
        (_, frames, rows, columns), time_stride = source.made_with.latent_shape(shape), source.made_with.time_stride
    check_length(denoiser, shape.frames, frames, time_stride)
    patch = denoiser.patch_size
    for name, side, pixels in (("height", rows, shape.height), ("width", columns, shape.width)):
        if side % patch:
            raise UsageError(
                f"{name}={pixels} makes {side} latent pixels, no multiple of denoiser.patch_size={patch}; "
                f"use a multiple of {pixels // side * patch}"
            )
