"""From logits to labels: temperature, thresholds, the removal of what is too small; and the file that keeps them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_dice.argument_checks import check_choice, check_class_indices, check_label, check_number
from lightning_dice.functional import hard_prediction
from lightning_dice.inference.component_filter import clean_ids, clean_planes
from lightning_dice.io import write_atomically

CALIBRATION = "calibration.json"
VERSION = 2
Unit = Literal["pixels", "mm"]


@dataclass(frozen=True)
class PostProcessing:
    r"""How logits become labels.

    The logits of a class are divided by the temperature T. With sigmoid, a pixel has class c where
    :math:`p_c > t_c`. With softmax it has the class of the greatest :math:`p_c / t_c`: of two classes the second where
    :math:`p_1 > t_1`, if :math:`t_0 = 1 - t_1`; equal thresholds are the greatest probability. Then components that
    are too small go.

    What is `None` is not decided: that leaves the labels as `hard_prediction` makes them, by the threshold of the
    module.

    Args:
        temperature: T, above 0; above 1 it makes probabilities less certain.
        thresholds: one for each class, in (0, 1); with softmax only their ratios matter.
        min_size: the size of the smallest connected component that stays, one number or one for each class; 0 keeps
            all. Pixels that touch at a corner are connected.
        unit: of `min_size`: `"pixels"`, or `"mm"`: mm² or mm³ by the spacing of the image.
        keep_largest: classes of which only the largest component stays.
        background: with softmax, the class that removed pixels get, and whose own components are let be; `None`: the
            class that is most common around the component.
        origin: where this comes from, for messages.

    Raises:
        ValueError: a setting out of its range; in a call, another number of classes, or an unknown spacing.

    >>> logits = torch.tensor([[0.3, -0.3, -3.0]])
    >>> PostProcessing(thresholds=[0.4]).labels(logits, activation="sigmoid")
    tensor([[ True,  True, False]])
    >>> print(PostProcessing(temperature=1.5, min_size=20))
    temperature 1.5, components of at least 20 pixels
    """

    temperature: float | None = None
    thresholds: Sequence[float] | None = None
    min_size: float | Sequence[float] | None = None
    unit: Unit = "pixels"
    keep_largest: Iterable[int] = ()
    background: int | None = 0
    origin: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.temperature is not None:
            self._set("temperature", check_number("temperature", self.temperature, 0, open_ends=True))
        if self.thresholds is not None:
            if isinstance(self.thresholds, (int, float, str)) or not len(self.thresholds):
                raise ValueError(f"thresholds must be a list with one for each class, got {self.thresholds!r}")
            each = [check_number("thresholds", value, 0, 1, open_ends=True) for value in self.thresholds]
            self._set("thresholds", tuple(each))
        if self.min_size is not None:
            given: Any = self.min_size
            several = isinstance(given, Sequence) and not isinstance(given, str)
            size = (
                tuple(check_number("min_size", value) for value in given)
                if several
                else check_number("min_size", given)
            )
            self._set("min_size", size)
        check_choice("unit", self.unit, Unit)
        self._set("keep_largest", check_class_indices("keep_largest", self.keep_largest))
        check_label("background", self.background)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __str__(self) -> str:
        said = [f"temperature {self.temperature:.4g}"] if self.temperature is not None else []
        if self.thresholds is not None:
            said.append("thresholds " + ", ".join(f"{value:.3g}" for value in self.thresholds))
        if self.min_size:
            given: Any = self.min_size
            sizes = ", ".join(f"{size:g}" for size in (given if isinstance(given, tuple) else (given,)))
            said.append(f"components of at least {sizes} {'pixels' if self.unit == 'pixels' else 'mm² or mm³'}")
        if self.keep_largest:
            said.append(f"the largest component of class {', '.join(map(str, self.keep_largest))}")
        return ", ".join(said) or "the most probable class, or the module's threshold"

    @property
    def scale(self) -> float:
        """The temperature, 1 where there is none."""
        return 1.0 if self.temperature is None else self.temperature

    @property
    def cleans(self) -> bool:
        """Whether components may be removed, for which a whole image is needed."""
        return bool(np.any(self.min_size)) or bool(self.keep_largest)

    def changes(self, activation: str, threshold: float = 0.5) -> bool:
        """Whether labels can differ from those of `hard_prediction(logits, activation=..., threshold=...)`."""
        tempered = self.scale != 1 and activation == "sigmoid" and threshold != 0.5
        return tempered or self.thresholds is not None or self.cleans

    def labels(
        self, logits: Tensor, *, activation: str, threshold: float = 0.5, spacing: Sequence[float] | None = None
    ) -> Tensor:
        """The labels of one image.

        Args:
            logits: `(classes, *space)`.
            activation: `"sigmoid"` or `"softmax"`.
            threshold: of the module: where this has no thresholds of its own, with sigmoid.
            spacing: between pixels along each axis, in mm; only for `unit="mm"`.

        Returns:
            Softmax: class ids `(*space)`, uint8, or int32 of more than 256 classes; sigmoid: bool planes
            `(classes, *space)`.
        """
        return self.clean(self.pixelwise(logits, activation=activation, threshold=threshold), spacing)

    def pixelwise(self, logits: Tensor, *, activation: str, threshold: float = 0.5) -> Tensor:
        """`labels` before components are removed: each pixel by itself, so that parts of an image will do."""
        classes = len(logits)
        if self.thresholds is not None and len(self.thresholds) != classes:
            raise ValueError(
                f"thresholds must be one for each of the {classes} classes, got {len(self.thresholds)}"
                + (f" from {self.origin}" if self.origin else "")
            )
        if activation == "softmax":
            if self.thresholds is not None:
                logits = logits - self._offsets(logits, [self.scale * math.log(t) for t in self.thresholds])
            ids = hard_prediction(logits.unsqueeze(0), activation="softmax")[0]
            return ids.to(torch.uint8 if classes <= 256 else torch.int32)
        if self.thresholds is None and self.scale == 1:
            return hard_prediction(logits.unsqueeze(0), activation="sigmoid", threshold=threshold)[0]
        # Compared as logits, as `hard_prediction` does.
        limits = [self.scale * math.log(t / (1 - t)) for t in self.thresholds or [threshold] * classes]
        return logits > self._offsets(logits, limits)

    @staticmethod
    def _offsets(logits: Tensor, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=logits.dtype, device=logits.device).view(-1, *[1] * (logits.ndim - 1))

    def clean(self, labels: Tensor, spacing: Sequence[float] | None = None) -> Tensor:
        """Labels of a whole image without the components that are too small.

        Args:
            labels: as `pixelwise` makes them.
            spacing: as in `labels`.
        """
        if not self.cleans:
            return labels
        planes = labels.dtype == torch.bool
        size = 1.0
        if self.unit == "mm" and self.min_size:
            if spacing is None:
                raise ValueError(
                    'the smallest components are given in mm, and the spacing of the image is not known: unit="pixels"'
                )
            space = labels.shape[1:] if planes else labels.shape
            if len(spacing) != len(space):
                raise ValueError(f"spacing must have one number for each of the {len(space)} axes, got {list(spacing)}")
            size = math.prod(spacing)
        min_size: Any = self.min_size or 0.0
        least = [value / size for value in min_size] if isinstance(min_size, tuple) else min_size / size
        array = labels.cpu().numpy().copy()
        if planes:
            clean_planes(array, least, self.keep_largest)
        else:
            clean_ids(array, least, self.keep_largest, self.background)
        return torch.from_numpy(array).to(labels.device)

    def probabilities(self, logits: Tensor, *, activation: str) -> Tensor:
        """Calibrated probabilities of logits `(classes, *space)`, float32 or better."""
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        tempered = logits if self.scale == 1 else logits / self.scale
        return tempered.softmax(0) if activation == "softmax" else tempered.sigmoid()

    def filled(self, other: PostProcessing) -> PostProcessing:
        """This decision, with what it leaves open from another: the user's word first, then the calibration's."""
        mine = dataclasses.asdict(self)
        taken = {name: getattr(other, name) for name in ("temperature", "thresholds") if mine[name] is None}
        if self.min_size is None:
            taken |= {"min_size": other.min_size, "unit": other.unit}
        if not self.keep_largest:
            taken["keep_largest"] = other.keep_largest
        return dataclasses.replace(self, **taken, origin=self.origin or other.origin)

    def settings(self) -> dict[str, Any]:
        """What is decided, as plain values: `PostProcessing(**settings)` is this again."""
        plain = {name: value for name, value in dataclasses.asdict(self).items() if name != "origin"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def save(self, path: Path, about: Mapping[str, Any] | None = None) -> None:
        """Write it to a JSON file, whole or not at all.

        Args:
            path: of the file.
            about: plain values that are kept beside it, such as what it was made from.
        """
        content = {"version": VERSION, "postprocessing": self.settings(), **(about or {})}
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: Path) -> PostProcessing:
        """What `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: names the file and what is wrong with it.
        """
        return cls(**_read(path)["postprocessing"], origin=str(path))


def pooled(decisions: Sequence[PostProcessing], classes_threshold: float = 0.5) -> PostProcessing:
    """The decision of an ensemble of networks that each have one.

    Probabilities are averaged after each network's own temperature, so that none is left; thresholds are the mean of
    the networks'; sizes of components must be the same.

    Args:
        decisions: one for each network.
        classes_threshold: the threshold of a network that has none of its own.

    Raises:
        ValueError: they remove different components, or have thresholds for different numbers of classes.
    """
    first = decisions[0]
    if len(decisions) == 1 or all(decision == first for decision in decisions):
        return first
    kinds = {(d.min_size, d.unit, tuple(d.keep_largest), d.background) for d in decisions}
    if len(kinds) > 1:
        raise ValueError("the networks of an ensemble must remove the same components: min_size, keep_largest ...")
    given = [decision.thresholds for decision in decisions if decision.thresholds is not None]
    thresholds = None
    if given:
        if len({len(each) for each in given}) > 1:
            raise ValueError("the networks of an ensemble have thresholds for different numbers of classes")
        default = (classes_threshold,) * len(given[0])
        each = [decision.thresholds or default for decision in decisions]
        thresholds = [sum(values) / len(values) for values in zip(*each, strict=True)]
    origins = ", ".join(decision.origin for decision in decisions if decision.origin) or None
    return dataclasses.replace(first, temperature=None, thresholds=thresholds, origin=origins)


def find_postprocessing(run: str | Path, choice: str | Path = "auto", checkpoint: Path | None = None) -> PostProcessing:
    """What calibration a run's predictions are to be made with.

    Args:
        run: its folder.
        choice: `"auto"`: `<run>/calibration.json` if it is there and was made for this checkpoint; `"none"`; or the
            path of such a file, for whatever checkpoint it was made.
        checkpoint: the file whose weights are used.

    Returns:
        A `PostProcessing` with `origin`, the file; `PostProcessing()` where there is none.

    Raises:
        FileNotFoundError: the file that was named is not there.
        ValueError: the file is not one that `PostProcessing.save` has written; or, with `"auto"`, was made for another
            checkpoint.
    """
    if choice == "none":
        return PostProcessing()
    path = Path(choice).expanduser() if choice != "auto" else Path(run).expanduser() / CALIBRATION
    if choice == "auto":
        if not path.is_file():
            return PostProcessing()
        made_for = (_read(path).get("checkpoint") or {}).get("sha256")
        if checkpoint is not None and made_for is not None and made_for != digest(checkpoint):
            raise ValueError(
                f"{path} was made for another checkpoint than {checkpoint}: calibrate again (overwrite=true), or "
                f"choose calibration=none, or calibration={path} to use it all the same"
            )
    return PostProcessing.load(path)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            found.update(block)
    return found.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no calibration file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a calibration file: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("postprocessing"), dict):
        raise ValueError(f'{path} is not a calibration file: it holds no "postprocessing"')
    if content.get("version") != VERSION:
        raise ValueError(f"{path} has version {content.get('version')!r}, and this package reads {VERSION}")
    known = {entry.name for entry in dataclasses.fields(PostProcessing)} - {"origin"}
    if unknown := sorted(set(content["postprocessing"]) - known):
        raise ValueError(f"{path}: a decision has no {', '.join(unknown)}, only {', '.join(sorted(known))}")
    try:
        PostProcessing(**content["postprocessing"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return content
