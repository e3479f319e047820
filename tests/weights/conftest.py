"""Published checkpoints of toy size, and weight files in every state."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = [
    (kind, path.stem)
    for kind in ("wfvae_v13", "wfvae_v15", "causalvae")
    for path in sorted((GOLDEN / kind).glob("*.json"))
]


def load_case(kind: str, case: str) -> tuple[dict, dict[str, Tensor]]:
    """Published settings and float32 weights."""
    config = json.loads((GOLDEN / kind / f"{case}.json").read_text())["config"]
    stored = load_file(GOLDEN / kind / f"{case}.safetensors").items()
    return config, {key.removeprefix("weights/"): v.float() for key, v in stored if key.startswith("weights/")}


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, dict, dict[str, Tensor]]:
    """Kind, published settings and weights of each recorded VAE."""
    return request.param[0], *load_case(*request.param)


@pytest.fixture
def small() -> tuple[str, dict, dict[str, Tensor]]:
    """One of them."""
    return "wfvae_v13", *load_case("wfvae_v13", "d_nearest_noattn_main")
