"""Record the scores of each case, the basis of reports and comparisons."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_dice.argument_checks import check_count
from lightning_dice.callbacks.picture_logging import log_picture
from lightning_dice.callbacks.ranks import gather_on_rank_zero
from lightning_dice.callbacks.step_outputs import (
    Activation,
    case_names,
    evaluated_split,
    step_labels,
    step_logits,
    step_temperature,
)
from lightning_dice.data.batch import find_batch
from lightning_dice.io import number, read_csv, write_csv
from lightning_dice.scoring import CaseScore, Reliability, Scoring, reliability, score_case
from lightning_dice.scoring import table as tables

RELIABILITY = ("split", "class", "lower", "upper", "pixels", "confidence", "right")


class CaseTable(Callback):
    """Write the scores of each case to `cases.csv` and the distribution of Dice to `dice_per_class.png`.

    Columns: `split` (`val` or `test`), `case`, `dice` (the mean over those scored classes that have a score),
    `dice/<class>`, and for every class `actual/<class>` and `predicted/<class>`, in pixels. Then, for every scored
    class, the other scores of `lightning_dice.scoring.score_case`: `jaccard`, `surface_dice`, `hd95`,
    `mean_surface_distance`, `volume_difference`, `volume_error`, `lesion_precision`, `lesion_recall`, `lesion_f1`,
    `lesions_actual`, `lesions_predicted`. `spacing` holds the mm in which distances and volumes are measured; if it is
    empty, they are in pixels. An undefined score is an empty field: any score of a class that is neither predicted nor
    present, and a distance to an empty surface. Columns without any value are omitted.

    If the step returns logits, the table also has the expected calibration error, `ece/<class>` for overlapping classes
    and `ece` (of the most probable class) for exclusive ones; `reliability.csv` counts the pixels of all cases by
    confidence.

    A case that a distributed sampler repeats is written once. Rows of the other split that are already in the table are
    kept. The evaluation step must return `{"logits": (batch, classes, *space)}`, or predicted masks as `"labels"`, or
    both; a `"temperature"`, which divides the logits, affects the calibration error only.

    Args:
        folder: for the files.
        classes: names of the logits' channels.
        activation: for the logits, `"sigmoid"` or `"softmax"`.
        threshold: probability above which a pixel is predicted as a class; unused with `"softmax"`.
        ignore_index: label of ignored pixels.
        exclude_classes: indices of classes that are not scored, such as the background.
        during_fit: record validations within a fit too, without surfaces, lesions and calibration; each replaces the
            one before.
        surfaces: passed to `lightning_dice.scoring.Scoring`, as are the following three.
        tolerance: for surface Dice, in mm, or in pixels where the spacing is unknown.
        lesions: score connected components.
        lesion_iou: intersection over union that two lesions must exceed to match; with 0, any overlap is a match.
        calibration_bins: number of bins of the confidence; 0 for no calibration error.

    Raises:
        ValueError: an argument is out of its range.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = CaseTable(folder, ["cell"], "sigmoid", surfaces=False, lesions=False)
    ...     mask = torch.tensor([[[0, 1, 1, 1]]])
    ...     score = table.add("a", predicted=torch.tensor([[[1, 1, 1, 0]]]), mask=mask)
    ...     table.write("test")
    ...     read_csv(table.table)[0]["dice"]
    '0.666667'
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
        self.calibration_bins = check_count("calibration_bins", calibration_bins, 0)
        self._cases: dict[str, tuple[CaseScore, Reliability | None]] = {}

    @property
    def table(self) -> Path:
        """Path of the table."""
        return self.folder / "cases.csv"

    @property
    def picture(self) -> Path:
        """Path of the picture of the distribution."""
        return self.folder / "dice_per_class.png"

    @property
    def reliability(self) -> Path:
        """Path of the table of pixels by confidence."""
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
        """Score a case, to be written by the next `write`.

        Args:
            case: name of the case.
            predicted: class ids `(*space)`, or planes `(classes, *space)`.
            mask: the true mask, in the same shape.
            spacing: pixel spacing, in mm.
            logits: `(classes, *space)`, for the calibration error.
            temperature: divides the logits to calibrate their probabilities.
            probs: probabilities `(classes, *space)` instead of logits.
            brief: omit surfaces, lesions and calibration.

        Raises:
            ValueError: from `score_case`, or the logits are NaN; the message names the case.
        """
        scoring = replace(self.scoring, surfaces=False, lesions=False) if brief else self.scoring
        for name, values in (("logits", logits), ("probabilities", probs)):
            # Their labels are numbers like any other. During a training, `GradientGuard` acts on its causes.
            if values is not None and not brief and bool(values.isnan().any()):
                raise ValueError(
                    f"case {case}: the network's {name} are NaN: its weights are, or the precision is too low for it"
                )
        try:
            score = score_case(predicted, mask, scoring, spacing)
        except ValueError as error:
            raise ValueError(f"case {case}: {error}") from error
        counts, confidence = None, logits if probs is None else probs
        if confidence is not None and self.calibration_bins and not brief:
            counts = reliability(
                confidence,
                mask,
                activation=scoring.activation,
                ignore_index=scoring.ignore_index,
                bins=self.calibration_bins,
                temperature=temperature,
                are_probabilities=probs is not None,
            )
        self._cases[case] = score, counts
        return score

    def write(self, split: str) -> None:
        """Write the added cases as the rows of a split, and the picture; then remove them."""
        cases, self._cases = self._cases, {}
        if not cases:
            return
        classes, scored = self.scoring.classes, self.scoring.scored
        known = tables.column_names(classes, scored)
        rows = [row for row in read_csv(self.table) if row.get("split") != split and set(row) <= set(known)]
        for case, (score, counts) in cases.items():
            rows.append(tables.format_row(split, case, score, classes, scored, self._calibration_errors(counts)))
        filled = {key for row in rows for key in row}
        always = tables.column_names(classes, scored)[: 3 + len(scored) + 2 * len(classes)]
        columns = [key for key in known if key in filled or key in always]
        write_csv(self.table, columns, sorted(rows, key=lambda row: (row["split"], row["case"])))
        self._write_reliability(split, {case: counts for case, (_, counts) in cases.items() if counts is not None})
        self._draw(split, {case: score for case, (score, _) in cases.items()})

    def on_validation_epoch_start(self, *_: Any) -> None:
        """Remove the cases of an interrupted evaluation."""
        self._cases.clear()

    def on_test_epoch_start(self, *_: Any) -> None:
        """Remove the cases of an interrupted evaluation."""
        self._cases.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the cases of the batch."""
        if evaluated_split(trainer, during_fit=self.during_fit) is None:
            return
        labels, logits = step_labels(outputs, self.scoring.activation, self.threshold), step_logits(outputs)
        found = find_batch(batch)
        if labels is None or found is None:
            return
        temperature = step_temperature(outputs)
        brief = trainer.state.fn == "fit"
        for index, case in enumerate(case_names(trainer, found, batch_idx, dataloader_idx)):
            if case not in self._cases:
                self.add(
                    case,
                    labels[index],
                    found.mask[index],
                    found.spacing[index],
                    None if logits is None else logits[index],
                    temperature=temperature,
                    brief=brief,
                )

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the tables and the picture."""
        split = evaluated_split(trainer, during_fit=self.during_fit)
        if split is None:
            return
        ranks, self._cases = gather_on_rank_zero(trainer, self._cases), {}
        for cases in ranks:
            self._cases.update(cases)
        if self._cases:
            self.write(split)
            log_picture(trainer, f"{split}/dice_per_class", self.picture)

    on_test_epoch_end = on_validation_epoch_end

    def _calibration_errors(self, counts: Reliability | None) -> dict[int | None, float]:
        """Return the calibration errors by class, with the most probable class's error under `None`."""
        if counts is None:
            return {}
        errors = counts.calibration_error()
        if self.scoring.activation == "softmax":
            return {None: errors[0]}
        return {index: errors[index] for index in self.scoring.scored}

    def _write_reliability(self, split: str, cases: dict[str, Reliability]) -> None:
        # Rows of this split are removed even if there are no new ones: they belong to another prediction.
        old = read_csv(self.reliability)
        rows = [row for row in old if row.get("split") != split and set(row) <= set(RELIABILITY)]
        if not cases and len(rows) == len(old):
            return
        if cases:
            # Sorted, so that the sums of floats are the same on any number of processes.
            total = reduce(Reliability.merge, (cases[name] for name in sorted(cases)))
            softmax = self.scoring.activation == "softmax"
            bins = total.pixels.shape[1]
            for channel in [0] if softmax else self.scoring.scored:
                name = "" if softmax else self.scoring.classes[channel]
                for index in range(bins):
                    pixels = int(total.pixels[channel, index])
                    values = {"lower": index / bins, "upper": (index + 1) / bins}
                    if pixels:
                        values["confidence"] = float(total.confidence[channel, index]) / pixels
                        values["right"] = int(total.correct[channel, index]) / pixels
                    texts = {key: number(value) for key, value in values.items()}
                    rows.append({"split": split, "class": name, "pixels": str(pixels), **texts})
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
