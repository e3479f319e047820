"""The LightningModule that trains a video VAE."""

from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from osp.data.sources import stable_seed
from osp.data.video import to_float
from osp.errors import DataError, OspError, UsageError
from osp.evaluation.metrics import psnr
from osp.training.discriminator import PatchDiscriminator3d, adaptive_weight, hinge_loss
from osp.training.ema import ExponentialMovingAverage
from osp.training.losses import VAELoss
from osp.vae import WFVAE

Batch = dict[str, Any]


class DivergedError(OspError):
    """The loss or its gradients are no longer finite."""


class VAEModule(lightning.LightningModule):
    """Trains a VAE, and from step `discriminator_start` a discriminator against it.

    One training step is one update of the VAE, on `accumulate` batches, then, once the discriminator has started, one
    update of the discriminator on `accumulate` batches of its own; the loader asks `batches_per_step` how many to hand
    over. Only the VAE's updates count as Lightning's `global_step`, so `max_steps`, checkpoints and validation mean VAE
    steps with and without a discriminator. All randomness of a step (latents, dropout) derives from the seed, the step
    and the rank: a resumed run repeats an uninterrupted one. Without a `discriminator_start` there is no discriminator.
    Raises UsageError for values out of range.
    """

    def __init__(
        self,
        vae: WFVAE,
        loss: VAELoss,
        *,
        lr: float = 1e-5,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 0,
        accumulate: int = 1,
        gradient_clip: float = 1e5,
        ema_decay: float = 0.999,
        discriminator: PatchDiscriminator3d | None = None,
        discriminator_start: int | None = None,
        discriminator_weight: float = 0.5,
        discriminator_lr: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check("accumulate", accumulate, least=1)
        _check("discriminator_start", discriminator_start or 0)
        _check("warmup_steps", warmup_steps)
        _check("ema_decay", ema_decay, below=1.0)
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("gradient_clip", gradient_clip)):
            _check(name, value)
        self.automatic_optimization = False
        self.vae = vae
        self.ema = ExponentialMovingAverage(vae, ema_decay)
        self.discriminator = None if discriminator_start is None else discriminator
        self.loss = loss
        self.lr, self.weight_decay, self.betas, self.warmup_steps = lr, weight_decay, (betas[0], betas[1]), warmup_steps
        self.accumulate = accumulate
        self.gradient_clip = gradient_clip
        self.discriminator_start = discriminator_start or 0
        self.discriminator_weight = discriminator_weight
        self.discriminator_lr = lr if discriminator_lr is None else discriminator_lr
        self.seed = seed
        self._broken = 0  # clips replaced since the process began
        self._sums: dict[str, Tensor] = {}  # of the validation under way

    def discriminating(self, step: int) -> bool:
        """Whether the discriminator takes part in a step."""
        return self.discriminator is not None and step >= self.discriminator_start

    def batches_per_step(self, step: int) -> int:
        """How many batches a step needs."""
        return self.accumulate * (2 if self.discriminating(step) else 1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW for the VAE, and a second one for the discriminator if there is one."""
        learned = [parameter for parameter in self.vae.parameters() if parameter.requires_grad]
        optimizers = [torch.optim.AdamW(learned, self.lr, self.betas, weight_decay=self.weight_decay)]
        if self.discriminator is not None:
            optimizers.append(
                torch.optim.AdamW(
                    self.discriminator.parameters(), self.discriminator_lr, self.betas, weight_decay=self.weight_decay
                )
            )
        return optimizers

    def on_fit_start(self) -> None:
        """Refuse what would train wrongly; bring the perceptual network to the device.

        Raises UsageError for float16, whose scaled gradients can be neither clipped nor balanced here.
        """
        if self.trainer.precision in ("16-mixed", "16-true"):
            raise UsageError(
                f"trainer.precision={self.trainer.precision} does not train a VAE; use bf16-mixed or 32-true"
            )
        self._place_perceptual()

    def on_validation_start(self) -> None:
        """Validation may run without a fit."""
        self._place_perceptual()

    def training_step(self, batches: list[Batch], batch_idx: int) -> None:
        """One update of the VAE and, once it has started, one of the discriminator.

        Raises DivergedError when the VAE's loss or gradients are not finite.
        """
        step = self.global_step
        torch.manual_seed(stable_seed(self.seed, step, self.global_rank))
        optimizers = self.optimizers()
        vae_optimizer, *others = optimizers if isinstance(optimizers, list) else [optimizers]

        for group in vae_optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (step + 1) / (self.warmup_steps + 1))
        vae_optimizer.zero_grad()
        logs: dict[str, Tensor] = {}
        for batch in batches[: self.accumulate]:
            for name, value in self._vae_backward(to_float(batch["video"]), step).items():
                logs[name] = logs.get(name, 0.0) + value / self.accumulate
        self._check_and_clip(step, logs)
        vae_optimizer.step()
        torch.clear_autocast_cache()  # it holds copies of the weights before the step
        self.ema.update(self.vae)

        if self.discriminating(step):
            # Its gradients of the VAE's backward pass are not its own. Lightning would count its step as another
            # global step, so it is taken on the optimiser itself.
            others[0].zero_grad()
            for batch in batches[self.accumulate :]:
                loss = self._discriminator_loss(to_float(batch["video"]))
                self.manual_backward(loss / self.accumulate)
                logs["discriminator"] = logs.get("discriminator", 0.0) + loss.detach() / self.accumulate
            others[0].optimizer.step()

        clips = len(batches[0]["video"])
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=clips)
        self.log("train/loss", logs["total"], prog_bar=True, logger=False, batch_size=clips)
        self._broken += sum(batch["broken"] for batch in batches)
        self.log("data/broken", float(self._broken), batch_size=clips)

    def on_validation_epoch_start(self) -> None:
        """Start the means anew."""
        self._sums = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Reconstruct with the averaged weights; gives the reconstruction, `B 3 T H W`."""
        video, vae = to_float(batch["video"]), self.ema.model
        latent = vae.encode(video).mode()
        reconstruction = vae.decode(latent, frames=video.shape[2]).float().clamp(-1.0, 1.0)
        scores = torch.stack([psnr(mine, theirs) for mine, theirs in zip(reconstruction, video, strict=True)])
        metrics = {"psnr": scores, "clips": torch.ones_like(scores)}
        if self.loss.perceptual is not None:
            metrics[self.loss.perceptual.name] = self.loss.perceptual(reconstruction, video).mean(dim=1)
        # What fills up the last batches, or stands in for a broken clip, has no weight.
        for name, values in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + (values * batch["weight"]).sum()
        return reconstruction

    def on_validation_epoch_end(self) -> None:
        """Log the means over all clips of all processes, and how many clips these are.

        Raises DataError if no clip of the validation could be read.
        """
        # Lightning's own weighted mean over processes rounds the weights to whole numbers.
        sums = {name: self.trainer.strategy.reduce(value, reduce_op="sum") for name, value in self._sums.items()}
        clips = sums.pop("clips")
        if not clips:
            raise DataError("no clip of data.val could be read; give another data.val.path")
        # Without `step` Lightning would draw the points one step too early.
        self.log_dict({"step": float(self.global_step), "data/val_clips": clips})
        for name, total in sums.items():
            self.log(f"val/{name}", total / clips, prog_bar=name == "psnr")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint says how to build its VAE."""
        checkpoint["vae_settings"] = self.vae.settings

    def _vae_backward(self, video: Tensor, step: int) -> dict[str, Tensor]:
        result = self.vae(video)
        losses = self.loss(video, result)
        total, logs = losses.total, dict(losses.terms)
        if self.discriminating(step):
            assert self.discriminator is not None
            adversarial = -self.discriminator(result.reconstruction).float().mean()
            weight = self.discriminator_weight * adaptive_weight(
                losses.reconstruction, adversarial, self.vae.last_layer
            )
            total = total + weight * adversarial
            logs |= {"adversarial": adversarial, "adversarial_weight": weight}
        self.manual_backward(total / self.accumulate)
        return {name: value.detach() for name, value in (logs | {"total": total}).items()}

    def _discriminator_loss(self, video: Tensor) -> Tensor:
        assert self.discriminator is not None
        with torch.no_grad():
            reconstruction = self.vae(video).reconstruction
        return hinge_loss(self.discriminator(video).float(), self.discriminator(reconstruction).float())

    def _check_and_clip(self, step: int, logs: dict[str, Tensor]) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.vae.parameters(), self.gradient_clip)
        # Not the norm alone: the L1 distance sends no gradient where the reconstruction is NaN.
        if not torch.isfinite(norm + logs["total"]):
            terms = ", ".join(f"{name} {value.item():.4g}" for name, value in logs.items())
            raise DivergedError(
                f"the loss or its gradients are not finite at step {step} ({terms}); "
                "continue from the last checkpoint with a lower module.lr or trainer.precision=32-true"
            )
        logs["gradient_norm"] = norm

    def _place_perceptual(self) -> None:
        if self.loss.perceptual is not None:
            self.loss.perceptual.to(self.device)


def _check(name: str, value: float, least: float = 0.0, below: float = float("inf")) -> None:
    if not isinstance(value, int | float) or not least <= value < below:
        limit = "" if below == float("inf") else f" and below {below:g}"
        raise UsageError(f"module.{name}={value} makes no sense; it must be a number of at least {least:g}{limit}")
