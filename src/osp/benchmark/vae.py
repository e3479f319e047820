"""`osp bench target=vae`: encoding and decoding, whole and in pieces."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from osp.benchmark.case import Target, start_compiler
from osp.benchmark.models import PRECISIONS, ModelSource, weights_dtype
from osp.benchmark.settings import choices, listed, sizes, whole_numbers
from osp.devices import count_flops
from osp.errors import UsageError
from osp.vae import Tiling, VideoVAE, stream_decode, stream_encode
from osp.vae.streaming import Half
from osp.vae.tiling import in_tiles

_HALVES: dict[str, Half] = {"encode": "encoder", "decode": "decoder"}
_MODES = ("whole", "pieces", "stream")


@dataclass(frozen=True)
class VAECase:
    """One row: what goes through a VAE, and how.

    `flops` is the nominal count for the whole clip.
    """

    vae: ModelSource
    half: str
    frames: int
    height: int
    width: int
    mode: str
    chunk_frames: int | None
    tiling: Tiling | None
    precision: str
    compiled: bool
    flops: int
    note: str = ""

    @property
    def about(self) -> dict[str, Any]:
        """The row's first columns."""
        return {
            "half": self.half,
            "size": f"{self.height}x{self.width}",
            "frames": self.frames,
            "mode": self.mode,
            "chunk_frames": None if self.mode == "whole" else self.chunk_frames or "auto",
            "tiles": None if self.tiling is None else f"{self.tiling.size}/{self.tiling.overlap}",
            "precision": self.precision,
            "compiled": self.compiled,
        }

    @property
    def group(self) -> tuple[Any, ...]:
        """The settings that rows share if they are compared with each other."""
        return (self.half, self.height, self.width, self.frames, self.precision, self.compiled)

    @property
    def is_reference(self) -> bool:
        """Whether the others of the group are compared with this one."""
        return self.mode == "whole" and self.tiling is None

    @property
    def work(self) -> dict[str, float]:
        """The frames and megapixels of one run; the table gives them per second."""
        return {"frames": self.frames, "megapixels": self.frames * self.height * self.width / 1e6}

    @property
    def counted(self) -> dict[str, float | None]:
        """No further columns."""
        return {}

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the arithmetic."""
        return PRECISIONS[self.precision]

    def load(self, device: torch.device) -> VideoVAE:
        """The VAE, in eval mode on the device."""
        if self.compiled:
            start_compiler()
        return _load(self.vae, device, self.precision, self.compiled)

    def inputs(self, vae: VideoVAE) -> Tensor:
        """The clip or the latent; in a stream only as much of it as a piece may have."""
        parameter = next(vae.parameters())
        frames = max(self._lengths(vae)) if self.mode == "stream" else self._input_frames(vae)
        if self.half == "decode":
            _, rows, columns = vae.strides.latent(1, self.height, self.width)
            size = (frames, rows, columns)
            return torch.randn(1, vae.latent_channels, *size, device=parameter.device, dtype=parameter.dtype)
        size = (frames, self.height, self.width)
        return torch.rand(1, 3, *size, device=parameter.device, dtype=parameter.dtype).mul_(2).sub_(1)

    def run(self, vae: VideoVAE, x: Tensor) -> None:
        """Once through."""
        mixed = self.precision.endswith("mixed")
        go = {"whole": self._whole, "pieces": self._pieces, "stream": self._stream}[self.mode]
        with torch.no_grad(), torch.autocast(x.device.type, dtype=self.dtype, enabled=mixed):
            go(vae, x)

    def _whole(self, vae: VideoVAE, x: Tensor) -> None:
        half, network = _HALVES[self.half], vae.network(_HALVES[self.half])
        x = vae.pad_frames(x) if self.half == "encode" else x
        in_tiles(x, self.tiling, lambda tile, _: network(tile, None), **vae.pixels(half))

    def _pieces(self, vae: VideoVAE, x: Tensor) -> None:
        if self.half == "decode":
            vae.decode(x, self.chunk_frames, self.tiling, self.frames)
        else:
            vae.encode(x, self.chunk_frames and self.chunk_frames * vae.time_stride, self.tiling)

    def _stream(self, vae: VideoVAE, longest: Tensor) -> None:
        pieces = (longest[:, :, :length] for length in self._lengths(vae))
        results: Iterator[Any] = (stream_decode if self.half == "decode" else stream_encode)(vae, pieces, self.tiling)
        for _ in results:
            pass

    def _lengths(self, vae: VideoVAE) -> list[int]:
        """The lengths of a stream's pieces; the first has one latent frame more, that of the clip's first frame."""
        chunk = vae.piece(_HALVES[self.half])
        if self.chunk_frames is not None:
            chunk = self.chunk_frames * (vae.time_stride if self.half == "encode" else 1)
        frames = self._input_frames(vae)
        first = min(frames, chunk + 1)
        return [first, *(min(chunk, frames - start) for start in range(first, frames, chunk))]

    def _input_frames(self, vae: VideoVAE) -> int:
        return vae.strides.latent_frames(self.frames) if self.half == "decode" else self.frames


@dataclass(frozen=True)
class VAESweep:
    """The settings of the rows: every combination is one."""

    halves: list[str]
    modes: list[str]
    precisions: list[str]
    compiled: list[bool]
    sizes: list[tuple[int, ...]]
    lengths: list[int]
    chunks: list[int | None]
    tilings: list[Tiling | None]

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> "VAESweep":
        """The sweep that plain values ask for. Raises UsageError for values that make no sense."""
        return cls(
            halves=choices(settings, "half", tuple(_HALVES)),
            modes=choices(settings, "mode", _MODES),
            precisions=choices(settings, "precision", tuple(PRECISIONS)),
            compiled=choices(settings, "compile", (False, True)),
            sizes=sizes(settings, "sizes", "HEIGHTxWIDTH", "256x256"),
            lengths=whole_numbers(settings, "frames"),
            chunks=whole_numbers(settings, "chunk_frames", null="the VAE's own"),
            tilings=[Tiling.read(value) for value in listed(settings, "tiling")],
        )

    def check(self, vae: VideoVAE) -> None:
        """Raise UsageError if the VAE does not take these clips, or these tiles."""
        for (height, width), length in product(self.sizes, self.lengths):
            vae.check_size(length, height, width)
        for tiling in self.tilings:
            if tiling is not None:
                tiling.check(vae.space_stride)


def cases(settings: Mapping[str, Any], source: ModelSource) -> tuple[list[VAECase], str]:
    """The rows that the settings ask for, those to compare next to each other; and what the model is.

    Raises UsageError for settings that make no sense, before anything is measured.
    """
    sweep, vae = VAESweep.read(settings), _build(source)
    sweep.check(vae)
    with torch.device("meta"):
        twin = type(vae)(**vae.settings)
    clips = {
        (half, size, length): nominal_flops(twin, half, length, *size)
        for half, size, length in product(sweep.halves, sweep.sizes, sweep.lengths)
    }
    rows = []
    for number, how, clip in product(sweep.precisions, sweep.compiled, clips):
        half, (height, width), length = clip
        for mode, tiling, chunk in product(sweep.modes, sweep.tilings, sweep.chunks):
            if mode == "whole" and chunk != sweep.chunks[0]:
                continue  # it has no pieces, so it is one row
            note = "" if mode == "whole" or vae.can_stream(_HALVES[half]) else "cannot stream"
            about = (source, half, length, height, width, mode, chunk, tiling, number, how)
            rows.append(VAECase(*about, flops=clips[clip], note=note))
    return rows, source.title(vae)


@lru_cache(maxsize=1)
def _load(source: ModelSource, device: torch.device, precision: str, compiled: bool) -> VideoVAE:
    vae = _build(source).to(device, weights_dtype(precision)).eval()
    if compiled:
        vae.get_submodule("encoder").compile()
        vae.get_submodule("decoder").compile()
    return vae


def _build(source: ModelSource) -> VideoVAE:
    vae = source.built()
    if not isinstance(vae, VideoVAE):
        raise UsageError(f"vae is a {type(vae).__name__}, which is no VAE; give weights of a VAE")
    return vae


def nominal_flops(vae: VideoVAE, half: str, frames: int, height: int, width: int) -> int:
    """The operations for a whole clip whose last stride is filled up. On the meta device nothing is computed."""
    if half == "encode":
        return count_flops(vae.encode_moments, vae.pad_frames(torch.empty(1, 3, frames, height, width, device="meta")))
    size = vae.strides.latent(frames, height, width)
    return count_flops(vae.decode_latent, torch.empty(1, vae.latent_channels, *size, device="meta"))


VAE = Target(
    cases,
    notes=(
        "TFLOP are nominal: those of direct convolutions over the whole clip, a multiply-add being two. In float32 on "
        "the CPU 3x3x3 convolutions compute a third less (`osp.vae.convolution`), so a share of the peak above 100 % "
        "is possible. Tiles compute more, as they overlap.",
        "Memory taken is what comes on top of the process with its weights: the clip, what is computed on the way, and "
        "the result; in a stream only a piece of each.",
        "Ratios are to the whole clip at once.",
    ),
    speed="megapixels_per_second",
    panel="half",
    x="frames",
    style=("mode", "chunk_frames"),
)
