"""The LightningModule that trains a video VAE."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from osp.checks import check_number
from osp.data.datamodule import ClipDataModule
from osp.data.media.video import to_float
from osp.errors import UsageError
from osp.evaluation.metrics import psnr
from osp.seeds import stable_seed
from osp.training.adversarial import discriminator_loss, vae_loss
from osp.training.build import with_memory
from osp.training.clipping import NormClipping
from osp.training.discriminator import Balance, PatchDiscriminator
from osp.training.losses import VAELoss
from osp.training.module import Batch, TrainingModule
from osp.training.optimisation import Optimisation
from osp.training.peek import clip_shapes
from osp.vae import VideoVAE
from osp.vae.autoencoder import Autoencoding
from osp.weights.publishing import scaling_entries


class VAEModule(TrainingModule):
    """Trains a VAE, and from step `discriminator_start` a discriminator against it.

    One training step is one update of the VAE, on `accumulate` batches, then, once the discriminator has started, one
    update of the discriminator on `accumulate` batches of its own; the loader asks `batches_per_step` how many to hand
    over. Only the VAE's updates count as Lightning's `global_step`, so `max_steps`, checkpoints and validation mean VAE
    steps with and without a discriminator. All randomness of a step derives from the seed and the step, that of dropout
    also from the rank among different clips: a resumed run repeats an uninterrupted one, and without dropout the loss
    does not depend on how the clips of a batch are split into processes. Without a `discriminator_start` there is no
    discriminator.

    `optimisation` are the settings of `Optimisation`, `lr` and so on. Raises UsageError for values out of range.
    """

    monitor = "val/psnr"
    mode: Literal["min", "max"] = "max"

    def __init__(
        self,
        vae: VideoVAE,
        loss: VAELoss,
        *,
        gradient_clip: float = 1e5,
        discriminator: PatchDiscriminator | None = None,
        discriminator_start: int | None = None,
        discriminator_weight: float = 0.5,
        discriminator_floor: float = 1e-6,
        discriminator_most: float = 1e6,
        discriminator_lr: float | None = None,
        seed: int = 0,
        **optimisation: Any,
    ) -> None:
        super().__init__(Optimisation(**{"weight_decay": 1e-4, "ema_decay": 0.999} | optimisation), seed)
        check_number("module.discriminator_start", discriminator_start, least=0, whole=True, null="never")
        check_number("module.discriminator_lr", discriminator_lr, least=0, null="lr")
        check_number("module.gradient_clip", gradient_clip, above=0)
        check_trainable(vae, loss)
        self.vae = vae
        self.clipping = NormClipping(gradient_clip)
        self.discriminator = None if discriminator_start is None else discriminator
        if self.discriminator is not None:
            vae.last_layer  # noqa: B018 (it raises where a VAE has none)
        self.loss = loss
        self.discriminator_start = discriminator_start or 0
        self.balance = Balance(discriminator_weight, discriminator_floor, discriminator_most)
        self.discriminator_lr = discriminator_lr
        self._noise = torch.Generator()

    def build(self) -> None:
        """See `TrainingModule.build`."""
        self.vae = with_memory(self.vae).train()  # weights that were read come in eval mode
        if self.discriminator is not None:
            self.discriminator = with_memory(self.discriminator)

    @property
    def opponents(self) -> Sequence[nn.Module]:
        """The discriminator, if there is one."""
        return [] if self.discriminator is None else [self.discriminator]

    @property
    def learned(self) -> nn.Module:
        """The VAE."""
        return self.vae

    def prepare(self, data: ClipDataModule) -> None:
        """See `TrainingModule`: sizes that the VAE does not take, and features."""
        for source in (data.train_source, data.val_source):
            if source is not None and source.made_with is not None:
                raise UsageError("a VAE trains on videos, and these are features; choose data=shards or data=synthetic")
            for shape in clip_shapes(source):
                self.vae.check_size(*shape)

    def discriminating(self, step: int) -> bool:
        """Whether the discriminator takes part in a step."""
        return self.discriminator is not None and step >= self.discriminator_start

    def batches_per_step(self, step: int) -> int:
        """How many batches a step needs."""
        return self.accumulate * (2 if self.discriminating(step) else 1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW for the VAE, and a second one for the discriminator if there is one."""
        optimizers = [self.optimisation.adamw(self.vae.parameters())]
        if self.discriminator is not None:
            optimizers.append(self.optimisation.adamw(self.discriminator.parameters(), self.discriminator_lr))
        return optimizers

    def on_fit_start(self) -> None:
        """Bring the perceptual network to the device."""
        super().on_fit_start()
        self._place_perceptual()
        self._noise = torch.Generator(self.device)

    def on_validation_start(self) -> None:
        """Validation may run without a fit."""
        self._place_perceptual()

    def training_step(self, batches: list[Batch], batch_idx: int) -> None:
        """One update of the VAE and, once it has started, one of the discriminator.

        Raises DivergedError when the VAE's loss or gradients are not finite.
        """
        step = self.global_step
        torch.manual_seed(stable_seed(self.seed, step, self.mesh.data_rank))
        self._noise.manual_seed(stable_seed(self.seed, step, 0))
        optimizers = self.optimizers()
        vae_optimizer, *others = optimizers if isinstance(optimizers, list) else [optimizers]

        self.set_rates([vae_optimizer])
        vae_optimizer.zero_grad()
        logs: dict[str, Tensor] = {}
        rate = {"lr": self.optimisation.lr * self.optimisation.rate_at(step)}
        for batch in batches[: self.accumulate]:
            for name, value in self._vae_backward(to_float(batch["video"]), step).items():
                logs[name] = logs.get(name, 0.0) + value / self.accumulate
        logs = self._averaged(logs)
        loss = logs["total"]
        taken = self.take_step([vae_optimizer], loss, logs)

        if self.discriminating(step):
            # The VAE's backward pass left gradients in it that must go. Lightning would count its step as another
            # global step, so it is taken on the optimiser itself.
            others[0].zero_grad()
            assert self.discriminator is not None
            for batch in batches[self.accumulate :]:
                against = discriminator_loss(self._through, self.discriminator, to_float(batch["video"]))
                self.manual_backward(against / self.accumulate)
                logs["discriminator"] = logs.get("discriminator", 0.0) + against.detach() / self.accumulate
            others[0].optimizer.step()
            others[0].zero_grad()  # or they would lie there while the VAE has its next turn
            logs |= self._averaged({"discriminator": logs["discriminator"]})

        clips = sum(len(batch["video"]) for batch in batches[: self.accumulate])
        self.log_step(logs | taken | rate | self.speed(clips), loss, batches, len(batches[0]["video"]))

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Reconstruct with the averaged weights; gives the reconstruction, `B 3 T H W`."""
        video, vae = to_float(batch["video"]), self.ema.model
        latent = vae.encode(video).mode()
        reconstruction = vae.decode(latent, frames=video.shape[2]).float().clamp(-1.0, 1.0)
        scores = torch.stack([psnr(mine, theirs) for mine, theirs in zip(reconstruction, video, strict=True)])
        metrics = {"psnr": scores}
        if self.loss.perceptual is not None:
            metrics[self.loss.perceptual.name] = self.loss.perceptual(reconstruction, video).mean(dim=1)
        self.add_scores(batch, metrics)
        return reconstruction

    def shown_clips(self, batch: Batch, outputs: Any, clips: int) -> Tensor:
        """Input on the left, reconstruction on the right."""
        return torch.cat([to_float(batch["video"]), outputs], dim=-1)[:clips]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint says which VAE it holds, how to build it, and the scaling of the one it began with."""
        checkpoint["vae_model"] = type(self.vae).__name__
        checkpoint["vae_settings"] = self.vae.settings
        if self.vae.scaling is not None:
            checkpoint["vae_scaling"] = scaling_entries(self.vae)

    def _averaged(self, logs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars by name -> their means over the clips of all processes."""
        means = self.averaged(torch.stack([value.float() for value in logs.values()]))
        return dict(zip(logs, means.unbind(), strict=True))

    def _through(self, video: Tensor) -> Autoencoding:
        """A pass through the VAE, whose noise is the same however the step's clips are split into processes."""
        mesh = self.mesh
        return self.vae(video, self._noise if mesh.data > 1 else None, (mesh.data_rank, mesh.data))

    def _vae_backward(self, video: Tensor, step: int) -> dict[str, Tensor]:
        against = self.discriminator if self.discriminating(step) else None
        total, terms = vae_loss(
            self.vae, self._through, self.loss, video, against, self.balance, self._mean_over_processes
        )
        self.manual_backward(total / self.accumulate)
        return {name: value.detach() for name, value in (terms | {"total": total}).items()}

    def _mean_over_processes(self, gradient: Tensor) -> Tensor:
        mean: Tensor = self.trainer.strategy.reduce(gradient, reduce_op="mean")
        return mean

    def _place_perceptual(self) -> None:
        if self.loss.perceptual is not None:
            self.loss.perceptual.to(self.device)


def check_trainable(vae: VideoVAE, loss: VAELoss) -> None:
    """Raise UsageError for a VAE without weights, and for a loss of wavelets where the VAE has none."""
    if not isinstance(vae, VideoVAE) or not any(True for _ in vae.parameters()):
        raise UsageError(f"a {type(vae).__name__} has no weights to train; choose another vae")
    if loss.wavelet_weight and not vae.has_wavelets:
        raise UsageError(
            f"module.loss.wavelet_weight={loss.wavelet_weight}: a {type(vae).__name__} has no wavelets; use 0"
        )
