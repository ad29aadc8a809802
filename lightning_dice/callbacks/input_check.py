"""Check data and network on the first batches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_dice.argument_checks import check_choice, check_label
from lightning_dice.callbacks.step_outputs import Activation, step_logits
from lightning_dice.data.batch import find_batch
from lightning_dice.functional import read_logits
from lightning_dice.functional.orientation import edge_scores, misplaced
from lightning_dice.kernels import check_logits, check_values
from lightning_dice.kernels.sums import valid_pixels
from lightning_dice.library_internals.torch import is_compiled_in_place
from lightning_dice.text import join_some

# Normalized images have values near 1; 8-bit and 16-bit images and Hounsfield units do not.
_LARGEST_RMS = 10.0

# No trained weight is nearly as large; float32 ends at 3e38.
_LARGEST_WEIGHT = 1e15

_ORIENTED_IMAGES = 16  # images of an epoch whose orientation is checked

# Operations that change neither the range of values nor their meaning.
_NEUTRAL_OPERATIONS = (
    *("Alias", "AsStrided", "Clone", "Narrow", "Permute", "Reshape", "Select", "Slice", "Squeeze", "ToCopy"),
    *("Transpose", "Unsafe", "Unsqueeze", "Upsample", "View"),
)


class InputCheck(Callback):
    """Check the first batches: raise or warn if the data, the network and the loss do not fit together.

    All values of the first batches of training and validation are checked. Those of later batches are not, because
    reading them would stall a GPU at each step. Which classes occur, and whether the masks fit the images' edges, is
    recorded on the device and read once, at the end of the first epoch.

    Raises `ValueError` for mask values outside the classes, soft labels outside [0, 1] or, with a softmax, with a sum
    other than 1, image values or logits that are not finite, different axes of image and mask, another number of
    channels in the logits, and a network that returns probabilities to a loss that applies the activation itself. The
    message names the remedy.

    Warns of images that are not normalized; of a mask whose pixels are all ignored; of classes that never occur in an
    epoch, or have every pixel; and of masks that fit square images clearly better when transposed, flipped or rotated.
    (At least 8 of the first 16 images of an epoch must have enough boundary. In random crops a transposed mask cannot
    be recognized; in validation, which reads whole images, it can.)

    Args:
        classes: names of the logits' channels.
        activation: that the loss applies to the logits; determines the form of the mask.
        ignore_index: label of ignored pixels.

    Raises:
        ValueError: a softmax over one class, or another activation.

    >>> InputCheck(["lesion"], "softmax")
    Traceback (most recent call last):
    ...
    ValueError: classes must be at least 2 with a softmax, which is always 1 over one channel, got ['lesion']; use \
activation="sigmoid" for a binary task
    """

    def __init__(self, classes: Sequence[str], activation: Activation, ignore_index: int | None = None) -> None:
        check_choice("activation", activation, Activation)
        if activation == "softmax" and len(classes) < 2:
            raise ValueError(
                f"classes must be at least 2 with a softmax, which is always 1 over one channel, got {list(classes)}; "
                'use activation="sigmoid" for a binary task'
            )
        self.classes, self.activation = list(classes), activation
        self.ignore_index = check_label("ignore_index", ignore_index)
        self._done: set[str] = set()  # checks that are made once
        self._statistics: dict[str, _MaskStatistics] = {}  # by split, in the first epoch
        self._hook: RemovableHandle | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the statistics of the masks, in the first epoch."""
        self._start_statistics("training", pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the batch and the output of the network, once."""
        if self._is_first("training"):
            self._check_batch(batch)
            self._check_next_output(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the masks to the statistics, in the first epoch."""
        self._add_to_statistics("training", batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of classes that did not occur and of misplaced masks, once."""
        self._report_statistics("training", trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the statistics of the masks, in the first epoch."""
        # Two batches of the sanity check need not have all classes.
        if not trainer.sanity_checking:
            self._start_statistics("validation", pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the batch, once."""
        if self._is_first("validation"):
            self._check_batch(batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Check the logits, once, and add the masks to the statistics, in the first epoch."""
        logits = step_logits(outputs)
        if logits is not None and self._is_first("logits"):
            self._check_logits(logits, "validation", pl_module)
        self._add_to_statistics("validation", batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of classes that did not occur and of misplaced masks, once."""
        self._report_statistics("validation", trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hook and the statistics: Lightning calls no teardown after an exception."""
        self._reset()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hook and the statistics."""
        self._reset()

    def _reset(self) -> None:
        self._remove_hook()
        self._statistics = {}

    def _is_first(self, check: str) -> bool:
        """Return whether a check has not been made yet, and mark it as made."""
        first = check not in self._done
        self._done.add(check)
        return first

    def _check_batch(self, batch: Any) -> None:
        found = find_batch(batch)
        if found is None:
            warnings.warn(
                f"batches of {type(batch).__name__} are not checked: InputCheck reads (image, mask[, case]), a Batch, "
                "or a mapping with image and mask",
                stacklevel=2,
            )
            return
        image, mask = found.image.detach().cpu(), found.mask.detach().cpu()
        # If the spacing is known, the images may have been resampled for the network, the masks not.
        resampled = any(spacing is not None for spacing in found.spacing)
        self._check_shapes(image, mask, resampled=resampled)
        for index, case in enumerate(found.case):
            if not image[index].isfinite().all():
                raise ValueError(f"the image of case {case!r} has values that are not finite (NaN or infinite)")
            if not mask.is_floating_point():
                self._check_labels(mask[index], case)
            self._check_values(mask[index], case)
        self._check_scale(image)

    def _check_shapes(self, image: Tensor, mask: Tensor, *, resampled: bool) -> None:
        space = tuple(mask.shape[2 - image.ndim :] if resampled else image.shape[2:])
        planes = (image.shape[0], len(self.classes), *space)
        # Floating-point masks are soft labels, one plane for each class under either activation.
        expected = planes if self.activation == "sigmoid" or mask.is_floating_point() else (image.shape[0], *space)
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"with {len(self.classes)} classes, activation={self.activation!r} and images of shape "
                f"{tuple(image.shape)} the mask must have the shape {expected}, got {tuple(mask.shape)}"
            )

    def _check_labels(self, mask: Tensor, case: str) -> None:
        found = torch.unique(mask).tolist()
        values = [value for value in found if value != self.ignore_index]
        if not values:
            warnings.warn(
                f"every pixel of the mask of case {case!r} is ignored: nothing can be learned from it", stacklevel=2
            )
        allowed = range(2) if self.activation == "sigmoid" else range(len(self.classes))
        wrong = [value for value in values if value not in allowed]
        if not wrong:
            return
        if wrong == [255] and set(values) <= {0, 255}:
            remedy = "the mask looks like a 0/255 picture: set 'data.label_map={255:1}'"
        else:
            remedy = "map them with 'data.label_map={value:class,...}', or set data.ignore_index to the value to ignore"
        raise ValueError(
            f"the mask of case {case!r} holds the values {join_some(wrong)}, outside {allowed[0]} to {allowed[-1]} "
            f"({join_some(self.classes)}); {remedy}"
        )

    def _check_values(self, mask: Tensor, case: str) -> None:
        """Make the checks of values that the losses make on the CPU but not on a GPU."""
        space = mask.shape[1:] if self.activation == "sigmoid" or mask.is_floating_point() else mask.shape
        logits = torch.zeros(()).expand(1, len(self.classes), *space)
        try:
            check_values(logits, mask.unsqueeze(0), activation=self.activation, ignore_index=self.ignore_index)
        except ValueError as error:
            raise ValueError(f"the mask of case {case!r}: {error}") from error

    def _check_scale(self, image: Tensor) -> None:
        image = image.float()
        if not image.numel() or float(image.square().mean().sqrt()) <= _LARGEST_RMS or not self._is_first("scale"):
            return
        warnings.warn(
            f"the images seem not normalized: their values range from {image.min():g} to {image.max():g}, with a mean "
            f"of {image.mean():.3g} and a standard deviation of {image.std():.3g}, but networks learn best from values "
            "around 0 of magnitude 1; set normalize=image (or fixed, or imagenet), or scale them in your own data set",
            stacklevel=2,
        )

    def _check_next_output(self, pl_module: LightningModule | None) -> None:
        net = getattr(pl_module, "net", None)
        # On a network compiled in place Dynamo does not notice that a hook is removed, and runs it at every step.
        if not isinstance(net, torch.nn.Module) or is_compiled_in_place(net):
            return

        def check(_net: torch.nn.Module, inputs: Any, output: Any) -> None:
            self._remove_hook()
            self._check_logits(read_logits(output, inputs[0].shape[2:])[0], "training", pl_module)

        self._hook = net.register_forward_hook(check)

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _check_logits(self, logits: Tensor, split: str, pl_module: LightningModule | None) -> None:
        if logits.shape[1] != len(self.classes):
            raise ValueError(
                f"the net returns logits with {logits.shape[1]} channels, {tuple(logits.shape)}, but there are "
                f"{len(self.classes)} classes ({join_some(self.classes)}): set the net's number of output channels"
            )
        if not bool(torch.isfinite(logits.detach()).all()):
            # A step may leave such weights although its gradients are finite.
            weights = [] if pl_module is None else pl_module.named_parameters()
            large = next(
                (name for name, weight in weights if not bool((weight.detach().abs() < _LARGEST_WEIGHT).all())), None
            )
            if large is not None:
                raise ValueError(
                    f"the steps so far have made weights that are not finite, or enormous ({large}), and therefore the "
                    f"logits of the first {split} batch are not finite: lower optimizer.lr, or limit the steps by "
                    "trainer.gradient_clip_val=1 or scheduler=warmup_cosine"
                )
            raise ValueError(
                f"the net returns logits that are not finite on the first {split} batch: look for a division by "
                "zero or a logarithm in the net, and try trainer.precision=32-true"
            )
        loss = getattr(pl_module, "loss", None)
        if getattr(loss, "activation", self.activation) is None:
            return  # The loss wants probabilities.
        if last := _last_activation(logits):
            problem = (
                f"the net ends in a {last}, and the loss applies a {self.activation} to its output: remove the {last} "
                "from the net"
            )
        else:
            try:
                check_logits(logits.detach().cpu(), activation=self.activation)
                return
            except ValueError as error:
                problem = f"the output of the net on the first {split} batch: {error}"
        # A loss of another package may take probabilities.
        if loss is None or hasattr(loss, "activation"):
            raise ValueError(problem)
        warnings.warn(problem, stacklevel=2)

    def _start_statistics(self, split: str, pl_module: LightningModule) -> None:
        if self._is_first(f"classes of {split}"):
            self._statistics[split] = _MaskStatistics(len(self.classes), self.ignore_index, pl_module.device)

    def _add_to_statistics(self, split: str, batch: Any) -> None:
        statistics = self._statistics.get(split)
        found = find_batch(batch) if statistics is not None else None
        if statistics is not None and found is not None:
            statistics.add(found.image.detach(), found.mask.detach())

    def _report_statistics(self, split: str, trainer: Trainer) -> None:
        statistics = self._statistics.pop(split, None)
        if statistics is None:
            return
        present, absent = statistics.reduce(trainer)
        if self.activation == "softmax":
            if self.ignore_index is not None and 0 <= self.ignore_index < len(present):
                present[self.ignore_index] = False
            absent = [sum(present) > own for own in present]
        if not trainer.is_global_zero or not any(present + absent):  # all pixels are ignored
            return
        everywhere = [name for name, a, b in zip(self.classes, present, absent, strict=True) if a and not b]
        if everywhere:
            warnings.warn(
                f"every pixel of every mask is {join_some(everywhere)} in the first epoch of {split}: there is nothing "
                f"to distinguish; {_REMEDY}",
                stacklevel=2,
            )
        if not (everywhere and self.activation == "softmax"):
            self._warn_absent(split, present)
        if name := statistics.misplaced():
            warnings.warn(
                f"the masks of {split} look {name.replace(':', ' (')}{')' if ':' in name else ''}: their boundaries "
                "would fit the edges in the images clearly better if this were undone; look at pictures of both, and "
                "at the code that wrote images and masks",
                stacklevel=2,
            )

    def _warn_absent(self, split: str, present: Sequence[bool]) -> None:
        # A class whose id is the ignored label cannot occur.
        ignored = self.ignore_index if self.activation == "softmax" else None
        names = [name for i, name in enumerate(self.classes) if not present[i] and i != ignored]
        if names:
            effect = "cannot be learned" if split == "training" else "has no score there"
            warnings.warn(
                f"in the first epoch of {split} no pixel is {join_some(names)}: a class that never occurs {effect}; "
                f"{_REMEDY}",
                stacklevel=2,
            )


_REMEDY = (
    "check the order of the names in data.classes, data.label_map, which maps the masks' values to classes, and "
    "whether there are enough cases"
)


class _MaskStatistics:
    """Statistics of an epoch's masks, kept on the device: the classes that occur, and how well masks fit images."""

    def __init__(self, classes: int, ignore_index: int | None, device: torch.device) -> None:
        self.classes, self.ignore_index = classes, ignore_index
        # For each class: whether any pixel has it and, for planes only, whether any pixel does not.
        self.found = torch.zeros(2, classes, dtype=torch.int32, device=device)
        self.scores: list[Tensor] = []
        self.images = 0

    def add(self, image: Tensor, mask: Tensor) -> None:
        """Add a batch."""
        if mask.ndim == image.ndim:
            valid = valid_pixels(mask, self.ignore_index)
            planes = (plane if valid is None else plane & valid for plane in (mask > 0, mask < 1))
            self.found |= torch.stack([plane.transpose(0, 1).flatten(1).any(1) for plane in planes])
        else:
            self.found[0] |= torch.stack([(mask == label).any() for label in range(self.classes)])
        if image.ndim == 4 and image.shape[2] == image.shape[3] and self.images < _ORIENTED_IMAGES:
            first = slice(_ORIENTED_IMAGES - self.images)
            self.scores.append(edge_scores(image[first], mask[first], self.ignore_index))
            self.images += len(image)

    def reduce(self, trainer: Trainer) -> tuple[list[bool], list[bool]]:
        """Return for each class whether any rank found a pixel with it, and without it. All ranks must call it."""
        found = trainer.strategy.reduce(self.found, reduce_op="max")
        present, absent = found.bool().tolist()
        return present, absent

    def misplaced(self) -> str | None:
        """Return how the masks seem to have been moved (see `functional.orientation.misplaced`), if at all."""
        return misplaced(torch.cat(self.scores).cpu()) if self.scores else None


def _last_activation(logits: Tensor) -> str | None:
    """Return the activation that certainly produced `logits`, read from their autograd graph; None otherwise."""
    node = logits.grad_fn
    while node is not None:
        name = node.name()
        if name.startswith(("Sigmoid", "Softmax")):
            return "sigmoid" if name.startswith("Sigmoid") else "softmax"
        if not name.startswith(_NEUTRAL_OPERATIONS) or not node.next_functions:
            return None
        node = node.next_functions[0][0]
    return None
