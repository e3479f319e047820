"""Checkpoints are written whole or not at all, and of one to go on from only numbers that fit are taken over."""

import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from osp.data.datamodule import ClipDataModule
from osp.data.sources import SyntheticClips
from osp.errors import DataError, OspError
from osp.training.checkpoint_io import AtomicCheckpointIO
from osp.training.checkpoints import load_trained_vae
from osp.training.losses import VAELoss
from osp.training.resumed import read_resumed
from osp.training.saving import BestCheckpoint, LastCheckpoint, remove_parts
from osp.training.state import averaged_weights, is_state, is_stored, open_state
from osp.training.vae_module import VAEModule
from osp.vae import WFVAE
from osp.weights.lazy import Stored

TINY = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}


def new_module() -> VAEModule:
    torch.manual_seed(0)
    vae = WFVAE(**TINY, encoder_blocks=1, decoder_blocks=1, attention=False)
    return VAEModule(vae, VAELoss(), lr=1e-3)


def fit(folder: Path, steps: int, resume: Path | None = None, **saving: Any) -> lightning.Trainer:
    module = new_module()
    clips = SyntheticClips(4, 5, 16, 16, seed=0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BestCheckpoint(folder), LastCheckpoint(folder, 1)],
        plugins=[AtomicCheckpointIO(**saving)],
    )
    trainer.fit(module, ClipDataModule(clips, clips, batch_size=2), ckpt_path=resume, weights_only=True)
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    fit(folder, 1)
    return folder / "last.ckpt"


def changed(trained: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = torch.load(trained, weights_only=True)
    change(content)
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


def test_paths_in_a_foreign_checkpoint_are_never_acted_upon(trained: Path, tmp_path: Path) -> None:
    victims = [tmp_path / "victim" / name for name in ("file.ckpt", "folder")]
    victims[1].mkdir(parents=True)
    victims[0].touch()
    run = tmp_path / "run"
    run.mkdir()

    def forge(content: dict[str, Any]) -> None:
        for number, victim in enumerate(victims):
            state = {
                "monitor": "val/psnr",
                "best_model_score": torch.tensor(-100.0),
                "best_model_path": f"{run}/../victim/{victim.name}",
                "best_k_models": {f"{run}/../victim/{victim.name}": torch.tensor(-100.0)},
                "last_model_path": str(victim),
                "kth_best_model_path": str(victim),
                "dirpath": str(run),
            }
            content["callbacks"][f"ModelCheckpoint{{'monitor': 'val/psnr', 'number': {number}}}"] = state
        content["callbacks"]["BestCheckpoint"] = {"score": -100.0, "path": str(victims[0])}
        content["hyper_parameters"] = {"folder": str(victims[0])}
        content["pytorch-lightning_version"] = "0.0.1"

    fit(run, 2, changed(trained, run, forge))
    assert all(victim.exists() for victim in victims)
    assert sorted(path.name for path in run.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert torch.load(run / "last.ckpt", weights_only=True)["callbacks"].keys() == {"BestCheckpoint"}


def nan(content: dict[str, Any]) -> None:
    content["state_dict"]["vae.decoder.conv_out.bias"].fill_(float("nan"))


@pytest.mark.parametrize(
    ("forge", "told"),
    [
        (nan, r"decoder\.conv_out\.bias has numbers that are not finite"),
        (lambda c: c["state_dict"].update(more=torch.zeros(1)), "1 unknown: more"),
        (lambda c: c["state_dict"].popitem(), "1 missing"),
        (lambda c: c["state_dict"].update({"vae.decoder.conv_out.bias": "text"}), "conv_out.bias is no tensor"),
        (
            lambda c: c["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(1)),
            "does not fit the model",
        ),
        (lambda c: c["optimizer_states"][0]["state"][0].pop("exp_avg"), "of another optimiser"),
        (lambda c: c["optimizer_states"][0]["state"].update({1000: {}}), "of another model"),
        (lambda c: c["optimizer_states"].clear(), "has 0 states of optimisers"),
        (lambda c: c["loops"]["fit_loop"].update({"epoch_loop.batch_progress": 3}), "batch_progress: is no mapping"),
        (lambda c: c["loops"]["fit_loop"]["epoch_progress"]["total"].update(ready="1"), r"total\.ready: is no count"),
        (lambda c: c["ClipDataModule"].update(batches="many"), "batches"),
        (lambda c: c["ClipDataModule"].update(seed=torch.zeros(2)), "seed: must be a number or text"),
        (lambda c: c.pop("loops"), "has no loops"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(
    forge: Callable[[dict[str, Any]], object], told: str, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(OspError, match=told) as refused:
        fit(tmp_path, 2, changed(trained, tmp_path, forge))
    assert "\n" not in str(refused.value)


def test_settings_of_optimisers_are_those_of_the_run_and_not_of_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    odd = changed(trained, tmp_path, lambda c: c["optimizer_states"][0]["param_groups"][0].update(weight_decay=9.0))
    (optimizer,) = fit(tmp_path, 2, odd).optimizers
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4
    assert next(iter(optimizer.state.values()))["step"] == 2


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_leaves_the_checkpoint_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with files_of_at_most(100_000), pytest.raises(DataError, match=r"last\.ckpt: cannot be written \(File too large\)"):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(100_000)}, path)
    assert [*path.parent.iterdir()] == [path]
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_a_checkpoint_goes_to_the_disk_beside_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    path = tmp_path / "last.ckpt"
    with files_of_at_most(100_000), pytest.raises(DataError):  # memory alone would not notice before the end
        AtomicCheckpointIO().save_checkpoint({str(n): torch.zeros(50_000) for n in range(4)}, path)
    AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 2}


def test_a_link_in_the_place_of_a_half_written_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".last.ckpt.part").symlink_to(tmp_path / "precious")
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert (tmp_path / "precious").read_text() == "mine"


def test_what_a_killed_run_left_half_written_goes_and_folders_stay(tmp_path: Path) -> None:
    for name in (".last.ckpt.part", "last.ckpt.tmp", "last.ckpt", "notes.tmp"):
        (tmp_path / name).touch()
    (tmp_path / ".folder.part").mkdir()
    remove_parts([tmp_path, tmp_path / "none"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".folder.part", "last.ckpt", "notes.tmp"]
    AtomicCheckpointIO().remove_checkpoint(tmp_path / ".folder.part")
    assert (tmp_path / ".folder.part").is_dir()


def content(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plain values of a checkpoint, and all of its tensors by where they stand, of a file or a folder."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Any] = {}

    def sort(value: Any, where: str) -> None:
        if isinstance(value, Stored | torch.Tensor):
            tensors[where] = value.read() if isinstance(value, Stored) else value
        elif isinstance(value, dict):
            for key, inner in value.items():
                sort(inner, f"{where}.{key}")
        else:
            plain[where] = value

    read = read_resumed(path)
    names = list(dict(new_module().named_parameters()))
    for state in read["optimizer_states"]:  # of one optimiser, which has all parameters that learn
        state.pop("param_groups", None)
        state["state"] = {names[key] if isinstance(key, int) else key: one for key, one in state["state"].items()}
    sort(dict(enumerate(read.pop("optimizer_states"))), "optimizers")
    sort(read, "")
    return plain, tensors


@pytest.mark.parametrize("background", [False, True])
def test_a_run_goes_on_from_a_folder_to_the_bit_as_from_a_file(trained: Path, background: bool, tmp_path: Path) -> None:
    fit(tmp_path / "file", 3, trained)
    fit(tmp_path / "folder", 1, form="folder", background=background)
    fit(tmp_path / "folder", 2, tmp_path / "folder" / "last.ckpt", form="folder", background=background)
    assert (tmp_path / "folder" / "last.ckpt" / "index.json").exists()
    assert open_state(tmp_path / "folder" / "last.ckpt").step == 2
    fit(tmp_path / "folder", 3, tmp_path / "folder" / "last.ckpt", form="file", background=background)
    (plain, tensors), (other, others) = (content(tmp_path / name / "last.ckpt") for name in ("file", "folder"))
    assert plain == other
    assert tensors.keys() == others.keys()
    assert all(torch.equal(value, others[key]) for key, value in tensors.items())
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"last.ckpt", "best.ckpt"}


def test_a_folder_gives_the_same_vae_as_a_file(trained: Path, tmp_path: Path) -> None:
    fit(tmp_path, 1, form="folder")
    assert is_state(tmp_path / "last.ckpt")
    ours, theirs = (load_trained_vae(path).state_dict() for path in (tmp_path / "last.ckpt", trained))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    part = averaged_weights(open_state(tmp_path / "last.ckpt"), "decoder.conv_out.")
    assert part.keys() == {"weight", "bias"}


@pytest.mark.parametrize(("form", "background"), [("file", False), ("folder", True)])
def test_so_many_checkpoints_stay_and_the_newest_is_the_last(form: str, background: bool, tmp_path: Path) -> None:
    fit(tmp_path, 4, form=form, background=background, keep=3)
    fit(tmp_path, 5, tmp_path / "last.ckpt", form=form, background=background, keep=3)
    names = ["best.ckpt", "last.ckpt", "step-00000003.ckpt", "step-00000004.ckpt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [open_state(tmp_path / name).step for name in names[1:]] == [5, 3, 4]


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_checkpoint_before(
    form: str, background: bool, tmp_path: Path
) -> None:
    fit(tmp_path, 1, form=form, background=background)
    before = {path.name for path in tmp_path.iterdir()}
    with (
        files_of_at_most(20_000),
        pytest.raises(DataError, match=r"\.ckpt: cannot be written \(File too large\)") as told,
    ):
        fit(tmp_path, 3, tmp_path / "last.ckpt", form=form, background=background)
    assert "the checkpoint before it is whole" in str(told.value)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert fit(tmp_path, 2, tmp_path / "last.ckpt", form=form, background=background).global_step == 2


def test_a_checkpoint_that_lies_aside_is_read_as_if_it_were_in_its_place(trained: Path, tmp_path: Path) -> None:
    fit(tmp_path, 1, form="folder")
    (tmp_path / "last.ckpt").rename(tmp_path / ".last.ckpt.before")  # as a kill at the wrong moment leaves it
    (tmp_path / ".last.ckpt.part").mkdir()
    (tmp_path / "best.ckpt").replace(tmp_path / ".best.ckpt.before.part")
    remove_parts([tmp_path])
    assert [path.name for path in tmp_path.iterdir()] == [".last.ckpt.before"]
    assert is_stored(tmp_path / "last.ckpt")
    assert open_state(tmp_path / "last.ckpt").step == 1
    fit(tmp_path, 2, tmp_path / "last.ckpt", form="folder")
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "best.ckpt"}
