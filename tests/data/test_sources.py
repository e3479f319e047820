"""Arrays and data sets of Hugging Face as sources of clips."""

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from osp.data.loader import FixedLoader
from osp.data.media.limits import Limits
from osp.data.media.video import ClipError
from osp.data.sources import ArrayClips, DatasetClips, FirstClips
from osp.errors import DataError, UsageError

MakeVideo = Callable[..., Path]


def video(frames: int = 9, height: int = 16, width: int = 24, channels: int = 3) -> np.ndarray[Any, Any]:
    """Bytes `T H W C` that differ everywhere."""
    return np.random.default_rng(frames).integers(0, 256, (frames, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(
    ("layout", "axes"),
    [("T H W C", (0, 1, 2, 3)), ("C T H W", (3, 0, 1, 2)), ("T C H W", (0, 3, 1, 2)), ("H W C T", (1, 2, 3, 0))],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_bytes_come_back_as_they_are_from_every_kind_of_file(
    tmp_path: Path, layout: str, axes: tuple[int, ...], suffix: str
) -> None:
    pixels = video()
    stored = np.ascontiguousarray(pixels.transpose(axes))
    file = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(file, stored)
    elif suffix == ".npz":
        np.savez_compressed(file, video=stored)
    else:
        save_file({"video": torch.from_numpy(stored), "other": torch.zeros(1)}, file)
    (tmp_path / "a.txt").write_text("said")
    key = "video" if suffix == ".safetensors" else None
    source = ArrayClips(tmp_path, 9, 16, 24, layout=layout, key=key, random_start=False)
    clip = source.read(0, 0)
    assert np.array_equal(clip["video"].numpy(), pixels.transpose(3, 0, 1, 2))
    assert (clip["caption"], clip["key"], clip["fps"]) == ("said", f"a{suffix}", 8.0)


def test_numbers_are_scaled_windows_drawn_and_pictures_fitted(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 12)[:, None, None].repeat(16, 1).repeat(32, 2).astype(np.float16)
    np.save(tmp_path / "grey.npy", ramp)
    source = ArrayClips(tmp_path, 4, 8, 8, layout="T H W", values=(0.0, 1.0))
    first, again = source.read(0, 5), source.read(0, 5)
    assert torch.equal(first["video"], again["video"])
    starts = {int(source.read(0, draw)["video"][0, 0, 4, 4]) for draw in range(40)}
    assert starts == {round(255 * float(np.float16(n / 11))) for n in range(9)}
    assert first["video"].shape == (3, 4, 8, 8)
    assert source.fingerprint() != ArrayClips(tmp_path, 4, 8, 8, layout="T H W").fingerprint()


def test_a_file_of_several_clips_gives_each_its_caption(tmp_path: Path) -> None:
    np.save(tmp_path / "batch.npy", np.stack([np.full((5, 3, 8, 8), n, np.uint8) for n in range(3)]))
    (tmp_path / "batch.json").write_text(json.dumps({"captions": ["zero", "one", "two"]}))
    source = ArrayClips(tmp_path, 5, 8, 8, layout="B T C H W")
    clips = [source.read(index, 0) for index in range(len(source))]
    assert [(clip["key"], clip["caption"], clip["video"].unique().tolist()) for clip in clips] == [
        (f"batch.npy#{n}", name, [n]) for n, name in enumerate(("zero", "one", "two"))
    ]
    (batch,) = FixedLoader(FirstClips(source, 2), batch_size=2)
    assert batch["video"].shape == (2, 3, 5, 8, 8)
    assert source.summary().line() == f"{tmp_path}: 3 clips, all with captions"


def test_arrays_that_cannot_be_used_are_told_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.save(tmp_path / "good.npy", video())
    np.save(tmp_path / "a_short.npy", video(2))
    np.save(tmp_path / "b_flat.npy", np.zeros((4, 4)))
    np.save(tmp_path / "c_objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    (tmp_path / "d_text.npz").write_bytes(b"no zip")
    huge = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 16, 24, 3)}
    with open(tmp_path / "e_huge.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, huge)
    np.savez(tmp_path / "f_hidden.npz", a=video())
    with zipfile.ZipFile(tmp_path / "f_hidden.npz", "a") as archive:
        archive.write(tmp_path / "e_huge.npy", "a")  # beside a.npy
    with zipfile.ZipFile(tmp_path / "g_huge.npz", "w") as archive:
        archive.write(tmp_path / "e_huge.npy", "a.npy")
    torch.save(torch.zeros(9, 16, 24, 3, dtype=torch.uint8), tmp_path / "h_pickle.pt")
    source = ArrayClips(tmp_path, 9, 16, 24, random_start=False)
    assert [entry.key for entry in source.entries] == ["f_hidden.npz", "good.npy"]
    assert torch.equal(source.read(0, 0)["video"], source.read(1, 0)["video"])
    assert source.summary().left_out == {"arrays that cannot be used": 7}
    assert "c_objects.npy: holds object, which are no numbers" in caplog.text
    for name in ("e_huge.npy", "g_huge.npz", "h_pickle.pt"):
        with pytest.raises(DataError, match="none of its arrays can be used"):
            ArrayClips(tmp_path / name, 9, 16, 24)
    assert "e_huge.npy: it claims the shape (1099511627776, 16, 24, 3)" in caplog.text
    assert "g_huge.npz: a claims the shape" in caplog.text
    assert "h_pickle.pt: is a pickle, which is not read; save its array as .npy or .safetensors" in caplog.text


def test_a_file_of_another_kind_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(DataError, match="none of its arrays can be used"):
        ArrayClips(tmp_path / "a.mp4", 9, 16, 24)
    assert "a.mp4: is no file of arrays; .npy .npz .safetensors are read" in caplog.text


def test_numbers_of_another_range_cost_the_clip(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", video().astype(np.float32))
    with pytest.raises(ClipError, match=r"numbers from 0 to 255, far outside values=\[-1.0, 1.0\]"):
        ArrayClips(tmp_path, 9, 16, 24).read(0, 0)
    np.save(tmp_path / "a.npy", np.full((9, 16, 24, 3), np.nan, np.float32))
    with pytest.raises(ClipError, match="not finite"):
        ArrayClips(tmp_path, 9, 16, 24).read(0, 0)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"layout": "T H W D"}, "layout=T H W D: must be T, H and W"),
        ({"layout": "T H"}, "layout=T H: must be"),
        ({"values": (1.0, 0.0)}, "values="),
        ({"frames": 0}, "frames=0"),
        ({"fps": 0}, "fps=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, wanted: dict[str, Any], message: str) -> None:
    np.save(tmp_path / "a.npy", video())
    settings: dict[str, Any] = {"frames": 9, "height": 8, "width": 8} | wanted
    with pytest.raises(UsageError, match=message):
        ArrayClips(tmp_path, **settings)


def test_folders_without_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no arrays in it"):
        ArrayClips(tmp_path, 1, 8, 8)
    with pytest.raises(DataError, match="no such folder or file of arrays"):
        ArrayClips(tmp_path / "gone", 1, 8, 8)
    np.save(tmp_path / "a.npy", video())
    with pytest.raises(DataError, match="none of its arrays can be used"):
        ArrayClips(tmp_path, 9, 8, 8, limits=Limits(frame_pixels=10))


class Rows(list[dict[str, Any]]):
    """As much of a data set as the source asks for."""

    def __init__(self, rows: list[dict[str, Any]], features: dict[str, Any]) -> None:
        super().__init__(rows)
        self.features, self._fingerprint = features, "f"

    def cast_column(self, column: str, kind: Any) -> "Rows":
        assert kind.decode is False
        return Rows([{**row, column: {"bytes": row[column], "path": None}} for row in self], self.features)

    def select(self, numbers: range) -> "Rows":
        return Rows([self[number] for number in numbers], self.features)

    def __getitem__(self, place: Any) -> Any:
        return [row[place] for row in self] if isinstance(place, str) else super().__getitem__(place)


@pytest.fixture
def library(tmp_path: Path, make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the package `datasets`."""
    data = make_video(tmp_path / "v.mp4", frames=6).read_bytes()

    class Video(SimpleNamespace):
        pass

    texts = ["one", ["two", "three"], None]
    rows = Rows([{"video": data, "text": text} for text in texts], {"video": Video(decode=True), "text": "string"})
    module = ModuleType("datasets")
    module.Video, module.load_dataset = Video, lambda name, split, streaming: rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_data_set_are_decoded_here(library: ModuleType, streaming: bool) -> None:
    source = DatasetClips("name", 6, 16, 16, streaming=streaming, clips=3, random_start=False)
    clips = [source.read(index, 0) for index in range(len(source))]
    assert [clip["caption"] for clip in clips] == ["one", "two", ""]
    assert {tuple(clip["video"].shape) for clip in clips} == {(3, 6, 16, 16)}
    assert {clip["fps"] for clip in clips} == {20.0}
    assert source.summary().line() == "name (train): 3 clips; 1 of 3 clips has no caption"
    assert len(DatasetClips("name", 6, 16, 16, clips=2)) == 2


def test_data_sets_that_cannot_be_read_are_told_in_one_line(library: ModuleType) -> None:
    with pytest.raises(UsageError, match="streaming=true: give clips=N too"):
        DatasetClips("name", 6, 16, 16, streaming=True)
    with pytest.raises(DataError, match="name: has no column frames; its columns are video, text: name one by media="):
        DatasetClips("name", 6, 16, 16, media="frames")

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such\nset")

    library.load_dataset = fails  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"name: split train cannot be read \(no such set\)"):
        DatasetClips("name", 6, 16, 16)


def test_without_the_package_the_mend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        DatasetClips("name", 6, 16, 16)


def test_a_folder_of_parquet_files_is_read_by_the_real_library(
    tmp_path: Path, make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = make_video(tmp_path / "v.mp4", frames=6).read_bytes()
    (tmp_path / "set").mkdir()
    parquet.write_table(arrow.table({"mp4": [data, data], "caption": ["one", ""]}), tmp_path / "set" / "0.parquet")
    source = DatasetClips(str(tmp_path / "set"), 6, 16, 16)
    assert [source.read(index, 0)["caption"] for index in range(2)] == ["one", ""]
    assert source.summary().captioned == 1
