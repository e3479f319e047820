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
from osp.training.losses import VAELoss
from osp.training.saving import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, remove_parts
from osp.training.vae_module import VAEModule
from osp.vae import WFVAE

TINY = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}


def fit(folder: Path, steps: int, resume: Path | None = None) -> lightning.Trainer:
    torch.manual_seed(0)
    vae = WFVAE(**TINY, encoder_blocks=1, decoder_blocks=1, attention=False)
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
        plugins=[AtomicCheckpointIO()],
    )
    module = VAEModule(vae, VAELoss(), lr=1e-3)
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
