"""From logits to labels: temperature, thresholds and removal of small components, and the calibration file."""

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
from lightning_dice.inference.component_filter import filter_ids, filter_planes
from lightning_dice.io import write_atomically

CALIBRATION = "calibration.json"
VERSION = 2
Unit = Literal["pixels", "mm"]


@dataclass(frozen=True)
class PostProcessing:
    r"""How logits become labels.

    Logits are divided by the temperature T. With sigmoid, a pixel is of class c where :math:`p_c > t_c`. With softmax
    it is of the class with the largest :math:`p_c / t_c`; of two classes that is the second where :math:`p_1 > t_1`, if
    :math:`t_0 = 1 - t_1`, and equal thresholds choose the largest probability. Components that are too small are then
    removed.

    A setting that is `None` does nothing: labels are then those of `hard_prediction` with the module's threshold.

    Args:
        temperature: T, above 0; above 1 it makes probabilities less certain.
        thresholds: one for each class, in (0, 1); with softmax only their ratios matter.
        min_size: the size of the smallest connected component that is kept, one number or one for each class; 0 keeps
            all. Pixels that touch at a corner are connected.
        unit: the unit of `min_size`: `"pixels"`, or `"mm"`: mm² or mm³ by the spacing of the image.
        keep_largest: classes of which only the largest component is kept.
        background: with softmax, the class of removed pixels, whose own components are kept; `None`: the most common
            class around the component.
        origin: the file that this was read from, for messages.

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
            value: Any = self.min_size
            several = isinstance(value, Sequence) and not isinstance(value, str)
            size = tuple(check_number("min_size", one) for one in value) if several else check_number("min_size", value)
            self._set("min_size", size)
        check_choice("unit", self.unit, Unit)
        self._set("keep_largest", check_class_indices("keep_largest", self.keep_largest))
        check_label("background", self.background)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __str__(self) -> str:
        parts = [f"temperature {self.temperature:.4g}"] if self.temperature is not None else []
        if self.thresholds is not None:
            parts.append("thresholds " + ", ".join(f"{value:.3g}" for value in self.thresholds))
        if self.min_size:
            value: Any = self.min_size
            sizes = ", ".join(f"{size:g}" for size in (value if isinstance(value, tuple) else (value,)))
            parts.append(f"components of at least {sizes} {'pixels' if self.unit == 'pixels' else 'mm² or mm³'}")
        if self.keep_largest:
            parts.append(f"the largest component of class {', '.join(map(str, self.keep_largest))}")
        return ", ".join(parts) or "the most probable class, or the module's threshold"

    @property
    def scale(self) -> float:
        """The temperature; 1 if there is none."""
        return 1.0 if self.temperature is None else self.temperature

    @property
    def removes_components(self) -> bool:
        """Whether components may be removed, which takes the labels of a whole image."""
        return bool(np.any(self.min_size)) or bool(self.keep_largest)

    def changes_labels(self, activation: str, threshold: float = 0.5) -> bool:
        """Whether labels can differ from those of `hard_prediction(logits, activation=..., threshold=...)`."""
        tempered = self.scale != 1 and activation == "sigmoid" and threshold != 0.5
        return tempered or self.thresholds is not None or self.removes_components

    def labels(
        self, logits: Tensor, *, activation: str, threshold: float = 0.5, spacing: Sequence[float] | None = None
    ) -> Tensor:
        """Return the labels of one image.

        Args:
            logits: `(classes, *space)`.
            activation: `"sigmoid"` or `"softmax"`.
            threshold: the module's threshold; used with sigmoid if `thresholds` is `None`.
            spacing: pixel spacing along each axis, in mm; needed for `unit="mm"`.

        Returns:
            Softmax: class ids `(*space)`, uint8, or int32 for more than 256 classes; sigmoid: bool planes
            `(classes, *space)`.
        """
        return self.remove_components(self.pixelwise(logits, activation=activation, threshold=threshold), spacing)

    def pixelwise(self, logits: Tensor, *, activation: str, threshold: float = 0.5) -> Tensor:
        """Return `labels` before components are removed: each pixel depends on its own logits only.

        >>> PostProcessing(thresholds=[0.4], min_size=9).pixelwise(torch.tensor([[0.3, -3.0]]), activation="sigmoid")
        tensor([[ True, False]])
        """
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

    def remove_components(self, labels: Tensor, spacing: Sequence[float] | None = None) -> Tensor:
        """Return the labels of a whole image without the components that are too small.

        Args:
            labels: as returned by `pixelwise`.
            spacing: as in `labels`.

        >>> PostProcessing(min_size=2).remove_components(torch.tensor([[True, False, True, True]]))
        tensor([[False, False,  True,  True]])
        """
        if not self.removes_components:
            return labels
        planes = labels.dtype == torch.bool
        pixel = self._pixel_size(labels.shape[1:] if planes else labels.shape, spacing)
        value: Any = self.min_size or 0.0
        min_size = [size / pixel for size in value] if isinstance(value, tuple) else value / pixel
        array = labels.cpu().numpy().copy()
        if planes:
            filter_planes(array, min_size, self.keep_largest)
        else:
            filter_ids(array, min_size, self.keep_largest, self.background)
        return torch.from_numpy(array).to(labels.device)

    def _pixel_size(self, space: Sequence[int], spacing: Sequence[float] | None) -> float:
        """Return the size of a pixel in the unit of `min_size`."""
        if self.unit == "pixels" or not self.min_size:
            return 1.0
        if spacing is None:
            raise ValueError('min_size is in mm, and the spacing of the image is not known: unit="pixels" needs none')
        if len(spacing) != len(space):
            raise ValueError(f"spacing must have one number for each of the {len(space)} axes, got {list(spacing)}")
        return math.prod(spacing)

    def with_defaults(self, defaults: PostProcessing) -> PostProcessing:
        """Return this with the settings that it lacks taken from another one, such as a calibration.

        >>> print(PostProcessing(min_size=9).with_defaults(PostProcessing(temperature=1.5, min_size=4)))
        temperature 1.5, components of at least 9 pixels
        """
        changes: dict[str, Any] = {
            name: getattr(defaults, name) for name in ("temperature", "thresholds") if getattr(self, name) is None
        }
        if self.min_size is None:
            changes |= {"min_size": defaults.min_size, "unit": defaults.unit}
        if not self.keep_largest:
            changes["keep_largest"] = defaults.keep_largest
        return dataclasses.replace(self, **changes, origin=self.origin or defaults.origin)

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values: `PostProcessing(**settings)` is equal to this.

        >>> PostProcessing(thresholds=[0.4]).settings()["thresholds"]
        [0.4]
        """
        plain = {name: value for name, value in dataclasses.asdict(self).items() if name != "origin"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def save(self, path: Path, about: Mapping[str, Any] | None = None) -> None:
        """Write the settings to a JSON file, atomically.

        Args:
            path: the file.
            about: plain values to keep in the file too, such as the checkpoint.
        """
        content = {"version": VERSION, "postprocessing": self.settings(), **(about or {})}
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: Path) -> PostProcessing:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it was not written by `save`, or holds a wrong setting; the message names the file.
        """
        return cls(**_read(path)["postprocessing"], origin=str(path))


def combine_postprocessing(each: Sequence[PostProcessing], default_threshold: float = 0.5) -> PostProcessing:
    """Return the post-processing of an ensemble.

    Probabilities are averaged after each network's own temperature, so the combined one has none, unless all are equal;
    its thresholds are the mean of the networks'.

    Args:
        each: one for each network.
        default_threshold: the threshold of a network that has none of its own.

    Raises:
        ValueError: they remove different components, or have thresholds for different numbers of classes.

    >>> print(combine_postprocessing([PostProcessing(2.0, [0.2]), PostProcessing(1.0, [0.4])]))
    thresholds 0.3
    """
    first = each[0]
    if all(one == first for one in each):
        return first
    if len({(one.min_size, one.unit, tuple(one.keep_largest), one.background) for one in each}) > 1:
        raise ValueError("the networks of an ensemble must remove the same components: min_size, keep_largest ...")
    counts = {len(one.thresholds) for one in each if one.thresholds is not None}
    thresholds = None
    if counts:
        if len(counts) > 1:
            raise ValueError("the networks of an ensemble have thresholds for different numbers of classes")
        default = (default_threshold,) * counts.pop()
        columns = zip(*(one.thresholds or default for one in each), strict=True)
        thresholds = [sum(values) / len(values) for values in columns]
    origins = ", ".join(one.origin for one in each if one.origin) or None
    return dataclasses.replace(first, temperature=None, thresholds=thresholds, origin=origins)


def find_postprocessing(run: str | Path, choice: str | Path = "auto", checkpoint: Path | None = None) -> PostProcessing:
    """Read the calibration for a run's predictions.

    Args:
        run: its folder.
        choice: `"auto"`: `<run>/calibration.json`, if it exists; `"none"`; or the path of such a file, whichever
            checkpoint it was made for.
        checkpoint: the file of the weights, which `"auto"` compares with the calibration's.

    Returns:
        A `PostProcessing` whose `origin` is the file; `PostProcessing()` if there is none.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file was not written by `PostProcessing.save`; or, with `"auto"`, was made for another
            checkpoint.
    """
    if choice == "none":
        return PostProcessing()
    path = Path(choice).expanduser() if choice != "auto" else Path(run).expanduser() / CALIBRATION
    if choice == "auto":
        if not path.is_file():
            return PostProcessing()
        calibrated = (_read(path).get("checkpoint") or {}).get("sha256")
        if checkpoint is not None and calibrated is not None and calibrated != sha256(checkpoint):
            raise ValueError(
                f"{path} was made for another checkpoint than {checkpoint}: calibrate again (overwrite=true), or set "
                f"calibration=none, or calibration={path} to use it anyway"
            )
    return PostProcessing.load(path)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    result = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            result.update(block)
    return result.hexdigest()


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
        raise ValueError(f"{path}: post-processing has no {', '.join(unknown)}, only {', '.join(sorted(known))}")
    try:
        PostProcessing(**content["postprocessing"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return content
