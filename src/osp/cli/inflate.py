"""`osp inflate`: an image VAE -> a folder of ours with a video VAE that begins with its weights."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import to_absolute_path
from omegaconf import DictConfig

from osp.checks import check_number
from osp.cli.checks import build_vae
from osp.errors import UsageError
from osp.vae import CausalVideoVAE
from osp.weights.inflate import inflated
from osp.weights.pretrained import save_pretrained


def run(cfg: DictConfig) -> dict[str, Any]:
    """Read the image VAE, fit it to the video VAE and write that; gives what the output folder holds.

    Raises UsageError for a VAE of another family, and errors as `inflated`.
    """
    check_number("seed", cfg.seed, least=0, whole=True)
    torch.manual_seed(cfg.seed)
    vae = build_vae(cfg.vae)
    if not isinstance(vae, CausalVideoVAE):
        raise UsageError(
            f"a {type(vae).__name__} is no image VAE over time; choose vae=odvae_v12, or another shape of it"
        )
    made = inflated(vae, to_absolute_path(str(cfg.source)), cfg.kernels)
    output = Path(to_absolute_path(str(cfg.output)))
    save_pretrained(vae, output, weights=made.weights)
    return {
        "output": str(output),
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "drawn": list(made.drawn),
        "settings": vae.settings,
    }
