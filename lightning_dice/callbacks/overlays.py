"""Draw the cases worth a look, the worst ones first."""

from __future__ import annotations

import math
import random
from bisect import insort
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_dice.callbacks.picture_logging import log_picture
from lightning_dice.callbacks.ranks import gather_on_rank_zero
from lightning_dice.callbacks.step_outputs import Activation, case_names, evaluated_split, step_labels
from lightning_dice.data.batch import find_batch
from lightning_dice.plotting.colors import class_colors
from lightning_dice.plotting.thumbnails import CaseThumbnail, ThumbnailSettings, make_thumbnail
from lightning_dice.scoring import Scoring, score_case

# The typical cases are chosen among as many cases drawn at random, and as many next to the median of the cases so far:
# the former serve data that are sorted by score, the latter all other data.
POOL = 12


class Overlays(Callback):
    """Draw `overlays.png`: image, truth, prediction and errors of the worst cases, some typical and the best ones.

    True positives, false positives, false negatives and wrong classes have colours that colour-blind readers can tell
    apart. Only some cases are kept, each reduced to `size` pixels on the longer side, so that the memory does not grow
    with the data. A case without a score (nothing present, nothing predicted) is drawn only if there is no other.

    Args:
        folder: for the picture.
        classes: names of the logits' channels.
        activation: for the logits, `"sigmoid"` or `"softmax"`.
        threshold: probability above which a pixel is predicted as a class; unused with `"softmax"`.
        ignore_index: label of ignored pixels.
        exclude_classes: indices of classes that are neither scored nor painted, such as the background.
        colors: one for each class, `"#RRGGBB"` or (red, green, blue); None for a palette.
        mean: each channel's mean, if it was subtracted from the images; restores their colours.
        std: each channel's standard deviation, if the images were divided by it.
        count: number of the worst cases.
        typical: number of cases next to the median.
        best: number of the best cases.
        size: pixels on the longer side of a case as it is kept.
        during_fit: draw the validations within a fit too; each replaces the picture before.

    Raises:
        ValueError: an argument is out of its range.

    >>> Overlays("runs/mine", ["cell"], "sigmoid").picture.as_posix()
    'runs/mine/overlays.png'
    """

    def __init__(
        self,
        folder: str | Path,
        classes: Sequence[str],
        activation: Activation,
        threshold: float = 0.5,
        ignore_index: int | None = None,
        exclude_classes: Collection[int] = (),
        colors: Sequence[str | Sequence[int]] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        count: int = 12,
        typical: int = 2,
        best: int = 2,
        size: int = 512,
        during_fit: bool = False,
    ) -> None:
        if count < 1 or typical < 0 or best < 0 or size < 32:
            raise ValueError(
                f"count must be at least 1, typical and best at least 0 and size at least 32 pixels, "
                f"got {count}, {typical}, {best} and {size}"
            )
        self.folder, self.classes, self.activation = Path(folder), list(classes), activation
        self.threshold, self.ignore_index, self.during_fit = threshold, ignore_index, during_fit
        self.exclude_classes = sorted(exclude_classes)
        self.colors = class_colors(len(self.classes), colors, self.exclude_classes)
        self._scoring = Scoring(
            self.classes, activation, ignore_index, self.exclude_classes, surfaces=False, lesions=False
        )
        self._thumbnails = ThumbnailSettings(activation, ignore_index, self.exclude_classes, mean, std, size)
        self.count, self.typical, self.best = count, typical, best
        self._reset()

    @property
    def picture(self) -> Path:
        """Path of the picture."""
        return self.folder / "overlays.png"

    def _reset(self) -> None:
        self._kept: dict[str, CaseThumbnail] = {}
        self._scores: dict[str, float] = {}
        self._ends: dict[str, float] = {}
        self._pool: list[str] = []
        self._ranked: list[tuple[float, str]] = []
        self._random = random.Random(0)

    def on_validation_epoch_start(self, *_: Any) -> None:
        """Remove the cases of an interrupted evaluation."""
        self._reset()

    def on_test_epoch_start(self, *_: Any) -> None:
        """Remove the cases of an interrupted evaluation."""
        self._reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep those cases of the batch that may be drawn."""
        if evaluated_split(trainer, during_fit=self.during_fit) is None:
            return
        labels = step_labels(outputs, self.activation, self.threshold)
        found = find_batch(batch)
        if labels is None or found is None:
            return
        for index, case in enumerate(case_names(trainer, found, batch_idx, dataloader_idx)):
            self.offer(case, found.image[index], found.mask[index], labels[index])

    on_test_batch_end = on_validation_batch_end

    def offer(self, case: str, image: Tensor, mask: Tensor, predicted: Tensor) -> None:
        """Keep a case if the next `draw` may need it.

        Args:
            case: name of the case; a name that was offered before is ignored.
            image: `(channels, *space)`, normalized or not.
            mask: class ids `(*space)`, or planes `(classes, *space)`.
            predicted: the predicted mask, in the same shape.
        """
        if case in self._scores:
            return
        score = score_case(predicted, mask, self._scoring).mean
        self._scores[case] = score
        ends = self._ends | {case: score}
        self._ends = {name: ends[name] for name in self._extremes(ends)}
        if not math.isnan(score):
            insort(self._ranked, (score, case))
            # Algorithm R: at any time the pool is a uniform sample of the cases so far.
            place = self._random.randrange(len(self._scores))
            if len(self._pool) < POOL:
                self._pool.append(case)
            elif place < POOL:
                self._pool[place] = case
        middle = max(0, (len(self._ranked) - POOL) // 2)
        wanted = {*self._pool, *self._ends, *(name for _, name in self._ranked[middle : middle + POOL])}
        if case in wanted:
            thumbnail = make_thumbnail(case, score, image, mask, predicted, self._thumbnails)
            if thumbnail is not None:
                self._kept[case] = thumbnail
        for name in self._kept.keys() - wanted:
            del self._kept[name]

    def _extremes(self, scores: dict[str, float]) -> list[str]:
        ranked = _ranked(scores)
        return ranked[: self.count] + (ranked[-self.best :] if self.best else [])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture."""
        split = evaluated_split(trainer, during_fit=self.during_fit)
        if split is None:
            return
        ranks = gather_on_rank_zero(trainer, (self._scores, self._kept))
        self._reset()
        for scores, records in ranks:
            self._scores.update(scores)
            self._kept.update(records)
        if self.draw(split):
            log_picture(trainer, f"{split}/overlays", self.picture)

    on_test_epoch_end = on_validation_epoch_end

    def draw(self, split: str) -> bool:
        """Draw the cases kept so far, and remove them; return whether there were any."""
        scores, kept = self._scores, self._kept
        self._reset()
        shown = self._choose(scores, kept)
        if not shown:
            return False
        from lightning_dice.plotting.panels import draw_overlays

        draw_overlays(
            self.picture,
            shown,
            self.classes,
            self.colors,
            dense=self.activation == "softmax" and not self.exclude_classes,
            title=f"{len(shown)} of {len(scores)} {split} cases, from the worst mean Dice to the best",
            labels=self._labels(scores, [record.case for record in shown]),
        )
        return True

    def _labels(self, scores: dict[str, float], shown: list[str]) -> dict[str, str]:
        ranked = _ranked(scores)
        worst, best = ranked[: self.count], ranked[self.count :][-self.best :] if self.best else []
        if len(shown) == len(scores):
            return dict.fromkeys(shown, "")
        return {case: "worst: " if case in worst else "best: " if case in best else "typical: " for case in shown}

    def _choose(self, scores: dict[str, float], kept: dict[str, CaseThumbnail]) -> list[CaseThumbnail]:
        """Return the thumbnails to draw, worst first."""
        chosen = {name: kept[name] for name in self._extremes(scores) if name in kept}
        known = [score for score in scores.values() if not math.isnan(score)]
        others = [name for name in kept if name not in chosen and not math.isnan(scores[name])]
        if known and others:
            median = sorted(known)[len(known) // 2]
            for name in sorted(others, key=lambda name: (abs(scores[name] - median), name))[: self.typical]:
                chosen[name] = kept[name]
        return [chosen[name] for name in _ranked({name: scores[name] for name in chosen})]


def _ranked(scores: dict[str, float]) -> list[str]:
    """Return cases from the worst to the best; cases without a score only if no case has one."""

    def order(names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: (scores[name], name))

    return order(name for name, score in scores.items() if not math.isnan(score)) or sorted(scores)
