"""`osp bench target=vae`: encoding and decoding, whole and in pieces."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from osp.cli.bench_case import Target, start_compiler
from osp.cli.bench_settings import PRECISIONS, choices, configuration, listed, sides, title, weights_dtype, whole_number
from osp.cli.checks import build_vae
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

    `vae` is its configuration as JSON, `flops` the nominal count for the whole clip.
    """

    vae: str
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
        """What rows to compare have in common."""
        return (self.half, self.height, self.width, self.frames, self.precision, self.compiled)

    @property
    def is_reference(self) -> bool:
        """Whether the others of the group are compared with this one."""
        return self.mode == "whole" and self.tiling is None

    @property
    def work(self) -> dict[str, float]:
        """What is done in one run, to be given per second."""
        return {"frames": self.frames, "megapixels": self.frames * self.height * self.width / 1e6}

    @property
    def dtype(self) -> torch.dtype:
        """What the arithmetic is done in."""
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
            size = (frames, self.height // vae.space_stride, self.width // vae.space_stride)
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
        """Of a stream's pieces; the first has one latent frame more, which is that of the clip's first frame."""
        chunk = vae.piece(_HALVES[self.half])
        if self.chunk_frames is not None:
            chunk = self.chunk_frames * (vae.time_stride if self.half == "encode" else 1)
        frames = self._input_frames(vae)
        first = min(frames, chunk + 1)
        return [first, *(min(chunk, frames - start) for start in range(first, frames, chunk))]

    def _input_frames(self, vae: VideoVAE) -> int:
        return latent_frames(vae, self.frames) if self.half == "decode" else self.frames


def latent_frames(vae: VideoVAE, frames: int) -> int:
    """How many latent frames a clip of so many frames has."""
    return 1 - (1 - frames) // vae.time_stride


def cases(cfg: DictConfig) -> tuple[list[VAECase], str]:
    """The rows that the settings ask for, those to compare next to each other; and what the model is.

    Raises UsageError for settings that make no sense, before anything is measured.
    """
    halves, modes = choices(cfg, "half", tuple(_HALVES)), choices(cfg, "mode", _MODES)
    precisions, compiled = choices(cfg, "precision", tuple(PRECISIONS)), choices(cfg, "compile", (False, True))
    sizes = [sides("sizes", value, "HEIGHTxWIDTH", "256x256") for value in listed(cfg, "sizes")]
    lengths = [whole_number("frames", value) for value in listed(cfg, "frames")]
    chunks = [None if n is None else whole_number("chunk_frames", n) for n in listed(cfg, "chunk_frames")]
    tilings = [None if value is None else _tiling(value) for value in listed(cfg, "tiling")]
    config = configuration(cfg, "vae")
    vae = build_vae(cfg.vae)
    for (height, width), length in product(sizes, lengths):
        vae.check_size(length, height, width)
    for tiling in tilings:
        if tiling is not None:
            tiling.check(vae.space_stride)
    with torch.device("meta"):
        twin = type(vae)(**vae.settings)
    clips = {
        (half, size, length): nominal_flops(twin, half, length, *size)
        for half, size, length in product(halves, sizes, lengths)
    }
    rows = []
    for number, how, clip in product(precisions, compiled, clips):
        half, (height, width), length = clip
        for mode, tiling, chunk in product(modes, tilings, chunks):
            if mode == "whole" and chunk != chunks[0]:
                continue  # it has no pieces, so it is one row
            note = "" if mode == "whole" or vae.can_stream(_HALVES[half]) else "cannot stream"
            about = (config, half, length, height, width, mode, chunk, tiling, number, how)
            rows.append(VAECase(*about, flops=clips[clip], note=note))
    return rows, title(cfg, "vae", vae)


@lru_cache(maxsize=1)
def _load(config: str, device: torch.device, precision: str, compiled: bool) -> VideoVAE:
    vae: VideoVAE = instantiate(OmegaConf.create(json.loads(config))).to(device).eval()
    vae.to(weights_dtype(precision))
    if compiled:
        vae.get_submodule("encoder").compile()
        vae.get_submodule("decoder").compile()
    return vae


def nominal_flops(vae: VideoVAE, half: str, frames: int, height: int, width: int) -> int:
    """For a whole clip, with what fills up the last stride of its frames. On the meta device nothing is computed."""
    if half == "encode":
        return count_flops(vae.encode_moments, vae.pad_frames(torch.empty(1, 3, frames, height, width, device="meta")))
    length = latent_frames(vae, frames)
    size = (length, height // vae.space_stride, width // vae.space_stride)
    return count_flops(vae.decode_latent, torch.empty(1, vae.latent_channels, *size, device="meta"))


def _tiling(value: Any) -> Tiling:
    if not isinstance(value, dict) or "size" not in value or not set(value) <= {"size", "overlap"}:
        raise UsageError(f"tiling={value} makes no sense; give null or {{size: 256, overlap: 64}}")
    return Tiling(**{str(key): whole_number(f"tiling.{key}", side) for key, side in value.items()})


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
