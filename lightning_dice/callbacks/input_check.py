"""What is wrong with the data or the net, said on the first batches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_dice.callbacks.step_outputs import Activation, step_logits
from lightning_dice.functional import read_logits
from lightning_dice.functional.orientation import edge_scores, misplaced
from lightning_dice.kernels import check_logits, check_values
from lightning_dice.kernels.sums import valid_pixels

# Images that are normalized have values near 1; bytes, 16 bits and Hounsfield units have not.
_LARGEST_RMS = 10.0

# No trained weight comes near; float32 ends at 3e38.
_LARGEST_WEIGHT = 1e15

_ORIENTED_IMAGES = 16

# What changes neither the values' range nor their meaning.
_PASSING = (
    *("Alias", "AsStrided", "Clone", "Narrow", "Permute", "Reshape", "Select", "Slice", "Squeeze", "ToCopy"),
    *("Transpose", "Unsafe", "Unsqueeze", "Upsample", "View"),
)


class InputCheck(Callback):
    """Refuse or name what would be trained on without a word, when the first batches show it.

    Of the first batch of training and of validation all values are looked at. Later ones are not: reading values back
    would stall a GPU at each step. Which classes occur is noted on the device, and read once, at the end of the first
    epoch, as is whether the masks lie on their images.

    It raises `ValueError` for mask values outside the classes, soft labels outside [0, 1] or that do not sum to 1 with
    a softmax, image values or logits that are not finite, axes of image and mask that differ, logits with another
    number of channels, and a net that returns probabilities, where the loss makes them once more. The message says how
    to mend it.

    It warns of images that are not normalized; of a mask without a pixel that counts; of classes that never occur in an
    epoch, or have every pixel; and where masks fit square images clearly better after they are transposed, flipped or
    turned. (Of the first 16 images of an epoch at least 8 must have enough boundary. A random crop leaves nothing of a
    transposed mask to be recognized; validation, which sees whole images, does.)

    Args:
        classes: names of the logits' channels.
        activation: what the loss applies to the logits; it decides the mask's form.
        ignore_index: the label of pixels that do not count.

    Raises:
        ValueError: a softmax of one class.

    >>> InputCheck(["lesion"], "softmax")
    Traceback (most recent call last):
    ...
    ValueError: classes must be at least 2 with a softmax, which is always 1 over one channel, got ['lesion']; use \
activation="sigmoid" for a binary task
    """

    def __init__(self, classes: Sequence[str], activation: Activation, ignore_index: int | None = None) -> None:
        if activation not in ("sigmoid", "softmax"):
            raise ValueError(f'activation must be "sigmoid" or "softmax", got {activation!r}')
        if activation == "softmax" and len(classes) < 2:
            raise ValueError(
                f"classes must be at least 2 with a softmax, which is always 1 over one channel, got {list(classes)}; "
                'use activation="sigmoid" for a binary task'
            )
        self.classes, self.activation, self.ignore_index = list(classes), activation, ignore_index
        self._seen: set[str] = set()
        self._watches: dict[str, _Watch] = {}
        self._hook: RemovableHandle | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to note what occurs, in the first epoch."""
        self._watch("training", pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the batch, and have the net's output checked, once."""
        if self._first("training"):
            self._check_batch(batch)
            self._look_at_output(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note what occurs, in the first epoch."""
        self._note("training", batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what did not occur, once."""
        self._conclude("training", trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to note what occurs, in the first epoch."""
        # The check before training sees two batches; that classes are not among them says nothing.
        if not trainer.sanity_checking:
            self._watch("validation", pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the batch, once."""
        if self._first("validation"):
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
        """Check the logits, once."""
        logits = step_logits(outputs)
        if logits is not None and self._first("logits"):
            self._check_logits(logits, "validation", pl_module)
        self._note("validation", batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what did not occur, once."""
        self._conclude("validation", trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind, as there is no teardown then."""
        self._forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._forget()

    def _forget(self) -> None:
        self._unhook()
        self._watches = {}

    def _first(self, what: str) -> bool:
        first = what not in self._seen
        self._seen.add(what)
        return first

    def _check_batch(self, batch: Any) -> None:
        given = read_batch(batch)
        if given is None:
            warnings.warn(
                f"batches of {type(batch).__name__} are not checked: InputCheck reads (image, mask[, case]), a Batch, "
                "or a mapping with image and mask",
                stacklevel=2,
            )
            return
        image, mask = given.image.detach().cpu(), given.mask.detach().cpu()
        # Where the spacing is known, images may have been resampled for the net, and masks left as they are.
        resampled = any(spacing is not None for spacing in getattr(batch, "spacing", None) or [])
        self._check_shapes(image, mask, resampled=resampled)
        for index, case in enumerate(given.case):
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
            warnings.warn(f"every pixel of the mask of case {case!r} is ignored: it teaches nothing", stacklevel=2)
        allowed = range(2) if self.activation == "sigmoid" else range(len(self.classes))
        wrong = [value for value in values if value not in allowed]
        if not wrong:
            return
        if wrong == [255] and set(values) <= {0, 255}:
            remedy = "the mask looks like a 0/255 picture: set 'data.values={255:1}'"
        else:
            remedy = (
                "map them with 'data.values={value:class,...}', or name the one to be ignored with data.ignore_index"
            )
        raise ValueError(
            f"the mask of case {case!r} holds the values {_some(wrong)}, outside {allowed[0]} to {allowed[-1]} "
            f"({_some(self.classes)}); {remedy}"
        )

    def _check_values(self, mask: Tensor, case: str) -> None:
        """What the losses refuse on the CPU, and do not look at on a GPU."""
        space = mask.shape[1:] if self.activation == "sigmoid" or mask.is_floating_point() else mask.shape
        logits = torch.zeros(()).expand(1, len(self.classes), *space)
        try:
            check_values(logits, mask.unsqueeze(0), activation=self.activation, ignore_index=self.ignore_index)
        except ValueError as error:
            raise ValueError(f"the mask of case {case!r}: {error}") from error

    def _check_scale(self, image: Tensor) -> None:
        image = image.float()
        if not image.numel() or float(image.square().mean().sqrt()) <= _LARGEST_RMS or not self._first("scale"):
            return
        warnings.warn(
            f"the images look as if they were not normalized: their values reach from {image.min():g} to "
            f"{image.max():g}, with a mean of {image.mean():.3g} and a standard deviation of {image.std():.3g}, where "
            "nets learn from values around 0 and of about 1; set normalize=image (or fixed, or imagenet), or scale "
            "them in your own data set",
            stacklevel=2,
        )

    def _look_at_output(self, pl_module: LightningModule | None) -> None:
        net = getattr(pl_module, "net", None)
        # Dynamo does not notice that a hook on a net compiled in place is gone, and would run it at every step.
        if not isinstance(net, torch.nn.Module) or getattr(net, "_compiled_call_impl", None) is not None:
            return

        def look(_net: torch.nn.Module, _inputs: Any, output: Any) -> None:
            self._unhook()
            self._check_logits(read_logits(output)[0], "training", pl_module)

        self._hook = net.register_forward_hook(look)

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _check_logits(self, logits: Tensor, split: str, pl_module: LightningModule | None) -> None:
        if logits.shape[1] != len(self.classes):
            raise ValueError(
                f"the net returns logits with {logits.shape[1]} channels, {tuple(logits.shape)}, but there are "
                f"{len(self.classes)} classes ({_some(self.classes)}): set the net's number of output channels"
            )
        if not bool(torch.isfinite(logits.detach()).all()):
            # What a step left, which the gradients of that step need not show.
            weights = [] if pl_module is None else pl_module.named_parameters()
            large = next(
                (name for name, one in weights if not bool((one.detach().abs() < _LARGEST_WEIGHT).all())), None
            )
            if large is not None:
                raise ValueError(
                    f"the steps so far have made weights that are not finite, or enormous ({large}), and so are the "
                    f"logits of the first {split} batch: lower optimizer.lr, or limit the steps by "
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
                f"the net ends in a {last}, and the loss applies a {self.activation} to what it returns: leave the "
                f"net's {last} out"
            )
        else:
            try:
                check_logits(logits.detach().cpu(), activation=self.activation)
                return
            except ValueError as error:
                problem = f"what the net returns on the first {split} batch: {error}"
        # A loss of somebody else may take probabilities.
        if loss is None or hasattr(loss, "activation"):
            raise ValueError(problem)
        warnings.warn(problem, stacklevel=2)

    def _watch(self, split: str, pl_module: LightningModule) -> None:
        if self._first(f"classes of {split}"):
            self._watches[split] = _Watch(len(self.classes), self.ignore_index, pl_module.device)

    def _note(self, split: str, batch: Any) -> None:
        watch = self._watches.get(split)
        given = read_batch(batch) if watch is not None else None
        if watch is not None and given is not None:
            watch.add(given.image.detach(), given.mask.detach())

    def _conclude(self, split: str, trainer: Trainer) -> None:
        watch = self._watches.pop(split, None)
        if watch is None:
            return
        there, elsewhere = watch.occurring(trainer)
        if self.activation == "softmax":
            if self.ignore_index is not None and 0 <= self.ignore_index < len(there):
                there[self.ignore_index] = False
            elsewhere = [sum(there) > own for own in there]
        if not trainer.is_global_zero or not any(there + elsewhere):  # no pixel counts
            return
        everywhere = [name for name, a, b in zip(self.classes, there, elsewhere, strict=True) if a and not b]
        if everywhere:
            warnings.warn(
                f"every pixel of every mask is {_some(everywhere)} in the first epoch of {split}: there is nothing to "
                f"tell apart; {_REMEDY}",
                stacklevel=2,
            )
        if not (everywhere and self.activation == "softmax"):
            self._warn_absent(split, [not one for one in there])
        if name := watch.misplaced():
            warnings.warn(
                f"the masks of {split} look {name.replace(':', ' (')}{')' if ':' in name else ''}: their boundaries "
                "lie clearly better on the images' edges after they are moved so than as they are; look at pictures "
                "of both, and at how images and masks were written",
                stacklevel=2,
            )

    def _warn_absent(self, split: str, absent: Sequence[bool]) -> None:
        # A class whose id is the ignored label is not to occur.
        ignored = self.ignore_index if self.activation == "softmax" else None
        names = [name for i, name in enumerate(self.classes) if absent[i] and i != ignored]
        if names:
            effect = "cannot be learned" if split == "training" else "has no score there"
            warnings.warn(
                f"in the first epoch of {split} no pixel is {_some(names)}: a class that never occurs {effect}; "
                f"{_REMEDY}",
                stacklevel=2,
            )


_REMEDY = (
    "look at the order of the names in data.classes, at data.values, which says what the masks' numbers mean, and "
    "whether there are enough cases"
)


class _Given(NamedTuple):
    image: Tensor
    mask: Tensor
    case: list[str]


def read_batch(batch: Any) -> _Given | None:
    """Image, mask and names of a batch in any form that a module takes."""
    if isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        batch = batch._asdict()
    if isinstance(batch, Mapping):
        image, mask, case = (batch.get(name) for name in ("image", "mask", "case"))
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        image, mask, case = (*batch, None)[:3]
    else:
        return None
    if not isinstance(image, Tensor) or not isinstance(mask, Tensor):
        return None
    if not isinstance(case, (list, tuple)) or len(case) != len(image):
        case = [f"{index} of the batch" for index in range(len(image))]
    return _Given(image, mask, [str(name) for name in case])


class _Watch:
    """What the masks of an epoch hold, noted on their device."""

    def __init__(self, classes: int, ignore_index: int | None, device: torch.device) -> None:
        self.classes, self.ignore_index = classes, ignore_index
        # For each class: whether some pixel is of it, and, of planes, whether some pixel is not.
        self.found = torch.zeros(2, classes, dtype=torch.int32, device=device)
        self.scores: list[Tensor] = []
        self.images = 0

    def add(self, image: Tensor, mask: Tensor) -> None:
        """Note a batch."""
        if mask.ndim == image.ndim:
            valid = valid_pixels(mask, self.ignore_index)
            planes = (one if valid is None else one & valid for one in (mask > 0, mask < 1))
            found = torch.stack([one.transpose(0, 1).flatten(1).any(1) for one in planes])
            self.found |= found
        else:
            there = torch.stack([(mask == label).any() for label in range(self.classes)])
            self.found[0] |= there
        if image.ndim == 4 and image.shape[2] == image.shape[3] and self.images < _ORIENTED_IMAGES:
            some = slice(_ORIENTED_IMAGES - self.images)
            self.scores.append(edge_scores(image[some], mask[some], self.ignore_index))
            self.images += len(image)

    def occurring(self, trainer: Trainer) -> tuple[list[bool], list[bool]]:
        """For each class, what some rank found; all of them must call."""
        found = trainer.strategy.reduce(self.found, reduce_op="max")
        there, elsewhere = found.bool().tolist()
        return there, elsewhere

    def misplaced(self) -> str | None:
        """How the masks seem to have been moved, as `misplaced` says."""
        return misplaced(torch.cat(self.scores).cpu()) if self.scores else None


def _last_activation(logits: Tensor) -> str | None:
    """The activation that `logits` certainly come out of, as the graph of their gradient tells."""
    node = logits.grad_fn
    while node is not None:
        name = node.name()
        if name.startswith(("Sigmoid", "Softmax")):
            return "sigmoid" if name.startswith("Sigmoid") else "softmax"
        if not name.startswith(_PASSING) or not node.next_functions:
            return None
        node = node.next_functions[0][0]
    return None


def _some(items: Sequence[Any], limit: int = 8) -> str:
    shown = ", ".join(map(str, items[:limit]))
    return shown + (", ..." if len(items) > limit else "")
