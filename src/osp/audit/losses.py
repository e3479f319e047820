"""The loss of a VAE and its discriminator against recorded cases."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from osp.audit.case import Case, Comparison, Unsupported
from osp.errors import DataError
from osp.training.discriminator import Balance, PatchDiscriminator, hinge_loss
from osp.training.losses import VAELoss
from osp.vae.autoencoder import Autoencoding
from osp.vae.posterior import GaussianPosterior

OLDER = Balance(0.5, floor=1e-4, most=1e4)
"""How v1.0 to v1.2 weigh the adversarial loss."""
_FIXED = {"perceptual_weight": 0, "logvar": 0}


@torch.enable_grad()
def run_causalvae_loss(case: Case) -> Iterator[Comparison]:
    """The terms of the loss before and after the discriminator's start, and its logits of real videos.

    `steps` are recorded as `out/stepN/...`. Every value is of a call that starts with the recorded running means.
    """
    config = case.setting("config")
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise Unsupported(f"{key}={config[key]}: the published training keeps it at {value}")
    video = case.tensor("in/x")
    yield case.compare("logits_real", _discriminator(case)(video), case.bar("logits_real"))
    steps = sorted({key.split("/")[1] for key in case.tensors if key.startswith("out/step")})
    for step in steps:
        made = _terms(case, config, video, int(step.removeprefix("step")) >= config["disc_start"])
        for name in case.below(f"out/{step}/"):
            if name not in made:
                raise DataError(f"{step}/{name}: is not known")
            what = f"{step}/{name}"
            yield case.compare(what, made[name].detach().reshape(1), case.bar(what))


def _terms(case: Case, config: Mapping[str, Any], video: Tensor, started: bool) -> dict[str, Tensor]:
    last_layer = case.tensor("in/last_layer").clone().requires_grad_()
    reconstruction = torch.nn.functional.conv3d(case.tensor("in/features"), last_layer)
    loss = VAELoss(pixel=config.get("loss_type", "l1"), kl_weight=config["kl_weight"], wavelet_weight=0)
    result = Autoencoding(reconstruction, GaussianPosterior.from_moments(case.tensor("in/moments")))
    terms = loss(video, result)
    nothing = torch.zeros((), device=video.device)
    made = {
        "nll_loss": terms.reconstruction,
        "kl_loss": result.posterior.kl().mean(),
        "total_loss": terms.total,
        "d_weight": nothing,
        "g_loss": nothing,
        "disc_loss": nothing,
    }
    if not started:
        return made
    adversarial = -_discriminator(case)(reconstruction).mean()
    balance = Balance(config.get("disc_weight", OLDER.weight), OLDER.floor, OLDER.most)
    weight = balance(terms.reconstruction, adversarial, last_layer)
    judge = _discriminator(case)
    real, fake = judge(video), judge(reconstruction.detach())
    return made | {
        "total_loss": terms.total + weight * adversarial,
        "d_weight": weight,
        "g_loss": adversarial,
        "disc_loss": hinge_loss(real, fake),
        "logits_real_mean": real.mean(),
        "logits_fake_mean": fake.mean(),
    }


def _discriminator(case: Case) -> PatchDiscriminator:
    """The recorded discriminator, in training."""
    weights = {f"layers.{_place(key)}": value for key, value in case.below("weights/main.").items()}
    first = weights["layers.0.weight"]
    config = case.setting("config")
    layers = config["disc_num_layers"]
    made = PatchDiscriminator(len(first), layers, 0.0, "2d" if first.ndim == 4 else "3d")
    made.load_state_dict(weights)
    return made.to(case.device).train()


def _place(key: str) -> str:
    """A key of the published layers in ours, which have a dropout after each of the hidden ones' three layers."""
    number, _, name = key.partition(".")
    hidden, layer = divmod(int(number) - 2, 3)
    return f"{int(number) if int(number) < 2 else 2 + 4 * hidden + layer}.{name}"
