"""The perceptual distance: where its trunk comes from, what it is called, and that it is the lpips package's number."""

import logging
from pathlib import Path

import lpips as package
import pytest
import torch
from torch import Tensor, nn

from osp.errors import UsageError
from osp.evaluation import lpips
from osp.evaluation.lpips import PerceptualDistance
from osp.weights import WeightImportError


@pytest.fixture(autouse=True)
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No trunk from this machine's torch hub cache, and no warning given yet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(lpips, "_random_trunk_reported", False)
    return tmp_path / "torch" / "hub" / "checkpoints"


def frames(count: int, side: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    """The package's own module, with a random trunk."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return package.LPIPS(net="alex", pnet_rand=True, verbose=False)


@pytest.fixture(scope="module")
def trunk_file(reference: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trunk of `reference` as torchvision's file of the whole network has it."""
    state = {f"features.{key.split('.', 1)[1]}": value for key, value in reference.net.state_dict().items()}
    path = tmp_path_factory.mktemp("trunk") / "alexnet.pth"
    torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, path)
    return path


def test_with_a_trunk_file_it_is_the_package_s_lpips(reference: nn.Module, trunk_file: Path) -> None:
    distance = PerceptualDistance(trunk=trunk_file)
    a, b = frames(3), frames(3, seed=1)
    assert distance.name == "lpips"
    torch.testing.assert_close(distance(a, b), reference(a, b).flatten())


def test_trunk_from_the_hub_cache(trunk_file: Path, empty_hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty_hub.mkdir(parents=True)
    (empty_hub / "alexnet-owt-7be5be79.pth").write_bytes(trunk_file.read_bytes())
    assert PerceptualDistance().name == "lpips"
    assert not caplog.records


def test_download_is_tried_only_when_asked_for(
    trunk_file: Path, empty_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(url: str, target: str, hash_prefix: str, progress: bool) -> None:
        asked.append(f"{url} {hash_prefix}")
        Path(target).write_bytes(trunk_file.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert PerceptualDistance().name == "lpips_random_trunk"
    assert asked == []
    assert PerceptualDistance(download=True).name == "lpips"
    assert asked == ["https://download.pytorch.org/models/alexnet-owt-7be5be79.pth 7be5be79"]


def test_a_failed_download_leaves_a_random_trunk(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def download(*_: object, **__: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert PerceptualDistance(download=True).name == "lpips_random_trunk"
    assert "the download failed: timed out" in caplog.text


def test_random_trunk_is_reported_once_in_a_process(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert PerceptualDistance("alex").name == PerceptualDistance("vgg").name == "lpips_random_trunk"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "alexnet-owt-7be5be79.pth" in lines[0]
    assert "trunk=FILE" in lines[0]


def test_random_trunk_is_the_same_whatever_the_global_seed() -> None:
    torch.manual_seed(1)
    first = PerceptualDistance()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = PerceptualDistance()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    a = frames(1)
    assert first(a, a + 0.25).item() == pytest.approx(0.0248006, rel=1e-3)


def test_video_gives_a_distance_for_each_frame() -> None:
    distance = PerceptualDistance()
    a, b = frames(6), frames(6, seed=1)
    video_a, video_b = (x.view(2, 3, 3, 64, 64).transpose(1, 2) for x in (a, b))
    torch.testing.assert_close(distance(video_a, video_b), distance(a, b).view(2, 3))


def test_gradient_reaches_the_video_and_nothing_else() -> None:
    distance = PerceptualDistance().train()
    a = frames(2).requires_grad_()
    distance(a, frames(2, seed=1)).sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert a.grad.abs().max() > 0
    assert not distance.training
    assert not any(parameter.requires_grad for parameter in distance.parameters())


@pytest.mark.parametrize("level", [-1.0, 0.0])
def test_gradient_is_finite_on_flat_and_equal_frames(level: float) -> None:
    a = torch.full((1, 3, 64, 64), level, requires_grad=True)
    distance = PerceptualDistance()(a, a.detach().clone())
    distance.sum().backward()
    assert distance.item() == 0
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_it_runs_in_float32_under_autocast() -> None:
    distance, a, b = PerceptualDistance(), frames(2), frames(2, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distance(a, b)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, distance(a, b))


@pytest.mark.parametrize(("net", "side"), [("alex", 16), ("alex", 31), ("vgg", 8)])
def test_tiny_frames_are_enlarged(net: str, side: int) -> None:
    distance = PerceptualDistance(net)
    a = frames(1, side)
    assert distance(a, a).item() == 0
    assert distance(a, -a).item() > 0


def test_bad_settings_and_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="net=squeeze"):
        PerceptualDistance("squeeze")
    with pytest.raises(WeightImportError, match=r"absent\.pth: no such file"):
        PerceptualDistance(trunk=tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(WeightImportError, match=r"text\.pth: damaged or not a checkpoint"):
        PerceptualDistance(trunk=tmp_path / "text.pth")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightImportError, match=r"other\.pth: not torchvision's .* \(no features\.0\.weight"):
        PerceptualDistance(trunk=tmp_path / "other.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(WeightImportError, match=r"list\.pth: holds a list, not a state dict"):
        PerceptualDistance(trunk=tmp_path / "list.pth")
