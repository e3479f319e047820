"""`osp cache`: clips -> a folder of features, that a denoiser trains on without its VAE and text encoder."""

from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

from osp.checks import check_choice
from osp.cli import user_error
from osp.cli.checks import CLIP, build_vae, check_numbers, check_vae_source
from osp.cli.data import build_source, check_data
from osp.cli.plain import configuration, instantiate, plain
from osp.data.features.format import DTYPES, POSTERIORS
from osp.devices import choose_device, choose_precision
from osp.errors import UsageError
from osp.training.feature_jobs import FeatureJob, FeatureModels, make_features
from osp.vae import Tiling

# Settings that a job and the command line call the same
_SAME = (
    "min_clips",
    "posterior",
    "dtype",
    "batch_size",
    "workers",
    "shard_clips",
    "processes",
    "part",
    "parts",
    "device",
    "devices",
    "where",
    "aesthetic_words",
)


def run(cfg: DictConfig) -> dict[str, Any] | None:
    """Encode what is not encoded yet; gives what the folder holds now, if this process is not one of others' helpers.

    Raises UsageError before any work for settings that do not fit together or to the folder, and DataError if no clip
    can be used.
    """
    least = {"min_clips": 1, "latent.scaling_clips": 1, "batch_size": 1, "workers": 1, "shard_clips": 1}
    check_numbers(cfg, CLIP | least | {"processes": 1, "devices": 1, "part": 0, "parts": 1})
    if cfg.part >= cfg.parts:
        raise UsageError(f"part={cfg.part}, parts={cfg.parts}: the parts are 0 to {cfg.parts - 1}")
    if cfg.processes > 1 and cfg.devices > 1:
        raise UsageError(
            f"processes={cfg.processes} devices={cfg.devices}: is one too many; with processes each takes a device and "
            "clips of its own, with devices all encode each batch together"
        )
    check_choice("posterior", cfg.posterior, POSTERIORS)
    check_choice("dtype", cfg.dtype, DTYPES)
    check_data(cfg)
    check_vae_source(cfg)
    settings = plain(cfg)
    job = FeatureJob(
        input=None if cfg.input is None else Path(to_absolute_path(cfg.input)),
        output=Path(to_absolute_path(cfg.output)),
        clip=settings["clip"],
        **settings["latent"],
        scaling_from=None if cfg.scaling_from is None else Path(to_absolute_path(cfg.scaling_from)),
        limits=instantiate(cfg.limits),
        tiling=Tiling.read(settings["tiling"]),
        precision=choose_precision(cfg.precision, choose_device(cfg.device)),  # which goes into the folder
        **{name: settings[name] for name in _SAME},
    )
    log_as = partial(_log_as, OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True))
    return make_features(job, partial(_models, settings), log_as)


def _models(settings: dict[str, Any], whole: bool) -> FeatureModels:
    """The models of the settings, or the VAE alone; also in another process, whose errors come as a user sees them."""
    try:
        cfg = configuration(settings)
        vae = build_vae(cfg.vae)
        if not whole:
            return FeatureModels(vae, None, None)
        strides = {"time_stride": vae.time_stride, "space_stride": vae.space_stride}
        rule = None if cfg.get("buckets") is None else instantiate(cfg.buckets, **strides)
        source = None if cfg.get("data") is None else build_source(cfg)
        return FeatureModels(vae, None if cfg.get("text") is None else instantiate(cfg.text), rule, source)
    except Exception as error:
        if (mended := user_error(error, "cache")) is None:
            raise
        raise mended from error


def _log_as(config: Any) -> None:
    configure_log(configuration(config))
