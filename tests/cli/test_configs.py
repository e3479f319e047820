"""Every configuration composes, and builds what it says."""

import inspect
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from osp.cli import VERBS, config_folder
from osp.configs.groups import groups_of
from osp.configs.meanings import heading
from osp.configs.references import missing_keys
from osp.diffusion import Epsilon, Flow, Objective, Velocity
from osp.training.clipping import AbnormalDrop, AdaptiveClipping, Clipping, NormClipping
from osp.training.denoiser_module import DenoiserModule
from osp.training.vae_module import VAEModule
from osp.vae import LatentCodec

ROOT = Path(__file__).parents[2]
STRIDES = ["buckets.time_stride=4", "buckets.space_stride=8"]
SHARDS = ["data.train.path=shards", "data.val.path=shards"]


def names(group: str) -> list[str]:
    """The choices of a group; there must be some, or a test of them would test nothing."""
    found = sorted(path.stem for path in (config_folder() / group).glob("[!_]*.yaml"))
    assert found, group
    return found


def composed(verb: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose(verb, list(overrides))


VAES = [name for name in names("experiment") if name in names("vae")]
TINY = [name for name in names("experiment") if name.endswith("_tiny") and name not in VAES]
# Experiments that train a VAE of another name.
STAGES = {f"causalvae_v11_stage{stage}": "causalvae_v11" for stage in (1, 2, 3)}
STAGES |= {f"odvae_v12_stage{stage}": "odvae_v12" for stage in (1, 2)}
SOURCES = ("trained", "published", "pretrained")  # of weights; the other choices of `vae` are models


def test_no_experiment_is_left_out() -> None:
    recipes = {name for name in names("experiment") if name.startswith("v1")}  # which have their own tests
    assert {*names("experiment")} == {*VAES, *STAGES, *TINY} | recipes


@pytest.mark.parametrize("experiment", [*VAES, *STAGES])
def test_every_experiment_with_a_vae_builds_its_model(experiment: str) -> None:
    cfg = composed("train", f"experiment={experiment}", "perceptual.download=false")
    with torch.device("meta"):
        vae = instantiate(cfg.vae)
    for part in ("train", "val"):
        vae.check_size(cfg.data[part].frames, cfg.clip.height, cfg.clip.width)
    assert cfg.name == experiment
    assert (
        f"{sum(value.numel() for value in vae.parameters()):,}"
        in (config_folder() / "vae" / f"{STAGES.get(experiment, experiment)}.yaml").read_text()
        or experiment == "wfvae_tiny"
    )


@pytest.mark.parametrize("experiment", TINY)
def test_every_tiny_experiment_with_a_denoiser_builds_its_module(experiment: str) -> None:
    cfg = composed("train", f"experiment={experiment}", "vae=wfvae_tiny")
    assert cfg.name == experiment
    codec = LatentCodec(instantiate(cfg.vae), 0.0, 1.0)
    with torch.device("meta"):
        module = instantiate(cfg.module, codec=codec)
    assert isinstance(module, DenoiserModule)
    assert (module.masks is None) == (module.denoiser.latent_channels == cfg.denoiser.channels)


def test_the_tiny_denoiser_with_frames_takes_shards_instead() -> None:
    cfg = composed("train", "experiment=i2v_tiny", "data=shards", *SHARDS, "data.train.flip=false")
    assert "objects" not in cfg.data.train
    plain = composed("train", "experiment=i2v_tiny").data
    assert (plain.train.objects, plain.train.plain, plain.val.plain, plain.val.clips) == (1, True, True, 64)


# What has to be given, by its last name
FILLED = {
    "time_stride": 4,
    "space_stride": 8,
    "max_tokens": 100,
    "shapes": [[1, 16, 16]],
    "kind": "wfvae_v13",
    **dict.fromkeys(("path", "dataset", "source", "urls", "input", "output", "checkpoint", "start_from"), "x"),
}
WITH = {
    ("module", "denoiser"): ["denoiser=cross_tiny", "text=words", "objective=flow_tiny"],
    ("data", "buckets"): ["buckets=shapes"],
    ("data", "stream_buckets"): ["buckets=shapes"],
    ("latent", "codec"): ["latent.scale=1"],
}
# What reads files or needs what may not be here: its arguments are looked at, and it is not built.
NOT_BUILT = {
    *("osp.weights.load_pretrained", "osp.weights.load_published", "osp.training.checkpoints.load_trained_vae"),
    *("osp.training.checkpoints.load_trained_generator", "osp.conditioning.T5Text", "osp.conditioning.CLIPPooled"),
    *("osp.data.sources.ShardClips", "osp.data.sources.BucketClips", "osp.data.sources.FeatureClips"),
    *("osp.data.sources.ArrayClips", "osp.data.sources.DatasetClips", "osp.data.streaming.RemoteShards"),
    *("lightning.Trainer", "osp.training.loggers.wandb_logger"),
}


def reader(group: str) -> str:
    """A verb that has the group."""
    return next(verb for verb in ("train", "sample", *VERBS) if group in groups_of(verb, config_folder()))


GROUPS = sorted({group for verb in VERBS for group in groups_of(verb, config_folder())})


def filled(group: str, name: str, verb: str) -> dict[str, Any]:
    """The configuration with a choice of a group, with something for all that has to be given."""
    cfg = composed(verb, f"{group}={name}", *WITH.get((group, name), ["output=x"] if verb == "chain" else []))
    for key in missing_keys(OmegaConf.to_container(cfg)):
        OmegaConf.update(cfg, key, FILLED[key.rpartition(".")[2]])
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def built(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """All parts of a configuration that are built: what of, and its arguments."""
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from built(value)
    if isinstance(config, dict) and "_target_" in config:
        yield config["_target_"], {key: value for key, value in config.items() if key[0] != "_"}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in names(group)])
def test_every_choice_of_every_group_composes_and_is_built(
    group: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = filled(group, name, reader(group))
    chosen = config.get(group, config if group in ("eval/target", "bench/target", "experiment", "debug") else {})
    parts = [*built(chosen)]
    for target, arguments in parts:
        inspect.signature(get_object(target)).bind(**arguments)
    if not NOT_BUILT & {target for target, _ in parts}:
        with torch.device("meta"):
            instantiate(chosen if "_target_" in chosen else {"parts": chosen})


CLIPPINGS: dict[str, Clipping] = {"adaptive": AdaptiveClipping(), "abnormal": AbnormalDrop(), "norm": NormClipping()}
OBJECTIVES: dict[str, Objective] = {
    "flow": Flow(),
    "flow_tiny": Flow(shift=2.0, std=1.0),
    "velocity_v13": Velocity(),
    "epsilon": Epsilon(),
    "ddpm_v10": Epsilon(learned_variance=True),
    "epsilon_v12": Epsilon(min_snr=5.0, offset_noise=0.02),
}


@pytest.mark.parametrize("name", names("clipping"))
def test_clippings_have_the_defaults_of_their_classes(name: str) -> None:
    kind = CLIPPINGS[name]
    made = instantiate(composed("train", f"clipping={name}").clipping)
    assert type(made) is type(kind)
    assert str(vars(made)) == str(vars(kind))


@pytest.mark.parametrize("name", names("objective"))
def test_objectives_are_the_published_ones(name: str) -> None:
    assert instantiate(composed("train", f"objective={name}").objective) == OBJECTIVES[name]


def test_the_benchmark_takes_every_vae() -> None:
    for name in names("vae"):
        source = {"published": ["vae.kind=wfvae_v13", "vae.source=x"]}.get(name, [])
        cfg = composed("bench", f"vae={name}", *source)
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        assert cfg.output == "outputs/bench/vae"


def test_the_benchmark_takes_every_denoiser() -> None:
    for name in names("denoiser"):
        source = {"published": ["denoiser.kind=opensora_v13", "denoiser.source=x"]}.get(name, [])
        cfg = composed("bench", "bench/target=denoiser", f"denoiser={name}", *source)
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        assert cfg.output == "outputs/bench/denoiser"
        assert "vae" not in cfg


@pytest.mark.parametrize("name", sorted({*names("denoiser")} - {"pretrained", "published"}))
def test_a_denoiser_is_what_its_configuration_says(name: str) -> None:
    with torch.device("meta"):
        model = instantiate(composed("bench", "bench/target=denoiser", f"denoiser={name}").denoiser)
        again = [type(model)(**model.settings), type(model)(**json.loads(json.dumps(model.settings)))]
    size = f"{sum(value.numel() for value in model.parameters()):,}"
    assert f"{size} parameters" in heading(config_folder() / "denoiser" / f"{name}.yaml")
    for other in again:
        assert other.config == model.config
        assert other.schedule == model.schedule
        assert [*map(shape, other.state_dict().items())] == [*map(shape, model.state_dict().items())]


def shape(entry: tuple[str, torch.Tensor]) -> tuple[str, torch.Size]:
    return entry[0], entry[1].shape


@pytest.mark.parametrize("vae", sorted({*names("vae")} - {*VAES, *SOURCES}))
def test_a_vae_to_evaluate_only_is_what_its_configuration_says(vae: str) -> None:
    with torch.device("meta"):
        built = instantiate(composed("eval", f"vae={vae}", "input=x").vae)
    size = f"{sum(value.numel() for value in built.parameters()):,}"
    assert size in (config_folder() / "vae" / f"{vae}.yaml").read_text()


def test_the_tiny_recipe_builds_its_module_with_and_without_discriminator() -> None:
    for start, discriminates in (("null", False), ("10", True)):
        cfg = composed("train", "experiment=wfvae_tiny", f"module.discriminator_start={start}")
        module = instantiate(cfg.module)
        assert isinstance(module, VAEModule)
        assert (module.discriminator is not None) == discriminates
        assert module.batches_per_step(9) == 1
        assert module.batches_per_step(10) == 1 + discriminates


EARLIER = {  # experiment: dimensions of the discriminator, its start, betas, gradient clip, EMA, frames, stride, steps
    "causalvae_v10": ("2d", 1000, (0.5, 0.9), 1.0, 0.0, 17, 1, 20_000),
    "causalvae_v11_stage1": ("3d", 1000, (0.5, 0.9), 1.0, 0.0, 9, 1, 50_000),
    "causalvae_v11_stage2": ("3d", 1000, (0.5, 0.9), 1.0, 0.0, 25, 1, 50_000),
    "causalvae_v11_stage3": ("3d", 1000, (0.5, 0.9), 1.0, 0.0, 25, 1, 40_000),
    "odvae_v12_stage1": ("3d", 2000, (0.9, 0.999), 1e5, 0.999, 25, 2, 101_000),
    "odvae_v12_stage2": ("3d", 2000, (0.9, 0.999), 1e5, 0.999, 25, 2, 226_000),
}


@pytest.mark.parametrize("experiment", EARLIER)
def test_the_recipes_of_earlier_vaes_are_as_published(experiment: str) -> None:
    cfg = composed("train", f"experiment={experiment}", "perceptual.download=false")
    made = cfg.module
    found = (made.discriminator.dimensions, made.discriminator_start, tuple(made.betas), made.gradient_clip)
    found += (made.ema_decay, cfg.clip.frames, cfg.clip.stride, cfg.trainer.max_steps)
    assert found == EARLIER[experiment]
    assert (made.lr, made.weight_decay, made.loss.wavelet_weight, made.loss.kl_weight) == (1e-5, 0, 0, 1e-6)
    assert (made.discriminator.width, made.discriminator.layers, made.discriminator.dropout) == (64, 3, 0)
    assert (made.discriminator_weight, made.discriminator_floor, made.discriminator_most) == (0.5, 1e-4, 1e4)
    assert (cfg.clip.height, cfg.clip.width, cfg.data.train.flip) == (256, 256, False)


def test_an_installed_wheel_brings_its_configurations(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(build, cwd=ROOT, check=True, timeout=120)
    (wheel,) = tmp_path.glob("osp-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = "from osp.cli import config_folder, main; print(config_folder()); main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "train", "experiment=wfvae_tiny", "--cfg", "job"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[0])
    assert folder == tmp_path / "site" / "osp" / "conf"
    assert {path.stem for path in folder.glob("*.yaml")} == set(VERBS)
    assert "name: wfvae_tiny" in done.stdout
