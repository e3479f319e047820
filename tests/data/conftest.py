"""Small videos of many kinds, made with PyAV."""

import contextlib
import itertools
import os
import runpy
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

SERVER = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "flaky_server.py"))["FlakyServer"]

Serve = Callable[..., Any]
MakeVideo = Callable[..., Path]
CutOff = Callable[[str, Callable[[Path], object]], Iterator[Path]]


class Stop(Exception):
    """The moment at which a run is cut off."""


@pytest.fixture
def cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CutOff:
    """cut_off("replace" or "fsync", write) -> the folders of runs; in each another call of it did not happen any more.

    Each run was cut off there and started once more. The last folder is that of a run with fewer calls, which ended.
    """

    def folders(name: str, write: Callable[[Path], object]) -> Iterator[Path]:
        original = getattr(os, name)
        for step in itertools.count():
            calls = itertools.count()

            def counted(*arguments: Any, step: int = step, calls: Iterator[int] = calls) -> Any:
                if next(calls) == step:
                    raise Stop
                return original(*arguments)

            folder, finished = tmp_path / str(step), False
            with monkeypatch.context() as patch, contextlib.suppress(Stop):
                patch.setattr(os, name, counted)
                write(folder)
                finished = True
            write(folder)
            yield folder
            if finished:
                return

    return folders


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(folder, every=10, ...) -> a `FlakyServer` of tools/flaky_server.py that answers until the test ends."""
    with contextlib.ExitStack() as running:
        yield lambda folder, *settings, **more: running.enter_context(SERVER(folder, *settings, **more))


@pytest.fixture(scope="session")
def make_video() -> MakeVideo:
    """make(path, codec="libx264", ...) -> path: moving gradients, 20 fps where `ticks` (1/600 s) say nothing else."""

    def make(
        path: Path,
        codec: str = "libx264",
        *,
        frames: int = 24,
        height: int = 48,
        width: int = 64,
        pixels: str = "yuv420p",
        options: dict[str, str] | None = None,
        ticks: Sequence[int] | None = None,
        rotation: float = 0,
    ) -> Path:
        if codec not in av.codecs_available:
            pytest.skip(f"this PyAV has no {codec}")
        rows, columns = np.mgrid[:height, :width]
        time_base = Fraction(1, 20) if path.suffix in (".avi", ".gif") else Fraction(1, 600)
        # Without it x264's bytes differ by chance for pictures as small as these.
        steady = {"mbtree": "0"} if codec == "libx264" else {}
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=20, options=(options or {}) | steady)
            stream.width, stream.height, stream.pix_fmt = width, height, pixels
            stream.codec_context.time_base = time_base
            if rotation:
                stream.set_display_rotation(rotation)
            for index in range(frames):
                colours = (columns * 2 + index * 3, rows * 3 + index * 2, np.full_like(rows, index * 4))
                picture = np.stack([colour % 256 for colour in colours], -1).astype(np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, "rgb24")
                frame.pts = ticks[index] if ticks else round(index / 20 / time_base)
                frame.time_base = time_base
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return make
