"""The LightningDataModule: the resumable training loader and the fixed validation pass, as the Trainer wants them."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl

from osp.data.buckets import bucket_table
from osp.data.loader import FixedLoader, ResumableLoader, Waiting
from osp.data.sources import ClipSource, FirstClips
from osp.devices.mesh import Mesh

log = logging.getLogger(__name__)


class ClipDataModule(pl.LightningDataModule):
    """Training and validation clips for one Trainer; batches are those of `osp.data.loader.Batch`.

    Args:
        train: the training clips, read in the exactly resumable order of `osp.data.loader.ResumableLoader`.
        val: the validation clips; None trains without validation.
        batch_size: clips in a training batch of one device; the global batch is this x `mesh.data`.
        val_batch_size: the same for validation; None takes `batch_size`.
        workers: reading processes beside each training process, for training and again during a validation pass.
        seed: of the training order.
        train_clips, val_clips: take the first so many clips of `train`, `val`; None takes all.
        batch_tokens: for sources with buckets, instead of `batch_size`: the most tokens in a batch of one device, in
            training and, without `val_batch_size`, in validation. The buckets are logged before training.
        image_ratio: for sources with buckets: the part of the training batches that are images.
        devices: how many devices the training batches are made for, see `osp.data.loader.ResumableLoader`.

    A LightningModule whose steps take several batches sets `batches_per_step` in its `setup`: how many step `step`
    (0, 1, ...) needs. `training_step` then gets a list of so many batches instead of one batch.

    The loaders deal clips to ranks (and so to nodes) and to workers by their plan, and are no torch DataLoaders:
    Lightning adds no distributed sampler to them, whatever its `use_distributed_sampler`. `Trainer(overfit_batches=n)`
    only shortens the epoch; to overfit, give a source of few clips.

    The training loader's state is in every checkpoint twice: where Lightning keeps it, and as this module's own state,
    because without `max_steps` Lightning does not restore the former from the checkpoint of an epoch's end.
    A checkpoint written from inside a training step (on an exception) counts that step's batches as used.

    Raises:
        UsageError, DataError: as the loaders do, at construction or (for a state that does not fit) when fit begins.
    """

    def __init__(
        self,
        train: ClipSource,
        val: ClipSource | None,
        batch_size: int | None = None,
        val_batch_size: int | None = None,
        workers: int = 0,
        seed: int = 0,
        train_clips: int | None = None,
        val_clips: int | None = None,
        batch_tokens: int | None = None,
        image_ratio: float | None = None,
        devices: int | None = None,
    ) -> None:
        super().__init__()
        self.train_source = _first(train, train_clips)
        self.val_source = None if val is None else _first(val, val_clips)
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.workers, self.seed = workers, seed
        self.batch_tokens, self.image_ratio, self.devices = batch_tokens, image_ratio, devices
        self.batches_per_step: Callable[[int], int] | None = None
        self.waiting: Waiting = nullcontext  # entered where a loader waits for a batch
        self._loader: ResumableLoader | None = None
        self._resume_from: dict[str, Any] = {}
        # A bad setting shows here, not at the first validation. How many devices there are is not known yet.
        self._new_train_loader()
        self.val_dataloader()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._loader, self._resume_from = None, {}  # of an earlier run; a checkpoint to resume is loaded later

    def train_dataloader(self) -> ResumableLoader:
        loader = self._new_train_loader()
        loader.waiting = self.waiting
        if self._loader is None and loader.plan.mesh.rank == 0:
            self._log_buckets(loader)
        # Asked again within a fit (`reload_dataloaders_every_n_epochs`), the new loader goes on where the old one is.
        if state := self._resume_from or (self._loader.state_dict() if self._loader is not None else {}):
            loader.load_state_dict(state)
        self._loader, self._resume_from = loader, {}
        return loader

    def _new_train_loader(self) -> ResumableLoader:
        return ResumableLoader(
            self.train_source,
            batch_size=self.batch_size,
            seed=self.seed,
            workers=self.workers,
            mesh=self.mesh,
            batches_per_step=self.batches_per_step,
            batch_tokens=self.batch_tokens,
            image_ratio=self.image_ratio,
            devices=self.devices,
        )

    def _log_buckets(self, loader: ResumableLoader) -> None:
        buckets = self.train_source.buckets()
        if buckets is not None:
            sizes = [group.batch for group in loader.plan.groups]
            table = bucket_table(buckets, sizes, self.train_source.dropped)
            log.info("training clips and global batches:\n%s", table)

    def val_dataloader(self) -> FixedLoader | list[FixedLoader]:
        if self.val_source is None:
            return []
        loader = FixedLoader(
            self.val_source,
            batch_size=self.val_batch_size,
            batch_tokens=self.batch_tokens if self.val_batch_size is None else None,
            workers=self.workers,
            mesh=self.mesh,
        )
        loader.waiting = self.waiting
        return loader

    @property
    def mesh(self) -> Mesh:
        """Which part of the clips is read here."""
        return Mesh.of(self.trainer)

    def state_dict(self) -> dict[str, Any]:
        return self._resume_from if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume_from = state_dict

    def teardown(self, stage: str) -> None:
        """Stops the training workers; the state can still be saved."""
        if self._loader is not None:
            self._loader.close()


def _first(source: ClipSource, clips: int | None) -> ClipSource:
    return source if clips is None else FirstClips(source, clips)
