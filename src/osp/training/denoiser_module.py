"""The LightningModule that trains a denoiser, on encoded clips or on videos."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from osp.conditioning import (
    ConditionInputs,
    EncodedText,
    MaskMix,
    TextEncoder,
    call_denoiser,
    denoiser_inputs,
    draw_dropped,
    drop_prompts,
    find_mix,
    given_frames,
)
from osp.data.datamodule import ClipDataModule
from osp.data.features.format import TextIdentity
from osp.data.media.video import to_float
from osp.denoiser import Denoiser
from osp.diffusion import Objective, draw_normal, squared_error
from osp.errors import UsageError
from osp.sampling import VideoGenerator
from osp.seeds import seeded, stable_seed
from osp.training.clipping import AdaptiveClipping, Clipping
from osp.training.denoiser_checks import check_data, check_parts, empty_text, latent_identity
from osp.training.ema import ExponentialMovingAverage
from osp.training.encode_features import measure_source_scaling, text_identities
from osp.training.module import Batch, TrainingModule, check_value
from osp.training.peek import first_clips
from osp.training.start import load_start
from osp.vae import LatentCodec

TIME_PARTS = 4
"""The loss is also logged for each of so many equal parts of the times, from little noise to much."""

_DEFAULT_FPS = 8.0  # where all clips are images


class DenoiserModule(TrainingModule):
    """Trains a denoiser, and the text encoder if that is one that learns along.

    A batch holds latents (`FeatureBatch`) or videos (`osp.data.loader.Batch`). Videos go through the
    codec's frozen VAE, and a sample of their posterior is taken; text is the batch's own embeddings, or captions that
    the text encoder reads. Neither a VAE nor a text encoder that is frozen is part of the checkpoint.

    All that is random about a sample derives from the seed and the sample's number in the run: a step's loss does not
    depend on how its samples are split into batches and processes, and a resumed run repeats an uninterrupted one.
    The loss is the mean over all values of a step's latents, whatever their sizes: the sum of squared errors by the sum
    of values, both over all batches and processes.

    Validation takes the averaged weights, and noise and times that are the same in every validation: `val/loss` is the
    mean over the clips, each at one time in every quarter of the times.

    Args:
        denoiser: one with condition channels learns to go on from given frames, by `masks`.
        text: the encoder of captions; None where the features hold embeddings.
        objective: what is predicted.
        codec: the VAE with its scaling. None for features; where it is given for them, clips are shown.
        clipping: None: `AdaptiveClipping()`.
        lr, weight_decay, betas: of AdamW.
        warmup_steps, decay_until: the rates rise linearly, and are constant then, or fall to 0 until that step.
        muon_lr: the matrices inside the blocks learn by Muon (Jordan et al., 2024) at this rate, scaled to steps as
            large as AdamW's (arXiv:2502.16982); None: by AdamW like the rest.
        accumulate: batches in a step.
        ema_decay: of the averaged weights.
        text_dropout: the part of the samples that lose their text; 1 trains without captions.
        masks: how frames are given: a name in `osp.conditioning.MIXES`, weights by kind, or a `MaskMix`.
        condition_noise: whether given frames get noise in training.
        image_text: where given frames are trained, half of the images have this text instead of their caption (v1.3).
        scaling_clips: the scaling of the codec is not its own but measured at the run's start, on so many clips.
        recompute_every: gradient checkpointing, see `Denoiser.recompute_every`.
        seed: of all the noise.

    Raises UsageError for parts that do not fit together and values out of range.
    """

    monitor = "val/loss"
    mode: Literal["min", "max"] = "min"

    def __init__(
        self,
        denoiser: Denoiser,
        text: TextEncoder | None,
        objective: Objective,
        codec: LatentCodec | None = None,
        *,
        clipping: Clipping | None = None,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 0,
        decay_until: int | None = None,
        muon_lr: float | None = None,
        accumulate: int = 1,
        ema_decay: float = 0.9999,
        text_dropout: float = 0.1,
        masks: MaskMix | Mapping[str, float] | str | None = None,
        condition_noise: bool = True,
        image_text: str | None = None,
        scaling_clips: int = 0,
        recompute_every: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            warmup_steps=warmup_steps,
            decay_until=decay_until,
            accumulate=accumulate,
            ema_decay=ema_decay,
            seed=seed,
        )
        check_value("text_dropout", text_dropout)
        if text_dropout > 1:
            raise UsageError(f"module.text_dropout={text_dropout} makes no sense; it must lie between 0 and 1")
        check_value("recompute_every", recompute_every)
        if muon_lr is not None:
            check_value("muon_lr", muon_lr)
        self.muon_lr = muon_lr
        for name, part, kind in (("denoiser", denoiser, Denoiser), ("objective", objective, Objective)):
            if not isinstance(part, kind):
                raise UsageError(f"module=denoiser needs {name}=NAME; choose one of conf/{name}")
        self.masks = None if masks is None else find_mix(masks)
        self.objective, self.codec = objective, codec
        self.text_dropout, self.condition_noise = text_dropout, condition_noise
        self.image_text = image_text if self.masks is not None else None
        self.scaling_clips = scaling_clips
        self.trains_text = text is not None and text.trained
        self._frozen_text = None if self.trains_text else text
        parts: dict[str, nn.Module] = {"denoiser": denoiser.train()}
        if self.trains_text:
            assert isinstance(text, nn.Module)
            parts["text"] = text.train()
        self.model = nn.ModuleDict(parts)
        self.denoiser.recompute_every = recompute_every
        self.ema = ExponentialMovingAverage(self.model, ema_decay)
        self.clipping = AdaptiveClipping() if clipping is None else clipping
        check_parts(denoiser, text, codec, self.masks)
        self._prepared = False
        self._encodes = False  # whether batches are videos
        self._latent: dict[str, Any] = {}  # what latents are made with, as checkpoints say it
        self._clip: dict[str, int] | None = None
        self._fps = _DEFAULT_FPS
        self._no_text: EncodedText | None = None  # the empty text of features
        self._text_made_by: tuple[TextIdentity | None, TextIdentity | None] = (None, None)
        self._since = 0.0

    @property
    def learned(self) -> nn.ModuleDict:
        """The denoiser, and the text encoder if it is trained."""
        return self.model

    @property
    def denoiser(self) -> Denoiser:
        """The one that is trained."""
        return part(self.model, "denoiser")

    @property
    def text(self) -> TextEncoder | None:
        """The text encoder, as far as it has learned if it is trained."""
        return part(self.model, "text") if self.trains_text else self._frozen_text

    def prepare(self, data: ClipDataModule) -> None:
        """See `TrainingModule`; also keeps what checkpoints say about the data."""
        check_data(data, self.denoiser, self.text, self.codec, self.masks, self.text_dropout)
        self._prepared = True
        source = data.train_source
        self._encodes = source.made_with is None
        self._latent = latent_identity(source, self.codec)
        self._no_text = empty_text(source)
        self._text_made_by = text_identities(self.text)
        if self.text is None and source.made_with is not None:
            self._text_made_by = source.made_with.text, source.made_with.pooled_text
        if clips := first_clips(data.val_source) or first_clips(source):
            size = clips[0]["size"] if "size" in clips[0] else clips[0]["video"].shape[1:]
            self._clip = dict(zip(("frames", "height", "width"), map(int, size), strict=True))
            self._fps = float(clips[0]["fps"]) or _DEFAULT_FPS

    def start_from(self, path: str) -> None:
        """Begin with the averaged weights of another run, or with those of a folder; see `osp.training.start`."""
        latent = load_start(path, self.denoiser, part(self.model, "text") if self.trains_text else None)
        self.ema.model.load_state_dict(self.model.state_dict())
        if latent is None:
            return
        if self.scaling_clips:
            self._scale(latent["shift"], latent["scale"])
        self._refuse_other_latents(latent, f"start_from={path}")

    def _refuse_other_latents(self, latent: Mapping[str, Any], whose: str) -> None:
        if latent["vae_fingerprint"] != self._latent["vae_fingerprint"]:
            raise UsageError(
                f"{whose} was trained on latents of another VAE ({latent['vae']} of {latent['origin']}) than "
                f"{self._latent['vae']} of {self._latent['origin']}; use that one"
            )
        if any(latent[name] != self._latent[name] for name in ("shift", "scale")):
            raise UsageError(
                f"{whose} was trained on latents with another shift and scale; for features take them over by "
                "`osp cache scaling_from=FOLDER`, for videos by latent.shift and latent.scale"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and Muon for the matrices inside the blocks if that is asked for."""
        if self.muon_lr is None:
            return self.adamw(self.model.parameters(), self.lr)
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            inside = parameter.ndim == 2 and ".blocks." in name and name.endswith("weight")
            (matrices if inside else rest).append(parameter)
        muon = torch.optim.Muon(matrices, self.muon_lr, weight_decay=self.weight_decay, adjust_lr_fn="match_rms_adamw")
        return [self.adamw(rest, self.lr), muon]

    def on_fit_start(self) -> None:
        """Bring what is frozen to the device, and measure the scaling of the latents if that is asked for."""
        super().on_fit_start()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not self._prepared:
            self.prepare(data)
        self._place()
        if self.scaling_clips and self.codec is not None:
            # By one process, so that all have the same to the last digit.
            scaling: Any = None
            if self.trainer.is_global_zero:
                vae = self.codec.vae
                scaling = measure_source_scaling(data.train_source, vae, self.scaling_clips, device=self.device)
            self._scale(*self.trainer.strategy.broadcast(scaling))

    def _scale(self, shift: Sequence[float], scale: Sequence[float]) -> None:
        assert self.codec is not None
        self.codec = LatentCodec(self.codec.vae, shift, scale)
        self._latent |= {"shift": list(shift), "scale": list(scale)}
        self.scaling_clips = 0

    def on_validation_start(self) -> None:
        """Validation may run without a fit; its time is not that of a step."""
        self._place()
        self._since = 0.0

    def _place(self) -> None:
        if self._frozen_text is not None:
            self._frozen_text.to(self.device)
        if self.codec is not None and self._encodes:
            self.codec.to(self.device)

    def training_step(self, batches: list[Batch], batch_idx: int) -> None:
        """One update. Raises DivergedError when the loss or gradients stay without finite values."""
        these = self.optimizers()
        optimizers = these if isinstance(these, list) else [these]
        self.set_rates(optimizers)
        for optimizer in optimizers:
            optimizer.zero_grad()
        generators = [[seeded(self.seed, "train", n) for n in batch["sample"].tolist()] for batch in batches]
        clean = [self._clean(batch, own) for batch, own in zip(batches, generators, strict=True)]
        values = self.summed(torch.tensor(float(sum(latent.numel() for latent in clean)), device=self.device))
        sums = torch.zeros(2, TIME_PARTS, device=self.device)  # errors and values in each part of the times
        for number, (batch, latent, own) in enumerate(zip(batches, clean, generators, strict=True)):
            # The processes' gradients are brought together once, with the last batch's.
            with self._unsynchronised() if number < len(batches) - 1 else nullcontext():
                errors, counted, parts = self._errors(batch, latent, own)
                # The mean over all processes is taken, where a sum over different clips is meant.
                self.manual_backward(errors.sum() * (self.mesh.data / values))
            sums[0].index_add_(0, parts, errors.detach())
            sums[1].index_add_(0, parts, counted)
        sums = self.summed(sums)
        loss = sums[0].sum() / sums[1].sum()
        logs: dict[str, Any] = {"lr": self.lr * self.rate_at(self.global_step)}
        logs |= self.take_step(optimizers, loss, {"loss": loss})
        logs |= {f"loss_time_{i}": sums[0, i] / n for i, n in enumerate(sums[1].tolist()) if n}
        clips = sum(len(latent) for latent in clean)
        now = time.monotonic()
        if self._since:
            logs["clips_per_second"] = clips * self.mesh.data / (now - self._since)
        self._since = now
        self.log_step(logs, loss, batches, clips)

    def _errors(self, batch: Batch, clean: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, ...]:
        """Each sample's weighted squared error, how many values it has, and the part of the times it was drawn in."""
        patch = self.denoiser.patch_size
        times = self.objective.sample_time(
            len(clean), generators, tokens=(clean.shape[3] // patch) * (clean.shape[4] // patch)
        ).to(clean.device)
        dropped = draw_dropped(self.text_dropout, generators)
        noise = draw_normal(clean.shape, generators, clean.device)
        condition = self._condition(batch, generators, training=True)
        text = self._encoded(batch, self.text, dropped, generators)
        errors, counted = self._squared_error(self.denoiser, clean, noise, times, text, condition)
        return errors, counted, (times.float() / self.objective.time_span * TIME_PARTS).long().clamp(0, TIME_PARTS - 1)

    def _squared_error(
        self,
        denoiser: Denoiser,
        clean: Tensor,
        noise: Tensor,
        times: Tensor,
        text: EncodedText,
        condition: ConditionInputs | None,
    ) -> tuple[Tensor, Tensor]:
        noisy = self.objective.corrupt(clean, noise, times)
        prediction = call_denoiser(denoiser, noisy, times, **denoiser_inputs(denoiser, text, condition))
        target = self.objective.target(clean, noise, times)
        return squared_error(prediction, target, self.objective.weight(times))

    def _clean(self, batch: Batch, generators: Sequence[torch.Generator] | None) -> Tensor:
        """The clean latents, `B C T H W`: the batch's, or those of its videos; without generators the means."""
        if "latent" in batch:
            return batch["latent"]
        assert self.codec is not None
        return self.codec.encode(to_float(batch["video"]), generators)

    def _condition(self, batch: Batch, generators: Sequence[torch.Generator], training: bool) -> ConditionInputs | None:
        """What the denoiser is given of the batch's videos."""
        if self.masks is None or self.codec is None:
            return None
        noise = training and self.condition_noise
        return self.masks.draw_given(to_float(batch["video"]), generators, noise).encode(self.codec)

    def _encoded(
        self,
        batch: Batch,
        encoder: TextEncoder | None,
        dropped: Tensor | None = None,
        generators: Sequence[torch.Generator] = (),
    ) -> EncodedText:
        if "text" in batch and not self.trains_text:
            text = EncodedText(batch["text"], batch["text_mask"], batch.get("pooled_text"))
            if dropped is None or not dropped.any():
                return text
            assert self._no_text is not None
            return text.replaced(dropped, self._no_text.to(text.text.device, text.text.dtype))
        assert encoder is not None
        captions = list(batch["caption"])
        if generators and self.image_text is not None and batch["video"].shape[2] == 1:
            default = draw_dropped(0.5, generators).tolist()
            captions = [self.image_text if use else text for text, use in zip(captions, default, strict=True)]
        return encoder(captions if dropped is None else drop_prompts(captions, dropped))

    def _unsynchronised(self) -> AbstractContextManager[Any]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss of the averaged weights, at one time in each part of the times."""
        generators = [seeded(self.seed, "val", key) for key in batch["key"]]
        model = self.ema.model
        clean = self._clean(batch, None)
        places = torch.stack([torch.rand((), generator=g) for g in generators])
        noise = draw_normal(clean.shape, generators, clean.device)
        condition = self._condition(batch, generators, training=False)
        text = self._encoded(batch, part(model, "text") if self.trains_text else self.text)
        scores = {}
        for number in range(TIME_PARTS):
            times = self.objective.time_at((number + places) / TIME_PARTS).to(clean.device)
            errors, counted = self._squared_error(part(model, "denoiser"), clean, noise, times, text, condition)
            scores[f"loss_time_{number}"] = errors / counted
        self.add_scores(batch, {"loss": torch.stack(list(scores.values())).mean(dim=0)} | scores)

    def shown_clips(self, batch: Batch, outputs: Any, clips: int) -> Tensor | None:
        """The clips on the left; on the right what the averaged weights make of their captions, and of the first frame
        where frames are given. None where captions cannot be read or latents not decoded."""
        text = part(self.ema.model, "text") if self.trains_text else self.text
        if self.codec is None or text is None:
            return None
        counts = text.count_tokens(batch["caption"])
        readable = [i for i, caption in enumerate(batch["caption"]) if caption.strip() and counts[i] <= text.max_tokens]
        if not (chosen := readable[:clips]):
            return None
        generator = VideoGenerator(part(self.ema.model, "denoiser"), text, self.objective, self.codec)
        # One by one: what trains leaves little memory.
        pairs = [self._shown(generator, batch, index) for index in chosen]
        if not self._encodes:
            self.codec.to("cpu")  # it is not needed until the next validation
        return torch.stack(pairs)

    def _shown(self, generator: VideoGenerator, batch: Batch, index: int) -> Tensor:
        """A clip and what is made of its caption, side by side, `3 T H 2W`."""
        codec = generator.codec.to(self.device)
        real = to_float(batch["video"][index]) if "video" in batch else codec.decode(batch["latent"][index, None])[0]
        # As many frames as a latent has room for; the last ones may be beyond the clip's.
        stride, (held, height, width) = codec.time_stride, real.shape[1:]
        size = 1 + -(-(held - 1) // stride) * stride, height, width
        given = given_frames({0: real[:, 0].cpu()}, *size) if self.masks is not None and held > 1 else None
        seed = stable_seed(self.seed, "shown", batch["key"][index])
        with self.trainer.precision_plugin.forward_context():
            made = generator.generate([batch["caption"][index]], *size, seeds=[seed], given=given)[0]
        return torch.cat([real.cpu(), made[:, :held]], dim=-1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint says how to build its generator, in plain values."""
        checkpoint["generator"] = {
            "denoiser": {"model": type(self.denoiser).__name__, "settings": self.denoiser.settings},
            "text": self._text_entry(),
            "objective": {"name": type(self.objective).__name__, "settings": asdict(self.objective)},
            "latent": self._latent,
            "fps": self._fps,
            "clip": self._clip,
        }

    def _text_entry(self) -> dict[str, Any]:
        if self.trains_text:
            text = part(self.model, "text")
            return {"encoder": type(text).__name__, "settings": text.settings}
        return {
            "encoder": None,
            "settings": {},
            "made_by": [one and asdict(one) for one in self._text_made_by],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A scaling that was measured stays what it was. Raises UsageError if the VAE is another now."""
        latent = checkpoint["generator"]["latent"]
        if self.scaling_clips:
            self._scale(latent["shift"], latent["scale"])
        if self._prepared:
            self._refuse_other_latents(latent, "this run")


def part(model: nn.ModuleDict, name: str) -> Any:
    """The denoiser or the text encoder of what is trained."""
    return model[name]
