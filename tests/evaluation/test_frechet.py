"""Frechet distance against analytic Gaussians, its streaming, and the networks that give the features."""

from pathlib import Path

import pytest
import scipy.linalg
import torch
from torch import Tensor

from osp.errors import UsageError
from osp.evaluation.frechet import FrechetDistance, Random3D, frechet_distance, video_features
from osp.evaluation.i3d import I3D, _pad_same
from osp.weights import WeightImportError
from osp.weights.files import load_exactly


def features(clips: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(clips, size, generator=torch.Generator().manual_seed(seed))


def covariance(size: int, rank: int, seed: int) -> Tensor:
    factor = features(size, rank, seed).double()
    return factor @ factor.T


def distance_of(a: Tensor, b: Tensor) -> float:
    metric = FrechetDistance(a.shape[1])
    metric.update(a, reference=True)
    metric.update(b, reference=False)
    return metric.compute().item()


def test_independent_gaussians() -> None:
    mean = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 0.5]], dtype=torch.float64)
    deviation = torch.tensor([[1.0, 3.0, 0.0], [2.0, 0.5, 4.0]], dtype=torch.float64)
    expected = (mean[0] - mean[1]).square().sum() + (deviation[0] - deviation[1]).square().sum()
    result = frechet_distance(mean[0], deviation[0].square().diag(), mean[1], deviation[1].square().diag())
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("rank", [6, 3])
def test_correlated_gaussians_against_the_matrix_root(rank: int) -> None:
    a, b = covariance(6, 6, seed=1), covariance(6, rank, seed=2)
    zero = torch.zeros(6, dtype=torch.float64)
    root = scipy.linalg.sqrtm((a @ b).numpy())
    expected = (a.trace() + b.trace()).item() - 2 * root.trace().real
    assert frechet_distance(zero, a, zero, b).item() == pytest.approx(expected, rel=1e-6)


def test_the_same_set_is_at_distance_zero_even_with_fewer_clips_than_features() -> None:
    clips = 10 + 3 * features(8, 400)
    assert distance_of(clips, clips) == pytest.approx(0.0, abs=1e-8)


def test_a_shifted_set_is_at_the_shift_squared() -> None:
    clips = features(30, 16)
    shift = torch.linspace(0, 1, 16)
    assert distance_of(clips, clips + shift) == pytest.approx(shift.square().sum().item(), rel=1e-5)


def test_scaled_set_against_the_closed_form() -> None:
    clips = features(50, 12)
    clips -= clips.mean(0)
    expected = (2.0 - 1.0) ** 2 * clips.T.cov().trace().item()  # tr(C) + tr(4 C) - 2 tr(2 C)
    assert distance_of(clips, 2 * clips) == pytest.approx(expected, rel=1e-5)


def test_batches_and_merged_parts_give_the_same_as_all_at_once() -> None:
    a, b = features(20, 8, seed=1), features(24, 8, seed=2) + 0.3
    first, second = FrechetDistance(8), FrechetDistance(8)
    for metric, part in ((first, slice(0, 7)), (second, slice(7, None))):
        for batch in a[part].split(3):
            metric.update(batch, reference=True)
        metric.update(b[part], reference=False)
    first.merge_state(second)
    assert first.count.tolist() == [20, 24]
    assert first.compute().item() == pytest.approx(distance_of(a, b), rel=1e-9)


def test_fewer_than_two_clips_have_no_distance() -> None:
    assert torch.tensor(distance_of(features(1, 4), features(5, 4))).isnan()


def test_random3d_is_fixed_and_tells_worse_from_better() -> None:
    torch.manual_seed(1)
    network = video_features("random3d")
    torch.manual_seed(2)
    again = Random3D()
    videos = torch.rand(6, 3, 5, 32, 32) * 2 - 1
    assert network.name == "frechet_random3d"
    assert network(videos).shape == (6, network.num_features)
    assert torch.equal(network(videos), again(videos))
    noise = torch.randn(videos.shape)
    slight, strong = (distance_of(network(videos), network(videos + s * noise)) for s in (0.05, 0.3))
    assert 0 < slight < strong


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 9, 16), (2, 300, 24)])
def test_random3d_takes_any_size(size: tuple[int, int, int]) -> None:
    network = Random3D()
    assert network(torch.zeros(2, 3, *size)).shape == (2, network.num_features)


def test_i3d_has_the_port_s_names_and_the_paper_s_size() -> None:
    with torch.device("meta"):
        state = I3D().state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes["Conv3d_1a_7x7.conv3d.weight"] == (64, 3, 7, 7, 7)
    assert shapes["Conv3d_2c_3x3.bn.running_mean"] == (192,)
    assert shapes["Mixed_3b.b0.conv3d.weight"] == (64, 192, 1, 1, 1)
    assert shapes["Mixed_4f.b1b.conv3d.weight"] == (320, 160, 3, 3, 3)
    assert shapes["Mixed_5b.b2a.conv3d.weight"] == (32, 832, 1, 1, 1)
    assert shapes["Mixed_5c.b3b.bn.weight"] == (128,)
    assert shapes["logits.conv3d.weight"] == (400, 1024, 1, 1, 1)
    assert shapes["logits.conv3d.bias"] == (400,)
    learned = [key for key in shapes if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert sum(state[key].numel() for key in learned) == 12_697_264  # with the 400-way head
    assert len(shapes) == 57 * 6 + 2  # convolution, four of BatchNorm and its counter; the head


def test_padding_is_tensorflow_s_same() -> None:
    x = torch.ones(1, 1, 9, 10, 4)
    padded = _pad_same(x, (3, 7, 1), (2, 2, 2))
    assert padded.shape[2:] == (11, 15, 4)
    ones = padded[0, 0].nonzero()
    assert ones.amin(0).tolist() == [1, 2, 0]  # 9: one on each side; 10: two before, three behind
    assert ones.amax(0).tolist() == [9, 11, 3]


@pytest.fixture(scope="module")
def i3d_state() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return I3D().state_dict()


def test_i3d_from_a_file(i3d_state: dict[str, Tensor], tmp_path: Path) -> None:
    old = {key: value for key, value in i3d_state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "rgb_imagenet.pt")
    network = video_features("i3d", tmp_path / "rgb_imagenet.pt")
    assert network.name == "rfvd"
    assert not network.training
    own = I3D().eval()
    load_exactly(own, i3d_state, "state")
    video = torch.rand(1, 3, 10, 24, 40) * 2 - 1
    with torch.no_grad():
        logits = network(video)
        torch.testing.assert_close(logits, own(video))
    assert logits.shape == (1, network.num_features) == (1, 400)
    assert logits.std() > 0


def test_i3d_refuses_other_weights(i3d_state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    renamed = {key.replace("Mixed_3b.b0", "Mixed_3b.branch0"): value for key, value in i3d_state.items()}
    torch.save(renamed, path)
    with pytest.raises(WeightImportError, match=r"weights\.pt does not fit.*\d+ missing: Mixed_3b\.b0\.conv3d\.weight"):
        video_features("i3d", path)
    torch.save(i3d_state | {"logits.conv3d.bias": torch.zeros(157)}, path)
    with pytest.raises(WeightImportError, match=r"logits\.conv3d\.bias \(\(157,\) instead of \(400,\)\)"):
        video_features("i3d", path)
    with pytest.raises(WeightImportError, match=r"absent\.pt: no such file"):
        video_features("i3d", tmp_path / "absent.pt")


def test_feature_settings() -> None:
    with pytest.raises(UsageError, match="features=vgg: unknown"):
        video_features("vgg")
    with pytest.raises(UsageError, match="features=i3d needs path=FILE"):
        video_features("i3d")
