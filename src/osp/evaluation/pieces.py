"""Videos of any length, reconstructed and measured piece by piece, in memory that does not grow with them."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from osp.data.media.video import to_float
from osp.evaluation.frechet import VideoFeatures
from osp.evaluation.lpips import PerceptualDistance
from osp.evaluation.metrics import PSNR_CAP, clip_metrics, flicker
from osp.vae import VideoVAE, stream_decode, stream_encode

WINDOW = 16
"""Frames of a piece that the Frechet distance takes for a clip."""

_SHOWN, _SHOWN_PIXELS = 64, 2**25  # frames of a long video that are shown, and their pixels

Whole = Callable[[Any, Tensor], Tensor]
Context = Callable[[], AbstractContextManager[Any]]


def reconstruct_pieces(
    vaes: Sequence[Any], pieces: Iterable[Tensor], device: torch.device, whole: Whole, context: Context
) -> Iterator[tuple[Tensor, ...]]:
    """A video's pieces with their reconstructions: `1 C T H W` in [-1, 1], the video's first, then one a VAE.

    `pieces` are uint8 `C T H W` of any lengths. A VAE that can stream is given them as they come. `whole` reconstructs
    the whole video with one that cannot. `context` is what the VAEs run in.
    """
    frames = (to_float(piece.to(device))[None] for piece in pieces)
    video, *copies = itertools.tee(frames, 1 + len(vaes))
    streams = [_decoded(vae, copy, whole, context) for vae, copy in zip(vaes, copies, strict=True)]
    return _aligned([video, *streams])


def _decoded(vae: Any, frames: Iterator[Tensor], whole: Whole, context: Context) -> Iterator[Tensor]:
    if not (isinstance(vae, VideoVAE) and vae.can_stream("encoder") and vae.can_stream("decoder")):
        yield whole(vae, torch.cat(list(frames), dim=2))
        return
    parts = stream_decode(vae, (posterior.mode() for posterior in stream_encode(vae, frames)))
    while True:
        with torch.no_grad(), context():  # not around the yield, where others run
            part = next(parts, None)
        if part is None:
            return
        part = part.float()
        yield torch.where(part.isfinite(), part.clamp(-1, 1), math.nan)


def _aligned(streams: Sequence[Iterator[Tensor]]) -> Iterator[tuple[Tensor, ...]]:
    """The frames that all streams have delivered, until the first stream ends; the others may be longer."""
    held: list[Tensor | None] = [None] * len(streams)
    while True:
        for number, stream in enumerate(streams):
            if held[number] is None:
                held[number] = next(stream, None)
            if held[number] is None:
                return
        ready = [part for part in held if part is not None]
        length = min(part.shape[2] for part in ready)
        yield tuple(part[:, :, :length] for part in ready)
        held = [part[:, :, length:] if part.shape[2] > length else None for part in ready]


class PieceErrors:
    """The PSNR of a whole video from its pieces: that of the mean squared error over all pixels."""

    def __init__(self) -> None:
        self.frames = 0
        self._error = 0.0

    def add(self, reconstruction: Tensor, video: Tensor) -> None:
        """Count the next piece; both are `C T H W` in [-1, 1]."""
        length = video.shape[1]
        self._error += length * (reconstruction.double() - video.double()).square().mean().item()
        self.frames += length

    def result(self) -> dict[str, float | None]:
        """The PSNR in dB, at most 100, as `psnr`."""
        error = self._error / max(1, self.frames)
        return {"psnr": min(PSNR_CAP, 10 * math.log10(4 / error)) if error > 0 else PSNR_CAP}


class PieceMetrics(PieceErrors):
    """The metrics of a whole video from those of its pieces, by the names that `clip_metrics` gives them.

    PSNR is that of the mean squared error over all pixels. Flicker counts the changes from piece to piece too. All
    others are means over frames.
    """

    def __init__(self, perceptual: PerceptualDistance | None = None) -> None:
        super().__init__()
        self._perceptual = perceptual
        self._sums: dict[str, tuple[float, float]] = {}  # the weighted sum, and the sum of weights
        self._last: tuple[Tensor, Tensor] | None = None

    def add(self, reconstruction: Tensor, video: Tensor) -> None:
        """Count the next piece; both are `C T H W` in [-1, 1]."""
        super().add(reconstruction, video)
        found = clip_metrics(reconstruction, video, self._perceptual)
        pair = reconstruction, video
        if self._last is not None:
            pair = torch.cat([self._last[0], reconstruction], 1), torch.cat([self._last[1], video], 1)
        between = flicker(*pair)
        found["flicker"] = None if between is None else between.item()
        for name, value in found.items():
            weight = pair[0].shape[1] - 1 if name == "flicker" else video.shape[1]
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total, count) if value is None else (total + weight * value, count + weight)
        self._last = reconstruction[:, -1:], video[:, -1:]

    def result(self) -> dict[str, float | None]:
        """All metrics; one that the video does not have is None."""
        means = {name: total / count if count else None for name, (total, count) in self._sums.items()}
        return means | super().result()


class ShownFrames:
    """The first frames of a video and of its reconstruction, for the contact sheet and the files; uint8 `C T H W`."""

    def __init__(self) -> None:
        self.video = torch.empty(3, 0, 0, 0, dtype=torch.uint8)
        self.reconstruction = self.video

    def add(self, video: Tensor, reconstruction: Tensor) -> None:
        """Keep what there is room for of the next piece."""
        most = max(1, min(_SHOWN, _SHOWN_PIXELS // (video.shape[2] * video.shape[3])))
        room = most - self.video.shape[1]
        if self.video.shape[1] == 0:
            self.video, self.reconstruction = video[:, :room], reconstruction[:, :room]
        elif room > 0:
            self.video = torch.cat([self.video, video[:, :room]], dim=1)
            self.reconstruction = torch.cat([self.reconstruction, reconstruction[:, :room]], dim=1)


class PieceFeatures:
    """Features of a video and its reconstruction, of runs of `WINDOW` frames each.

    A run is as long as the network needs if that is more. What is left at the end is left out, unless it is all there
    is and long enough.
    """

    def __init__(self, features: VideoFeatures) -> None:
        self._found: list[tuple[Tensor, Tensor]] = []
        self._features = features
        self._window = max(WINDOW, features.min_frames)
        self._held: list[Tensor] = []

    def add(self, video: Tensor, reconstruction: Tensor) -> None:
        """Count the next piece; both are `1 C T H W` in [-1, 1]."""
        new = torch.cat([video, reconstruction])
        held = torch.cat([*self._held, new], dim=2)
        while held.shape[2] >= self._window:
            self._take(held[:, :, : self._window])
            held = held[:, :, self._window :]
        self._held = [held] if held.shape[2] else []

    def finish(self) -> list[tuple[Tensor, Tensor]]:
        """The features of the video and of its reconstruction, `1 D`, one pair a run."""
        if not self._found and self._held and self._held[0].shape[2] >= self._features.min_frames:
            self._take(self._held[0])
        return self._found

    def _take(self, pair: Tensor) -> None:
        self._found.append((self._features(pair[:1]).cpu(), self._features(pair[1:]).cpu()))
