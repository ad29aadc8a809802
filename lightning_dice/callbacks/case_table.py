"""A row of scores for each case: what two runs are compared by."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_dice.argument_checks import count
from lightning_dice.callbacks.loggers import log_picture
from lightning_dice.callbacks.step_outputs import (
    Activation,
    evaluated_split,
    gather,
    step_labels,
    step_logits,
    step_temperature,
)
from lightning_dice.data.batch import Batch
from lightning_dice.io import number, read_csv, write_csv
from lightning_dice.scoring import CaseScore, Reliability, Scoring, reliability, score_case
from lightning_dice.scoring import table as tables

RELIABILITY = ("split", "class", "lower", "upper", "pixels", "confidence", "right")


class CaseTable(Callback):
    """Write the scores of each case to `cases.csv` and the distribution of Dice to `dice_per_class.png`.

    Columns: `split` (`val` or `test`), `case`, `dice` (mean over the classes that are scored and have a score),
    `dice/<class>`, and for every class `actual/<class>` and `predicted/<class>`, in pixels. Then, for every class that
    is scored, what `lightning_dice.scoring.score_case` says of it: `jaccard`, `surface_dice`, `hd95`,
    `mean_surface_distance`, `volume_difference`, `volume_error`, `lesion_precision`, `lesion_recall`, `lesion_f1`,
    `lesions_actual`, `lesions_predicted`. `spacing` holds the mm by which distances and volumes were measured; where it
    is empty, they are in pixels. A score that is not defined is an empty field: that of a class neither predicted nor
    there, and the distance between a surface and none. Columns without any value are left out.

    Where the step returns logits, there is the expected calibration error too, `ece/<class>` for overlapping classes
    and `ece` (of the most probable class) for those that exclude each other; and `reliability.csv`, the pixels of all
    cases by confidence.

    A case that a distributed sampler repeats is written once. Rows of the other split that are already in the table are
    kept. The evaluation step must return `{"logits": (batch, classes, *space)}`, or the masks it has decided on as
    `"labels"`, or both; a `"temperature"`, by which logits are divided, has a part in the calibration error alone.

    Args:
        folder: where the files go.
        classes: names of the logits' channels.
        activation: what turns logits into probabilities.
        threshold: a probability; with `"softmax"` it has no part.
        ignore_index: the label of pixels that do not count.
        exclude_classes: indices of classes that are not scored, such as the background.
        during_fit: record the validations within a fit too, without surfaces, lesions and calibration; each replaces
            the one before.
        surfaces: this and the following as in `lightning_dice.scoring.Scoring`.
        tolerance: of surface Dice, in mm, or in pixels where the spacing is not known.
        lesions: score connected components.
        lesion_iou: what two lesions must have more of to match; with 0 any overlap will do.
        calibration_bins: of the confidence; 0: no calibration error.
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
        surfaces: bool = True,
        tolerance: float | Sequence[float] = 2.0,
        lesions: bool = True,
        lesion_iou: float = 0.0,
        calibration_bins: int = 15,
    ) -> None:
        self.folder, self.threshold, self.during_fit = Path(folder), threshold, during_fit
        self.scoring = Scoring(
            classes,
            activation,
            ignore_index,
            exclude_classes,
            surfaces=surfaces,
            tolerance=tolerance,
            lesions=lesions,
            lesion_iou=lesion_iou,
        )
        self.calibration_bins = count("calibration_bins", calibration_bins, 0)
        self._cases: dict[str, tuple[CaseScore, Reliability | None]] = {}

    @property
    def table(self) -> Path:
        """Where the table is written."""
        return self.folder / "cases.csv"

    @property
    def picture(self) -> Path:
        """Where the distribution is drawn."""
        return self.folder / "dice_per_class.png"

    @property
    def reliability(self) -> Path:
        """Where pixels are counted by confidence."""
        return self.folder / "reliability.csv"

    def add(
        self,
        case: str,
        predicted: Tensor,
        mask: Tensor,
        spacing: Sequence[float] | None = None,
        logits: Tensor | None = None,
        *,
        temperature: float = 1.0,
        probs: Tensor | None = None,
        brief: bool = False,
    ) -> CaseScore:
        """Score a case, for the next `write`.

        Args:
            case: its name.
            predicted: class ids `(*space)`, or planes `(classes, *space)`.
            mask: of the same shape.
            spacing: of its pixels, in mm.
            logits: `(classes, *space)`, for the calibration error.
            temperature: by which logits are divided to become those of calibrated probabilities.
            probs: probabilities `(classes, *space)` instead of logits.
            brief: without surfaces, lesions and calibration.

        Raises:
            ValueError: as `score_case`; the message names the case.
        """
        scoring = replace(self.scoring, surfaces=False, lesions=False) if brief else self.scoring
        try:
            score = score_case(predicted, mask, scoring, spacing)
        except ValueError as error:
            raise ValueError(f"case {case}: {error}") from error
        sure, sureness = None, logits if probs is None else probs
        if sureness is not None and self.calibration_bins and not brief:
            sure = reliability(
                sureness,
                mask,
                activation=scoring.activation,
                ignore_index=scoring.ignore_index,
                bins=self.calibration_bins,
                temperature=temperature,
                are_probabilities=probs is not None,
            )
        self._cases[case] = score, sure
        return score

    def write(self, split: str) -> None:
        """Write what was added as the rows of a split, and the pictures; then forget it."""
        cases, self._cases = self._cases, {}
        if not cases:
            return
        classes, scored = self.scoring.classes, self.scoring.scored
        known = tables.columns(classes, scored)
        rows = [row for row in read_csv(self.table) if row.get("split") != split and set(row) <= set(known)]
        for case, (score, sure) in cases.items():
            rows.append(tables.row(split, case, score, classes, scored, self._errors(sure)))
        filled = {key for row in rows for key in row}
        always = tables.columns(classes, scored)[: 3 + len(scored) + 2 * len(classes)]
        columns = [key for key in known if key in filled or key in always]
        write_csv(self.table, columns, sorted(rows, key=lambda row: (row["split"], row["case"])))
        self._write_reliability(split, {case: sure for case, (_, sure) in cases.items() if sure is not None})
        self._draw(split, {case: score for case, (score, _) in cases.items()})

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
        if evaluated_split(trainer, during_fit=self.during_fit) is None:
            return
        labels, logits = step_labels(outputs, self.scoring.activation, self.threshold), step_logits(outputs)
        if labels is None:
            return
        temperature = step_temperature(outputs)
        brief = trainer.state.fn == "fit"
        for index, case in enumerate(batch.case):
            if case not in self._cases:
                of_case = None if logits is None else logits[index]
                self.add(
                    case,
                    labels[index],
                    batch.mask[index],
                    batch.spacing[index],
                    of_case,
                    temperature=temperature,
                    brief=brief,
                )

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table and the picture."""
        split = evaluated_split(trainer, during_fit=self.during_fit)
        if split is None:
            return
        parts, self._cases = gather(trainer, self._cases), {}
        for part in parts:
            self._cases.update(part)
        if self._cases:
            self.write(split)
            log_picture(trainer, f"{split}/dice_per_class", self.picture)

    on_test_epoch_end = on_validation_epoch_end

    def _errors(self, sure: Reliability | None) -> dict[int | None, float]:
        """Calibration errors by class; by `None`, that of the most probable one."""
        if sure is None:
            return {}
        errors = sure.error()
        if self.scoring.activation == "softmax":
            return {None: errors[0]}
        return {index: errors[index] for index in self.scoring.scored}

    def _write_reliability(self, split: str, cases: dict[str, Reliability]) -> None:
        # Those of this split are replaced even by none: they would be of another prediction.
        old = read_csv(self.reliability)
        rows = [row for row in old if row.get("split") != split and set(row) <= set(RELIABILITY)]
        if not cases and len(rows) == len(old):
            return
        if cases:
            # In the order of their names: sums of floats then are the same on any number of processes.
            first, *others = (cases[name] for name in sorted(cases))
            total = first
            for other in others:
                total = total.plus(other)
            softmax = self.scoring.activation == "softmax"
            bins = total.pixels.shape[1]
            for place in [0] if softmax else self.scoring.scored:
                for index in range(bins):
                    pixels = int(total.pixels[place, index])
                    texts = {"lower": index / bins, "upper": (index + 1) / bins}
                    if pixels:
                        texts["confidence"] = float(total.confidence[place, index]) / pixels
                        texts["right"] = int(total.right[place, index]) / pixels
                    name = "" if softmax else self.scoring.classes[place]
                    row = {key: number(value) for key, value in texts.items()}
                    rows.append({"split": split, "class": name, "pixels": str(pixels), **row})
        write_csv(self.reliability, RELIABILITY, rows)

    def _draw(self, split: str, cases: dict[str, CaseScore]) -> None:
        from lightning_dice.plotting.curves import draw_distribution

        scores = {
            self.scoring.classes[index]: [score.classes[index].dice for score in cases.values()]
            for index in self.scoring.scored
        }
        if len(scores) > 1:
            scores = {"mean of classes": [score.mean for score in cases.values()]} | scores
        draw_distribution(self.picture, scores, f"Dice of {len(cases)} {split} cases")
