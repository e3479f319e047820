"""Our denoisers with the published weights give the published numbers (toy sizes, recorded from the published code)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from osp.denoiser import Denoiser
from osp.weights import load_published

GOLDEN = Path(__file__).parent.parent / "golden"
SETS = [
    (kind, path.stem, name)
    for kind in ("opensora_v13", "opensora_inpaint_v13", "ummdit_v15")
    for path in sorted((GOLDEN / kind).glob("*.json"))
    for name in json.loads(path.read_text())["input_sets"]
]
# Ours -> theirs
INPUTS = {
    "latent": "hidden_states",
    "time": "timestep",
    "text": "encoder_hidden_states",
    "text_mask": "encoder_attention_mask",
    "pooled_text": "pooled_projections",
    "video_mask": "attention_mask",
}


def load_case(kind: str, case: str) -> tuple[dict, dict[str, Tensor]]:
    settings = json.loads((GOLDEN / kind / f"{case}.json").read_text())
    tensors = {key: value.float() for key, value in load_file(GOLDEN / kind / f"{case}.safetensors").items()}
    return settings, tensors


def inputs(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """One stored set, as our models take it."""
    found = {ours: tensors.get(f"in/{name}/{theirs}") for ours, theirs in INPUTS.items()}
    given = {key: value for key, value in found.items() if value is not None}
    return {key: v.squeeze(1) if key in ("text", "text_mask", "pooled_text") else v for key, v in given.items()}


def blocks_of(model: Denoiser, given: dict[str, Tensor]) -> tuple[Tensor, list]:
    """The prediction, and what each block gave."""
    outputs: list = []
    hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in model.blocks]
    prediction = model(**given)
    for hook in hooks:
        hook.remove()
    return prediction, outputs


@pytest.mark.parametrize(("kind", "case", "name"), SETS)
@torch.no_grad()
def test_denoiser(kind: str, case: str, name: str) -> None:
    settings, tensors = load_case(kind, case)
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    model = load_published(kind, weights, settings["config"])
    prediction, outputs = blocks_of(model, inputs(tensors, name))
    tolerance = settings["tolerance_f32_vs_f64"]
    bar = 4 * tolerance[f"{name}/sample"] + 1e-5
    torch.testing.assert_close(prediction, tensors[f"out/{name}/sample"], rtol=0, atol=bar)

    stored = {key.split("block_")[1]: v for key, v in tensors.items() if key.startswith(f"out/{name}/block_")}
    sizes = settings["config"]["num_layers"]
    for place, value in stored.items():
        first, *rest = place.split("_")
        got = outputs[int(first) + (sum(sizes[: int(first)]) - int(first) + int(rest[0]) if rest else 0)]
        if rest:
            got = got[("vis", "txt").index(rest[1])]
        bar = 4 * tolerance[f"{name}/blocks"] + 1e-5
        torch.testing.assert_close(got, value[:, : got.shape[1]], rtol=0, atol=bar, msg=lambda m, p=place: f"{p}: {m}")
