"""A score for each case: what two runs are compared by."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_dice.callbacks.files import number, read_csv, write_csv
from lightning_dice.callbacks.loggers import log_picture
from lightning_dice.callbacks.scores import (
    Activation,
    CaseScore,
    evaluated_split,
    gather,
    score_cases,
    step_logits,
)
from lightning_dice.data.batch import Batch


class CaseTable(Callback):
    """Write the scores of each case to `cases.csv` and their distribution to `dice_per_class.png`.

    Columns: `split` (`val` or `test`), `case`, `dice` (mean over the classes that are scored and have a score),
    `dice/<class>`, and for every class `actual/<class>` and `predicted/<class>`, in pixels. A class that is neither
    predicted nor there has no score: its field is empty. A case that a distributed sampler repeats is written once.
    Rows of the other split that are already in the table are kept.

    The evaluation step must return `{"logits": (batch, classes, *space)}`.

    Args:
        folder: where the two files go.
        classes: names of the logits' channels.
        activation: what turns logits into probabilities.
        threshold: a probability; with `"softmax"` it has no part.
        ignore_index: the label of pixels that do not count.
        exclude_classes: indices of classes that are not scored, such as the background.
        during_fit: record the validations within a fit too; each replaces the one before.
    """

    def __init__(
        self,
        folder: str | Path,
        classes: Sequence[str],
        activation: Activation,
        threshold: float = 0.5,
        ignore_index: int | None = None,
        exclude_classes: Collection[int] = (),
        during_fit: bool = False,
    ) -> None:
        self.folder, self.classes, self.activation = Path(folder), list(classes), activation
        self.threshold, self.ignore_index, self.during_fit = threshold, ignore_index, during_fit
        self.exclude_classes = frozenset(exclude_classes)
        self._cases: dict[str, CaseScore] = {}

    @property
    def table(self) -> Path:
        """Where the table is written."""
        return self.folder / "cases.csv"

    @property
    def picture(self) -> Path:
        """Where the distribution is drawn."""
        return self.folder / "dice_per_class.png"

    def on_validation_epoch_start(self, *_: Any) -> None:
        """Start with no case."""
        self._cases.clear()

    def on_test_epoch_start(self, *_: Any) -> None:
        """Start with no case."""
        self._cases.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the cases of the batch."""
        logits = step_logits(outputs)
        if logits is None or evaluated_split(trainer, during_fit=self.during_fit) is None:
            return
        scores = score_cases(
            logits,
            batch.mask,
            activation=self.activation,
            threshold=self.threshold,
            ignore_index=self.ignore_index,
            exclude_classes=self.exclude_classes,
        )
        self._cases.update(zip(batch.case, scores, strict=True))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table and the picture."""
        split = evaluated_split(trainer, during_fit=self.during_fit)
        if split is None:
            return
        cases: dict[str, CaseScore] = {}
        for part in gather(trainer, self._cases):
            cases.update(part)
        if cases:
            self._write(split, cases)
            self._draw(trainer, split, cases)

    on_test_epoch_end = on_validation_epoch_end

    def _write(self, split: str, cases: dict[str, CaseScore]) -> None:
        scored = [index for index in range(len(self.classes)) if index not in self.exclude_classes]
        columns = ["split", "case", "dice", *(f"dice/{self.classes[index]}" for index in scored)]
        columns += [f"{side}/{name}" for name in self.classes for side in ("actual", "predicted")]
        rows = [row for row in read_csv(self.table) if row.get("split") != split and set(row) <= set(columns)]
        for case, score in cases.items():
            row = {"split": split, "case": case, "dice": number(score.mean)}
            row |= {f"dice/{self.classes[index]}": number(score.dice[index]) for index in scored}
            row |= {f"actual/{name}": str(pixels) for name, pixels in zip(self.classes, score.actual, strict=True)}
            row |= {
                f"predicted/{name}": str(pixels) for name, pixels in zip(self.classes, score.predicted, strict=True)
            }
            rows.append(row)
        write_csv(self.table, columns, sorted(rows, key=lambda row: (row["split"], row["case"])))

    def _draw(self, trainer: Trainer, split: str, cases: dict[str, CaseScore]) -> None:
        from lightning_dice.callbacks.curves import draw_distribution

        scores = {
            name: [score.dice[index] for score in cases.values()]
            for index, name in enumerate(self.classes)
            if index not in self.exclude_classes
        }
        if len(scores) > 1:
            scores = {"mean of classes": [score.mean for score in cases.values()]} | scores
        draw_distribution(self.picture, scores, f"Dice of {len(cases)} {split} cases")
        log_picture(trainer, f"{split}/dice_per_class", self.picture)
