"""Checks of a verb's settings and model, made before anything else happens."""

from collections.abc import Collection, Mapping

from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

from osp.checks import check_number
from osp.cli.plain import instantiate, plain
from osp.errors import DataError, UsageError
from osp.training.state import is_stored
from osp.vae import VideoVAE

CLIP = {"clip.frames": 1, "clip.height": 1, "clip.width": 1, "clip.stride": 1}


def check_numbers(cfg: DictConfig, least: Mapping[str, float], optional: Collection[str] = ()) -> None:
    """Check numbers against the least value of each, whole numbers where that is an `int`; `optional` ones may be null.

    Raises UsageError naming the key and the value.
    """
    for key, bound in least.items():
        value = OmegaConf.select(cfg, key)
        if value is not None or key not in optional:
            check_number(key, value, bound, whole=isinstance(bound, int))


def check_vae_source(cfg: DictConfig) -> None:
    """Raise UsageError if a configuration with `vae` says no file or folder to read it from, DataError for no file."""
    if cfg.vae.get("path", "") is None:
        raise UsageError(
            "give checkpoint=FILE of `osp train`, vae=pretrained path=FOLDER of `osp import-weights`, "
            "or vae=published vae.kind=KIND vae.source=FILE"
        )
    check_checkpoint(cfg, cfg.vae)


def check_generator_source(cfg: DictConfig) -> None:
    """Raise UsageError if a configuration with `generator` says not where to read all of it, DataError for no file."""
    parts = [part for part in ("denoiser", "vae", "text") if cfg.get(part) is not None]
    if missing := dict.fromkeys(key for part in parts for key in _without_path(cfg[part], part, cfg.get("path"))):
        raise UsageError(f"this generator is read from folders; give {' '.join(f'{key}=FOLDER' for key in missing)}")
    if cfg.generator.get("path", "") is None:
        raise UsageError(
            "give checkpoint=FILE of `osp train`, or generator=opensora_v13 and the like; see conf/generator"
        )
    check_checkpoint(cfg, cfg.generator)


def check_checkpoint(cfg: DictConfig, part: DictConfig) -> None:
    """Raise DataError if a part of a configuration is read from its `checkpoint` and that is not there."""
    path = cfg.checkpoint
    if path is not None and part.get("path") == path and not is_stored(to_absolute_path(path)):
        raise DataError(f"checkpoint={path}: no such file; give a checkpoint of `osp train`")


def build_vae(cfg: DictConfig) -> VideoVAE:
    """The VAE of a configuration `vae`. Raises UsageError if that gives another model, as a folder with weights may."""
    vae = instantiate(cfg)
    if not isinstance(vae, VideoVAE):
        raise UsageError(f"vae is a {type(vae).__name__}, which is no VAE; give weights of a VAE")
    return vae


def _without_path(cfg: DictConfig, key: str, whole: str | None) -> list[str]:
    """The settings named `path` in a configuration that say nothing; `whole` is that of all parts together."""
    found = []
    for name in map(str, cfg):
        if name == "path" and whole is None and "${path}" in str(plain(cfg, resolve=False)["path"]):
            found.append("path")
        elif name == "path" and (OmegaConf.is_missing(cfg, name) or cfg.path is None):
            found.append(f"{key}.path")
        elif not OmegaConf.is_missing(cfg, name) and isinstance(cfg[name], DictConfig):
            found += _without_path(cfg[name], f"{key}.{name}", whole)
    return found
