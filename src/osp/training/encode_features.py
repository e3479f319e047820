"""Clips -> features, once: a frozen VAE, and the text encoder unless it trains along, run over a source of clips."""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osp.conditioning import TextEncoder, clean_texts
from osp.data.features.format import FeatureIdentity, Features, TextIdentity, require_feature_index
from osp.data.features.writer import FeatureWriter
from osp.data.loader import GIVE_UP_AFTER
from osp.data.media.shape import Shape
from osp.data.media.video import ClipError, to_float
from osp.data.sources import ClipSource
from osp.errors import DataError, UsageError
from osp.parallel.exchange import Exchange
from osp.seeds import seeded
from osp.training.encoding_together import ClipEncoder
from osp.vae import LatentCodec, VideoVAE, measure_scaling

log = logging.getLogger(__name__)

_LOG_EVERY = 10.0  # seconds between two lines about the progress


class FeatureEncoder:
    """Clips of one shape -> their features.

    Args:
        codec: the VAE with the scaling that goes into the identity; it is moved to `device`.
        text: None, or one that trains along, leaves captions only.
        posterior, dtype: as in `FeatureIdentity`.
        precision: of the VAE's arithmetic: `32-true`, `bf16-mixed` or `16-mixed`.
        over: processes that encode together, of which this is the first; see `ClipEncoder`.

    Raises UsageError for a value that is not known.
    """

    def __init__(
        self,
        codec: LatentCodec,
        text: TextEncoder | None = None,
        *,
        posterior: str = "gaussian",
        dtype: str = "float16",
        device: torch.device | str = "cpu",
        precision: str = "32-true",
        over: Exchange | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.codec, self.text = codec, None if text is None or text.trained else text
        self.posterior, self.encode = posterior, ClipEncoder(codec.vae, self.device, precision, over)
        tokens, pooled = text_identities(self.text)
        self.identity = FeatureIdentity(
            **codec.identity(), text=tokens, pooled_text=pooled, posterior=posterior, dtype=dtype
        )
        if self.text is not None:
            self.text.to(self.device)

    @torch.no_grad()
    def __call__(self, clips: Sequence[Mapping[str, Any]]) -> list[Features]:
        """Clips of one shape, as `osp.data.sources.ClipSource.read` gives them, encoded in one batch."""
        posterior = self.encode(torch.stack([clip["video"] for clip in clips]))
        mean, logvar = posterior.mean.float().cpu(), posterior.logvar.float().cpu()
        captions = [[text for text in clip.get("captions", [clip.get("caption", "")]) if text] for clip in clips]
        texts = iter(self._texts([text for said in captions for text in said]))
        features = []
        for clip, said, latent, spread in zip(clips, captions, mean, logvar, strict=True):
            size = Shape(*clip["video"].shape[1:])
            sample = self.posterior == "sample"
            if sample:
                generator = seeded("posterior", clip["key"])
                latent = latent + torch.exp(0.5 * spread) * torch.randn(latent.shape, generator=generator)
            encoded = [next(texts) for _ in said]
            features.append(
                Features(
                    clip["key"],
                    size,
                    latent,
                    None if sample else spread,
                    said,
                    [text["text"] for text in encoded if "text" in text],
                    [text["pooled_text"] for text in encoded if "pooled_text" in text],
                    fps=0.0 if size.frames == 1 else float(clip["fps"]),
                )
            )
        return features

    def empty(self) -> dict[str, Tensor]:
        """The embeddings of the empty text; nothing without a text encoder."""
        return next(iter(self._texts([""])), {})

    def _texts(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """The `text` of each prompt (`L D`, without padding) and its `pooled_text` (`P`), if there is one."""
        if self.text is None or not prompts:
            return [{}] * len(prompts)
        encoded = self.text(clean_texts(prompts, self.text.cleaning))
        lengths = encoded.mask.sum(dim=1).tolist()
        texts = [{"text": text[:length]} for text, length in zip(encoded.text, lengths, strict=True)]
        if encoded.pooled is not None:
            for text, pooled in zip(texts, encoded.pooled, strict=True):
                text["pooled_text"] = pooled
        return texts


def text_identities(text: TextEncoder | None) -> tuple[TextIdentity | None, TextIdentity | None]:
    """`text` and `pooled_text` in the `FeatureIdentity` of features that this encoder makes."""
    return (None, None) if text is None else text.identities()


def encode_features(
    source: ClipSource, encoder: FeatureEncoder, writer: FeatureWriter, batch_size: int = 1, workers: int = 1
) -> int:
    """Writes the shards that the writer has to do; gives how many clips were encoded.

    Batches hold up to `batch_size` clips of one shape and one shard, so that a shard's bytes do not depend on which
    others are there. `workers` threads read ahead. A broken clip is skipped and logged.

    Raises:
        UsageError: the clips bring images, the device's memory is too small, or another process writes the same shards.
        DataError: no clip of the source can be used, or GIVE_UP_AFTER in a row cannot; a file cannot be written.
    """
    if source.images:
        raise UsageError(
            f"{source.path}: its clips bring {source.images} images each, which features do not keep; "
            "encode the videos alone"
        )
    plan = {number: same_shape_batches(source, writer.shard(number).clips, batch_size) for number in writer.todo()}
    part = f"part {writer.part} of {writer.parts}: " if writer.parts > 1 else ""
    progress = _Progress(part, sum(len(batch) for batches in plan.values() for batch in batches))
    reads = _read_ahead(source, [batch for batches in plan.values() for batch in batches], workers)
    encoded = lost = 0  # clips of this run; clips skipped in a row
    for number, batches in plan.items():
        with writer.shard(number) as shard:
            for indices, results in zip(batches, reads, strict=False):
                made = iter(_encoded(encoder, [clip for clip in results if not isinstance(clip, ClipError)]))
                for index, result in zip(indices, results, strict=True):
                    try:
                        if isinstance(result, ClipError):
                            raise result
                        shard.add(index, replace(next(made), record=_kept(source, index)))
                        encoded, lost = encoded + 1, 0
                    except ClipError as error:
                        log.warning("clip skipped: %s", error)
                        shard.skip(index, error.name, error.reason)
                        lost, reason = lost + 1, str(error)
                if lost >= min(GIVE_UP_AFTER, len(source)):
                    raise DataError(
                        f"{lost} clips in a row cannot be used (of {len(source)}), the last one: {reason}; "
                        "check that the clips are complete and suit the settings"
                    )
                progress.add(len(indices))
    return encoded


def _encoded(encoder: FeatureEncoder, clips: Sequence[Mapping[str, Any]]) -> list[Features]:
    try:
        return encoder(clips) if clips else []
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"batch_size={len(clips)}: the memory of {encoder.device} is too small for so many clips; "
            "use a smaller batch_size; what is written so far counts"
        ) from error


def _kept(source: ClipSource, index: int) -> dict[str, Any]:
    """The part of the clip's own record that its features keep."""
    scores = source.record(index).get("scores")
    return {"scores": scores} if scores else {}


def same_shape_batches(source: ClipSource, indices: Iterable[int], batch_size: int) -> list[list[int]]:
    """The clips in batches of one shape; the order is the same for the same clips."""
    shapes: dict[int, Shape] = {}
    for bucket in source.buckets() or []:
        shapes |= dict.fromkeys(bucket.clips.tolist(), bucket.shape)
    together: dict[Shape | None, list[int]] = {}
    for index in indices:
        together.setdefault(shapes.get(index), []).append(index)
    return [
        clips[start : start + batch_size] for clips in together.values() for start in range(0, len(clips), batch_size)
    ]


def _read(source: ClipSource, indices: Sequence[int]) -> list[dict[str, Any] | ClipError]:
    clips: list[dict[str, Any] | ClipError] = []
    for index in indices:
        try:
            clips.append(source.read(index, 0))
        except ClipError as error:
            clips.append(error)
    return clips


def _read_ahead(
    source: ClipSource, batches: Sequence[Sequence[int]], workers: int
) -> Iterator[list[dict[str, Any] | ClipError]]:
    """The batches in order; the next ones are decoded meanwhile (libav works outside of Python's lock)."""
    with ThreadPoolExecutor(workers) as pool:
        futures: deque[Future[list[dict[str, Any] | ClipError]]] = deque()
        try:
            for batch in batches:
                futures.append(pool.submit(_read, source, batch))
                if len(futures) > workers:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()


def read_scaling(folder: Path, vae: VideoVAE) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale of the features in a folder, for more features of the same VAE.

    Raises:
        DataError: it is no folder of features.
        UsageError: they were made with another VAE.
    """
    index = require_feature_index(folder)
    identity = FeatureIdentity.from_json(index["identity"])
    if identity.vae_fingerprint != LatentCodec(vae, 0.0, 1.0).fingerprint():
        raise UsageError(
            f"{folder}: its features were made with another VAE ({identity.vae} of {index['vae_origin']}) "
            f"than {vae.origin}; give that one, or use another folder"
        )
    return identity.shift, identity.scale


def measure_source_scaling(
    source: ClipSource,
    vae: VideoVAE,
    clips: int,
    *,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    precision: str = "32-true",
) -> tuple[list[float], list[float]]:
    """Shift and scale of each channel by `osp.vae.measure_scaling`, over so many clips spread over the source.

    Raises UsageError if none of them can be read.
    """
    encoder = ClipEncoder(vae.eval(), torch.device(device), precision)
    count = min(clips, len(source))
    chosen = [number * len(source) // count for number in range(count)]

    def videos() -> Iterator[Tensor]:
        for results in _read_ahead(source, same_shape_batches(source, chosen, batch_size), workers=1):
            if good := [clip["video"] for clip in results if not isinstance(clip, ClipError)]:
                yield to_float(torch.stack(good).to(device))

    log.info("measuring the scale of the latents over %d clips", count)
    with encoder.autocast():
        return measure_scaling(vae, videos())


class _Progress:
    """Now and then a log line: how far, how fast, and for how long still."""

    def __init__(self, part: str, total: int) -> None:
        self.part, self.total, self.done = part, total, 0
        self.begun = self.logged = time.monotonic()
        if total:
            log.info("%s%d clips to encode", part, total)

    def add(self, clips: int) -> None:
        self.done += clips
        now = time.monotonic()
        if now - self.logged < _LOG_EVERY and self.done < self.total:
            return
        self.logged = now
        rate = self.done / max(now - self.begun, 1e-9)
        left = (self.total - self.done) / rate
        time_left = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
        log.info("%s%d of %d clips, %.3g clips/s, %s left", self.part, self.done, self.total, rate, time_left)
