"""The LightningModule that trains a denoiser, on encoded clips or on videos."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from osp.checks import check_number
from osp.conditioning import (
    ConditionInputs,
    MaskMix,
    SeenWords,
    TextEncoder,
    clean_texts,
    find_mix,
    given_frames,
)
from osp.data.datamodule import ClipDataModule
from osp.data.media.video import to_float
from osp.denoiser import Denoiser
from osp.diffusion import Objective
from osp.documents import check_form
from osp.errors import UsageError
from osp.parallel import Parallelism, kind_of
from osp.sampling import VideoGenerator
from osp.seeds import seeded, stable_seed
from osp.training.build import drawing_from, with_memory
from osp.training.clipping import AdaptiveClipping, Clipping
from osp.training.denoiser_checks import check_data, check_parts
from osp.training.denoiser_loss import TIME_PARTS, Noised, StepErrors, mean_errors
from osp.training.encode_features import measure_source_scaling
from osp.training.joint import check_joint, images_beside, with_images
from osp.training.latent_identity import LatentIdentity
from osp.training.module import Batch, TrainingModule
from osp.training.optimisation import Optimisation
from osp.training.start import open_start
from osp.training.text_input import TextInput
from osp.vae import LatentCodec

_SCALING = ([float], tuple)
_LATENT_FORM = {"vae": str, "vae_fingerprint": str, "origin": (str, None), "shift": _SCALING, "scale": _SCALING}


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
        denoiser: one with frame channels learns to go on from given frames, by `masks`.
        text: the encoder of captions; None where the features hold embeddings.
        objective: what is predicted.
        codec: the VAE with its scaling. None for features; where it is given for them, clips are shown.
        clipping: None: `AdaptiveClipping()`.
        muon_lr: the matrices inside the blocks learn by Muon at this rate; None: by AdamW like the rest.
        text_dropout: the part of the samples that lose their text; 1 trains without captions.
        masks: how frames are given: a name in `osp.conditioning.MIXES`, weights by kind, or a `MaskMix`.
        condition_noise: whether given frames get noise in training.
        image_text: where given frames are trained, half of the images have this text instead of their caption (v1.3).
        dropped_text: half of the samples that lose their text have this one in its place (v1.2, image to video).
        joint_images: so many evenly spaced frames of each clip are trained on as images too (v1.0), beside it and at
            its time; clips that bring images of their own (`JointClips`) need none.
        scaling_clips: the scaling of the codec is not its own but measured at the run's start, on so many clips.
        recompute_every: gradient checkpointing, see `Denoiser.recompute_every`.
        offload_activations: see `Denoiser`; needs `recompute_every`.
        compile: compile each block with torch.compile.
        seed: of all the noise.
        optimisation: the settings of `Optimisation`, `lr` and so on.

    Denoiser and a text encoder that learns along may come without memory. Raises UsageError for parts that do not fit
    together and values out of range.
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
        muon_lr: float | None = None,
        text_dropout: float = 0.1,
        masks: MaskMix | Mapping[str, float] | str | None = None,
        condition_noise: bool = True,
        image_text: str | None = None,
        dropped_text: str | None = None,
        joint_images: int = 0,
        scaling_clips: int = 0,
        recompute_every: int = 0,
        offload_activations: bool = False,
        compile: bool = False,
        seed: int = 0,
        **optimisation: Any,
    ) -> None:
        super().__init__(Optimisation(**optimisation), seed)
        check_number("module.recompute_every", recompute_every, least=0, whole=True)
        if offload_activations and not recompute_every:
            raise UsageError(
                "module.offload_activations=true: keeps the inputs of blocks that are computed again; give "
                "module.recompute_every=1 too"
            )
        check_number("module.joint_images", joint_images, least=0, whole=True)
        check_number("module.muon_lr", muon_lr, least=0, null="all by AdamW")
        for name, part, kind in (("denoiser", denoiser, Denoiser), ("objective", objective, Objective)):
            if not isinstance(part, kind):
                raise UsageError(f"module=denoiser needs {name}=NAME; choose one of conf/{name}")
        self.muon_lr, self.recompute_every = muon_lr, recompute_every
        self.offload_activations, self.compile_blocks = offload_activations, compile
        self.masks = None if masks is None else find_mix(masks)
        self.objective, self.codec = objective, codec
        self.condition_noise, self.joint_images, self.scaling_clips = condition_noise, joint_images, scaling_clips
        self.texts = TextInput(text, text_dropout, image_text if self.masks is not None else None, dropped_text)
        parts: dict[str, nn.Module] = {"denoiser": denoiser}
        if self.texts.is_trained:
            assert isinstance(text, nn.Module)
            parts["text"] = text
        self.model = nn.ModuleDict(parts)
        self.clipping = AdaptiveClipping() if clipping is None else clipping
        check_parts(denoiser, objective, text, codec, self.masks)
        self._identity: LatentIdentity | None = None  # known once the data are
        self._encodes = False  # whether batches are videos

    @property
    def learned(self) -> nn.ModuleDict:
        """The denoiser, and the text encoder if it is trained."""
        return self.model

    @property
    def denoiser(self) -> Denoiser:
        """The one that is trained."""
        return denoiser_of(self.model)

    @property
    def text(self) -> TextEncoder | None:
        """The text encoder, as far as it has learned if it is trained."""
        return self._text_of(self.model)

    def _text_of(self, model: nn.ModuleDict) -> Any:
        """The encoder of captions that goes with the trained model, or with its averaged twin."""
        return model["text"] if self.texts.is_trained else self.texts.frozen

    def build(self) -> None:
        """See `TrainingModule.build`."""
        for name, model in list(self.model.items()):
            self.model[name] = with_memory(model).train()

    def networks(self, learned: nn.Module) -> Sequence[nn.Module]:
        """See `TrainingModule`: the denoiser, and the text encoder if it is trained."""
        assert isinstance(learned, nn.ModuleDict)
        return list(learned.values())

    def parallelism(self) -> Parallelism:
        """See `TrainingModule`."""
        return replace(
            super().parallelism(),
            recompute_every=self.recompute_every,
            offload_activations=self.offload_activations,
            compile=self.compile_blocks,
        )

    @property
    def _trained_text(self) -> Any:
        return self.model["text"] if self.texts.is_trained else None

    def prepare(self, data: ClipDataModule) -> None:
        """See `TrainingModule`; also keeps what checkpoints say about the data."""
        check_data(data, self.denoiser, self.text, self.codec, self.masks, self.texts.dropout)
        check_joint(self.denoiser, data.train_source, self.joint_images)
        self._identity = LatentIdentity.of(data, self.codec)
        self._encodes = data.train_source.made_with is None
        self.texts.prepare(data.train_source)

    def start_from(self, path: str) -> None:
        """Begin with the averaged weights of another run, or with those of a folder; see `osp.training.start`.

        Whether they fit is checked now, after `prepare`; they are read when the model is built.
        """
        assert not self._is_configured
        with drawing_from(seeded(self.seed, "start").get_state()):  # parts that the other run has not
            start = open_start(path, self.denoiser, self._trained_text)
        self.start = [start.denoiser, start.text][: len(self.model)]
        if start.text is not None:
            self.texts.seen = SeenWords(start.words)
        if (latent := start.latent) is None:
            return
        if self.scaling_clips:
            self._scale(latent["shift"], latent["scale"])
        self.identity.refuse_others(latent, f"start_from={path}")

    @property
    def identity(self) -> LatentIdentity:
        """The identity of the latents of the prepared data."""
        assert self._identity is not None
        return self._identity

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and Muon for the matrices inside the blocks if that is asked for."""
        if self.muon_lr is None:
            return self.optimisation.adamw(self.model.parameters())
        return self.optimisation.with_muon(self.model, self.muon_lr)

    def on_fit_start(self) -> None:
        """Bring what is frozen to the device, and measure the scaling of the latents if that is asked for."""
        super().on_fit_start()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self._identity is None:
            self.prepare(data)
        self._place()
        if self.scaling_clips and self.codec is not None:
            # One process does it, so that all have the same to the last digit.
            scaling: Any = None
            if self.trainer.is_global_zero:
                vae = self.codec.vae
                scaling = measure_source_scaling(data.train_source, vae, self.scaling_clips, device=self.device)
            self._scale(*self.trainer.strategy.broadcast(scaling))

    def _scale(self, shift: Sequence[float], scale: Sequence[float]) -> None:
        assert self.codec is not None
        self.codec = LatentCodec(self.codec.vae, shift, scale)
        if self._identity is not None:
            self._identity = self._identity.rescaled(shift, scale)
        self.scaling_clips = 0

    def on_validation_start(self) -> None:
        """Validation may run without a fit."""
        self._place()

    def _place(self) -> None:
        if self.texts.frozen is not None:
            self.texts.frozen.to(self.device)
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
        clean = [self._joined(batch, own) for batch, own in zip(batches, generators, strict=True)]
        values = self.summed(torch.tensor(float(sum(latent.numel() for latent in clean)), device=self.device))
        found = StepErrors(self.objective, self.device)
        for number, (batch, latent, own) in enumerate(zip(batches, clean, generators, strict=True)):
            # The processes' gradients are brought together once, with the last batch's.
            with self._unsynchronised() if number < len(batches) - 1 else nullcontext():
                sample = self._noised(batch, latent, own)
                errors, counted = sample.error(self.denoiser, self.objective)
                # The mean over all processes is taken, although a sum over different clips is meant.
                self.manual_backward(errors.sum() * (self.mesh.data / values))
            found.add(sample.times, errors, counted)
            self.suspects.add(time=sample.times, loss=errors / counted)
        loss, by_time = mean_errors(self.summed(found.sums))
        logs: dict[str, Any] = {"lr": self.optimisation.lr * self.optimisation.rate_at(self.global_step)}
        logs |= self.take_step(optimizers, loss, {"loss": loss}) | by_time
        clips = sum(len(latent) for latent in clean)
        self.log_step(logs | self.speed(clips), loss, batches, clips)

    def _noised(self, batch: Batch, clean: Tensor, generators: Sequence[torch.Generator]) -> Noised:
        """A batch of a training step; each sample draws in this order: time, dropped text, noise, condition."""
        patch = self.denoiser.patch_size
        tokens = (clean.shape[3] // patch) * (clean.shape[4] // patch)
        times = self.objective.sample_time(len(clean), generators, tokens=tokens).to(clean.device)
        dropped = self.texts.draw_dropped(generators)
        noise = self.objective.draw_noise(clean.shape, generators, clean.device)
        condition = self._condition(batch, generators, noise=self.condition_noise)
        images = images_beside(batch, self.joint_images)
        text = self.texts.encode(batch, self._trained_text, dropped, generators, images)
        return Noised(clean, noise, times, text, condition, images)

    def _joined(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """The clean latents of a training batch, in a joint one with those of its images behind: `B C T+n H W`."""
        clean = self._clean(batch, generators)
        if not images_beside(batch, self.joint_images):
            return clean
        assert self.codec is not None
        return with_images(clean, batch, self.joint_images, self.codec, generators)

    def _clean(self, batch: Batch, generators: Sequence[torch.Generator] | None) -> Tensor:
        """The clean latents, `B C T H W`: the batch's, or those of its videos; without generators the means."""
        if "latent" in batch:
            return batch["latent"]
        assert self.codec is not None
        return self.codec.encode(to_float(batch["video"]), generators)

    def _condition(self, batch: Batch, generators: Sequence[torch.Generator], noise: bool) -> ConditionInputs | None:
        """The denoiser's inputs from frames of the batch's videos, with noise on them or without; None: no masks."""
        if self.masks is None or self.codec is None:
            return None
        given = self.masks.draw_given(to_float(batch["video"]), generators, noise)
        return given.encode(self.codec, self.denoiser, generators)

    def _unsynchronised(self) -> AbstractContextManager[Any]:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss of the averaged weights, at one time in each part of the times."""
        generators = [seeded(self.seed, "val", key) for key in batch["key"]]
        model = self.ema.model
        clean = self._clean(batch, None)
        places = torch.stack([torch.rand((), generator=g) for g in generators])
        noise = self.objective.draw_noise(clean.shape, generators, clean.device)
        condition = self._condition(batch, generators, noise=False)
        text = self.texts.encode(batch, self._text_of(model))
        scores = {}
        for number in range(TIME_PARTS):
            times = self.objective.time_at((number + places) / TIME_PARTS).to(clean.device)
            errors, counted = Noised(clean, noise, times, text, condition).error(denoiser_of(model), self.objective)
            scores[f"loss_time_{number}"] = errors / counted
        self.add_scores(batch, {"loss": torch.stack(list(scores.values())).mean(dim=0)} | scores)

    def shown_clips(self, batch: Batch, outputs: Any, clips: int) -> Tensor | None:
        """The clips on the left; on the right what the averaged weights make of their captions, and of the first frame
        where frames are given. None where captions cannot be read or latents not decoded."""
        text = self._text_of(self.ema.model)
        if self.codec is None or text is None:
            return None
        captions = clean_texts(batch["caption"], text.prompt_cleaning)
        counts = text.count_tokens(captions)
        readable = [i for i, caption in enumerate(captions) if caption.strip() and counts[i] <= text.max_tokens]
        if not (chosen := readable[:clips]):
            return None
        generator = VideoGenerator(denoiser_of(self.ema.model), text, self.objective, self.codec)
        # Clips are made one by one, since the model in training leaves little memory.
        pairs = [self._shown(generator, batch, index) for index in chosen]
        if not self._encodes:
            self.codec.to("cpu")  # it is not needed until the next validation
        return torch.stack(pairs)

    def _shown(self, generator: VideoGenerator, batch: Batch, index: int) -> Tensor:
        """A clip and what is made of its caption, side by side, `3 T H 2W`."""
        codec = generator.codec.to(self.device)
        real = to_float(batch["video"][index]) if "video" in batch else codec.decode(batch["latent"][index, None])[0]
        # As many frames as a latent has room for; the last ones may be beyond the clip's.
        held, height, width = real.shape[1:]
        size = held + codec.strides.missing_frames(held), height, width
        given = given_frames({0: real[:, 0].cpu()}, *size) if self.masks is not None and held > 1 else None
        seed = stable_seed(self.seed, "shown", batch["key"][index])
        with self.trainer.precision_plugin.forward_context():
            made = generator.generate([batch["caption"][index]], *size, seeds=[seed], given=given)[0]
        return torch.cat([real.cpu(), made[:, :held]], dim=-1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint says how to build its generator, in plain values."""
        checkpoint["generator"] = {
            "denoiser": {"model": kind_of(self.denoiser).__name__, "settings": self.denoiser.settings},
            "text": self.texts.entry(self._trained_text),
            "objective": {"name": type(self.objective).__name__, "settings": asdict(self.objective)},
            "latent": self.identity.latent,
            "fps": self.identity.fps,
            "clip": self.identity.clip,
        }
        # Each process knows the words of its own clips alone.
        words = self.texts.seen.listed() if self.mesh.data == 1 else None
        if words is not None:
            checkpoint["generator"]["words"] = words

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A scaling that was measured stays what it was. Raises UsageError if the VAE is another now."""
        entry: Any = checkpoint.get("generator")
        check_form(entry, {"latent": _LATENT_FORM, "words?": [str]}, "the checkpoint to go on from: generator")
        latent = entry["latent"]
        if self.scaling_clips:
            self._scale(latent["shift"], latent["scale"])
        if self._identity is not None:
            self._identity.refuse_others(latent, "this run")
        self.texts.seen = SeenWords(entry.get("words"))
        super().on_load_checkpoint(checkpoint)


def denoiser_of(model: nn.ModuleDict) -> Denoiser:
    """The denoiser in what is trained, or in its averaged twin."""
    denoiser = model["denoiser"]
    assert isinstance(denoiser, Denoiser)
    return denoiser
