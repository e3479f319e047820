"""Folders of made videos: files that say inside how they were made, and a list of them."""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import torch
from PIL import Image
from torch import Tensor

from osp.checks import check_choice
from osp.data.media.pictures import animated_gif, encode_png
from osp.data.media.shape import Shape
from osp.data.media.video import encode_video, probe, read_clip, to_uint8
from osp.documents import DocumentError, parse_json, read_text
from osp.errors import DataError, UsageError
from osp.files import write_whole

FORMATS = ("mp4", "gif", "png")
SAMPLES = "samples.jsonl"


class SampleFolder:
    """Where videos go: as MP4, GIF, or PNG, of which a video is a folder of frames and an image one file.

    Each file holds its settings as JSON, in the container's comment or PNG's text `Comment`; `samples.jsonl` lists the
    files with theirs, a line each. The same video with the same settings gives the same bytes. Raises UsageError for
    another format.
    """

    def __init__(self, folder: Path, kind: str, overwrite: bool = False) -> None:
        check_choice("format", kind, FORMATS)
        self.folder, self.kind, self.overwrite = folder, kind, overwrite
        self.listed = _read_list(self.list)

    @property
    def list(self) -> Path:
        """The file that lists the videos."""
        return self.folder / SAMPLES

    def path(self, stem: str, frames: int) -> Path:
        """The file of a video, or the folder of its frames."""
        return self.folder / (stem if self.kind == "png" and frames > 1 else f"{stem}.{self.kind}")

    def is_made(self, stem: str, settings: Mapping[str, Any]) -> bool:
        """Whether the video is there, made with these settings, so that it can be kept.

        Raises UsageError if there is one made with others, unless it may be overwritten.
        """
        path = self.path(stem, settings["frames"])
        if self.overwrite or not path.exists():
            return False
        before = read_settings(path)
        if before == _plain(settings):
            self.listed[path.name] = before
            return True
        other = next((key for key in settings if before is None or before.get(key) != _plain(settings)[key]), "others")
        raise UsageError(
            f"{path} is there, made with other settings ({other} differs); choose another output=DIR, or overwrite=true"
        )

    def write(self, stem: str, video: Tensor, settings: Mapping[str, Any]) -> Path:
        """Write a video `3 T H W` in [-1, 1]; the file appears as a whole."""
        path, pixels, comment = self.path(stem, video.shape[1]), to_uint8(video), json.dumps(settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        if self.kind == "mp4":
            # Several threads would give other bytes on machines with other numbers of cores.
            write_whole(path, encode_video(pixels, settings["fps"], threads=1, comment=comment))
        elif self.kind == "gif":
            write_whole(path, animated_gif(pixels, settings["fps"], comment))
        elif video.shape[1] == 1:
            write_whole(path, encode_png(pixels[:, 0], comment))
        else:
            self._write_frames(path, pixels, comment)
        self.listed[path.name] = _plain(settings)
        self._append(_line(path.name, settings))
        return path

    def _append(self, line: str) -> None:
        """Add a line to the list, whole or not at all; what a killed command left of one is not gone on with."""
        with open(self.list, "ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            whole = end == 0 or file.read(1) == b"\n"
            data = ("" if whole else "\n").encode() + line.encode()
            try:
                written = file.write(data)
                if written != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                with suppress(OSError):
                    file.truncate(end)
                raise OSError(error.errno, error.strerror, str(self.list)) from error

    def _write_frames(self, path: Path, pixels: Tensor, comment: str) -> None:
        part = path.with_name(f".{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            for number, frame in enumerate(pixels.unbind(1)):
                write_whole(part / f"{number:04d}.png", encode_png(frame, comment))
            os.replace(part, path)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def finish(self) -> Path:
        """Write the list anew, sorted and without files that are gone."""
        there = {name: settings for name, settings in sorted(self.listed.items()) if (self.folder / name).exists()}
        write_whole(self.list, "".join(_line(*entry) for entry in there.items()))
        return self.list


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings that a video of ours, or a folder of its frames, was made with; None if the files hold none.

    Raises DataError for a file that cannot be read.
    """
    file = min(path.glob("*.png"), default=None) if path.is_dir() else path
    if file is None:
        return None
    if file.exists() and not file.is_file():
        raise DataError(f"{path}: is no regular file; remove it")
    try:
        if file.suffix == ".mp4":
            with av.open(f"file:{file}") as container:
                comment = container.metadata.get("comment", "")
        else:
            with Image.open(file) as image:
                comment = image.info.get("Comment") or image.info.get("comment", b"")
        settings = parse_json(comment, str(path))
    except DocumentError:
        return None
    except (OSError, av.FFmpegError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read ({error}); remove it, or use overwrite=true") from error
    return settings if isinstance(settings, dict) else None


def made_size(path: Path) -> Shape:
    """The size of a video of ours, or of a folder of its frames. Raises DataError if there is none to read."""
    if not path.exists():
        raise DataError(f"{path}: no such file, but {SAMPLES} beside it lists it; run `osp sample` again")
    frames = _frames(path) if path.is_dir() else []
    info = probe(frames[0] if frames else path)
    return Shape(len(frames) or info.frames, info.height, info.width)


def read_made(path: Path, size: Shape) -> Tensor:
    """The first frames of a video of ours, or of a folder of its frames, as uint8 `3 T H W`.

    Raises ClipError for a file that cannot be read.
    """
    space = size.height, size.width
    if not path.is_dir():
        return read_clip(path, frames=size.frames, size=space)
    return torch.cat([read_clip(file, frames=1, size=space) for file in _frames(path)[: size.frames]], dim=1)


def _frames(path: Path) -> list[Path]:
    if not (frames := sorted(path.glob("*.png"))):
        raise DataError(f"{path}: has no frames in it; remove it, and run `osp sample` again")
    return frames


def _line(name: str, settings: Mapping[str, Any]) -> str:
    return json.dumps({"path": name, **settings}) + "\n"


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as JSON gives them back."""
    return json.loads(json.dumps(settings))


def _read_list(path: Path) -> dict[str, dict[str, Any]]:
    """The settings of files by name; a line that was not written to its end is passed over."""
    listed: dict[str, dict[str, Any]] = {}
    try:
        lines = read_text(path).split("\n")
    except FileNotFoundError:
        return listed
    for line in lines:
        try:
            entry = parse_json(line, str(path), {"path": str})
        except DocumentError:
            continue
        listed[entry.pop("path")] = entry
    return listed
