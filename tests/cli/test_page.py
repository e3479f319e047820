"""`osp page`: one HTML file with all that runs left, that needs nothing else."""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import av
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from osp.data.media.video import encode_video, to_float
from osp.data.sources import SyntheticClips
from osp.evaluation.frechet import Random3D
from osp.evaluation.generation import GeneratedClip, evaluate_generation
from osp.evaluation.reconstruction import evaluate_reconstruction
from osp.report.html import charts
from osp.sampling.outputs import SampleFolder
from osp.vae.lowest_band import LowestBand

Osp = Callable[..., tuple[int, str, str]]
PageCommand = Callable[..., tuple[int, dict[str, object], str]]
CLIPS = SyntheticClips(8, 9, 32, 32, objects=1, plain=True)
VOID = {"meta", "img", "br", "line"}


class Page(HTMLParser):
    """Checks that all that is opened is closed, and gathers what there is."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.sources += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def run_folder(path: Path, name: str) -> Path:
    """As `osp train` leaves one."""
    writer = SummaryWriter(str(path / "tensorboard"))
    for step in range(0, 1000, 2):
        writer.add_scalar("train/loss", 1 / (1 + step), step)
    for step in (500, 1000):
        writer.add_scalar("val/psnr", 20 + step / 100, step)
    writer.add_scalar("data/broken", 0, 1)
    writer.close()
    result = {"name": name, "steps": 1000, "parameters": 1234567, "seconds": 125.0}
    (path / "result.json").write_text(json.dumps(result))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a whole demonstration leaves."""
    top = tmp_path_factory.mktemp("runs")
    real = [CLIPS.read(index, 0) for index in range(8)]
    made = [GeneratedClip(clip["key"], clip["caption"], to_float(clip["video"]), 8.0, 0) for clip in real[:4]]
    made[1] = GeneratedClip("wrong", made[0].prompt, made[1].video, 8.0, 1)
    evaluate_generation(
        made, real, output=str(top / "generation"), model_name="toy", features=Random3D(), vae=LowestBand(4)
    )
    evaluate_reconstruction(
        LowestBand(4),
        real,
        output=top / "reconstruction",
        model_name="band",
        save_videos=2,
        baselines={"lowest_band": LowestBand(8)},
    )
    samples = SampleFolder(top / "samples", "mp4")
    settings = {"seed": 7, "fps": 8.0, "frames": 5}
    samples.write("000", torch.rand(3, 5, 15, 17), {"prompt": "<script>alert('&')</script>", **settings})
    samples.write("001", torch.rand(3, 5, 16, 16), {"prompt": "plain", **settings})
    (top / "samples" / "001.mp4").write_bytes(encode_video(torch.rand(3, 5, 16, 16), 8.0, lossless=True))
    SampleFolder(top / "samples", "png").write("002", torch.rand(3, 5, 16, 16), {"prompt": "frames", **settings})
    SampleFolder(top / "samples", "png").write("003", torch.rand(3, 1, 16, 16), {"prompt": "one", **settings})
    return {
        "vae_run": run_folder(top / "vae", "wfvae_tiny"),
        "denoiser_run": run_folder(top / "denoiser", "t2v_tiny"),
        **{name: top / name for name in ("generation", "reconstruction", "samples")},
    }


@pytest.fixture
def page(osp: Osp) -> PageCommand:
    """Runs `osp page`: exit code, result and stderr."""

    def run(*arguments: str) -> tuple[int, dict[str, object], str]:
        code, out, err = osp("page", *arguments)
        return code, json.loads(out.splitlines()[-1]) if out else {}, err

    return run


def test_the_page_holds_everything_and_needs_nothing(
    tmp_path: Path, folders: dict[str, Path], page: PageCommand
) -> None:
    inputs = [f"{name}={path}" for name, path in folders.items()]
    code, result, err = page(*inputs, f"output={tmp_path / 'new' / 'page.html'}", "title='A & B'")
    assert code == 0, err
    text = (tmp_path / "new" / "page.html").read_text()
    assert result["bytes"] == len(text.encode())
    read = Page(text)
    assert all(source.startswith("data:") for source in read.sources)
    assert not re.search(r"https?://|url\(|@import", text)
    assert read.tags["script"] == 0
    assert "<script>alert('&')</script>" in read.text
    assert read.tags["video"] == 4 + 2 + 3
    assert read.tags["img"] == 1
    assert read.tags["svg"] == 4  # two curves of each run
    assert read.tags["title"] == 1

    metrics = json.loads((folders["generation"] / "metrics.json").read_text())
    for part in ("A & B", "75.0 %", "0.2 %", f"{metrics['frechet']['frechet_random3d']:.3g}", "frechet_random3d"):
        assert part in read.text
    assert read.text.count("✓") == 3
    assert read.text.count("✗") == 1
    for clip in metrics["clips"]:
        assert clip["prompt"] in read.text
    assert "1000 steps of 1,234,567 parameters, 2 minutes" in read.text
    assert "dB over lowest band" in read.text


def test_a_chart_shows_the_curve() -> None:
    drawn = charts({"a loss": [(step, 4 - 3 * step / 1000) for step in range(0, 1001, 2)]})
    (found,) = re.findall(r'points="([^"]*)"', drawn)
    points = [tuple(map(float, point.split(","))) for point in found.split()]
    assert len(points) == 200
    assert points == sorted(points)  # to the right, and down
    assert (points[0][1], points[-1][1]) == (12.0, 150.0)
    assert re.findall(r"<text[^>]*>([^<]*)", drawn) == ["3.99", "2.5", "1", "0", "step 1000"]  # of means
    assert "nan" not in charts({"constant": [(0, 1.0), (5, 1.0)]})


def test_videos_play_in_browsers(tmp_path: Path, folders: dict[str, Path], page: PageCommand) -> None:
    code, _, err = page(f"samples={folders['samples']}", f"output={tmp_path / 'page.html'}")
    assert code == 0, err
    sizes = []
    for source in Page((tmp_path / "page.html").read_text()).sources:
        kind, _, data = source.partition(";base64,")
        if kind == "data:image/png":
            continue
        assert kind == "data:video/mp4"
        with av.open(io.BytesIO(base64.b64decode(data))) as container:
            context = container.streams.video[0].codec_context
            assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
            sizes.append((context.width, context.height, sum(1 for _ in container.decode(video=0))))
    assert sizes == [(18, 16, 5), (16, 16, 5), (16, 16, 5)]


def test_fewer_clips_and_missing_folders_are_fine(tmp_path: Path, folders: dict[str, Path], page: PageCommand) -> None:
    both = f"generation=[{folders['generation']},{folders['generation']}]"
    code, _, err = page(both, "clips=1", f"output={tmp_path / 'page.html'}")
    assert code == 0, err
    assert Page((tmp_path / "page.html").read_text()).tags["video"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "there is nothing to show; give at least one of vae_run=DIR, "),
        (["vae_run=none"], 1, r"none/result\.json: No such file.*a run that has ended"),
        (["samples=none"], 1, r"none/samples\.jsonl: lists no video"),
        (["samples=none", "clips=-1"], 2, "clips=-1: must be a whole number of at least 0"),
    ],
)
def test_what_cannot_be_shown_is_said(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    page: PageCommand,
) -> None:
    got, _, said = page(*arguments)
    assert got == code
    assert re.search(message, said), said
    assert "\n" not in said
    assert not (tmp_path / "outputs").exists()
