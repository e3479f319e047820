"""Published checkpoints of toy size, and weight files in every state."""

import json
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from osp.weights.families import FAMILIES

GOLDEN = Path(__file__).parent.parent / "golden"
PUBLISHED = [kind for family in FAMILIES.values() for kind in family.kinds]
CASES = [(kind, path.stem) for kind in PUBLISHED for path in sorted((GOLDEN / kind).glob("*.json"))]


def _weights(path: Path) -> dict[str, Tensor]:
    """What is stored under `weights/`, float32."""
    return {key.removeprefix("weights/"): v.float() for key, v in load_file(path).items() if key.startswith("weights/")}


def load_case(kind: str, case: str) -> tuple[dict, dict[str, Tensor]]:
    """Published settings and float32 weights."""
    config = json.loads((GOLDEN / kind / f"{case}.json").read_text())["config"]
    return config, _weights(GOLDEN / kind / f"{case}.safetensors")


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, dict, dict[str, Tensor]]:
    """Kind, published settings and weights of each recorded model."""
    return request.param[0], *load_case(*request.param)


@pytest.fixture
def load_golden() -> Callable[[str, str], tuple[dict, dict[str, Tensor]]]:
    """Settings and weights of a recorded model: `load_golden(kind, case)`."""
    return load_case


@pytest.fixture
def kinds_without_a_case() -> set[str]:
    """Published kinds of which no model is recorded."""
    return {*PUBLISHED} - {kind for kind, _ in CASES}


@pytest.fixture
def small() -> tuple[str, dict, dict[str, Tensor]]:
    """One of them."""
    return "wfvae_v13", *load_case("wfvae_v13", "d_nearest_noattn_main")


@pytest.fixture
def joint() -> tuple[str, dict, dict[str, Tensor]]:
    """A recorded joint transformer."""
    return "ummdit_v15", *load_case("ummdit_v15", "a_n2")


@pytest.fixture
def write_ranks() -> Callable[..., Path]:
    """Writes a denoiser as a Megatron run leaves it: `write_ranks(weights, folder, tensor=2, pipeline=(3, 1))`."""
    return _write_ranks


def _write_ranks(
    weights: Mapping[str, Tensor],
    folder: Path,
    tensor: int = 1,
    pipeline: Sequence[int] = (),
    entries: Callable[[dict[str, Tensor]], dict[str, Any]] = lambda part: {"model": part},
) -> Path:
    """`pipeline` holds how many blocks each pipeline rank gets; `entries` makes what a file holds of its weights."""
    for stage, part in enumerate(_pipeline_parts(weights, pipeline) if pipeline else [dict(weights)]):
        for rank in range(tensor):
            path = folder / (f"mp_rank_{rank:02d}_{stage:03d}" if pipeline else f"mp_rank_{rank:02d}")
            path.mkdir(parents=True)
            own = {key: _slice(key, value, rank, tensor) for key, value in part.items()}
            own |= {"transformer_blocks.0.attn1._extra_state": None}
            run = {"args": Namespace(tensor_model_parallel_size=tensor), "iteration": 7, "optimizer": {"step": [1]}}
            torch.save(run | entries(own), path / "model_optim_rng.pt")
    return folder


def _slice(key: str, value: Tensor, rank: int, ranks: int) -> Tensor:
    name = key.removesuffix(".weight").removesuffix(".bias")
    if name.endswith(("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", ".net.0.proj")):
        return value.chunk(ranks, 0)[rank].clone()
    if key.endswith(("to_out.0.weight", "to_add_out.weight", ".net.2.weight")):
        return value.chunk(ranks, 1)[rank].clone()
    return value


def _pipeline_parts(weights: Mapping[str, Tensor], blocks: Sequence[int]) -> list[dict[str, Tensor]]:
    """Each rank's weights, where stages and blocks and long skips are numbered from 0 again."""
    nested = any(re.match(r"transformer_blocks\.\d+\.\d+\.", key) for key in weights)
    pattern = re.compile(r"transformer_blocks\.(\d+)\.(\d+)\.(.*)" if nested else r"transformer_blocks\.()(\d+)\.(.*)")
    matches = {key: match for key in weights if (match := pattern.match(key))}
    places = sorted({(int(match[1] or 0), int(match[2])) for match in matches.values()})
    assert sum(blocks) == len(places)
    first_skip = (places[-1][0] + 2) // 2  # the stage that the first long skip leads to
    parts: list[dict[str, Tensor]] = []
    for rank, size in enumerate(blocks):
        own = places[sum(blocks[:rank]) :][:size]
        stages = sorted({stage for stage, _ in own})
        part: dict[str, Tensor] = {}
        for key, match in matches.items():
            if (place := (int(match[1] or 0), int(match[2]))) in own:
                stage = stages.index(place[0])
                block = [other for other in own if other[0] == place[0]].index(place)
                part[f"transformer_blocks.{f'{stage}.' if nested else ''}{block}.{match[3]}"] = weights[key]
        skips = [stage - first_skip for stage, block in own if stage >= first_skip and block == 0]
        for key in weights.keys() - matches.keys():
            if match := re.match(r"(skip_norm_linear\w*)\.(\d+)\.(.*)", key):
                if int(match[2]) in skips:
                    part[f"{match[1]}.{skips.index(int(match[2]))}.{match[3]}"] = weights[key]
            elif key.startswith(("norm_final", "norm_out", "proj_out", "scale_shift_table")):
                part |= {key: weights[key]} if rank == len(blocks) - 1 else {}
            elif rank == 0 or key.startswith(("time_text_embed", "adaln_single")):
                part[key] = weights[key]
        parts.append(part)
    return parts
