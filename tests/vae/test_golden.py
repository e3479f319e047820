"""Our VAE with the published weights gives the published numbers (toy sizes, recorded from the published code)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from osp.errors import UsageError
from osp.vae.wavelet import PUBLISHED_SCALE_3D, haar2d, haar3d, inverse_haar2d, inverse_haar3d
from osp.weights import load_published

GOLDEN = Path(__file__).parent.parent / "golden"
VAE_CASES = [
    (kind, path.stem)
    for kind in ("wfvae_v13", "wfvae_v15", "causalvae")
    for path in sorted((GOLDEN / kind).glob("*.json"))
]


def load_case(kind: str, case: str) -> tuple[dict, dict[str, Tensor]]:
    settings = json.loads((GOLDEN / kind / f"{case}.json").read_text())
    tensors = {key: value.float() for key, value in load_file(GOLDEN / kind / f"{case}.safetensors").items()}
    return settings, tensors


@pytest.mark.parametrize("case", ["a", "b"])
def test_wavelets(case: str) -> None:
    settings, tensors = load_case("wavelet", case)
    x, z2, z3 = (tensors[f"in/{name}"] for name in ("x", "z2", "z3"))
    bands3 = haar3d(x, scale=PUBLISHED_SCALE_3D)
    got = {
        "haar2d": haar2d(x),
        "haar3d": bands3,
        "inv2d": inverse_haar2d(z2),
        "inv3d": inverse_haar3d(z3, scale=PUBLISHED_SCALE_3D),
        "roundtrip2d": inverse_haar2d(haar2d(x)),
        "roundtrip3d": inverse_haar3d(bands3, scale=PUBLISHED_SCALE_3D),
    }
    bar = 4 * settings["tolerance_f32_vs_f64"] + 1e-5
    for name, value in got.items():
        torch.testing.assert_close(value, tensors[f"out/{name}"], rtol=0, atol=bar, msg=name)


@pytest.mark.parametrize("slide", [False, True])
@pytest.mark.parametrize(("kind", "case"), VAE_CASES)
@torch.no_grad()
def test_vae(kind: str, case: str, slide: bool, request: pytest.FixtureRequest) -> None:
    if slide:
        request.getfixturevalue("sliding")
    settings, tensors = load_case(kind, case)
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    vae = load_published(kind, weights, settings["config"])
    for frames in settings["Ts"]:
        posterior = vae.encode(tensors[f"in/T{frames}/x"])
        got = {"mean": posterior.mean, "logvar": posterior.logvar, "dec": vae.decode(tensors[f"in/T{frames}/z"])}
        for name, value in got.items():
            bar = 4 * settings["tolerance_f32_vs_f64"][name] + (1e-4 if name == "dec" else 1e-5)
            expected = tensors[f"out/T{frames}/{name}"]
            torch.testing.assert_close(
                value, expected, rtol=0, atol=bar, msg=lambda m, n=name, t=frames: f"T={t} {n}: {m}"
            )


def test_a_setting_that_no_published_vae_has_is_refused() -> None:
    settings, tensors = load_case(*VAE_CASES[0])
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    with pytest.raises(UsageError, match="no setting t_interpolaton; it has"):
        load_published(VAE_CASES[0][0], weights, settings["config"] | {"t_interpolaton": "nearest"})
