"""The settings of sampling in a configuration."""

from dataclasses import fields

from omegaconf import DictConfig, OmegaConf

from osp.cli.plain import plain
from osp.sampling.settings import Sampling


def read_sampling(cfg: DictConfig) -> Sampling:
    """The settings of sampling in a configuration, others by default. Raises UsageError for one out of its limits."""
    return Sampling.read(plain(OmegaConf.masked_copy(cfg, [one.name for one in fields(Sampling) if one.name in cfg])))
