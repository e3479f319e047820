"""Clips that lie in files as arrays of pixels: NumPy's `.npy` and `.npz`, and safetensors."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osp.checks import check_number
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.video import ClipError
from osp.data.shards.captions import SideCars
from osp.data.shards.entry import ClipEntry
from osp.data.sources.array_files import ARRAY_SUFFIXES, open_array
from osp.data.sources.source import ListedClips
from osp.data.summary import Tally
from osp.errors import DataError, UsageError
from osp.seeds import seeded

_OTHER_AXES = {"B", "T", "C", "H", "W"}


class ArrayClips(ListedClips):
    """The clips of a folder of arrays, each scaled until it covers one size and cropped at the centre.

    Args:
        path: a folder, read with all below it in the order of the names, or one file.
        frames, height, width: the size of every clip; shorter ones are left out.
        layout: the axes of an array, letters between spaces: some order of T, H, W and C, and a B before them where an
            array holds several clips. Without C the clips are grey.
        values: the numbers that stand for black and white. Bytes are 0 to 255 always.
        fps: frames a second that the clips are said to have.
        key: the array of a file that holds several by name; None: its only one.
        random_start: the window lies anywhere in the clip, and of several captions one is drawn; else the window is at
            the beginning and the caption is the first.
        flip: mirror half of the reads left to right.
        limits: what one file may cost.

    Captions lie beside the files, as for videos; of a file of several clips a list of as many texts has one for each.

    Raises:
        UsageError: a setting makes no sense.
        DataError: no such folder, or no clip in it that can be used.
    """

    path: Path

    def __init__(
        self,
        path: str | Path,
        frames: int,
        height: int,
        width: int,
        layout: str = "T H W C",
        values: tuple[float, float] = (-1.0, 1.0),
        fps: float = 8.0,
        key: str | None = None,
        random_start: bool = True,
        flip: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        for name, value in (("frames", frames), ("height", height), ("width", width)):
            check_number(name, value, 1, whole=True)
        check_number("fps", fps, above=0)
        self.axes = layout.split()
        if len({*self.axes}) < len(self.axes) or not {"T", "H", "W"} <= {*self.axes} <= _OTHER_AXES:
            raise UsageError(
                f"layout={layout}: must be T, H and W in some order, with C and B where there are such axes"
            )
        if len(values) != 2 or not values[0] < values[1]:
            raise UsageError(f"values={list(values)}: must be the number of black and the larger one of white")
        self.path, self.size, self.layout = Path(path), (frames, height, width), layout
        self.values, self.fps, self.key = (float(values[0]), float(values[1])), float(fps), key
        self.random_start, self.mirrors, self.limits = random_start, flip, limits
        self.entries, tally = [], Tally()
        side_cars = SideCars(limits)
        for file in _files(self.path):
            try:
                self.entries += self._list(file, side_cars)
            except (ValueError, OSError) as error:
                tally.add("arrays that cannot be used", f"{file.name}: {error}")
            except DataError as error:
                tally.add("arrays that cannot be used", error)
        side_cars.passed_over.warn(self.path)
        tally.warn(self.path)
        self.passed_over = {**tally.counts, **side_cars.passed_over.counts}
        if not self.entries:
            raise DataError(f"{self.path}: none of its arrays can be used ({layout}, frames={frames})")

    def fingerprint(self) -> str:
        """See `ClipSource.fingerprint`."""
        listing = hashlib.sha256()
        for entry in self.entries:
            listing.update(f"{entry.key} {entry.size}\n".encode("utf-8", "surrogatepass"))
        how = f"{self.size} {self.layout} values={self.values} fps={self.fps} key={self.key}"
        reads = f"random_start={self.random_start} flip={self.mirrors}"
        return f"arrays {how} {reads} clips={len(self.entries)} list={listing.hexdigest()[:16]}"

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """See `ClipSource.read`; the window and the flip come from a generator seeded by (key, draw)."""
        entry = self.entries[index]
        generator = seeded(entry.key, draw)
        mirrored = bool(torch.rand((), generator=generator) < 0.5)
        spare = entry.record["frames"] - self.size[0]
        start = int(torch.randint(spare + 1, (), generator=generator)) if self.random_start else 0
        try:
            array, _ = open_array(entry.tar, self.key, self.limits)
            place = [self._slice(axis, start, entry.offset) for axis in self.axes]
            video = self._pixels(torch.as_tensor(array(tuple(place))), entry.key)
        except (ValueError, OSError) as error:
            raise ClipError(entry.key, f"cannot be read ({error})") from error
        captions = entry.record.get("captions") or [entry.record.get("caption", "")]
        chosen = int(torch.randint(len(captions), (), generator=generator)) if self.random_start else 0
        video = video.flip(-1) if self.mirrors and mirrored else video
        return {"video": video.contiguous(), "caption": captions[chosen], "key": entry.key, "fps": self.fps}

    def _list(self, file: Path, side_cars: SideCars) -> list[ClipEntry]:
        """The clips of one file, whose array is not read. Raises ClipError for one that does not fit."""
        _, shape = open_array(file, self.key, self.limits)
        sizes = dict(zip(self.axes, shape, strict=False))
        if len(shape) != len(self.axes):
            raise ClipError(file.name, f"has the shape {shape}, which is not {self.layout}")
        if sizes.get("C", 1) not in (1, 3):
            raise ClipError(file.name, f"has {sizes['C']} channels by its layout {self.layout}; there must be 1 or 3")
        if min(shape, default=0) < 1 or sizes["T"] < self.size[0]:
            raise ClipError(file.name, f"has {sizes['T']} frames of the {self.size[0]} that are needed")
        if sizes["H"] * sizes["W"] > self.limits.frame_pixels:
            raise ClipError(file.name, f"has frames of more than limits.frame_pixels={self.limits.frame_pixels}")
        record = {"kind": "video", "frames": sizes["T"], "height": sizes["H"], "width": sizes["W"], "fps": self.fps}
        name = file.relative_to(self.path).as_posix() if self.path.is_dir() else file.name
        caption, size = side_cars.find(file), file.stat().st_size
        if "B" not in self.axes:
            said = {} if caption is None else caption.as_record()
            return [ClipEntry(name, file, "", 0, size, record | {"source": name} | said)]
        texts = () if caption is None else caption.texts
        each = texts if len(texts) == sizes["B"] else texts[:1] * sizes["B"]
        records = [record | {"source": name, "caption": text} for text in each] or [record] * sizes["B"]
        return [ClipEntry(f"{name}#{number}", file, "", number, size, said) for number, said in enumerate(records)]

    def _slice(self, axis: str, start: int, number: int) -> slice | int:
        return number if axis == "B" else slice(start, start + self.size[0]) if axis == "T" else slice(None)

    def _pixels(self, window: Tensor, key: str) -> Tensor:
        """uint8 `3 T H W` of one size, of the numbers of a clip."""
        axes = [axis for axis in self.axes if axis != "B"]
        if "C" not in axes:
            window, axes = window.unsqueeze(-1), [*axes, "C"]
        video = window.permute(*(axes.index(axis) for axis in "TCHW"))
        black, white = (0.0, 255.0) if video.dtype == torch.uint8 else self.values
        video = (video.to(torch.float32) - black) / (white - black)
        if not bool(video.isfinite().all()):
            raise ClipError(key, "has numbers that are not finite")
        low, high = float(video.min()), float(video.max())
        if low < -0.5 or high > 1.5:
            found = f"{low * (white - black) + black:g} to {high * (white - black) + black:g}"
            raise ClipError(key, f"has numbers from {found}, far outside values={list(self.values)}")
        _, height, width = self.size
        scale = max(height / video.shape[2], width / video.shape[3])
        if scale != 1:
            covering = [max(height, round(video.shape[2] * scale)), max(width, round(video.shape[3] * scale))]
            video = torch.nn.functional.interpolate(video, covering, mode="bicubic", antialias=True)
        top, left = (video.shape[2] - height) // 2, (video.shape[3] - width) // 2
        video = video[:, :, top : top + height, left : left + width].clamp(0, 1)
        return (video * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(1, 0, 2, 3)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such folder or file of arrays")
    found: list[Path] = []
    for root, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in files if Path(name).suffix.lower() in ARRAY_SUFFIXES and name[0] != "."]
    if not found:
        raise DataError(f"{path}: no arrays in it (.npy .npz .safetensors)")
    return sorted(path for path in found if path.is_file())
