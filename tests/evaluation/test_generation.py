"""The judgement of generated videos, with generators whose faults are known."""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from osp.data.media.shape import Strides
from osp.data.media.video import ClipError, probe, to_float
from osp.data.procedural.drawing import render
from osp.data.procedural.scene import Scene, backgrounds_for, read_caption
from osp.data.sources import SyntheticClips
from osp.errors import DataError, UsageError
from osp.evaluation.frechet import FrechetDistance, Random3D
from osp.evaluation.generation import GeneratedClip, evaluate_generation

FRAMES, SIDE = 9, 48
REAL = SyntheticClips(40, FRAMES, SIDE, SIDE, objects=1, plain=True, seed=3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Blur(nn.Module):
    """A VAE that keeps one pixel of `space_stride` x `space_stride`, or grey only."""

    def __init__(self, space_stride: int, grey: bool = False) -> None:
        super().__init__()
        self.strides, self.grey = Strides(4, space_stride), grey

    def encode(self, video: Tensor) -> Any:
        video = video.mean(dim=1, keepdim=True).expand_as(video) if self.grey else video
        latent = F.avg_pool3d(video, (1, self.strides.space, self.strides.space))

        class Posterior:
            def mode(self) -> Tensor:
                return latent

        return Posterior()

    def decode(self, latent: Tensor) -> Tensor:
        return F.interpolate(latent, scale_factor=(1.0, self.strides.space, self.strides.space), mode="trilinear")


def real(count: int = 40) -> Iterator[dict[str, Any]]:
    return (REAL.read(index, 0) for index in range(count))


def rendered(prompt: str, seed: int) -> Tensor:
    """The scene of the prompt, with other places and backgrounds than the real clip's."""
    asked = read_caption(prompt)
    backgrounds = backgrounds_for([asked.colour])
    scene = Scene((asked,), backgrounds[seed % len(backgrounds)], variation=1000 + seed)
    return to_float(render(scene, FRAMES, SIDE, SIDE))


def perfect(count: int) -> Iterator[GeneratedClip]:
    for seed, clip in enumerate(real(count)):
        yield GeneratedClip(clip["key"], clip["caption"], rendered(clip["caption"], seed), 8.0, seed)


def evaluate(generated: Any, output: Path, clips: Any = None, **arguments: Any) -> dict[str, Any]:
    clips = real() if clips is None else clips
    return evaluate_generation(generated, clips, output=str(output), model_name="toy", features=Random3D(), **arguments)


def test_a_generator_that_draws_its_prompts_is_right_and_files_agree(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "old.mp4").touch()
    results = evaluate(perfect(20), tmp_path, vae=Blur(1, grey=True), contact_sheet_clips=5, save_videos=3)
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(results))
    assert results["counts"] == {
        "generated": 20,
        "real": 20,
        "further_real": 20,
        "skipped": 0,
    }
    rates = results["accuracy"]
    for name in ("generated", "real"):
        assert {part: rate["rate"] for part, rate in rates[name].items()} == dict.fromkeys(rates["chance"], 1.0)
        assert rates[name]["all"]["low"] == pytest.approx(0.8389, abs=1e-4)
        assert rates[f"{name}_shuffled"]["all"] < 0.05
    # It loses colours, and with them some objects.
    assert rates["vae"]["colour"]["rate"] < 0.5 < 0.7 < rates["vae"]["shape"]["rate"]
    assert rates["chance"]["all"] == 1 / 560
    assert results["given"] is None

    with (tmp_path / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["prompt"] for row in table] == [clip["caption"] for clip in real(20)]
    for row, record in zip(table, results["clips"], strict=True):
        assert row["colour"] == row["colour_read"] == record["read"]["colour"]
        assert (row["motion_right"], row["right"], row["seed"]) == ("True", "True", str(record["seed"]))
    files = [row["file"] for row in table if row["file"]]
    assert files == [f"videos/{path.name}" for path in sorted((tmp_path / "videos").iterdir())]
    assert len(files) == 3
    info = probe(tmp_path / files[0])
    assert (info.frames, info.fps, info.width) == (FRAMES, 8.0, SIDE)
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > 2 * 1176


def test_distances_are_between_the_sets_that_they_say(tmp_path: Path) -> None:
    count = 15
    results = evaluate(perfect(count), tmp_path, vae=Blur(4))
    network = Random3D()

    def distance(reference: Tensor, other: Tensor) -> float:
        metric = FrechetDistance(network.num_features)
        metric.update(network(reference), reference=True)
        metric.update(network(other), reference=False)
        return float(metric.compute())

    clips = to_float(torch.stack([clip["video"] for clip in real(2 * count)]))
    made = torch.stack([clip.video for clip in perfect(count)])
    frechet = results["frechet"]
    assert next(iter(frechet)) == "frechet_random3d"
    reference = clips[count:]
    assert frechet["frechet_random3d"] == pytest.approx(distance(reference, made), rel=1e-3)
    assert frechet["floor"] == pytest.approx(distance(reference, clips[:count]), rel=1e-3)
    blurred = Blur(4)
    assert frechet["vae"] == pytest.approx(
        distance(reference, blurred.decode(blurred.encode(clips[:count]).mode())), rel=1e-3
    )
    assert (frechet["n_clips"], frechet["reference_clips"], frechet["too_few_clips"]) == (count, count, True)
    # Where there are no others, the prompts' own clips have to do.
    few = evaluate(perfect(count), tmp_path, real(count))["frechet"]
    assert few["frechet_random3d"] == pytest.approx(distance(clips[:count], made), rel=1e-3)
    assert few["floor"] is few["vae"] is None


def test_wrong_and_broken_videos_are_counted_as_wrong(tmp_path: Path) -> None:
    def generated() -> Iterator[GeneratedClip]:
        for number, clip in enumerate(perfect(4)):
            video = clip.video
            if number == 2:
                video = video.flip(1)  # played backwards
            yield GeneratedClip(clip.key, "a red star moves up" if number == 2 else clip.prompt, video, 8.0)

    broken = ClipError("one.mp4", "broken")
    results = evaluate(generated(), tmp_path, [broken, *real(3)])
    assert results["counts"] == {"generated": 4, "real": 3, "further_real": 0, "skipped": 1}
    assert results["skipped"] == [{"clip": "one.mp4", "reason": "broken"}]
    assert [clip["right"]["all"] for clip in results["clips"]] == [True, True, False, True]
    assert results["accuracy"]["generated"]["all"]["right"] == 3
    assert results["frechet"]["n_clips"] == 3
    assert "vae" not in results["accuracy"]


def test_a_video_that_is_not_finite_ends_it_with_one_line(tmp_path: Path) -> None:
    clips = list(perfect(2))
    broken = replace(clips[1], video=torch.full_like(clips[1].video, math.nan))
    with pytest.raises(DataError, match=r": the model gives numbers that are not finite .*precision=32-true$"):
        evaluate([clips[0], broken], tmp_path, real(2))
    assert not (tmp_path / "metrics.json").exists()


def test_given_frames_are_compared_with_what_the_vae_keeps_of_them(tmp_path: Path) -> None:
    given = (0, FRAMES - 1)

    def generated() -> Iterator[GeneratedClip]:
        for clip in real(3):
            video = to_float(clip["video"])
            video[:, 1:-1] = 0
            video[:, 0] += 0.02
            video[:, -1] -= 0.04
            yield GeneratedClip(clip["key"], clip["caption"], video, 8.0, real=clip["video"])

    vae = Blur(2)
    results = evaluate(generated(), tmp_path, vae=vae, given=given)
    about = results["given"]
    assert about["frames"] == [0, 8]
    assert about["psnr"] == pytest.approx(10 * math.log10(4 / ((0.02**2 + 0.04**2) / 2)), abs=0.01)
    first, last = about["by_frame"]
    assert (first["frame"], last["frame"]) == given
    assert first["psnr"] == pytest.approx(20 * math.log10(2 / 0.02), abs=0.01)
    assert first["psnr"] - last["psnr"] == pytest.approx(20 * math.log10(2), abs=0.01)
    assert last["loss"] == pytest.approx(last["vae_psnr"] - last["psnr"])
    clip = to_float(next(real())["video"])[None]
    lost = (vae.decode(vae.encode(clip).mode()) - clip)[:, :, list(given)]
    assert results["clips"][0]["vae_psnr"] == pytest.approx(-10 * math.log10(lost.square().mean() / 4), abs=1e-3)
    assert about["loss"] == pytest.approx(about["vae_psnr"] - about["psnr"])
    assert float(next(csv.DictReader((tmp_path / "metrics.csv").open()))["given_psnr"]) == pytest.approx(
        about["psnr"], abs=0.01
    )

    with pytest.raises(UsageError, match="but not the clip"):
        evaluate(perfect(1), tmp_path, given=given)


def test_what_cannot_be_judged_is_an_error(tmp_path: Path) -> None:
    video = torch.zeros(3, FRAMES, SIDE, SIDE)
    with pytest.raises(UsageError, match="'a cat' names no shape"):
        evaluate([GeneratedClip("k", "a cat", video, 8.0)], tmp_path)
    with pytest.raises(UsageError, match="names no shape"):
        evaluate(perfect(1), tmp_path, [{**next(real()), "caption": "a dog"}])
    with pytest.raises(DataError, match="nothing was generated"):
        evaluate([], tmp_path)
    with pytest.raises(DataError, match="no real clip could be read: 1 skipped; the first: k: broken"):
        evaluate(perfect(1), tmp_path, [ClipError("k", "broken")])
