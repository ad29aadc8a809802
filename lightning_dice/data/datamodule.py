"""The datamodule: batches from a source of cases, with augmentation, sampling and workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from lightning_dice.argument_checks import check_label
from lightning_dice.data.batch import Batch, Sample
from lightning_dice.data.batching import (
    Augment,
    EvalBatches,
    Maps,
    Normalize,
    PreparedSample,
    TrainItems,
    collate,
    identity,
    prepare_sample,
)
from lightning_dice.data.errors import DataError
from lightning_dice.data.interfaces import Cases, Source, Split
from lightning_dice.data.patches import PatchSampler
from lightning_dice.data.samplers import EvalSampler, LazyDataLoader, TrainSampler, ignore_signals, start_method
from lightning_dice.library_internals.lightning import batch_progress, epoch_progress

# The splits that each stage of the Trainer reads.
STAGES: dict[str | None, tuple[Split, ...]] = {
    None: get_args(Split),
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}


class SegmentationData(lightning.LightningDataModule):
    """Batches for training and evaluation from any `Source`, with or without a Trainer.

    **Training.** Each case, or each of its patches, goes through `augment`, then `normalize`. Batches are reshuffled
    every epoch and all have the same length; the last few cases of an epoch are dropped. The order and all random
    choices of patches and `augment` are functions of the global seed (`lightning.seed_everything`,
    `torch.manual_seed`), the epoch and the case: they do not depend on the number of workers, and n processes with
    batches of b together see what one process with batches of n·b sees.

    **Evaluation.** Whole images, each at its own size. A batch holds consecutive cases of one size, so nothing is
    padded and no score depends on its neighbours. Several processes divide the cases among them and see each case
    exactly once; the last batches may be shorter, or empty, so that all processes have equally many.

    **Padding.** Inside `augment` a mask holds 1 + label, and 0 where the label is `ignore_index`. Crops, rotations
    and shifts fill the outside of the image with 0, so these pixels come out as ignored, not as background. With
    `ignore_index=None` labels are not shifted, and the outside becomes label 0. Soft labels, which are floats, are
    shifted in the same way.

    The samplers distribute the cases themselves; the Trainer's `use_distributed_sampler` may have either value.

    Args:
        source: where the cases come from.
        batch_size: cases in a training batch, per process.
        num_workers: worker processes of each loader; `None`: one less than the cores available to each training
            process, at most 8.
        augment: takes an image (`tv_tensors.Image`, `(channels, *space)`) and a mask (`tv_tensors.Mask`, int32, with or
            without planes; float32 for soft labels) and returns both, as `torchvision.transforms.v2.Compose` does.
            Applied in training only.
        normalize: takes the image as a plain tensor and returns it. Applied everywhere. If it has a method `fit`, as
            `Standardize` does, `normalize.fit(image)` of the image before `augment` is applied after `augment`.
        ignore_index: the label of pixels to be ignored.
        eval_batch_size: cases in a batch for validation, test and prediction; `None`: `batch_size`.
        pin_memory: copy batches to page-locked memory; `None`: if the Trainer uses a CUDA GPU.
        patches: cuts patches from the training cases before `augment`; `None`: `augment` gets whole images.
        maps: functions of a mask, by name, such as the distance maps that a loss needs. They are applied to each mask
            after augmentation, and their results come stacked in `Batch.maps`. You can set them until a loader is
            made; prediction, which has no loss, skips them.

    Attributes:
        report: the report of `source.check()`; `None` until `prepare_data` has run.
        resumed_batches: the batches of the resumed epoch that are done, if they are counted otherwise than in the
            checkpoint, as a batch has another size now; `ExactResume` corrects the Trainer's count by it.

    Raises:
        ValueError: for a setting out of its range.
        DataError: from `prepare_data` and `setup` for a split with too few cases; from a training loader for images
            that cannot be stacked.

    >>> from lightning_dice.data.synthetic import SyntheticSource
    >>> data = SegmentationData(SyntheticSource(size=(32, 32), cases=(8, 3, 0)), batch_size=2, num_workers=0)
    >>> data.prepare_data()
    >>> data.setup()
    >>> [len(batch.case) for batch in data.train_dataloader()]
    [2, 2, 2, 2]
    >>> [batch.case for batch in data.val_dataloader()]
    [['val-0000', 'val-0001'], ['val-0002']]
    >>> data.test_dataloader()
    []
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int = 8,
        num_workers: int | None = None,
        augment: Augment | None = None,
        normalize: Normalize | None = None,
        ignore_index: int | None = None,
        eval_batch_size: int | None = None,
        pin_memory: bool | None = None,
        patches: PatchSampler | None = None,
        maps: Maps | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            optional = "" if name == "batch_size" else "None or "
            if not (value is None and optional) and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be {optional}an integer of at least {least}, got {value!r}")
        for name, function in (("augment", augment), ("normalize", normalize)):
            if function is not None and not callable(function):
                raise ValueError(f"{name} must be None or callable, got {function!r}")
        if maps is not None and not (isinstance(maps, Mapping) and all(callable(make) for make in maps.values())):
            raise ValueError(f"maps must be None or functions of a mask by name, got {maps!r}")
        self.source = source
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.augment = augment
        self.normalize = normalize
        self.ignore_index = check_label("ignore_index", ignore_index)
        self.pin_memory = pin_memory
        self.patches = patches
        self.maps = maps
        self.report: str | None = None
        self._cases: dict[Split, Cases | None] = {}
        self._train_sampler: TrainSampler | None = None
        # When a run is resumed: its seed, the interrupted epoch and the batches already done in it.
        self._resumed: dict[str, int] | None = None
        self.resumed_batches: int | None = None

    def add_maps(self, maps: Maps) -> None:
        """Add to `maps`; a module requests the maps that its loss needs."""
        self.maps = {**(self.maps or {}), **maps}

    def prepare_data(self) -> None:
        """Check the source and log its report. Does so once, however often it is called.

        Raises:
            DataError: the source found problems, or the training split is smaller than one batch.
        """
        if self.report is not None:
            return
        report = self.source.check()
        if (train := self._open_split("train")) is not None:
            self._check_train(train)
        self.report = report
        rank_zero_info(report)

    def setup(self, stage: str | None = None) -> None:
        """Open the splits of a stage, `"fit"`, `"validate"`, `"test"` or `"predict"`; `None`: all splits.

        Raises:
            DataError: the training split is smaller than one batch per process, or another split is empty.
        """
        for name in STAGES[stage]:
            cases = self._open_split(name)
            if cases is None:
                if stage is not None and name == STAGES[stage][0]:
                    raise DataError(f"the data has no {name} split, which {stage} needs")
            elif name == "train":
                self._check_train(cases)
            elif not len(cases):
                raise DataError(f"the {name} split must hold at least one case, got none: add cases, or leave it out")
            self._cases[name] = cases
        self._train_sampler = None

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return a loader of augmented, shuffled batches of `batch_size`."""
        cases = self._cases_of("train")
        if cases is None:
            raise DataError("the data has no train split")
        if self._train_sampler is None:
            # All loaders share one sampler, so that a new loader for each epoch continues the order.
            resumed, self._resumed = self._resumed or {}, None
            seed = resumed.get("next_seed", resumed.get("seed"))
            self._train_sampler = TrainSampler(cases, *self._world(), seed=self._seed() if seed is None else seed)
            if "batches" in resumed:
                self._skip_seen_cases(self._train_sampler, resumed)
        return self._loader(
            LazyDataLoader,
            TrainItems(cases, self._preparation(self.augment, self.maps)),
            sampler=self._train_sampler,
            batch_size=self.batch_size,
            drop_last=True,  # batch normalization fails on a single image, and overweights a few
            collate_fn=collate,
        )

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return a loader of whole validation images, or an empty list if there is no such split."""
        return self._eval_loader("val", self.maps)

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return a loader of whole test images, or an empty list if there is no such split."""
        return self._eval_loader("test", self.maps)

    def predict_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return a loader of whole test images, or an empty list if there is no such split."""
        return self._eval_loader("test", None)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training data: the seed, and the batches done of an unfinished epoch."""
        if self._train_sampler is None or self.trainer is None:
            return {}
        epoch, batch = epoch_progress(self.trainer), batch_progress(self.trainer)
        ended = epoch.processed == epoch.ready
        return {
            "seed": self._train_sampler.seed_of(epoch.processed),
            "next_seed": self._train_sampler.entropy,
            "epoch": epoch.processed,
            "batches": 0 if ended else batch.processed,
            "step": self.batch_size * self._train_sampler.num_replicas,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the next training at this position; the Trainer calls this with the state in a checkpoint."""
        if self.trainer is None or self.trainer.state.fn == "fit":
            self._resumed = dict(state_dict)

    def change_seed(self, seed: int) -> None:
        """Resume with another seed than that of the checkpoint; an interrupted epoch keeps its order."""
        if self._resumed is not None:
            self._resumed["next_seed"] = seed

    def _skip_seen_cases(self, sampler: TrainSampler, resumed: dict[str, int]) -> None:
        """Skip the cases of the interrupted epoch that all processes together have seen."""
        now = self.batch_size * sampler.num_replicas
        before = resumed["batches"] * resumed["step"]
        seen = before // sampler.num_replicas
        if before and resumed["step"] != now:
            rank_zero_warn(
                f"the epoch was interrupted with {resumed['step']} images in a batch of all processes, and resumes "
                f"with {now}: this epoch is not exact"
            )
            batches, left = len(sampler) // self.batch_size, 0
            if resumed["batches"] < sampler.cases // resumed["step"]:
                # At least one: Lightning would not end an epoch without a batch. It may repeat a few cases.
                left = max(1, (len(sampler) - seen) // self.batch_size)
            seen = min(seen, len(sampler) - left * self.batch_size)
            self.resumed_batches = max(0, batches - left)
        sampler.skip = resumed["epoch"], seen
        if before:
            sampler.other = resumed["epoch"], resumed["seed"]

    def _eval_loader(self, name: Split, maps: Maps | None) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        cases = self._cases_of(name)
        if cases is None:
            return []
        # The sampler yields whole batches and the data set stacks them. Lightning would replace a `batch_sampler`
        # with one that pads the last batches with duplicates.
        return self._loader(
            DataLoader,
            EvalBatches(cases, self._preparation(None, maps)),
            sampler=EvalSampler(cases, *self._world(), batch_size=self.eval_batch_size),
            batch_size=None,
            collate_fn=identity,
        )

    def _open_split(self, name: Split) -> Cases | None:
        cases = self.source.split(name)
        return cases if cases is None or name != "train" or self.patches is None else self.patches.cut(cases)

    def _cases_of(self, name: Split) -> Cases | None:
        if name not in self._cases:
            raise RuntimeError(f"the {name} split is not open: call setup() first")
        return self._cases[name]

    def _preparation(self, augment: Augment | None, maps: Maps | None) -> Callable[[Sample], PreparedSample]:
        return partial(
            prepare_sample,
            augment=augment,
            normalize=self.normalize,
            ignore_index=self.ignore_index,
            maps=dict(maps or {}),
        )

    def _loader(self, kind: type[DataLoader[Batch]], dataset: Dataset[Any], **settings: Any) -> DataLoader[Batch]:
        workers = self._workers()
        pin_memory = self.pin_memory
        if pin_memory is None:
            pin_memory = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return kind(
            dataset,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=ignore_signals,
            multiprocessing_context=start_method() if workers else None,
            **settings,
        )

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = self.trainer.num_devices if self.trainer is not None else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return max(0, min(8, cores // processes - 1))

    def _world(self) -> tuple[int, int]:
        """Return the number of processes that share the data, and the rank of this one."""
        if self.trainer is not None:
            # The strategy knows which processes see different data: if a model is split over GPUs, not all do.
            shares = self.trainer.distributed_sampler_kwargs or {}
            return shares.get("num_replicas", 1), shares.get("rank", 0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0

    def _seed(self) -> int:
        """Return the first process's torch seed: unless the user sets one, every process has another."""
        seed = [torch.initial_seed()]
        if self.trainer is not None:
            return self.trainer.strategy.broadcast(seed[0])
        if self._world()[0] > 1:
            torch.distributed.broadcast_object_list(seed)
        return seed[0]

    def _check_train(self, cases: Cases) -> None:
        world = self._world()[0]
        if (share := len(cases) // world) >= self.batch_size:
            return
        remedy = f"data.batch_size={share}" if share else f"trainer.devices={len(cases)} and data.batch_size=1"
        processes = f" for each of {world} processes" if world > 1 else ""
        number = f"{len(cases)} case{'s' if len(cases) != 1 else ''}"
        raise DataError(
            f"the train split must hold at least one batch of {self.batch_size}{processes}, got {number}: "
            f"add cases, or set {remedy}"
        )
