"""Our own form of a saved VAE: written, read back, and refused when something is wrong with it."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from osp.cli.checks import build_vae
from osp.errors import UsageError
from osp.vae import WFVAE, CausalVideoVAE
from osp.weights import WeightImportError, load_pretrained, save_pretrained
from osp.weights.families import FAMILIES
from osp.weights.layout import Family, Layout
from osp.weights.pretrained import published_part

WF = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 6}


@pytest.mark.parametrize("model", [WFVAE(**WF), CausalVideoVAE(base_channels=32, blocks=1)])
def test_a_vae_comes_back_as_it_was(model: torch.nn.Module, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path, {"scale": [0.5]})
    vae = load_pretrained(tmp_path)
    assert type(vae) is type(model)
    assert vae.settings == model.settings
    assert not vae.training
    own, loaded = model.state_dict(), vae.state_dict()
    assert own.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], value) for key, value in own.items())
    assert [p.requires_grad for p in vae.parameters()] == [p.requires_grad for p in model.parameters()]
    assert published_part(tmp_path) == {"scale": [0.5]}


def test_other_models_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a Linear cannot be saved; a WFVAE or CausalVideoVAE.* can"):
        save_pretrained(torch.nn.Linear(1, 1), tmp_path)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    save_pretrained(WFVAE(**WF).bfloat16(), tmp_path)
    assert load_file(tmp_path / "model.safetensors")["decoder.conv_out.bias"].dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in load_pretrained(tmp_path).state_dict().values())


class Other(torch.nn.Module):
    """A model that is no VAE, with nested settings."""

    def __init__(self, stages: list[list[int]], names: dict[str, int]) -> None:
        super().__init__()
        self.settings = {"stages": stages, "names": names}
        self.lines = torch.nn.Linear(len(stages), names["out"])


def test_a_model_that_is_no_vae_is_saved_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(lambda _: "Other", lambda _: [], lambda model: model.settings)
    monkeypatch.setitem(FAMILIES, "other", Family("other", Other, layout, {}))
    model = Other([[1, 2], [3]], {"out": 5})
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert isinstance(loaded, Other)
    assert loaded.settings == model.settings
    assert torch.equal(loaded.lines.weight, model.lines.weight)
    with pytest.raises(UsageError, match="vae is a Other, which is no VAE; give weights of a VAE"):
        build_vae(OmegaConf.create({"_target_": "osp.weights.load_pretrained", "path": str(tmp_path)}))


def config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damage_is_told_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give path=FOLDER"):
        load_pretrained(None)
    with pytest.raises(WeightImportError, match="none: no such folder"):
        load_pretrained(tmp_path / "none")
    with pytest.raises(WeightImportError, match=r"has no config\.json"):
        load_pretrained(tmp_path)
    vae = WFVAE(**WF)
    for changes, message in (
        ({"model": "VAE"}, "model=VAE: is not known; choose WFVAE, CausalVideoVAE"),
        ({"model": ["WFVAE"]}, "is not known"),
        ({"settings": {"latent_channels": "4"}}, r"config\.json: its settings build no WFVAE"),
        ({"settings": {"latents": 4}}, r"config\.json: its settings build no WFVAE.*no setting latents"),
        ({"settings": [1]}, "its settings build no WFVAE"),
        ({"settings": WF | {"base_channels": 8}}, r"model\.safetensors does not fit the model"),
        ({"_class_name": "WFVAEModel"}, "run `osp import-weights` first"),
    ):
        save_pretrained(vae, tmp_path)
        config(tmp_path, **changes)
        with pytest.raises(WeightImportError, match=message):
            load_pretrained(tmp_path)
        (tmp_path / "config.json").unlink()
        (tmp_path / "model.safetensors").unlink()
    save_pretrained(vae, tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightImportError, match=r"model\.safetensors does not fit the model"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightImportError, match=r"model\.safetensors: not a readable safetensors"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightImportError, match=r"model\.safetensors: no such file"):
        load_pretrained(tmp_path)
