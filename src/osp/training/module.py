"""The base of the LightningModules here: settings, steps made by hand, averaged weights, validation means."""

import time
from collections.abc import Sequence
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from osp.data.datamodule import ClipDataModule
from osp.denoiser import Denoiser
from osp.devices.mesh import Mesh
from osp.errors import DataError, UsageError
from osp.parallel import Parallelism, apply, fill_model, local
from osp.training.build import drawing_from, initial_weights
from osp.training.checkpoint_io import AtomicCheckpointIO
from osp.training.clipping import Clipping, DivergedError
from osp.training.ema import ExponentialMovingAverage
from osp.training.optimisation import Optimisation
from osp.training.resumed import take_over
from osp.training.suspects import Suspects
from osp.weights.lazy import Weights, unread

Batch = dict[str, Any]


class TrainingModule(lightning.LightningModule):
    """One training step is one update, on `accumulate` batches; the loader asks `batches_per_step` how many to give.

    Optimisation is by hand, so that only the updates of what is trained count as Lightning's `global_step`. A subclass
    has the attribute `clipping`, and says in `monitor` and `mode` which metric of the validation chooses the best
    checkpoint, and whether more of it is better (`max`) or less (`min`).

    Models may come without memory (`osp.training.build`). They get weights in `configure_model`, drawn from where the
    random numbers stood when the module was made, so that a seed gives the same ones whenever that is; the averaged
    weights `ema` are made after that. Out of a Trainer, call `configure_model` first.
    """

    monitor: str
    mode: Literal["min", "max"]
    clipping: Clipping
    ema: ExponentialMovingAverage[Any]
    start: Sequence[Weights | None] | None = None
    """The weights that `networks` and `opponents` begin with, until they are read; None: their own, or drawn ones."""

    def __init__(self, optimisation: Optimisation, seed: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimisation = optimisation
        self.accumulate = optimisation.accumulate
        self.seed = seed
        self.suspects = Suspects()
        self._drawn_from = torch.get_rng_state()
        self._is_configured = False
        self._restored: int | None = None  # states of optimisers in the checkpoint that the run goes on from
        self._broken = 0  # clips replaced since the process began
        self._sums: dict[str, Tensor] = {}  # of the validation under way
        self._since = 0.0  # when the last step ended; 0 after a validation, whose time is not a step's

    @property
    def learned(self) -> nn.Module:
        """The module whose weights are trained, averaged and counted."""
        raise NotImplementedError

    def build(self) -> None:
        """Give weights to the models that have none yet."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Build what is trained, then its averaged twin; once."""
        if self._is_configured:
            return
        how = self.parallelism()
        with drawing_from(self._drawn_from):
            if how.sharding is None:
                self.build()
                for model, own in zip(self._models, self._started, strict=True):
                    if own is not None:
                        fill_model(model, own)
                self.ema = ExponentialMovingAverage(self.learned, self.optimisation.ema_decay)
                self._apply_to_all(how)
            else:
                self._build_shards(how)
        self._check_finite()
        self._is_configured, self.start = True, None

    def _build_shards(self, how: Parallelism) -> None:
        """Give weights to models of which this process holds a part; no model ever lies whole in memory."""
        models = self._models
        weights = initial_weights(models, self._started)
        for model in models:
            model.train()
        self.ema = ExponentialMovingAverage(self.learned, self.optimisation.ema_decay)
        self._apply_to_all(how)
        for model, own in zip(models, weights, strict=True):
            fill_model(model, own)
        self.ema.copy(self.learned)

    def _apply_to_all(self, how: Parallelism) -> None:
        for model in (*self.networks(self.learned), *self.networks(self.ema.model), *self.opponents):
            apply(model, how)

    def check_weights(self) -> None:
        """Read once what is to be read when the models are built, and raise what that would raise."""
        for model, own in zip(self._models, self._started, strict=True):
            if (weights := own or unread(model)) is not None:
                for key in weights:
                    weights[key]

    @property
    def _models(self) -> list[nn.Module]:
        return [*self.networks(self.learned), *self.opponents]

    @property
    def _started(self) -> Sequence[Weights | None]:
        return self.start or [None for _ in self._models]

    def networks(self, learned: nn.Module) -> Sequence[nn.Module]:
        """The networks in what is learned, or in its averaged twin, each of which is called by itself."""
        return [learned]

    @property
    def opponents(self) -> Sequence[nn.Module]:
        """The networks that are trained beside what is learned, without averages."""
        return []

    def parallelism(self) -> Parallelism:
        """All that is applied to each network; out of a Trainer nothing is split.

        Raises UsageError where processes are to share tokens, and nothing has any.
        """
        strategy = None if self._trainer is None else self.trainer.strategy
        sequence = getattr(strategy, "sequence_group", None)
        if sequence is not None and not any(isinstance(one, Denoiser) for one in self.networks(self.learned)):
            raise UsageError(
                f"trainer.strategy.sequence={self.mesh.sequence}: splits the tokens of a denoiser, and none is trained "
                "here; use sequence=1"
            )
        processes = 1 if self._trainer is None else self.trainer.world_size
        return Parallelism(processes, sequence, sharding=getattr(strategy, "sharding", None))

    @property
    def works_together(self) -> bool:
        """Whether a network runs only if all processes run it at once, as each holds a part of it or of its input."""
        strategy = None if self._trainer is None else self.trainer.strategy
        return getattr(strategy, "sharding", None) is not None or Mesh.of(self._trainer).sharing > 1

    def _check_finite(self) -> None:
        """Raise DataError if the run would begin with weights that have no values, in all processes at once."""
        names = [name for name, _ in self.learned.named_parameters()]
        wrong = [not torch.isfinite(local(value)).all() for value in self.learned.parameters()]
        first = torch.tensor(wrong.index(True) if True in wrong else len(wrong))
        if self.works_together:
            first = self.trainer.strategy.reduce(first.to(self.trainer.strategy.root_device), reduce_op="min")
        if first < len(names):
            raise DataError(
                "the weights that the run begins with have numbers that are not finite "
                f"({names[int(first)]}); begin with others"
            )

    def prepare(self, data: ClipDataModule) -> None:
        """Look at the data before anything begins. Raises UsageError or DataError if it does not suit the model."""

    def start_from(self, path: str) -> None:
        """Take over the weights of another run. Raises UsageError if that cannot be."""
        raise UsageError(
            f"start_from={path} is for module=denoiser; a VAE goes on from vae=trained checkpoint=FILE or "
            "vae=pretrained path=FOLDER"
        )

    def shown_clips(self, batch: Batch, outputs: Any, clips: int) -> Tensor | None:
        """The clips to show of a validation's first batch, `N 3 T H W` in [-1, 1], N up to `clips`; None: no clips."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Tell the loader how many batches a step needs, and the writer of checkpoints what is trained."""
        if isinstance(writer := self.trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            writer.bind(self)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        data.batches_per_step = self.batches_per_step

    def batches_per_step(self, step: int) -> int:
        """How many batches a step needs."""
        return self.accumulate

    @property
    def mesh(self) -> Mesh:
        """Which processes hold different clips."""
        return Mesh.of(self.trainer)

    def summed(self, value: Tensor) -> Tensor:
        """The sum of a value of clips over all different clips of all processes."""
        total: Tensor = self.trainer.strategy.reduce(value, reduce_op="sum")
        return total / self.mesh.sharing  # processes that share a clip have added it as often

    def averaged(self, value: Tensor) -> Tensor:
        """The mean of a value, which clips of equal numbers gave in each process, over all different clips."""
        return self.summed(value) / self.mesh.data

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave in the checkpoint what this run takes over (`osp.training.resumed`). Raises errors as that."""
        take_over(checkpoint, self)
        self._restored = len(checkpoint["optimizer_states"])

    def on_train_start(self) -> None:
        """Raise DataError if an optimiser found no state to go on from."""
        if self._restored not in (None, len(self.trainer.optimizers)):
            raise DataError(
                f"the checkpoint to go on from has {self._restored} states of optimisers, and there are "
                f"{len(self.trainer.optimizers)} optimisers"
            )

    def on_train_batch_start(self, batch: list[Batch], batch_idx: int) -> None:
        """Put the loggers' axis where the run is: Lightning's own count loses a step with each checkpoint."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.global_step
        self.suspects.begin(batch)

    def set_rates(self, optimizers: Sequence[LightningOptimizer]) -> None:
        """Give each optimiser its rate for this step."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * self.optimisation.rate_at(self.global_step)

    def on_fit_start(self) -> None:
        """Refuse what would train wrongly.

        Raises UsageError for float16, whose scaled gradients can be neither clipped nor balanced here, and for weights
        in half precision, which are too coarse for small steps and for averages.
        """
        if self.trainer.precision in ("16-mixed", "16-true", "bf16-true"):
            raise UsageError(
                f"trainer.precision={self.trainer.precision} does not train here; use bf16-mixed or 32-true"
            )

    def take_step(
        self, optimizers: Sequence[LightningOptimizer], loss: Tensor, terms: dict[str, Tensor]
    ) -> dict[str, float]:
        """Clip the gradients and update weights and averages, unless the step is dropped; gives what to log.

        A dropped step counts in `global_step` too, so that steps, batches and validations stay together. Raises
        DivergedError, naming the terms of the loss, if there is no going on. The clips of a step that was not finite
        are listed in a file (`osp.training.suspects`).
        """
        step = self.global_step
        clipped = self.clipping(self.learned.parameters(), loss)
        dumped = "" if clipped.finite else self.suspects.write(self.trainer, step, clipped.norm, terms)
        if clipped.diverged:
            listed = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            often = f" (and {self.clipping.patience - 1} steps before)" if self.clipping.patience > 1 else ""
            raise DivergedError(
                f"the loss or its gradients are not finite at step {step}{often} ({listed}){dumped}; "
                "continue from the last checkpoint with a lower module.lr or trainer.precision=32-true"
            )
        if clipped.dropped:  # without gradients optimisers change nothing, not even their own state
            for optimizer in optimizers:
                optimizer.zero_grad()
        for number, optimizer in enumerate(optimizers):
            # Lightning would count every optimiser's step as a global step; one of them is enough.
            (optimizer if number == 0 else optimizer.optimizer).step()
        torch.clear_autocast_cache()  # it holds copies of the weights before the step
        if not clipped.dropped:
            self.ema.update(self.learned)
        return {"gradient_norm": clipped.norm} | self.clipping.logs()

    def log_step(self, logs: dict[str, Any], loss: Tensor, batches: list[Batch], clips: int) -> None:
        """Log `train/...` and the broken clips."""
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=clips)
        self.log("train/loss", loss, prog_bar=True, logger="total" not in logs, batch_size=clips)
        self._broken += sum(batch["broken"] for batch in batches)
        self.log("data/broken", float(self._broken), batch_size=clips)

    def speed(self, clips: int) -> dict[str, float]:
        """Clips a second of all processes since the step before, to be logged; nothing after a validation."""
        before, self._since = self._since, time.monotonic()
        return {"clips_per_second": clips * self.mesh.data / (self._since - before)} if before else {}

    def on_validation_epoch_start(self) -> None:
        """Start the means anew."""
        self._sums, self._since = {}, 0.0

    def add_scores(self, batch: Batch, scores: dict[str, Tensor]) -> None:
        """Take in scores `B` of clips. What fills up last batches, or stands in for a broken clip, has no weight."""
        weight = batch["weight"]
        for name, values in (scores | {"clips": torch.ones_like(weight)}).items():
            self._sums[name] = self._sums.get(name, 0.0) + (values * weight).sum()

    def on_validation_epoch_end(self) -> None:
        """Log the means over all clips of all processes, and how many clips these are.

        Raises DataError if no clip of the validation could be read.
        """
        # Lightning's own weighted mean over processes rounds the weights to whole numbers.
        sums = {name: self.summed(value) for name, value in self._sums.items()}
        clips = sums.pop("clips")
        if not clips:
            raise DataError("no clip of data.val could be read; give another data.val.path")
        # Without `step` Lightning would draw the points one step too early.
        self.log_dict({"step": float(self.global_step), "data/val_clips": clips})
        for name, total in sums.items():
            if not torch.isfinite(total):
                raise DivergedError(
                    f"val/{name} is not finite at step {self.global_step}; continue from a checkpoint before with a "
                    "lower module.lr or trainer.precision=32-true"
                )
            self.log(f"val/{name}", total / clips, prog_bar=f"val/{name}" == self.monitor)
