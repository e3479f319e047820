"""A run begins with weights of a file or folder: the same split over processes as in one, none of which holds all."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Processes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from osp.conditioning import WordText
from osp.denoiser import CrossTransformer, Denoiser, JointTransformer
from osp.diffusion import Flow
from osp.parallel import Parallelism, Sharding
from osp.parallel import whole as gathered
from osp.training.denoiser_module import DenoiserModule
from osp.training.export import export
from osp.training.latent_identity import LatentIdentity
from osp.training.sharded import entries_of, pieces_of
from osp.weights import load_pretrained, save_pretrained
from osp.weights.sharded import write_index, write_shard

TOOL = str(Path(__file__).parents[2] / "tools" / "meta_start.py")
LATENT = {"vae": "v", "vae_fingerprint": "f", "origin": None, "shift": [0.0], "scale": [1.0]}
SIZES: dict[str, Any] = {"channels": 4, "out_channels": 4, "heads": 1, "text_channels": 8}
CROSS = SIZES | {"head_dim": 12, "stages": [{"blocks": 2}]}
JOINT = SIZES | {"head_dim": 16, "pooled_channels": 8, "modulation_width": 8, "long_skips": False}
SPARSE = {"stages": [{"blocks": 1, "pattern": "skiparse", "k": k} for k in (1, 2, 1)], "long_skips": True}
# The settings of the run before, and what is new: conditions, or a sparse schedule with long skips.
DENOISERS: dict[str, tuple[type[Denoiser], dict[str, Any], dict[str, Any]]] = {
    "cross": (CrossTransformer, CROSS, {"frame_channels": [4, 4]}),
    "joint": (JointTransformer, JOINT | {"stages": [{"blocks": 3}]}, SPARSE),
}


def new_text() -> WordText:
    return WordText(8, 8, layers=1, heads=2)


def write_all(folder: Path, kind: str) -> dict[str, Path]:
    """The averaged weights of a run in each form in which a run takes them."""
    make, settings, _ = DENOISERS[kind]
    torch.manual_seed(2)
    denoiser, text = make(**settings), new_text()
    weights = {f"ema.model.denoiser.{key}": value for key, value in denoiser.state_dict().items()}
    weights |= {f"ema.model.text.{key}": value for key, value in text.state_dict().items()}
    entry = {
        "denoiser": {"model": make.__name__, "settings": denoiser.settings},
        "text": {"encoder": "WordText", "settings": text.settings},
        "objective": {"name": "Flow", "settings": {}},
        "latent": LATENT,
        "fps": 8.0,
        "clip": None,
    }
    state = {"state_dict": weights, "generator": entry, "global_step": 7, "optimizer_states": []}
    places = {form: folder / f"{kind}-{form}" for form in ("file", "folder", "exported", "imported")}
    torch.save(state, places["file"])
    places["folder"].mkdir()
    write_shard(places["folder"], 0, pieces_of(state, [], first=True))
    write_index(places["folder"], 1, entries_of(state))
    export(places["file"], places["exported"])
    save_pretrained(denoiser, places["imported"])
    return places


def begun(kind: str, path: str, how: Parallelism) -> dict[str, Tensor]:
    """All weights and averages of a module that begins with others."""
    make, settings, new = DENOISERS[kind]
    torch.manual_seed(3)
    with torch.device("meta"):
        denoiser, text = make(**settings | new), new_text()
        module = DenoiserModule(denoiser, text, Flow(), masks="stage2" if "frame_channels" in new else None, seed=4)
    module._identity = LatentIdentity(LATENT)
    module.start_from(path)
    return configured(module, how)


def configured(module: DenoiserModule, how: Parallelism) -> dict[str, Tensor]:
    module.parallelism = lambda: how  # type: ignore[method-assign]
    module.configure_model()
    return {key: gathered(value) for key, value in module.state_dict().items() if isinstance(value, Tensor)}


def pretrained(path: str, how: Parallelism) -> dict[str, Tensor]:
    """As `begun`, of a denoiser that is read, beside a text encoder that is drawn."""
    torch.manual_seed(3)
    with torch.device("meta"):
        denoiser, text = load_pretrained(path), new_text()
    assert isinstance(denoiser, Denoiser)
    return configured(DenoiserModule(denoiser, text, Flow()), how)


def in_parts(cases: list[tuple[str, str]], imported: str) -> list[dict[str, Tensor]]:
    """All of them, in one of several processes."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    how = Parallelism(mesh.size(), sharding=Sharding(mesh, torch.device("cpu")))
    return [*(begun(*case, how) for case in cases), pretrained(imported, how)]


def test_a_split_run_begins_with_the_same_weights_to_the_bit(processes: Processes, tmp_path: Path) -> None:
    places = {kind: write_all(tmp_path, kind) for kind in DENOISERS}
    cases = [(kind, str(place)) for kind, found in places.items() for place in found.values()]
    imported = str(places["joint"]["imported"])
    wanted = [*(begun(*case, Parallelism()) for case in cases), pretrained(imported, Parallelism())]
    for found in processes.run(2, in_parts, cases, imported):
        for case, ours, theirs in zip([*cases, "pretrained"], found, wanted, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), case
    before = torch.load(places["joint"]["file"], weights_only=True)["state_dict"]
    for case, weights in zip([*cases, "pretrained"], wanted, strict=True):
        for key, value in before.items():
            if case[0] == "joint" and ("text." not in key or "imported" not in case[1]):
                assert torch.equal(weights[key], value), (case, key)
    assert sum("_skips." in key for key in wanted[-2]) == 8  # which are new, of model and averages


def memory(folder: str) -> list[tuple[int, int]]:
    measured = runpy.run_path(TOOL)["measured"]
    return measured(torch.device("cpu"), folder, torch.float32, in_turn=False)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's account of memory")
def test_no_process_holds_a_model_that_it_reads_whole(processes: Processes, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = CrossTransformer(**SIZES | {"heads": 8, "head_dim": 96, "stages": [{"blocks": 2}]})
    whole = 2 * runpy.run_path(TOOL)["write_random"](model, tmp_path, torch.float32)  # and the averages
    assert whole > 140e6
    for peak, before in processes.run(2, memory, str(tmp_path))[0]:
        assert peak - before < 0.7 * whole  # a half, one tensor and what the allocator takes
