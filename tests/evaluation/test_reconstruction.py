"""The evaluation from clips to files, with autoencoders whose losses are known."""

import csv
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from osp.data.media.shape import Strides
from osp.data.media.video import ClipError, read_clip
from osp.errors import DataError, UsageError
from osp.evaluation.frechet import Random3D
from osp.evaluation.lpips import PerceptualDistance
from osp.evaluation.reconstruction import evaluate_reconstruction
from osp.vae import WFVAE
from osp.vae.lowest_band import LowestBand


class Latent:
    """A posterior without spread."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def mode(self) -> Tensor:
        return self.mean


class Pooling(nn.Module):
    """Average pooling in space, then nearest; with stride 1 the identity, plus a constant."""

    def __init__(self, space_stride: int, time_stride: int = 4, offset: float = 0.0) -> None:
        super().__init__()
        self.strides, self.offset = Strides(time_stride, space_stride), offset

    def encode(self, video: Tensor) -> Latent:
        return Latent(F.avg_pool3d(video, (1, self.strides.space, self.strides.space)))

    def decode(self, latent: Tensor) -> Tensor:
        return F.interpolate(latent, scale_factor=(1.0, self.strides.space, self.strides.space)) + self.offset


class NaNForBright(Pooling):
    """Breaks on clips that are mostly white."""

    def decode(self, latent: Tensor) -> Tensor:
        broken = latent.mean(dim=(1, 2, 3, 4), keepdim=True) > 0.9
        return super().decode(latent).masked_fill(broken, math.nan)


@pytest.fixture
def tiny_vae() -> WFVAE:
    torch.manual_seed(0)
    widths = {"base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}
    return WFVAE(latent_channels=4, encoder_blocks=1, decoder_blocks=1, **widths).eval()


def clip(index: int, frames: int = 5, height: int = 32, width: int = 32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(index)
    video = torch.randint(60, 200, (3, frames, height, width), generator=generator, dtype=torch.uint8)
    return {"video": video, "key": f"{index:06d}-noise", "fps": 8.0, "caption": f"noise {index}"}


def evaluate(vae: nn.Module, clips: Any, output: Path, **arguments: Any) -> dict[str, Any]:
    return evaluate_reconstruction(vae, clips, output=output, model_name="toy", **arguments)


@pytest.fixture
def perceptual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PerceptualDistance:
    """With a random trunk, also where this machine has the real one."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-cache"))
    return PerceptualDistance()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_results_files_and_return_value_agree(tmp_path: Path, perceptual: PerceptualDistance) -> None:
    assert perceptual.name == "lpips_random_trunk"
    clips = [clip(i) for i in range(5)]
    results = evaluate(
        Pooling(2),
        clips,
        tmp_path,
        batch_size=2,
        perceptual=perceptual,
        features=Random3D(),
        baselines={"pool4": Pooling(4), "same": Pooling(1)},
        settings={"checkpoint": Path("run/last.ckpt")},
    )
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(results, default=str))
    assert results["settings"]["checkpoint"] == Path("run/last.ckpt")
    assert results["model"] == "toy"
    assert results["counts"] == {"clips": 5, "frames": 25, "skipped": 0}
    assert [record["key"] for record in results["clips"]] == [c["key"] for c in clips]
    assert results["clips"][3]["caption"] == "noise 3"

    table = rows(tmp_path / "metrics.csv")
    assert [row["key"] for row in table] == [*(c["key"] for c in clips), "mean"]
    names = ["psnr", "ssim", "ms_ssim_2scale", perceptual.name, "flicker"]
    assert list(results["mean"]) == names
    for row, record in zip(table, results["clips"], strict=False):
        assert {name: float(row[name]) for name in names} == record["metrics"]
        assert float(row["psnr_pool4"]) == record["baselines"]["pool4"]["psnr"]
    for name in names:
        values = torch.tensor([record["metrics"][name] for record in results["clips"]], dtype=torch.float64)
        assert results["mean"][name] == pytest.approx(values.mean().item())
        assert results["std"][name] == pytest.approx(values.std(correction=0).item())
        assert float(table[-1][name]) == results["mean"][name]

    assert results["psnr_gain"]["pool4"] == pytest.approx(
        results["mean"]["psnr"] - results["baselines"]["pool4"]["psnr"]
    )
    assert results["psnr_gain"]["pool4"] > 0.5
    assert results["baselines"]["same"]["psnr"] == 100.0  # the cap
    assert results["frechet"]["n_clips"] == 5
    assert results["frechet"]["too_few_clips"] is True
    assert results["frechet"]["frechet_random3d"] > 0
    assert "lpips" not in (tmp_path / "metrics.json").read_text().replace("lpips_random_trunk", "")
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > 2000  # two columns
    assert sorted(path.name for path in tmp_path.iterdir()) == ["contact_sheet.png", "metrics.csv", "metrics.json"]


def test_psnr_of_a_known_error(tmp_path: Path) -> None:
    results = evaluate(Pooling(1, offset=0.2), [clip(0), clip(1)], tmp_path)
    assert results["mean"]["psnr"] == pytest.approx(20.0, abs=1e-3)
    assert results["std"]["psnr"] == pytest.approx(0.0, abs=1e-3)
    assert results["mean"]["flicker"] == pytest.approx(0.0, abs=1e-3)
    assert results["frechet"] is None


def test_output_is_clamped_before_it_is_measured(tmp_path: Path) -> None:
    white = {"video": torch.full((3, 1, 16, 16), 255, dtype=torch.uint8), "key": "white", "fps": 1.0}
    results = evaluate(Pooling(1, offset=0.5), [white], tmp_path)
    assert results["mean"]["psnr"] == 100.0
    assert results["mean"]["flicker"] is None  # a single frame
    assert rows(tmp_path / "metrics.csv")[-1]["flicker"] == ""


def test_batch_size_changes_nothing(tmp_path: Path) -> None:
    mixed = [clip(0), clip(1), clip(2, frames=1), clip(3, height=48), clip(4, height=48), clip(5)]
    one, four = (evaluate(Pooling(2), mixed, tmp_path / str(n), batch_size=n, features=Random3D()) for n in (1, 4))
    assert [record["key"] for record in one["clips"]] == [record["key"] for record in four["clips"]]
    for a, b in zip(one["clips"], four["clips"], strict=True):
        assert a["metrics"].keys() == b["metrics"].keys()
        for name, value in a["metrics"].items():
            assert b["metrics"][name] == (None if value is None else pytest.approx(value, rel=1e-5))
    assert one["frechet"]["frechet_random3d"] == pytest.approx(four["frechet"]["frechet_random3d"], rel=1e-3)


def test_broken_clips_are_counted_and_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    clips = [ClipError("a.mp4", "the file is empty"), clip(0), clip(2)]
    results = evaluate(Pooling(1), clips, tmp_path, batch_size=4, features=Random3D())
    assert results["counts"] == {"clips": 2, "frames": 10, "skipped": 1}
    assert results["skipped"] == [{"clip": "a.mp4", "reason": "the file is empty"}]
    assert [record["key"] for record in results["clips"]] == ["000000-noise", "000002-noise"]
    assert results["frechet"]["n_clips"] == 2
    assert "clip skipped: a.mp4: the file is empty" in caplog.text


@pytest.mark.parametrize("in_pieces", [False, True])
def test_numbers_that_are_not_finite_end_it_with_one_line(in_pieces: bool, tmp_path: Path) -> None:
    bright = clip(1) | {"key": "bright", "video": torch.full((3, 5, 32, 32), 250, dtype=torch.uint8)}
    if in_pieces:
        bright |= {"pieces": iter([bright.pop("video")]), "height": 32, "width": 32}
    with pytest.raises(DataError, match=r"^bright: the model gives numbers that are not finite .*precision=32-true$"):
        evaluate(NaNForBright(1), [clip(0), bright], tmp_path, batch_size=4)
    assert not (tmp_path / "metrics.json").exists()


def test_settings_that_are_not_finite_leave_valid_json(tmp_path: Path) -> None:
    evaluate(Pooling(1), [clip(0)], tmp_path, settings={"training_val_psnr": [[0, math.nan], [1, 2.0]]})
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["settings"]["training_val_psnr"] == [[0, None], [1, 2.0]]


def pieces(whole: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    video = whole["video"]
    about = {"pieces": iter(video.split(lengths, dim=1)), "height": video.shape[2], "width": video.shape[3]}
    return {key: value for key, value in whole.items() if key != "video"} | about


@pytest.mark.parametrize("lengths", [[7, 1, 6], [1, 13], [14]])
def test_a_video_in_pieces_is_measured_as_the_whole(lengths: list[int], tmp_path: Path, tiny_vae: WFVAE) -> None:
    clips = [clip(0, 14), clip(1, 14, 24, 40)]
    about: dict[str, Any] = {"baselines": {"band": LowestBand(4)}, "save_videos": 2}
    whole = evaluate(tiny_vae, clips, tmp_path / "whole", **about)
    parts = evaluate(tiny_vae, [pieces(one, lengths) for one in clips], tmp_path / "parts", **about)
    assert [record["frames"] for record in parts["clips"]] == [14, 14]
    assert [(record["height"], record["width"]) for record in parts["clips"]] == [(32, 32), (24, 40)]
    for one, other in zip(whole["clips"], parts["clips"], strict=True):
        assert other["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
        assert other["baselines"]["band"] == pytest.approx(one["baselines"]["band"], rel=1e-4)
    assert len(list((tmp_path / "parts" / "reconstructions").iterdir())) == 2


def test_a_vae_that_cannot_stream_is_given_the_whole_video(tmp_path: Path) -> None:
    whole = evaluate(Pooling(2), [clip(0, 6)], tmp_path / "whole")
    parts = evaluate(Pooling(2), [pieces(clip(0, 6), [2, 4])], tmp_path / "parts")
    assert parts["mean"] == pytest.approx(whole["mean"], rel=1e-5)


def test_the_frechet_distance_says_what_it_takes_for_a_clip(tmp_path: Path) -> None:
    long = evaluate(Pooling(2), [pieces(clip(0, 40), [11] * 3 + [7]), clip(1)], tmp_path / "a", features=Random3D())
    assert long["frechet"]["n_clips"] == 3  # two runs of 16 frames of the first, and the second as it is
    assert long["frechet"]["clips_are"] == "runs of 16 frames of the videos"
    sizes = evaluate(Pooling(2), [clip(0), clip(1, 5, 16, 16)], tmp_path / "b", features=Random3D())
    assert sizes["frechet"]["clips_are"] == "the clips, each in its own size"
    short = evaluate(Pooling(2), [pieces(clip(n, 4), [4]) for n in (0, 1)], tmp_path / "c", features=Random3D())
    assert short["frechet"]["n_clips"] == 2  # all there is of each


def test_a_video_that_is_damaged_on_its_way_costs_itself_alone(tmp_path: Path) -> None:
    def damaged() -> Iterator[Tensor]:
        yield clip(1, 20)["video"]
        raise ClipError("long.mp4", "damaged after 20 frames")

    broken = {"key": "long.mp4", "fps": 8.0, "pieces": damaged(), "height": 32, "width": 32}
    results = evaluate(Pooling(2), [broken, clip(0)], tmp_path, features=Random3D())
    assert results["counts"] == {"clips": 1, "frames": 5, "skipped": 1}
    assert results["skipped"] == [{"clip": "long.mp4", "reason": "damaged after 20 frames"}]
    assert results["frechet"]["n_clips"] == 1


def test_no_clip_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no clip could be evaluated: 1 skipped; the first: a\.mp4: the file is empty"):
        evaluate(Pooling(2), [ClipError("a.mp4", "the file is empty")], tmp_path)
    with pytest.raises(DataError, match="no clip could be evaluated: 0 skipped"):
        evaluate(Pooling(2), [], tmp_path)
    assert list(tmp_path.iterdir()) == []


class Untouchable(Pooling):
    """Fails the test if it is run."""

    def encode(self, video: Tensor) -> Latent:
        raise AssertionError("computed before the settings were checked")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((5, 36, 32), "height=36: must be a multiple of 8, the stride of Untouchable; use 32 or 40"),
        ((5, 32, 20), "width=20: must be a multiple of 8, the stride of Untouchable; use 16 or 24"),
    ],
)
def test_sizes_are_checked_before_any_compute(size: tuple[int, int, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(Untouchable(8), [clip(0, *size)], tmp_path)


def test_features_need_enough_frames(tmp_path: Path) -> None:
    class Long(Random3D):
        min_frames = 10

    with pytest.raises(UsageError, match="frames=9: frechet_random3d needs at least 10 frames"):
        evaluate(Untouchable(8), [clip(0, frames=9)], tmp_path, features=Long())


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="precision=half: is not known; choose 32-true, bf16-mixed, 16-mixed or auto"):
        evaluate(Untouchable(8), [clip(0)], tmp_path, precision="half")
    with pytest.raises(UsageError, match="batch_size=0"):
        evaluate(Untouchable(8), [clip(0)], tmp_path, batch_size=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"output=.*file: cannot be made a folder"):
        evaluate(Untouchable(8), [clip(0)], tmp_path / "file")


def test_a_model_that_changes_the_size_is_named(tmp_path: Path) -> None:
    class Longer(Pooling):
        def decode(self, latent: Tensor) -> Tensor:
            return super().decode(latent).repeat(1, 1, 2, 1, 1)

    with pytest.raises(UsageError, match=r"Longer gives 1x3x10x32x32 for a video of 1x3x5x32x32"):
        evaluate(Longer(2), [clip(0)], tmp_path)


def test_mixed_precision_reaches_the_model_and_not_the_metrics(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    class Linear(Pooling):
        def decode(self, latent: Tensor) -> Tensor:
            mixed = F.conv3d(latent, torch.eye(3).view(3, 3, 1, 1, 1))
            seen.append(mixed.dtype)
            return mixed

    results = evaluate(Linear(1), [clip(0)], tmp_path, precision="bf16-mixed")
    assert seen == [torch.bfloat16]
    assert 60 < results["mean"]["psnr"] < 80  # bfloat16 keeps 8 bits of the value
    assert results["settings"]["precision"] == "bf16-mixed"


def test_side_by_side_videos(tmp_path: Path) -> None:
    black = {"video": torch.zeros(3, 5, 32, 48, dtype=torch.uint8), "key": "folder/black", "fps": 10.0}
    image = {"video": torch.zeros(3, 1, 32, 48, dtype=torch.uint8), "key": "still", "fps": 0.0}
    evaluate(Pooling(1, offset=2.0), [black, image, clip(2)], tmp_path, save_videos=2, contact_sheet_clips=0)
    folder = tmp_path / "reconstructions"
    assert sorted(path.name for path in folder.iterdir()) == ["000-folder_black.mp4", "001-still.png"]
    with av.open(str(folder / "000-folder_black.mp4")) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(frames) == 5
    assert frames[0].shape == (32, 96, 3)
    assert frames[2][:, :40].mean() < 10  # input
    assert frames[2][:, 56:].mean() > 245  # reconstruction
    with Image.open(folder / "001-still.png") as picture:
        assert picture.size == (96, 32)
        assert picture.getpixel((10, 10)) == (0, 0, 0)
        assert picture.getpixel((80, 10)) == (255, 255, 255)
    assert not (tmp_path / "contact_sheet.png").exists()
    evaluate(Pooling(1), [clip(2)], tmp_path, save_videos=1, contact_sheet_clips=0)
    assert len(list(folder.iterdir())) == 1  # nothing of the evaluation before


def test_real_files_broken_ones_among_them(shared: Path, tmp_path: Path) -> None:
    names = ["good/man_in_street.mp4", "broken/empty.mp4", "good/flipping_a_pancake.mkv", "broken/text.mp4"]

    def read() -> Iterator[dict[str, Any] | ClipError]:
        for name in names:
            try:
                video = read_clip(shared / "clips" / name, frames=5, size=(64, 64), name=name)
                yield {"video": video, "key": Path(name).stem, "fps": 24.0}
            except ClipError as error:
                yield error

    results = evaluate(Pooling(2), read(), tmp_path, baselines={"pool8": Pooling(8)})
    assert results["counts"] == {"clips": 2, "frames": 10, "skipped": 2}
    assert [entry["clip"] for entry in results["skipped"]] == ["broken/empty.mp4", "broken/text.mp4"]
    assert 20 < results["mean"]["psnr"] < 45
    assert results["psnr_gain"]["pool8"] > 3
