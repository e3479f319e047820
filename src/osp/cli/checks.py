"""What a verb checks of its settings and its model before anything else happens."""

from collections.abc import Collection, Mapping

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from osp.errors import UsageError
from osp.vae import VideoVAE

CLIP = {"clip.frames": 1, "clip.height": 1, "clip.width": 1, "clip.stride": 1}


def check_numbers(cfg: DictConfig, least: Mapping[str, float], optional: Collection[str] = ()) -> None:
    """Check numbers against the least value of each, whole numbers where that is an `int`; `optional` ones may be null.

    Raises UsageError naming the key and the value.
    """
    for key, bound in least.items():
        value = OmegaConf.select(cfg, key)
        if value is None and key in optional:
            continue
        whole = isinstance(bound, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value >= bound:
            given = "null" if value is None else value
            raise UsageError(
                f"{key}={given} makes no sense; it must be a {'whole ' if whole else ''}number of at least {bound}"
            )


def check_vae_source(cfg: DictConfig) -> None:
    """Raise UsageError if a configuration with `vae` says no file or folder to read it from."""
    if cfg.vae.get("path", "") is None:
        raise UsageError(
            "give checkpoint=FILE of `osp train`, vae=pretrained path=FOLDER of `osp import-weights`, "
            "or vae=published vae.kind=KIND vae.source=FILE"
        )


def build_vae(cfg: DictConfig) -> VideoVAE:
    """The VAE of a configuration `vae`. Raises UsageError if that gives another model, as a folder with weights may."""
    vae = instantiate(cfg)
    if not isinstance(vae, VideoVAE):
        raise UsageError(f"vae is a {type(vae).__name__}, which is no VAE; give weights of a VAE")
    return vae
