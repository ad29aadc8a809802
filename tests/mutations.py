"""Mutations of the package, each with the tests that must catch it: how few tests may be is measured here.

    python -m tests.mutations -j 2         all of them, two at once: about 3 seconds for each on an idle core
    python -m tests.mutations top-k scores those whose name or file contains one of these
    python -m tests.mutations --list       only list them

A mutation replaces one piece of text in a copy of the package, and at least one of its tests must fail then. All tests
must pass in the copy before. Exits with 1 if a mutation survives, if its text does not occur exactly once, or if the
package cannot be imported with it. Add one when you add a formula or a check, and before you remove a test.
"""

# The text of the package is quoted as it is.
# ruff: noqa: E501

from __future__ import annotations

import argparse
import compileall
import contextlib
import multiprocessing
import os
import py_compile
import queue
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds, for the tests of one mutation
# Exit statuses of pytest.
PASSED, FAILED = 0, 1


@dataclass(frozen=True)
class Mutation:
    """A replacement of text, and the tests of which at least one must fail.

    Attributes:
        name: what the mutation breaks; starts with the part of the package.
        file: path below `lightning_dice/`.
        old: text that occurs exactly once in the file.
        new: replaces it.
        tests: node ids of pytest, below `tests/`; the fewest and fastest that catch it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS: list[Mutation] = []


def mutate(file: str, *mutations: tuple[str, str, str, str | Iterable[str]]) -> None:
    """Add mutations of one file: name, old text, new text, and the tests."""
    for name, old, new, tests in mutations:
        MUTATIONS.append(Mutation(name, file, old, new, (tests,) if isinstance(tests, str) else tuple(tests)))


FAMILY = "losses/test_family.py::"
EVERY = "losses/test_every_loss.py::"
NUMBERS = "losses/test_numbers.py::"
TRANSFORMS = "losses/test_transforms.py::"
REFUSALS = "losses/test_refusals.py::"
COMPOUND = "losses/test_compound.py::"
DEEP = "losses/test_deep_supervision.py::"
BOUNDARY = "losses/test_boundary.py::"
SKELETON = "losses/test_skeleton.py::"
LESIONS = "losses/test_lesion_wise.py::"
PRESETS = "losses/test_presets.py::"
RANKS = "losses/test_two_processes.py::"
SUMS = "kernels/test_overlap_sums.py::"
BACKENDS = "kernels/test_backends.py::"
COUNTS = "kernels/test_counts.py::"
RESIZING = "functional/test_target_resizing.py::"
MAPS = "functional/test_target_maps.py::"


def definition(case: str) -> str:
    """Return the test of the definition of a loss: a case of `losses/family.py` and an activation."""
    return f"{FAMILY}TestDefinition::test_loss_and_gradient[{case}]"


def hard(test: str) -> str:
    """Return a test of the hard cases of `losses/test_family.py`."""
    return f"{FAMILY}TestHardCases::test_{test}"


def duties(loss: str, activation: str = "softmax") -> str:
    """Return the test of what a loss inherits from the shared code."""
    return f"{EVERY}test_shared_duties[{activation}-{loss}]"


def weighted(loss: str) -> str:
    """Return the test of a loss's pixel weight."""
    return f"{EVERY}test_a_weight_counts[{loss}]"


def annotated(loss: str) -> str:
    """Return the test of a loss's classes that are not annotated."""
    return f"{EVERY}test_a_class_that_is_not_annotated_does_not_count[{loss}]"


# The formulas.
mutate(
    "functional/scores.py",
    (
        "dice-without-the-2",
        "_ratio(2 * sums.overlap, sums.predicted",
        "_ratio(sums.overlap, sums.predicted",
        definition("dice-sigmoid"),
    ),
    (
        "jaccard-counts-the-overlap-twice",
        "sums.predicted + sums.actual - sums.overlap, above",
        "sums.predicted + sums.actual, above",
        definition("jaccard-sigmoid"),
    ),
    (
        "tversky-alpha-and-beta-swapped",
        "alpha * (sums.predicted - sums.overlap) + beta * (",
        "beta * (sums.predicted - sums.overlap) + alpha * (",
        definition("tversky-softmax"),
    ),
    (
        "generalized-not-squared",
        '{"inverse_square": 2, "inverse": 1',
        '{"inverse_square": 1, "inverse": 1',
        definition("generalized_dice-sigmoid"),
    ),
    (
        "generalized-inverse-squared",
        '"inverse": 1, "uniform": 0}[',
        '"inverse": 2, "uniform": 0}[',
        definition("generalized_dice-inverse-sigmoid"),
    ),
    (
        "generalized-uniform-weighted",
        '"uniform": 0}[',
        '"uniform": 1}[',
        definition("generalized_dice-uniform-sigmoid"),
    ),
    (
        "generalized-absent-always-counts",
        "float(count_absent))",
        "1.0)",
        hard("classes_absent_from_the_target[generalized_dice-sigmoid]"),
    ),
    (
        "generalized-commonest-instead-of-rarest",
        "actual.where(present, torch.inf).amin(1",
        "actual.where(present, 0.0).amax(1",
        definition("generalized_dice-sigmoid"),
    ),
    (
        "smooth-pair-not-kept-apart",
        "score = (numerator + above)",
        "score = (numerator + below)",
        definition("dice-sigmoid"),
    ),
    (
        "ratio-of-nothing-has-a-gradient-of-nan",
        "torch.where(defined, denominator, 1.0)",
        "denominator",
        hard("a_class_absent_from_both[dice-None]"),
    ),
    (
        "ratio-of-nothing-is-perfect",
        "return torch.where(defined, score, torch.nan)",
        "return torch.where(defined, score, 1.0)",
        hard("a_class_absent_from_both[dice-None]"),
    ),
    ("power-is-steep-near-0", "    low = 1e-6\n", "    low = 1e-9\n", NUMBERS + "test_the_slope_of_a_root_is_bounded"),
    (
        "power-without-a-straight-part",
        "return torch.where(loss > low, loss.clamp(min=low) ** gamma, loss * low ** (gamma - 1))",
        "return loss.clamp(min=0) ** gamma",
        NUMBERS + "test_the_slope_of_a_root_is_bounded",
    ),
    (
        "logarithm-clamps-small-scores",
        "score.clamp(min=torch.finfo(score.dtype).tiny)",
        "score.clamp(min=1e-2)",
        [hard("classes_absent_from_the_target[log_dice-sigmoid]"), definition("log_dice-sigmoid")],
    ),
)
mutate(
    "losses/dice.py",
    (
        "log-dice-without-gamma",
        "dice_score(sums, self.smooth), self.gamma)",
        "dice_score(sums, self.smooth))",
        definition("log_dice-root-sigmoid"),
    ),
    (
        "log-cosh-of-twice-the-loss",
        "torch.expm1(-2 * loss.abs()) / 2)",
        "torch.expm1(-2 * loss.abs()) / 3)",
        definition("log_cosh_dice-sigmoid"),
    ),
    (
        "generalized-penalty-hidden-by-nan",
        "loss.where(sums.actual > 0, 0.0) if",
        "loss if",
        FAMILY + "test_the_penalty_of_a_generalized_loss_without_smoothing",
    ),
    (
        "generalized-absent-policy-dropped",
        'count_absent = self.absent.rule == "smooth"',
        "count_absent = True",
        hard("classes_absent_from_the_target[generalized_dice-softmax]"),
    ),
)
mutate(
    "losses/tversky.py",
    (
        "focal-tversky-without-gamma",
        "power(super().per_class(sums), self.gamma)",
        "super().per_class(sums)",
        definition("focal_tversky-sigmoid"),
    ),
    (
        "log-jaccard-without-gamma",
        "jaccard_score(sums, self.smooth), self.gamma)",
        "jaccard_score(sums, self.smooth))",
        definition("log_jaccard-root-sigmoid"),
    ),
    (
        "log-tversky-without-gamma",
        "self.alpha, self.beta, self.smooth), self.gamma)",
        "self.alpha, self.beta, self.smooth))",
        definition("log_tversky-sharp-sigmoid"),
    ),
    (
        "log-tversky-weighs-errors-alike",
        "minus_log(tversky_score(sums, self.alpha, self.beta,",
        "minus_log(tversky_score(sums, self.alpha, self.alpha,",
        definition("log_tversky-softmax"),
    ),
    (
        "tversky-like-smp-raises-classes",
        "    if gamma != 1:\n",
        "    if False:\n",
        PRESETS + "test_refuses",
    ),
    (
        "tversky-accepts-squares",
        "    if loss.squared:\n",
        "    if False:\n",
        REFUSALS + "test_settings_that_exclude_each_other",
    ),
)
mutate(
    "losses/overlap.py",
    (
        "overlap-squared-dropped",
        "if self.squared and sums.predicted_squares is not None",
        "if False and sums.predicted_squares is not None",
        definition("dice-squared-sigmoid"),
    ),
    (
        "overlap-minimum-dropped",
        'if self.overlap == "minimum" and sums.minimum is not None',
        "if False and sums.minimum is not None",
        definition("dice-minimum-sigmoid"),
    ),
    (
        "overlap-minimum-not-required",
        'minimum=self.overlap == "minimum", absent',
        "minimum=False, absent",
        definition("jaccard-minimum-sigmoid"),
    ),
    (
        "overlap-excluded-classes-count",
        "        if self.exclude_classes:\n",
        "        if False:\n",
        definition("jaccard-softmax"),
    ),
    (
        "overlap-weights-of-other-classes",
        "weights = None if weights is None else weights[included]",
        "weights = None if weights is None else weights[: len(included)]",
        [definition("dice-softmax"), FAMILY + "TestInvariances::test_classes_relabelled[dice-sigmoid]"],
    ),
    (
        "overlap-weights-dropped",
        "return self.reduce_classes(*self.class_losses(pooled), weights)",
        "return self.reduce_classes(*self.class_losses(pooled), None)",
        definition("dice-softmax"),
    ),
    (
        "overlap-sum-without-weights",
        "(1.0 if weights is None else weights)).sum()",
        "1.0).sum()",
        PRESETS + "TestMonai::test_weights",
    ),
    (
        "overlap-table-shows-what-is-left-out",
        "DeferredReduction.ready(loss.where(kept, torch.nan))",
        "DeferredReduction.ready(loss)",
        "losses/test_dice_loss.py::test_reductions_agree",
    ),
    (
        "overlap-penalty-dropped",
        "return self.absent.loss(loss, sums), self.absent",
        "return loss, self.absent",
        hard("classes_absent_from_the_target[dice-sigmoid]"),
    ),
    (
        "overlap-shape-of-a-formula-unchecked",
        "if loss.shape != sums.overlap.shape:",
        "if False:",
        COMPOUND + "TestALossOfOnesOwn",
    ),
    (
        "overlap-across-ranks-dropped",
        "return pool_and_reduce([sums], self.pool, formula, across_ranks=self.across_ranks)",
        "return pool_and_reduce([sums], self.pool, formula)",
        RANKS + "test_one_message_or_none",
    ),
)
mutate(
    "functional/absent_classes.py",
    (
        "absent-ignored-class-counts",
        "kept = (sums.count > 0) & (",
        "kept = (",
        FAMILY + "TestInvariances::test_an_ignored_image_does_not_dilute_the_mean",
    ),
    ("absent-undefined-counts", "(~score.isnan() | broken)", "(score == score)", hard("a_diverged_network_is_seen")),
    (
        "absent-skip-dropped",
        'if self.rule == "skip" else kept',
        "if False else kept",
        hard("classes_absent_from_the_target[dice-sigmoid]"),
    ),
    (
        "absent-skip-hides-nan",
        "kept & ((sums.actual > 0) | broken)",
        "kept & (sums.actual > 0)",
        hard("a_diverged_network_is_seen_in_a_class_that_is_skipped"),
    ),
    (
        "absent-penalty-not-a-mean",
        "sums.absent_nll / sums.count.clamp(min=torch.finfo(loss.dtype).tiny)",
        "sums.absent_nll",
        hard("classes_absent_from_the_target[dice-softmax]"),
    ),
    (
        "absent-penalty-of-present-classes",
        "return torch.where(sums.actual > 0, loss,",
        "return torch.where(sums.actual < 0, loss,",
        hard("classes_absent_from_the_target[jaccard-softmax]"),
    ),
)
mutate(
    "functional/reduction.py",
    (
        "pool-all-keeps-classes-apart",
        '    if pool == "all":\n',
        "    if False:\n",
        "losses/test_dice_loss.py::test_equals_the_definition",
    ),
    (
        "pool-image-is-the-batch",
        '    if pool == "image":\n        return sums\n',
        "",
        "losses/test_dice_loss.py::test_equals_the_definition",
    ),
    (
        "mean-divided-by-the-number",
        ".sum(), weight.sum()",
        ".sum(), kept.sum().to(values.dtype)",
        FAMILY + "TestInvariances::test_scale_of_class_weights",
    ),
    (
        "mean-of-nothing-is-nan",
        "total / torch.where(norm > 0, norm, 1.0))",
        "total / norm)",
        hard("nothing_to_learn_from"),
    ),
    (
        "mean-adds-what-is-left-out",
        "(values.where(kept, 0.0) * weight).sum()",
        "(values * weight).sum()",
        hard("a_class_absent_from_both[dice-None]"),
    ),
    (
        "ranks-send-in-evaluation",
        "and dist.is_initialized() and torch.is_grad_enabled() else",
        "and dist.is_initialized() else",
        RANKS + "test_one_message_or_none",
    ),
    (
        "ranks-gradient-not-scaled",
        "return grad[0] * dist.get_world_size()",
        "return grad[0]",
        RANKS + "test_equal_to_one_process",
    ),
    ("ranks-each-on-its-own", "    if not across_ranks:\n", "    if True:\n", RANKS + "test_equal_to_one_process"),
    (
        "ranks-sums-in-the-wrong-order",
        "rest = iter(sums)\n    return [",
        "rest = iter(sums[::-1])\n    return [",
        "losses/test_deep_supervision.py::test_is_the_mean_of_the_losses_of_the_levels",
    ),
)
# Losses per pixel.
mutate(
    "losses/base.py",
    (
        "pixel-mean-divides-by-all-planes",
        "pixels = pooled.actual if pooled.exclusive else pooled.count",
        "pixels = pooled.count",
        definition("cross_entropy-softmax"),
    ),
    (
        "pixel-mean-sum-without-class-weights",
        "(self.per_class(pooled) * weights).sum(1), (pixels",
        "self.per_class(pooled).sum(1), (pixels",
        definition("focal-softmax"),
    ),
    (
        "pixel-mean-divisor-without-class-weights",
        "(pixels * weights).sum(1)",
        "pixels.sum(1)",
        definition("cross_entropy-softmax"),
    ),
    (
        "sums-ignore-nothing",
        "            ignore_index=self.ignore_index,\n            weight=weight,",
        "            ignore_index=None,\n            weight=weight,",
        duties("DiceLoss"),
    ),
    (
        "sums-drop-the-weight",
        "            weight=weight,\n            annotated=annotated,\n            required",
        "            weight=None,\n            annotated=annotated,\n            required",
        weighted("JaccardLoss"),
    ),
    (
        "sums-drop-annotated",
        "            annotated=annotated,\n            required",
        "            annotated=None,\n            required",
        annotated("TverskyLoss"),
    ),
    (
        "sums-required-dropped",
        "            required=self.required_sums,\n",
        "",
        hard("classes_absent_from_the_target[dice-sigmoid]"),
    ),
    (
        "loss-in-the-dtype-of-the-logits",
        "dtype = torch.promote_types(logits.dtype, torch.float32)\n        return self.deferred_from_sums",
        "dtype = logits.dtype\n        return self.deferred_from_sums",
        duties("DiceLoss"),
    ),
    (
        "logits-rounded-to-half",
        "        sums = overlap_sums(\n            logits,",
        "        sums = overlap_sums(\n            logits.bfloat16().to(logits.dtype),",
        definition("focal-softmax"),
    ),
    (
        "forward-drops-maps",
        "annotated=annotated, maps=maps)])\n        return loss",
        "annotated=annotated)])\n        return loss",
        BOUNDARY + "TestInvariances::test_given_maps_are_taken",
    ),
    (
        "maps-given-are-computed-again",
        "if maps is not None and name in maps:",
        "if False:",
        BOUNDARY + "TestInvariances::test_given_maps_are_taken",
    ),
    ("maps-shape-unchecked", "if tuple(values.shape) != shape:", "if False:", MAPS + "TestMapOfABatch"),
    (
        "maps-integer-planes-read-as-ids",
        "if planes and reader.holds_ids(target):",
        "if False:",
        MAPS + "TestMapOfABatch",
    ),
    (
        "maps-other-classes-accepted",
        "if reader.classes is not None and reader.classes != classes:",
        "if False:",
        BOUNDARY + "test_refuses_what_does_not_fit_the_logits",
    ),
    (
        "plain-module-gets-integers",
        "        target = target.to(logits.dtype) if target.shape == logits.shape else target.long()\n",
        "        target = target\n",
        COMPOUND + "TestAnyModule::test_planes_and_ids_of_small_dtypes",
    ),
    (
        "unknown-settings-accepted",
        "        if not settings:\n            return\n        names",
        "        return\n        names",
        COMPOUND + "test_an_unknown_setting_is_refused",
    ),
    (
        "class-weights-of-any-number",
        "    if weights.numel() != classes:\n",
        "    if False:\n",
        REFUSALS + "test_class_weights_of_another_number",
    ),
)
mutate(
    "losses/cross_entropy.py",
    (
        "ce-smoothing-over-two-classes",
        "(sums.nll.shape[1] if sums.exclusive else 2)",
        "2",
        definition("cross_entropy-smoothed-softmax"),
    ),
    (
        "ce-smoothing-without-the-background",
        "if sums.exclusive or sums.absent_nll is None else sums.all_nll + sums.absent_nll",
        "if True else sums.all_nll",
        definition("cross_entropy-smoothed-sigmoid"),
    ),
    (
        "ce-smoothing-added",
        "return (1 - share) * sums.nll + share",
        "return sums.nll + share",
        definition("cross_entropy-smoothed-softmax"),
    ),
    (
        "focal-alpha-dropped",
        "focal=Focal(self.gamma, self.alpha)",
        "focal=Focal(self.gamma)",
        definition("focal-alpha-sigmoid"),
    ),
    (
        "focal-gamma-dropped",
        "focal=Focal(self.gamma, self.alpha)",
        "focal=Focal(2.0, self.alpha)",
        definition("focal-root-softmax"),
    ),
    (
        "focal-alpha-with-a-softmax",
        'if alpha is not None and self.activation == "softmax":',
        "if False:",
        REFUSALS + "test_settings_that_exclude_each_other",
    ),
    ("top-k-rounded-up", "* self.k + 1e-9).floor()", "* self.k + 1e-9).ceil()", definition("top_k-half-sigmoid")),
    ("top-k-of-no-pixel", ".floor().clamp(min=1).long()", ".floor().long()", definition("top_k-sigmoid")),
    ("top-k-easiest", ".sort(1, descending=True)", ".sort(1, descending=False)", definition("top_k-half-softmax")),
    (
        "top-k-ignores-nothing",
        "            ignore_index=self.ignore_index,\n            weight",
        "            ignore_index=None,\n            weight",
        duties("TopKCrossEntropyLoss"),
    ),
    (
        "top-k-drops-the-weight",
        "            weight=weight,\n            annotated=annotated,\n        )\n        cost",
        "            annotated=annotated,\n        )\n        cost",
        weighted("TopKCrossEntropyLoss"),
    ),
    (
        "top-k-drops-annotated",
        "            annotated=annotated,\n        )\n        cost",
        "        )\n        cost",
        annotated("TopKCrossEntropyLoss"),
    ),
    (
        "top-k-class-weights-dropped",
        "weights = class_weights_of(self.class_weights, classes, pixels.logits)",
        "weights = class_weights_of(None, classes, pixels.logits)",
        definition("top_k-softmax"),
    ),
    (
        "top-k-in-half-precision",
        "        cost, weights = self._weighted(pixels, logits.shape[1])\n",
        "        cost, weights = self._weighted(pixels, logits.shape[1])\n        cost = cost.to(logits.dtype)\n",
        duties("TopKCrossEntropyLoss"),
    ),
    (
        "top-k-soft-pixel-by-class",
        "cost.sum(1, keepdim=True), (weights * pixels.target).sum(1, keepdim=True)",
        "cost, weights * pixels.target",
        FAMILY + "test_the_hardest_pixels_with_weights_of_pixel_and_class",
    ),
    (
        "top-k-mean-over-images-without-pixels",
        "return weighted_mean(mean.unsqueeze(1), kept.unsqueeze(1))",
        "return weighted_mean(mean.unsqueeze(1), torch.ones_like(kept).unsqueeze(1))",
        FAMILY + "TestInvariances::test_an_ignored_image_does_not_dilute_the_mean",
    ),
)
mutate(
    "losses/compound.py",
    ("compound-ignores-nothing", "ignore_index=first.ignore_index", "ignore_index=None", duties("DiceCELoss")),
    (
        "compound-drops-the-weight",
        "                weight=weight,\n                annotated=annotated,\n                required",
        "                annotated=annotated,\n                required",
        weighted("DiceCELoss"),
    ),
    (
        "compound-drops-annotated",
        "                annotated=annotated,\n                required",
        "                required",
        annotated("DiceFocalLoss"),
    ),
    (
        "compound-term-without-weight",
        "term.deferred_call(logits, target, weight, annotated=annotated, maps=term_maps)",
        "term.deferred_call(logits, target, annotated=annotated, maps=term_maps)",
        definition("compound-softmax"),
    ),
    (
        "compound-term-without-annotated",
        "term.deferred_call(logits, target, weight, annotated=annotated, maps=term_maps)",
        "term.deferred_call(logits, target, weight, maps=term_maps)",
        definition("compound-sigmoid"),
    ),
    (
        "compound-term-without-maps",
        "term.deferred_call(logits, target, weight, annotated=annotated, maps=term_maps)",
        "term.deferred_call(logits, target, weight, annotated=annotated)",
        BOUNDARY + "TestInACompound::test_different_maps_of_one_name_are_kept_apart",
    ),
    (
        "compound-weights-dropped",
        "torch.stack([self.weights[name] * value for",
        "torch.stack([value for",
        definition("compound-sigmoid"),
    ),
    (
        "compound-weight-0-is-computed",
        "if self.weights[name] != 0}",
        "}",
        COMPOUND + "test_a_term_of_weight_zero_is_not_computed",
    ),
    (
        "compound-one-focal-factor-for-all",
        "required.agrees(term.required_sums)",
        "True",
        definition("compound-sigmoid"),
    ),
    (
        "compound-maps-of-one-name-shared",
        "all(maps.get(key, own) == own for maps in all_maps)",
        "True",
        BOUNDARY + "TestInACompound::test_different_maps_of_one_name_are_kept_apart",
    ),
    (
        "dice-ce-weights-swapped",
        '{"dice": dice_weight, "ce": ce_weight}',
        '{"dice": ce_weight, "ce": dice_weight}',
        definition("dice_ce-weighted-sigmoid"),
    ),
    (
        "dice-ce-smoothing-dropped",
        "CrossEntropyLoss(label_smoothing=label_smoothing, **_pixel",
        "CrossEntropyLoss(**_pixel",
        definition("dice_ce-weighted-softmax"),
    ),
    (
        "dice-ce-class-weights-for-dice-alone",
        '"activation", "ignore_index", "class_weights", "across_ranks"',
        '"activation", "ignore_index", "across_ranks"',
        definition("dice_ce-softmax"),
    ),
    (
        "dice-focal-weight-dropped",
        '{"dice": dice_weight, "focal": focal_weight}',
        '{"dice": dice_weight, "focal": 1.0}',
        definition("dice_focal-alpha-sigmoid"),
    ),
    (
        "dice-focal-alpha-dropped",
        "FocalLoss(gamma=gamma, alpha=alpha, **_pixel",
        "FocalLoss(gamma=gamma, **_pixel",
        definition("dice_focal-alpha-sigmoid"),
    ),
    (
        "compound-ignored-label-taken-for-a-class",
        "if valid is not None and not bool(valid.all()):",
        "if False:",
        COMPOUND + "TestAnyModule::test_the_ignored_label_is_not_taken_for_a_label",
    ),
    ("compound-different-activations", "if len(set(found.values())) > 1:", "if False:", COMPOUND + "test_refuses"),
)
mutate(
    "losses/deep_supervision.py",
    (
        "deep-weights-not-normalized",
        "return [weight / sum(weights) for weight in weights]",
        "return list(weights)",
        DEEP + "test_is_the_mean_of_the_losses_of_the_levels",
    ),
    (
        "deep-levels-count-the-same",
        "tuple(0.5**level for",
        "tuple(1.0 for",
        DEEP + "test_is_the_mean_of_the_losses_of_the_levels",
    ),
    (
        "deep-level-of-weight-0-is-computed",
        "reversed(list(zip(levels, shares, strict=True))) if share]",
        "reversed(list(zip(levels, shares, strict=True)))]",
        DEEP + "test_a_level_of_weight_zero_is_not_computed",
    ),
    (
        "deep-drops-the-weight",
        "weight = None if weight is None else coarser_weight(weight, space)",
        "weight = None",
        weighted("DeepSupervision"),
    ),
    (
        "deep-drops-annotated",
        "                logits, own, weight, annotated=annotated, maps=maps\n",
        "                logits, own, weight, maps=maps\n",
        annotated("DeepSupervision"),
    ),
    (
        "deep-drops-maps",
        "                logits, own, weight, annotated=annotated, maps=maps\n",
        "                logits, own, weight, annotated=annotated\n",
        DEEP + "test_maps_go_to_levels_of_the_targets_size",
    ),
    (
        "deep-ignores-nothing",
        "                ignore_index=self.ignore_index,\n                reduce=self.reduce",
        "                reduce=self.reduce",
        DEEP + "test_ignored_pixels_do_no_harm_at_any_level",
    ),
    (
        "deep-reduce-dropped",
        "                reduce=self.reduce,\n",
        "",
        DEEP + "test_maps_go_to_levels_of_the_targets_size",
    ),
    (
        "deep-maps-of-soft-labels",
        'if not self.maps or self.reduce == "max" or soft or not len(target):',
        "if True:",
        DEEP + "test_maps_of_coarser_levels_know_small_objects",
    ),
    (
        "deep-ignored-label-as-probability",
        "own = own.masked_fill(own == self.ignore_index, 0)",
        "own = own",
        DEEP + "test_an_ignored_label_is_no_share_of_a_class",
    ),
    (
        "deep-any-order",
        '                raise ValueError(f"logits must come finest first',
        '                print(f"logits must come finest first',
        DEEP + "test_levels_in_the_wrong_order_are_refused",
    ),
)

# Losses of maps.
mutate(
    "losses/boundary.py",
    (
        "distance-ignores-nothing",
        "                ignore_index=self.ignore_index,\n                weight",
        "                ignore_index=None,\n                weight",
        duties("BoundaryLoss", "sigmoid"),
    ),
    (
        "distance-drops-the-weight",
        "                weight=weight,\n                annotated=annotated,\n            )\n            included",
        "                annotated=annotated,\n            )\n            included",
        weighted("HausdorffLoss"),
    ),
    (
        "distance-drops-annotated",
        "                annotated=annotated,\n            )\n            included",
        "            )\n            included",
        annotated("BoundaryLoss"),
    ),
    (
        "distance-mean-of-what-is-not-annotated",
        "        if pixels.annotated is not None:\n",
        "        if False:\n",
        BOUNDARY + "TestInvariances::test_a_class_that_is_not_annotated_is_left_out",
    ),
    (
        "distance-excluded-classes-count",
        "weighted_mean(mean[:, included], kept[:, included])",
        "weighted_mean(mean, kept)",
        BOUNDARY + "test_equals_the_definition",
    ),
    (
        "distance-map-of-excluded-classes",
        "            exclude_classes=self.exclude_classes,\n            spacing",
        "            spacing",
        BOUNDARY + "TestInACompound::test_terms_add_up_and_share_a_map",
    ),
    (
        "distance-spacing-dropped",
        "            spacing=spacing,  # type: ignore[arg-type]  # made a tuple there\n        )\n        self.classes, self.spacing = classes, self._distance",
        "        )\n        self.classes, self.spacing = classes, self._distance",
        BOUNDARY + "test_equals_the_definition",
    ),
    (
        "distance-in-half-precision",
        "            values = self.per_pixel(pixels,",
        '            values = self.per_pixel(__import__("dataclasses").replace(pixels, logits=pixels.logits.to(logits.dtype)),',
        duties("BoundaryLoss"),
    ),
    (
        "distance-in-the-dtype-of-the-logits",
        "            dtype = torch.promote_types(logits.dtype, torch.float32)\n            mean = self._mean",
        "            dtype = logits.dtype\n            mean = self._mean",
        duties("HausdorffLoss"),
    ),
    (
        "boundary-without-sign",
        "return pixels.probs() * distance",
        "return pixels.probs() * distance.abs()",
        BOUNDARY + "test_by_hand",
    ),
    (
        "hausdorff-without-alpha",
        "(distance.abs() / unit) ** self.alpha + (predicted",
        "(distance.abs() / unit) ** 2 + (predicted",
        BOUNDARY + "test_the_exponent_of_the_hausdorff_loss",
    ),
    ("hausdorff-without-the-prediction", " + (predicted.abs() / unit) ** self.alpha", "", BOUNDARY + "test_by_hand"),
    (
        "hausdorff-error-not-squared",
        "(p - pixels.target_planes()) ** 2 * distances",
        "(p - pixels.target_planes()).abs() * distances",
        BOUNDARY + "test_equals_the_definition",
    ),
    (
        "hausdorff-always-in-pixels",
        "        if self.relative:\n",
        "        if False:\n",
        BOUNDARY + "test_distances_as_shares_of_the_diagonal",
    ),
    (
        "hausdorff-softmax-cut-at-one-half",
        'if pixels.activation == "softmax" or not pixels.planes:\n            classes',
        "if False:\n            classes",
        BOUNDARY + "test_equals_the_definition",
    ),
    (
        "hausdorff-predicts-ignored-pixels",
        'planes = planes & (valid.all(1, keepdim=True) if pixels.activation == "softmax" else valid)',
        "planes = planes",
        BOUNDARY + "test_equals_the_definition",
    ),
    (
        "boundary-weight-replaces-the-weight",
        "            own = own * weight\n",
        "",
        [BOUNDARY + "TestBoundaryWeighted::test_is_the_loss_with_a_weight", weighted("BoundaryWeightedLoss")],
    ),
    (
        "boundary-weight-drops-annotated",
        "return self.loss.deferred_call(logits, target, own, annotated=annotated, maps=maps)",
        "return self.loss.deferred_call(logits, target, own, maps=maps)",
        annotated("BoundaryWeightedLoss"),
    ),
    (
        "boundary-weight-without-strength",
        '            strength=check_number("strength", strength),\n',
        "",
        BOUNDARY + "TestBoundaryWeighted::test_without_strength_it_is_the_loss",
    ),
    (
        "boundary-weight-twice",
        '        if "boundary_weight" in loss.maps:\n',
        "        if False:\n",
        BOUNDARY + "TestBoundaryWeighted::test_what_the_loss_needs_is_there_too",
    ),
)
mutate(
    "functional/target_maps.py",
    (
        "map-distance-with-the-other-sign",
        "return outside - inside",
        "return inside - outside",
        MAPS + "TestSignedDistance::test_by_hand",
    ),
    (
        "map-boundary-beside-ignored-pixels",
        "differs &= known[1:] & known[:-1]",
        "differs &= True",
        MAPS + "TestBoundaryDistance",
    ),
    (
        "map-tube-leaves-the-mask",
        "return skeleton & mask",
        "return skeleton",
        MAPS + "TestTubedSkeleton::test_a_tube_has_its_radius_and_stays_within_the_mask",
    ),
    ("map-skeletons-are-lost", "    if lost.size:\n", "    if False:\n", MAPS + "test_every_object_has_a_skeleton"),
    (
        "map-weight-not-of-a-bell",
        "np.exp(-((distance / self.width) ** 2) / 2)",
        "np.exp(-(distance / self.width) / 2)",
        MAPS + "TestMaps::test_the_weight_is_by_any_two_labels_of_ids_and_by_each_plane",
    ),
)
mutate(
    "functional/target_reader.py",
    (
        "map-of-ignored-pixels",
        "return masks if valid is None else masks & valid",
        "return masks",
        MAPS + "TestMaps::test_ignored_pixels_are_of_no_class",
    ),
    (
        "map-ignored-in-one-plane",
        "valid = valid.all(0, keepdim=True).expand(target.shape)",
        "valid = valid",
        MAPS + "TestMaps::test_an_ignored_soft_label_is_ignored_in_all_planes",
    ),
    (
        "map-soft-labels-cut-above-one-half",
        "else target >= 0.5",
        "else target > 0.5",
        MAPS + "TestMaps::test_cut_soft_labels_at_one_half",
    ),
    (
        "map-excluded-classes-are-computed",
        "if index not in self.exclude_classes:",
        "if True:",
        MAPS + "TestMaps::test_excluded_classes_are_zero",
    ),
)
mutate(
    "losses/lesion_wise.py",
    (
        "lesions-ignore-nothing",
        "                ignore_index=self.ignore_index,\n                weight",
        "                ignore_index=None,\n                weight",
        duties("LesionWiseLoss", "sigmoid"),
    ),
    ("lesions-drop-the-weight", "                weight=weight,\n", "", weighted("LesionWiseLoss")),
    (
        "lesions-drop-annotated",
        "                annotated=annotated,\n            )\n            classes",
        "            )\n            classes",
        annotated("LesionWiseLoss"),
    ),
    (
        "lesions-of-excluded-classes",
        "kept = kept & counted[own_class].unsqueeze(1)",
        "kept = kept",
        LESIONS + "TestEqualsTheDefinition::test_for_every_setting",
    ),
    (
        "lesions-class-weights-dropped",
        "        if self.loss.class_weights is not None:\n",
        "        if False:\n",
        LESIONS + "TestEqualsTheDefinition::test_for_every_setting",
    ),
    (
        "lesions-connectivity-dropped",
        "            connectivity=self.connectivity,\n",
        "",
        LESIONS + "TestEqualsTheDefinition::test_with_connectivity",
    ),
    (
        "lesions-always-nearest",
        "            regions=self.regions,\n",
        "",
        LESIONS + "TestEqualsTheDefinition::test_for_every_setting",
    ),
    (
        "lesions-required-sums-dropped",
        "regions.flatten(2), self.loss.required_sums)",
        "regions.flatten(2))",
        LESIONS + "TestEqualsTheDefinition::test_for_every_setting",
    ),
    (
        "lesions-in-the-dtype-of-the-logits",
        "dtype = torch.promote_types(logits.dtype, torch.float32)",
        "dtype = logits.dtype",
        duties("LesionWiseLoss"),
    ),
    (
        "lesions-of-any-pool",
        '        if loss.pool != "image":\n',
        "        if False:\n",
        LESIONS + "test_refuses_settings",
    ),
)
mutate(
    "kernels/regions.py",
    (
        "regions-shared-pixels-lost",
        "(summed[: self.regions] + summed[self.regions :][self.group])",
        "summed[: self.regions]",
        LESIONS + "TestEqualsTheDefinition::test_for_every_setting",
    ),
    (
        "regions-ids-not-gathered",
        "self.index if ids is None else self.index.gather(1, ids)",
        "self.index if ids is None else self.index[:, :1]",
        LESIONS + "TestEqualsTheDefinition::test_for_every_setting",
    ),
)
mutate(
    "functional/components.py",
    (
        "components-joined-by-sides-alone",
        "connectivity or mask.ndim",
        "connectivity or 1",
        "functional/test_components.py::test_pixels_that_touch_at_a_corner_are_one_component_by_default",
    ),
    (
        "components-nearest-dropped",
        '    if regions == "nearest":\n',
        "    if False:\n",
        "functional/test_components.py::test_equals_the_definition",
    ),
)
mutate(
    "losses/skeleton.py",
    (
        "cldice-one-iteration-more",
        "    for _ in range(iterations):\n",
        "    for _ in range(iterations + 1):\n",
        SKELETON + "TestSoftSkeleton::test_equals_the_definition",
    ),
    (
        "cldice-without-the-core",
        "    if not core:\n        return skeleton\n",
        "    return skeleton\n",
        SKELETON + "TestSoftSkeleton::test_the_core_is_what_is_too_wide",
    ),
    (
        "cldice-neighbours-of-ignored-pixels",
        "        valid = valid_pixels(target, self.ignore_index)\n",
        "        valid = None\n",
        SKELETON + "TestClDice::test_equals_the_definition",
    ),
    (
        "cldice-arithmetic-mean",
        "loss = 1 - 2 * tprec * tsens / both.where(both != 0, 1.0)",
        "loss = 1 - both / 2",
        SKELETON + "TestClDice::test_a_cut_costs_and_a_thinner_line_does_not",
    ),
    (
        "cldice-mean-of-two-zeros-is-nan",
        "both.where(both != 0, 1.0)",
        "both",
        SKELETON + "TestClDice::test_without_smoothing_two_zeros_have_the_mean_zero",
    ),
    (
        "cldice-counts-what-is-nowhere",
        "        if self.smooth[1] == 0:\n",
        "        if False:\n",
        SKELETON + "TestClDice::test_what_is_absent_scores_as_in_dice",
    ),
    (
        "cldice-smooth-dropped",
        "    below = below + smooth[1]\n",
        "",
        SKELETON + "TestClDice::test_equals_the_definition",
    ),
    (
        "cldice-ignores-nothing",
        "                ignore_index=self.ignore_index,\n                weight",
        "                ignore_index=None,\n                weight",
        duties("ClDiceLoss", "sigmoid"),
    ),
    (
        "cldice-drops-the-weight",
        "                weight=weight,\n                annotated=annotated,\n            )\n            if logits.ndim",
        "                annotated=annotated,\n            )\n            if logits.ndim",
        weighted("ClDiceLoss"),
    ),
    (
        "cldice-drops-annotated",
        "                annotated=annotated,\n            )\n            if logits.ndim",
        "            )\n            if logits.ndim",
        annotated("ClDiceLoss"),
    ),
    (
        "cldice-weights-of-other-classes",
        "weights = None if weights is None else weights[included]",
        "weights = None if weights is None else weights[: len(included)]",
        SKELETON + "TestClDice::test_class_weights_are_normalized",
    ),
    (
        "cldice-in-the-dtype-of-the-logits",
        "        dtype = torch.promote_types(logits.dtype, torch.float32)\n        mean = pool_and_reduce(sums",
        "        dtype = logits.dtype\n        mean = pool_and_reduce(sums",
        duties("ClDiceLoss"),
    ),
    (
        "cldice-pool-dropped",
        "mean = pool_and_reduce(sums, self.pool, formula",
        'mean = pool_and_reduce(sums, "batch", formula',
        SKELETON + "TestClDice::test_equals_the_definition",
    ),
    (
        "cldice-absent-dropped",
        "kept = self.absent.kept(loss, precision)",
        'kept = AbsentPolicy("smooth").kept(loss, precision)',
        SKELETON + "TestClDice::test_an_absent_class_can_be_left_out",
    ),
    (
        "skeleton-recall-is-precision",
        "            alpha=0.0,\n            beta=1.0,",
        "            alpha=1.0,\n            beta=0.0,",
        SKELETON + "TestSkeletonRecall::test_equals_the_definition",
    ),
    (
        "skeleton-recall-drops-the-weight",
        "skeleton = skeleton * (weight if",
        "skeleton = skeleton * 1 if True else (weight if",
        weighted("SkeletonRecallLoss"),
    ),
    (
        "skeleton-recall-drops-annotated",
        "return self.recall.deferred(logits, target, skeleton, annotated=annotated)",
        "return self.recall.deferred(logits, target, skeleton)",
        annotated("SkeletonRecallLoss"),
    ),
    (
        "skeleton-recall-radius-dropped",
        "            radius=self.radius,\n",
        "",
        SKELETON + "TestSkeletonRecall::test_only_the_tube_counts",
    ),
    (
        "skeleton-recall-pool-dropped",
        "            pool=pool,\n            exclude_classes=exclude_classes,\n            class_weights",
        "            exclude_classes=exclude_classes,\n            class_weights",
        SKELETON + "TestSkeletonRecall::test_equals_the_definition",
    ),
)
mutate(
    "kernels/pixels.py",
    (
        "transforms-unknown-to-exact-functions",
        "transforming = not torch.compiler.is_compiling() and is_transforming()",
        "transforming = False",
        TRANSFORMS + "test_gradient[DiceLoss]",
    ),
    (
        "transforms-save-the-argument-of-the-softmax",
        "        saved = ctx.function.save(x, output)\n",
        "        saved = x\n",
        TRANSFORMS + "test_gradient[DiceLoss]",
    ),
    (
        "transforms-without-forward-mode",
        "        ctx.save_for_forward(saved)\n",
        "",
        TRANSFORMS + "test_tangent[DiceLoss]",
    ),
    (
        "transforms-without-vmap",
        "    generate_vmap_rule = True\n",
        "",
        TRANSFORMS + "test_vmap[DiceLoss]",
    ),
    (
        "planes-of-ids-written-in-place",
        "return (self.target == classes).to(self.logits.dtype)",
        "return torch.zeros_like(self.logits).scatter_(1, self.target.long(), 1.0)",
        TRANSFORMS + "test_vmap[ClDiceLoss]",
    ),
)
mutate(
    "kernels/dispatch.py",
    (
        "transforms-of-the-fast-kernels",
        "if is_transforming() or torch.jit",
        "if torch.jit",
        [TRANSFORMS + "test_gradient[DiceLoss]", TRANSFORMS + "test_a_loss_of_other_tensors_within_a_transform"],
    ),
)
mutate(
    "kernels/checks.py",
    (
        "vmap-checks-values",
        'one.device.type == "cpu" and not is_vmapped(one)',
        'one.device.type == "cpu"',
        TRANSFORMS + "test_vmap[DiceLoss]",
    ),
    (
        "transforms-check-no-values",
        'one.device.type == "cpu" and not is_vmapped(one)',
        'one.device.type == "cpu" and not torch._C._are_functorch_transforms_active()',
        TRANSFORMS + "test_values_are_checked_where_they_can_be_read",
    ),
)
mutate(
    "kernels/overlap_sums.py",
    (
        "vmap-of-targets-checks-values",
        "if can_read_values(logits, target, *",
        "if can_read_values(logits, *",
        TRANSFORMS + "test_vmap[DiceLoss]",
    ),
)
mutate(
    "kernels/reference.py",
    (
        "tangents-of-sums-as-gradients",
        "        return _Total.value(tangent)\n",
        "        return tangent.sum(-1, dtype=wide_dtype(tangent)) * 2\n",
        TRANSFORMS + "test_tangent[DiceLoss]",
    ),
)
mutate(
    "kernels/regions.py",
    (
        "lesions-vmapped",
        "    if is_vmapped(regions):\n",
        "    if False:\n",
        TRANSFORMS + "test_vmap[LesionWiseLoss]",
    ),
)
mutate(
    "losses/each_image.py",
    (
        "maps-within-transforms",
        "if torch.compiler.is_compiling() or not is_transforming():",
        "if True:",
        TRANSFORMS + "test_gradient[BoundaryLoss]",
    ),
    (
        "maps-vmapped-over-the-wrong-axis",
        "batches = batch.movedim(in_dims[0], 0)",
        "batches = batch.movedim(in_dims[0], 1)",
        TRANSFORMS + "test_vmap[HausdorffLoss]",
    ),
)
mutate(
    "losses/base.py",
    (
        "torchscript-fails-without-a-reason",
        "    def __prepare_scriptable__(self)",
        "    def _prepare_scriptable(self)",
        TRANSFORMS + "test_torchscript_is_refused[DiceLoss]",
    ),
)
mutate(
    "losses/on_probabilities.py",
    (
        "on-probabilities-ignores-nothing",
        "pixels = checked_pixels(logits, target, activation=self.activation, ignore_index=self.ignore_index)",
        "pixels = checked_pixels(logits, target, activation=self.activation)",
        duties("OnProbabilities", "sigmoid"),
    ),
    (
        "on-probabilities-mean-with-ignored-pixels",
        "            if pixels.weight is None:\n",
        "            if True:\n",
        definition("on_probabilities-softmax"),
    ),
    (
        "on-probabilities-drops-the-weight",
        "        if weight is not None or annotated is not None:\n",
        "        if False:\n",
        weighted("OnProbabilities"),
    ),
    (
        "on-probabilities-of-nothing-is-nan",
        "self.loss(probs, planes) if probs.numel() else probs.sum()",
        "self.loss(probs, planes)",
        duties("OnProbabilities"),
    ),
    (
        "on-probabilities-of-nothing-is-nan-in-a-graph",
        "return torch.where(entries > 0, value, 0.0)",
        "return value",
        "losses/test_compile_and_export.py::test_a_loss_of_probabilities_compiles_with_any_number_of_ignored_pixels",
    ),
    (
        "on-probabilities-vmapped-with-ignored-pixels",
        "                if not torch.compiler.is_compiling() and is_vmapped(valid):\n",
        "                if False:\n",
        TRANSFORMS + "test_vmap[OnProbabilities]",
    ),
    (
        "on-probabilities-cannot-be-a-graph",
        "        if torch.compiler.is_compiling():\n",
        "        if False:\n",
        "losses/test_compile_and_export.py::test_a_loss_of_probabilities_compiles_with_any_number_of_ignored_pixels",
    ),
    (
        "on-probabilities-in-half-precision",
        "self.loss(probs, planes) if",
        "self.loss(probs.half(), planes.half()) if",
        duties("OnProbabilities"),
    ),
    (
        "on-probabilities-without-the-activation",
        "probs, planes = pixels.probs(), pixels.target_planes()",
        "probs, planes = pixels.logits, pixels.target_planes()",
        definition("on_probabilities-sigmoid"),
    ),
)
mutate(
    "losses/batch_loss.py",
    (
        "batch-loss-drops-the-weight",
        "loss(logits, batch.mask, batch.weight, annotated",
        "loss(logits, batch.mask, None, annotated",
        "test_module.py",
    ),
    (
        "batch-loss-drops-maps",
        "annotated=batch.annotated, maps=batch.maps)",
        "annotated=batch.annotated)",
        "test_module.py",
    ),
)
# What a network returns, how it is optimized, and what a training is made of.
mutate(
    "functional/model_outputs.py",
    (
        "features-are-levels",
        "level.ndim != expected or level.shape[1] != classes:",
        "level.ndim != expected:",
        "functional/test_model_outputs.py",
    ),
    (
        "larger-logits-are-resized",
        "got != whole and 2 * got > whole + 1",
        "got < whole and 2 * got > whole + 1",
        "functional/test_model_outputs.py",
    ),
    ("stacked-levels-are-volumes", "levels[0].ndim == axes + 3", "False", "functional/test_model_outputs.py"),
    ("auxiliary-heads-are-dropped", 'str(name).startswith("aux")', "False", "functional/test_model_outputs.py"),
)
mutate(
    "losses/deep_supervision.py",
    (
        "levels-of-other-classes",
        "if level.ndim > 1}) > 1",
        "if level.ndim > 1}) > 9",
        "losses/test_deep_supervision.py",
    ),
)
mutate(
    "module.py",
    (
        "auxiliary-weight-is-one",
        "self.auxiliary_weight * terms",
        "terms",
        "test_module.py::test_auxiliary_heads_are_trained",
    ),
    (
        "no-loss-of-a-step",
        "on_step=True, on_epoch=False",
        "on_step=False, on_epoch=True",
        "test_optimization.py::test_the_loss_of_a_step_is_logged",
    ),
    (
        "compiled-names-are-saved",
        "        without_compiled_names(self)\n",
        "",
        "test_optimization.py::test_compiled_networks_and_plain_ones_share_checkpoints",
    ),
)
mutate(
    "data/batch.py",
    ("any-third-part-is-ignored", "if names is None or len(names)", "if False and len(names)", "data/test_batch.py"),
)
mutate(
    "callbacks/step_outputs.py",
    ("nameless-cases-collide", "if not batch.has_names", "if False", "callbacks/test_case_table.py"),
    ("loaders-collide", "and len(loaders) > 1", "and len(loaders) > 9", "callbacks/test_case_table.py"),
)
mutate(
    "optimization.py",
    (
        "incomplete-accumulation",
        "wanted / min(wanted, int(batches) - first)",
        "1.0",
        "test_optimization.py::test_each_batch_of_a_step_has_the_same_share",
    ),
    (
        "rate-of-one-group",
        "for group in optimizer.param_groups:",
        "for group in optimizer.param_groups[:1]:",
        "test_optimization.py::test_groups_keep_the_ratio_of_their_rates",
    ),
    ("made-optimizers-are-called", "and not callable(factory)", "and False", "test_optimization.py::test_refuses"),
)
LENGTHS = "test_schedules.py::test_a_schedule"
mutate(
    "schedules.py",
    (
        "steps-are-epochs",
        'if interval == "step" and steps',
        "if False and steps",
        f"{LENGTHS}_without_a_length_has_that_of_the_training",
    ),
    (
        "warmup-is-no-part-of-the-length",
        "max(1, length() - first)",
        "length()",
        f"{LENGTHS}_without_a_length_has_that_of_the_training",
    ),
    (
        "epochs-taken-for-steps",
        "end == epochs and end < length",
        "False",
        f"{LENGTHS}_that_ends_before_the_training_is_refused",
    ),
    (
        "a-rate-of-zero",
        "isinstance(part, PolynomialLR) and end",
        "False and end",
        f"{LENGTHS}_that_ends_before_the_training_is_refused",
    ),
)
mutate(
    "cli/trainer_settings.py",
    (
        "no-training-at-all",
        "if value < least and not",
        "if False and not",
        "cli/test_trainer_settings.py::test_what_a_training_cannot_be_made_of",
    ),
)
# Presets.
mutate(
    "losses/compat.py",
    (
        "monai-smooth-swapped",
        "(smooth_nr * pixels_per_smooth, smooth_dr * pixels_per_smooth)",
        "(smooth_dr * pixels_per_smooth, smooth_nr * pixels_per_smooth)",
        PRESETS + "TestMonai::test_dice_and_jaccard",
    ),
    (
        "monai-batch-dropped",
        '"pool": "batch" if batch else "image",\n        "squared"',
        '"pool": "image",\n        "squared"',
        PRESETS + "TestMonai::test_dice_and_jaccard",
    ),
    (
        "monai-squared-dropped",
        '"squared": squared_pred,',
        '"squared": False,',
        PRESETS + "TestMonai::test_dice_and_jaccard",
    ),
    (
        "monai-background-counts",
        '"exclude_classes": () if include_background else (0,),\n        "class_weights": _monai',
        '"exclude_classes": (),\n        "class_weights": _monai',
        PRESETS + "TestMonai::test_dice_and_jaccard",
    ),
    (
        "monai-jaccard-smooth-not-halved",
        "monai_overlap(pixels_per_smooth=0.5, **arguments)",
        "monai_overlap(**arguments)",
        PRESETS + "TestMonai::test_dice_and_jaccard",
    ),
    (
        "monai-soft-labels-as-product",
        '"minimum" if soft_label and not squared_pred else "product"',
        '"product"',
        PRESETS + "TestMonai::test_soft_labels",
    ),
    (
        "monai-ignored-label-dropped",
        '"ignore_index": ignore_index,\n        "reduction": reduction',
        '"ignore_index": None,\n        "reduction": reduction',
        PRESETS + "TestMonai::test_ignored_ids",
    ),
    (
        "monai-reduction-dropped",
        '"reduction": reduction,',
        '"reduction": "mean",',
        PRESETS + "TestMonai::test_reductions",
    ),
    (
        "monai-weight-of-any-mean",
        'if reduction == "mean" and abs(mean - 1) > _ROUNDING:',
        "if False:",
        PRESETS + "test_refuses",
    ),
    (
        "monai-weight-of-the-background",
        "[*([] if include_background else [0.0]), *weights.tolist()]",
        "[*([] if include_background else [1.0]), *weights.tolist()]",
        PRESETS + "TestMonai::test_focal_without_background",
    ),
    (
        "monai-generalized-not-squared",
        '{"square": "inverse_square", "simple": "inverse"',
        '{"square": "inverse", "simple": "inverse"',
        PRESETS + "TestMonai::test_generalized",
    ),
    (
        "monai-dice-ce-weight-dropped",
        'return {**settings, "class_weights": weights}',
        "return settings",
        PRESETS + "TestMonai::test_dice_ce",
    ),
    (
        "monai-focal-alpha-dropped",
        '{"activation": "sigmoid", "alpha": alpha, "class',
        '{"activation": "sigmoid", "alpha": None, "class',
        PRESETS + "TestMonai::test_focal",
    ),
    (
        "smp-pool-by-image",
        '"pool": "batch",\n        "overlap": "minimum"',
        '"pool": "image",\n        "overlap": "minimum"',
        PRESETS + "TestSmp::test_overlap",
    ),
    (
        "smp-absent-classes-count",
        '        "absent": "skip",\n',
        "",
        PRESETS + "TestWhereAPeerIsWrong::test_smp_counts_an_absent_class_as_perfect",
    ),
    (
        "smp-classes-dropped",
        "excluded = tuple(index for index in range(total) if index not in counted)",
        "excluded = ()",
        PRESETS + "TestSmp::test_some_classes",
    ),
    (
        "smp-log-dice-smooth-not-doubled",
        "return smp_overlap(mode, pixels_per_smooth=pixels_per_smooth, **arguments)",
        "return smp_overlap(mode, **arguments)",
        PRESETS + "TestSmp::test_overlap",
    ),
    (
        "smp-focal-of-a-softmax",
        'activation = "sigmoid" if from_logits else None\n',
        'activation = ("softmax" if mode == "multiclass" else "sigmoid") if from_logits else None\n',
        PRESETS + "TestSmp::test_focal",
    ),
    (
        "nnunet-background-counts",
        "() if (regions if do_bg is None else do_bg) else (0,)",
        "()",
        PRESETS + "TestNnunet::test_as_its_trainer_builds_it_for_labels",
    ),
    (
        "nnunet-pool-dropped",
        '"pool": "batch" if batch_dice else "image",\n        "exclude',
        '"pool": "image",\n        "exclude',
        PRESETS + "TestNnunet::test_dice",
    ),
)
# The rest of `functional`.
mutate(
    "functional/target_resizing.py",
    (
        "coarser-means-of-ignored-pixels",
        "means = _mean(values.where(valid, 0.0), space) / share",
        "means = _mean(values, space) / share",
        RESIZING + "TestEqualsTheDefinition::test_means_of_planes",
    ),
    (
        "coarser-fractions-of-all-pixels",
        "return (result / share.where(share > 0, 1.0)).where(share > 0, float(ignore_index))",
        "return result.where(share > 0, float(ignore_index))",
        RESIZING + "TestEqualsTheDefinition::test_shares_of_ids",
    ),
    (
        "coarser-commonest-instead-of-rarest",
        "order = count.argsort(dim=1, descending=True, stable=True)",
        "order = count.argsort(dim=1, descending=False, stable=True)",
        RESIZING + "TestEqualsTheDefinition::test_rarest_of_ids",
    ),
    (
        "coarser-ignored-in-one-plane",
        "valid = None if valid is None else valid.all(1, keepdim=True)",
        "valid = valid",
        RESIZING + "TestEqualsTheDefinition::test_means_of_soft_labels",
    ),
    (
        "padding-in-a-dtype-too-small",
        "return F.pad(_widen_for(target, ignore_index), padding",
        "return F.pad(target, padding",
        RESIZING + "TestPadding",
    ),
)
mutate(
    "functional/hard_labels.py",
    (
        "hard-threshold-dropped",
        "cut = threshold if activation is None else _logit(threshold)",
        "cut = 0.5 if activation is None else 0.0",
        "functional/test_hard_labels.py",
    ),
    (
        "hard-prediction-of-logits-as-probabilities",
        "return logits > _logit(threshold)",
        "return logits > threshold",
        "functional/test_hard_labels.py",
    ),
    (
        "hard-counts-ignored-pixels",
        "return count_classes(logits, target, ignore_index)",
        "return count_classes(logits, target)",
        "functional/test_hard_labels.py",
    ),
)
mutate(
    "functional/micro_batches.py",
    (
        "micro-batches-count-buffers-twice",
        "return nullcontext(), _SwappedBuffers(before)",
        "return nullcontext(), nullcontext()",
        "test_micro_batches.py::test_running_statistics_see_each_image_once",
    ),
    (
        "micro-batches-random-numbers-differ",
        "preserve_rng_state=True",
        "preserve_rng_state=False",
        "test_micro_batches.py::test_dropout_is_replayed",
    ),
    (
        "micro-batches-unequal",
        "image.tensor_split(-(-len(image) // micro_batch_size))",
        "image.split(micro_batch_size)",
        "test_micro_batches.py::test_micro_batches_are_as_equal_as_can_be",
    ),
    (
        "micro-batches-buffers-not-restored",
        "            buffer.data = data\n",
        "            pass\n",
        "test_micro_batches.py::test_running_statistics_see_each_image_once",
    ),
)
mutate(
    "metrics.py",
    (
        "metric-threshold-dropped",
        "threshold=self.threshold, ignore_index",
        "threshold=0.5, ignore_index",
        "test_metrics.py::test_binary_with_a_threshold",
    ),
    (
        "metric-ignores-nothing",
        "threshold=self.threshold, ignore_index=self.ignore_index",
        "threshold=self.threshold, ignore_index=None",
        "test_metrics.py::test_by_hand",
    ),
    (
        "metric-pooled-by-image",
        '        if self.pool == "dataset":\n            self.overlap',
        "        if False:\n            self.overlap",
        "test_metrics.py::test_pooled_over_the_data_set",
    ),
    (
        "metric-absent-classes-have-a-score",
        "return score, self.absent.kept(score, sums)",
        "return score, score == score",
        "test_metrics.py::test_the_policy_for_a_class_absent_from_the_target",
    ),
    (
        "metric-excluded-classes-have-a-score",
        "score = score.index_fill(0, excluded, torch.nan)",
        "score = score",
        "test_metrics.py::test_excluded_classes_have_no_score",
    ),
    (
        "metric-sums-in-floating-point",
        "(score.where(kept, 0.0) * _UNITS_PER_SCORE).round().long().sum(0)",
        "(score.where(kept, 0.0).float() * _UNITS_PER_SCORE).sum(0).long()",
        "test_metrics.py::test_any_split_gives_the_same_bits",
    ),
    (
        "metric-macro-counts-what-was-never-seen",
        "mean = scores.nanmean()",
        "mean = scores.nan_to_num().mean()",
        "test_metrics.py::test_by_hand",
    ),
    (
        "metric-nan-is-left-out-of-the-average",
        "mean.where(~self._nan_classes[self._included].any(), torch.nan)",
        "mean",
        "test_metrics.py::test_a_nan_gives_no_plausible_score",
    ),
    (
        "metric-nan-is-a-wrong-pixel",
        "score.index_fill(0, excluded, torch.nan).where(~self._nan_classes, torch.nan)",
        "score.index_fill(0, excluded, torch.nan)",
        "test_metrics.py::test_a_nan_gives_no_plausible_score",
    ),
    (
        "metric-states-of-other-settings-are-equal",
        "hashlib.sha256(repr(settings)",
        "hashlib.sha256(repr(())",
        "test_metrics.py::test_other_settings_share_no_state_in_a_collection",
    ),
    (
        "metric-weights-are-equal",
        "weight = actual.where(actual.sum(1, keepdim=True) > 0, 1)",
        "weight = torch.ones_like(actual)",
        "test_metrics.py::test_averages_by_hand",
    ),
    (
        "metric-micro-counts-excluded-classes",
        "values[:, self._included].sum(1, keepdim=True)",
        "values.sum(1, keepdim=True)",
        "test_metrics.py::test_equals_torchmetrics_where_it_is_right",
    ),
)
mutate(
    "metric_inputs.py",
    (
        "metric-inputs-are-logits",
        "probs = logits.softmax(1) if exclusive else logits.sigmoid()",
        "probs = logits",
        "test_metric_logging.py::test_logits_between_0_and_1_are_not_taken_for_probabilities",
    ),
    (
        "metric-inputs-do-not-ignore",
        "        metric.ignore_index = ignore_index\n",
        "        pass\n",
        "test_metric_logging.py::test_our_score_ignores_what_the_loss_ignores",
    ),
    (
        "metric-inputs-of-segmentation-do-not-ignore",
        "return preds * valid, target * valid",
        "return preds, target * valid",
        "test_metric_logging.py::test_metrics_of_segmentation_get_labels_without_the_ignored_pixels",
    ),
    (
        "metric-inputs-of-rankings-do-not-ignore",
        'return "ranking"',
        'return "multilabel"',
        "test_metric_logging.py::test_every_metric_of_torchmetrics_logs_and_resets_or_is_refused[MultilabelRankingLoss]",
    ),
    (
        "metric-inputs-keep-soft-labels",
        "if self.mask.is_floating_point() and has_planes:",
        "if False:",
        "test_metric_logging.py::test_soft_labels_are_made_hard_in_every_stage",
    ),
)
mutate(
    "metric_logging.py",
    (
        "metric-logging-leaves-nan-out",
        "if index not in excluded}",
        "if index not in excluded and not score.isnan()}",
        "test_metric_logging.py::test_a_class_without_a_score_is_nan_and_not_the_former_value",
    ),
    (
        "metric-logging-does-not-reset-at-the-start",
        "        own.reset()\n",
        "        pass\n",
        "test_metric_logging.py::test_an_interrupted_epoch_is_counted_once",
    ),
    (
        "metric-logging-one-suffix-for-all-loaders",
        'f"/dataloader_idx_{index}" if len(collections) > 1 else ""',
        'f"/dataloader_idx_0" if len(collections) > 1 else ""',
        "test_metric_logging.py::test_two_processes_log_the_same_of_two_loaders",
    ),
    (
        "metric-logging-mixes-loaders",
        "in collections[loader].items",
        "in collections[0].items",
        "test_metric_logging.py::test_each_loader_has_its_own_metrics",
    ),
    (
        "metric-logging-refuses-at-the-end-of-an-epoch",
        "                    self._probe(name, metric, arguments)\n",
        "                    pass\n",
        "test_metric_logging.py::test_metrics_that_are_refused_before_the_first_step",
    ),
    (
        "metric-logging-remembers-the-sanity-check",
        "(copy_without_hooks(metric) if self.trainer.sanity_checking else metric).compute()",
        "metric.compute()",
        "test_metric_logging.py::test_the_check_before_a_training_is_no_minimum_of_it",
    ),
    (
        "metric-logging-takes-minus-1-for-a-score",
        "value = value.where(value >= 0, torch.nan)",
        "pass",
        "test_metric_logging.py::test_a_class_that_mean_iou_has_not_seen_is_no_score_of_minus_1",
    ),
)
# The sums: the reference, and the other implementations against it.
mutate(
    "kernels/reference.py",
    (
        "sums-added-in-float32",
        "block.sum(-1, dtype=wide_dtype(x))",
        "block.sum(-1).to(wide_dtype(x)).float()",
        SUMS + "test_sums_do_not_stop_at_2_to_the_24",
    ),
    (
        "sums-of-a-class-in-float32",
        "zeros = like.new_zeros(like.shape[:2], dtype=wide_dtype(like))",
        "zeros = like.new_zeros(like.shape[:2])",
        SUMS + "test_sums_do_not_stop_at_2_to_the_24",
    ),
    (
        "sums-overlap-without-weight",
        "overlap, actual = add(_weighted(p * t, w)), add(",
        "overlap, actual = add(p * t), add(",
        SUMS + "test_pixel_weights",
    ),
    (
        "sums-weight-of-the-first-class",
        "w if w.shape[1] == 1 else w.gather(1, ids)",
        "w[:, :1]",
        SUMS + "test_pixel_weights",
    ),
    ("sums-minimum-is-product", "torch.minimum(p, t)", "p * t", SUMS + "test_equals_the_definition"),
    (
        "sums-complement-by-subtraction",
        "return torch.where(likely, softplus(z - others), -torch.log1p(-p.masked_fill(likely, 0)))",
        "return -log(1 - p)",
        SUMS + "test_certain_pixels_are_exact_in_float32",
    ),
    (
        "sums-focal-of-the-wrong-class",
        "front * t * present + back * (1 - t) * absent",
        "back * t * present + front * (1 - t) * absent",
        SUMS + "test_any_focal_factor",
    ),
    (
        "sums-focal-steep-near-0",
        "(-torch.expm1(-nll)).clamp(min=torch.finfo(nll.dtype).tiny) ** gamma",
        "(-torch.expm1(-nll)) ** gamma",
        NUMBERS + "test_certain_probabilities_stay_finite",
    ),
    (
        "sums-of-classes-not-annotated",
        "    if annotated is None:\n        return sums\n    return sums.map",
        "    return sums\n    return sums.map",
        SUMS + "test_classes_that_are_not_annotated",
    ),
    (
        "sums-gradient-half",
        "return grad[0].to(ctx.dtype).unsqueeze(-1).expand(ctx.shape)",
        "return 0.5 * grad[0].to(ctx.dtype).unsqueeze(-1).expand(ctx.shape)",
        SUMS + "test_gradients_once_and_twice",
    ),
    (
        "sums-squares-of-soft-labels",
        'more["actual_squares"] = add(_weighted(t * t, w)) if soft else actual',
        'more["actual_squares"] = actual',
        SUMS + "test_equals_the_definition",
    ),
)
mutate(
    "kernels/pixels.py",
    (
        "pixels-in-half-precision",
        "z = z if z.dtype == torch.float64 else z.float()",
        "z = z",
        duties("CrossEntropyLoss", "None"),
    ),
    (
        "pixels-ignored-times-0",
        "        z = z.where(valid, zero)\n",
        "        z = z * valid\n",
        SUMS + "test_ignored_pixels_may_hold_anything",
    ),
    (
        "pixels-ignored-label-stays",
        "        t = t.where(valid, torch.zeros((), dtype=t.dtype, device=t.device))\n",
        "",
        SUMS + "test_equals_the_definition",
    ),
    (
        "pixels-ignored-in-one-plane",
        "            valid = valid.all(1, keepdim=True)\n",
        "            pass\n",
        SUMS + "test_equals_the_definition",
    ),
    (
        "pixels-weight-of-ignored",
        "w = valid.to(z.dtype) if w is None else w.where(valid, zero)",
        "w = valid.to(z.dtype) if w is None else w",
        SUMS + "test_pixel_weights",
    ),
    (
        "pixels-background-without-the-others",
        "background = z.masked_fill(~merged, -torch.inf).logsumexp(1, keepdim=True)",
        "background = z[:, :1]",
        SUMS + "test_classes_that_are_not_annotated",
    ),
    (
        "pixels-sigmoid-gradient-rounds",
        "saved.sigmoid() * (-saved).sigmoid()",
        "saved.sigmoid() * (1 - saved.sigmoid())",
        SUMS + "test_certain_pixels_are_exact_in_float32",
    ),
    (
        "pixels-softmax-gradient-rounds",
        "p * torch.where(likely, g * others.sum(1, keepdim=True) - rest, g - whole)",
        "p * (g - whole)",
        SUMS + "test_certain_pixels_are_exact_in_float32",
    ),
    (
        "pixels-nll-rounds",
        "return softplus(others - own) + (own - own)",
        "return torch.logsumexp(z, 1, keepdim=True) - own",
        SUMS + "test_certain_pixels_are_exact_in_float32",
    ),
    (
        "pixels-infinity-hidden",
        "return softplus(others - own) + (own - own)",
        "return softplus(others - own)",
        BACKENDS + "test_a_diverged_net_yields_no_finite_sums",
    ),
    (
        "pixels-softplus-drops-digits",
        "F.softplus(z, threshold=40)",
        "F.softplus(z)",
        SUMS + "test_large_logits_in_float64",
    ),
    (
        "pixels-log-of-0",
        "p.clamp(min=torch.finfo(p.dtype).tiny).log()",
        "p.log()",
        SUMS + "test_certain_probabilities_have_finite_gradients",
    ),
)
mutate(
    "kernels/sums.py",
    (
        "label-wraps-around",
        "    return limits.min <= ignore_index <= limits.max\n",
        "    return True\n",
        SUMS + "test_a_label_that_the_dtype_cannot_hold_ignores_nothing",
    ),
    (
        "focal-factors-differ",
        "return self.focal is None or other.focal is None or self.focal == other.focal",
        "return True",
        SUMS + "test_one_pass_has_one_focal_factor",
    ),
)
mutate(
    "kernels/checks.py",
    (
        "check-planes-broadcast",
        '    if activation == "sigmoid" and not as_planes:\n',
        "    if False:\n",
        REFUSALS + "test_shapes_and_dtypes",
    ),
    (
        "check-ids-broadcast",
        "    if not (as_planes or as_ids):\n",
        "    if False:\n",
        REFUSALS + "test_shapes_and_dtypes",
    ),
    (
        "check-ids-of-floats",
        "    if as_ids and not as_planes and (target.is_floating_point() or target.dtype == torch.bool):\n",
        "    if False:\n",
        REFUSALS + "test_shapes_and_dtypes",
    ),
    (
        "check-softmax-of-one-channel",
        '    if activation == "softmax" and classes < 2:\n',
        "    if False:\n",
        REFUSALS + "test_shapes_and_dtypes",
    ),
    (
        "check-logits-of-integers",
        "    if not logits.is_floating_point():\n",
        "    if False:\n",
        REFUSALS + "test_shapes_and_dtypes",
    ),
    ("check-logits-without-space", "    if logits.ndim < 3:\n", "    if False:\n", REFUSALS + "test_shapes_and_dtypes"),
    (
        "check-no-tensor",
        "        if not isinstance(value, Tensor):\n",
        "        if False:\n",
        REFUSALS + "test_shapes_and_dtypes",
    ),
    (
        "check-weight-broadcasts",
        "    if weight is not None and tuple(weight.shape) not in (ids_shape, shape):\n",
        "    if False:\n",
        REFUSALS + "test_weights_of_pixels_and_classes",
    ),
    (
        "check-weight-of-integers",
        "    if weight is not None and not weight.is_floating_point():\n",
        "    if False:\n",
        REFUSALS + "test_weights_of_pixels_and_classes",
    ),
    (
        "check-weight-negative",
        "bool(((weight >= 0) & weight.isfinite()).all())",
        "True",
        SUMS + "test_refuses_values_out_of_range",
    ),
    (
        "check-annotated-broadcasts",
        "    if annotated is not None and (tuple(annotated.shape) != shape[:2] or annotated.dtype != torch.bool):\n",
        "    if False:\n",
        REFUSALS + "test_weights_of_pixels_and_classes",
    ),
    (
        "check-planes-out-of-range",
        "    if planes and not (low >= -ROUNDING and high <= 1 + ROUNDING):\n",
        "    if False:\n",
        REFUSALS + "test_values",
    ),
    (
        "check-ids-out-of-range",
        "    if not planes and not (low >= 0 and high < classes):\n",
        "    if False:\n",
        SUMS + "test_refuses_values_out_of_range",
    ),
    ("check-soft-labels-of-any-sum", "    if bool(wrong.any()):\n", "    if False:\n", REFUSALS + "test_values"),
    (
        "check-probabilities-of-logits",
        "        if low < -ROUNDING or high > 1 + ROUNDING:\n",
        "        if False:\n",
        REFUSALS + "test_values",
    ),
    (
        "check-softmax-twice",
        "if bool((logits.sum(1, dtype=torch.float32) - 1).abs().max() < 1e-2):",
        "if False:",
        REFUSALS + "test_values",
    ),
    (
        "check-sigmoid-of-a-mask",
        "elif bool(((logits == 0) | (logits == 1)).all()):",
        "elif False:",
        REFUSALS + "test_values",
    ),
)
mutate(
    "kernels/overlap_sums.py",
    (
        "several-outputs-accepted",
        "    if not isinstance(logits, Tensor):\n",
        "    if False:\n",
        REFUSALS + "test_a_network_with_several_outputs_is_sent_to_deep_supervision",
    ),
    (
        "values-unchecked-by-the-reference",
        "        check_values(logits, target, activation=activation, ignore_index=ignore_index, weight=weight)\n",
        "",
        SUMS + "test_refuses_values_out_of_range",
    ),
    (
        "shapes-unchecked",
        "        check_shapes(logits, target, activation=activation, weight=weight, annotated=annotated)\n        if annotated",
        "        if annotated",
        REFUSALS + "test_shapes_and_dtypes",
    ),
    (
        "logits-unchecked-by-backends",
        "        check_logits(logits, activation=spec.activation)\n",
        "        pass\n",
        REFUSALS + "test_values",
    ),
    (
        "minimum-of-hard-labels-missing",
        '        fields |= {"minimum": fields["overlap"]} if spec.required.minimum else {}\n',
        "",
        BACKENDS + "test_equals_the_reference_on_any_shape",
    ),
    (
        "weight-dropped-by-backends",
        "stacked = autograd.eager_sums(logits, target, weight, backend, spec)",
        "stacked = autograd.eager_sums(logits, target, None, backend, spec)",
        BACKENDS + "test_equals_the_reference_on_any_shape",
    ),
)
mutate(
    "kernels/autograd.py",
    (
        "second-derivative-of-a-backend",
        "        if torch.is_grad_enabled():\n            gradient = _reference",
        "        if False:\n            gradient = _reference",
        BACKENDS + "test_a_gradient_of_the_gradient",
    ),
    (
        "values-unchecked-by-blocked",
        "not BACKENDS[backend].CHECKS_VALUES",
        "False",
        SUMS + "test_refuses_values_out_of_range",
    ),
)
mutate(
    "kernels/dispatch.py",
    (
        "negated-views-read-as-they-are",
        " and not tensor.is_neg()\n",
        "\n",
        BACKENDS + "test_views_whose_values_differ_from_their_memory",
    ),
    (
        "strict-uses-the-reference",
        '    if _strict and _forced != "reference":\n',
        "    if False:\n",
        BACKENDS + "test_the_reference_computes_what_a_backend_does_not_support",
    ),
)
mutate(
    "kernels/torch_blocked.py",
    (
        "blocked-gradient-of-dice-alone",
        "        own -= by_nll * soft.others * soft.inv\n",
        "",
        BACKENDS + "test_equals_the_reference_on_any_shape",
    ),
    (
        "blocked-one-minus-p-by-subtraction",
        "        own -= by_nll * soft.others * soft.inv\n",
        "        own -= by_nll * (1 - soft.own * soft.inv)\n",
        BACKENDS + "test_a_certain_pixel_has_its_own_small_gradient",
    ),
    (
        "blocked-last-block-lost",
        "for start in range(0, z.shape[2], length):",
        "for start in range(0, max(z.shape[2] - length, 1), length):",
        BACKENDS + "test_at_the_ends_of_tiles_and_blocks",
    ),
    (
        "blocked-weight-dropped-in-the-gradient",
        "return gradient if block.weight is None else gradient.mul_(block.weight)\n\n\ndef _by_class",
        "return gradient\n\n\ndef _by_class",
        BACKENDS + "test_equals_the_reference_on_any_shape",
    ),
    (
        "blocked-gradient-not-copied-back",
        "gradient if flat.data_ptr() == gradient.data_ptr() else gradient.copy_(flat.view(gradient.shape))",
        "gradient",
        BACKENDS + "test_any_layout_in_memory",
    ),
    (
        "blocked-sums-of-any-target",
        "return form and set(spec.rows) <= _DICE_AND_CE and",
        "return set(spec.rows) <= _DICE_AND_CE and",
        BACKENDS + "test_every_form_of_target_has_its_sums",
    ),
)
mutate(
    "kernels/counts.py",
    (
        "counts-nan-as-a-class",
        "    predicted = torch.where(greatest.isnan(), logits.shape[1], predicted)\n",
        "",
        COUNTS + "test_equals_the_definition",
    ),
    (
        "counts-of-ignored-pixels",
        "predicted & valid, actual & valid, valid.sum(-1)",
        "predicted, actual & valid, valid.sum(-1)",
        COUNTS + "test_planes",
    ),
)
mutate(
    "kernels/native/__init__.py",
    (
        "native-strides-assumed",
        "        elif step != expected:\n            return None\n",
        "",
        BACKENDS + "test_any_layout_in_memory",
    ),
    (
        "native-gradient-not-copied-back",
        "return gradient if written is gradient else gradient.copy_(written)",
        "return gradient",
        BACKENDS + "test_any_layout_in_memory",
    ),
    (
        "native-probabilities-as-logits",
        "        spec.activation is not None\n        and can_read",
        "        can_read",
        SUMS + "test_equals_the_definition",
    ),
    (
        "native-memory-errors-pass",
        "    if call.invalid == _NO_MEMORY:\n",
        "    if False:\n",
        "kernels/test_native.py::test_no_memory_is_an_error_and_no_crash",
    ),
)
mutate(
    "kernels/native/sums.cpp",
    (
        "native-padding-counts",
        "to[j] = j < n ? R(1) : R(0);",
        "to[j] = R(1);",
        BACKENDS + "test_at_the_ends_of_tiles_and_blocks",
    ),
    (
        "native-ignored-logits-stay",
        "z_own[c * P + j] = ignored(c, j) ? R(0) : z_own[c * P + j];",
        "z_own[c * P + j] = z_own[c * P + j];",
        BACKENDS + "test_ignored_pixels_may_hold_anything",
    ),
    (
        "native-one-minus-p-by-subtraction",
        "const vec q = x >= unit ? S::load(rest + j) * share : unit - p, g = S::load(three + j);",
        "const vec q = unit - p, g = S::load(three + j);",
        BACKENDS + "test_a_certain_pixel_has_its_own_small_gradient",
    ),
)


# Probabilities that underflow, axes without classes or pixels, and settings of losses that are no state.
UNDERFLOW = NUMBERS + "test_backends_agree_where_probabilities_underflow"
mutate(
    "kernels/native/sums.cpp",
    (
        "underflow-native-counts-by-the-exponential",
        "to[at] = to[at] < LEAST * of[at] ? LEAST * of[at] : to[at];",
        "to[at] = to[at];",
        UNDERFLOW + "[native]",
    ),
    (
        "underflow-native-squares-stay-0",
        "{SQUARES, COUNT}, {MINIMUM, ACTUAL}}",
        "{MINIMUM, ACTUAL}}",
        UNDERFLOW + "[native]",
    ),
)
mutate(
    "kernels/torch_blocked.py",
    (
        "underflow-blocked-counts-by-the-exponential",
        "    torch.maximum(sums[:2], LEAST * sums[2:4], out=sums[:2])\n",
        "",
        UNDERFLOW + "[blocked]",
    ),
)
mutate(
    "kernels/reference.py",
    (
        "underflow-reference-counts-by-the-exponential",
        "    sums = sums if pixels.activation is None else _without_underflow(sums)\n",
        "",
        UNDERFLOW + "[reference]",
    ),
    (
        "underflow-probabilities-that-are-passed-are-never-0",
        "    sums = sums if pixels.activation is None else _without_underflow(sums)\n",
        "    sums = _without_underflow(sums)\n",
        NUMBERS + "test_an_absent_class_has_a_score_of_0_without_smoothing[native]",
    ),
    (
        "smoothing-loses-the-share-of-a-class-that-is-not-annotated",
        "    own = own * (classes / known.sum(1).clamp(min=1)).view(images, 1, 1)\n",
        "",
        FAMILY + "test_smoothing_spreads_a_label_over_the_annotated_classes",
    ),
    (
        "smoothing-of-pixels-whose-class-is-not-annotated",
        "own = known.gather(1, pixels.target.flatten(1).long()).view(pixels.target.shape)",
        "own = torch.ones_like(pixels.logits[:, :1])",
        FAMILY + "test_smoothing_spreads_a_label_over_the_annotated_classes",
    ),
    (
        "smoothing-of-soft-labels-that-are-not-annotated",
        "own = (pixels.target.to(known.dtype) * known.unsqueeze(2)).sum(1, keepdim=True)",
        "own = torch.ones_like(pixels.logits[:, :1])",
        FAMILY + "test_smoothing_spreads_a_label_over_the_annotated_classes",
    ),
)
mutate(
    "kernels/sums.py",
    (
        "underflow-gradient-ends-at-the-limit",
        "    return sums + (LEAST * number.detach() - sums.detach()).clamp(min=0)\n",
        "    return sums.clamp(min=LEAST * number)\n",
        UNDERFLOW + "[native]",
    ),
)
mutate(
    "losses/skeleton.py",
    (
        "underflow-cldice-counts-by-the-exponential",
        "            predicted = predicted if pixels.activation is None else at_least(predicted, count)\n",
        "",
        SKELETON + "TestClDice::test_a_network_predicts_some_of_an_absent_class_however_low_its_logits_are[-10000.0]",
    ),
    (
        "no-pixels-fail-in-cldice",
        "    if not probs.numel():\n",
        "    if False:\n",
        duties("ClDiceLoss"),
    ),
)
mutate(
    "kernels/regions.py",
    (
        "no-pixels-fail-in-lesion-wise",
        "regions.amax(2) if regions.shape[2] else",
        "regions.amax(2) if True else",
        duties("LesionWiseLoss"),
    ),
)
mutate(
    "kernels/checks.py",
    (
        "no-classes-have-a-loss-of-0",
        "    if logits.shape[1] == 0:\n",
        "    if False:\n",
        REFUSALS + "test_shapes_and_dtypes[logits-without-classes]",
    ),
)
SETTING = "losses/test_compile_and_export.py::test_class_weights_are_a_setting_and_no_state[DiceLoss]"
mutate(
    "losses/base.py",
    (
        "class-weights-are-state",
        "self.register_buffer(name, value, persistent=False)",
        "self.register_buffer(name, value)",
        SETTING,
    ),
    ("class-weights-of-old-states-are-refused", "    state.pop(prefix + name, None)\n", "    pass\n", SETTING),
)


# Checkpoints, and what is made of them.
mutate(
    "checkpoints.py",
    (
        "checkpoint-before-is-not-kept",
        "if target.stem in self.keep and target.is_file():",
        "if target.stem not in self.keep and target.is_file():",
        "test_checkpoints.py::test_the_former_one_stays",
    ),
    (
        "checkpoint-is-tried-once",
        "left = end - time.monotonic()",
        "left = 0.0",
        "test_checkpoints.py::test_a_disk_that_is_full_for_a_while",
    ),
    (
        "checkpoint-checksum-ignored",
        "(part := archive.testzip()) is not None",
        "(part := archive.testzip()) is archive",
        "test_checkpoints.py::TestNewest::test_the_one_before_one_that_is_damaged_within",
    ),
    (
        "checkpoint-before-the-last-is-preferred",
        'first = [folder / f"last{SUFFIX}", folder / f"last{FORMER}{SUFFIX}"]',
        'first = [folder / f"last{FORMER}{SUFFIX}", folder / f"last{SUFFIX}"]',
        "test_checkpoints.py::TestNewest::test_the_last",
    ),
)
mutate(
    "loading.py",
    (
        "loading-drops-built-in-targets",
        "return getattr(builtins, name)",
        "return None",
        "test_loading.py::test_directives",
    ),
    (
        "loading-fetches-pretrained-weights",
        'names = (*_PRETRAINED, "weights") if',
        "names = _PRETRAINED if",
        "test_loading.py::test_pretrained_weights_are_not_fetched",
    ),
    (
        "loading-trusts-every-target",
        "if not within(str(home)):",
        "if home is None:",
        "test_export.py::TestSafetensors::test_calls_nothing_but_what_is_trusted",
    ),
)
SETTINGS = "cli/test_training_settings.py::"
mutate(
    "schedules.py",
    (
        "plateau steps at each epoch, with old scores",
        "return int(trainer.check_val_every_n_epoch)",
        "return 1",
        SETTINGS + "test_a_plateau_counts_validations_not_epochs",
    ),
    (
        "plateau is restricted with any metric",
        'or not monitor.startswith("val/")',
        "",
        SETTINGS + "test_only_a_plateau_of_a_validation_is_restricted",
    ),
)
mutate(
    "cli/monitors.py",
    (
        "the largest loss is the best",
        'if mode in ("max", "min") and best is not None and mode != best:',
        "if False:",
        "cli/test_training_settings.py::test_a_mode_that_takes_the_worst_for_the_best",
    ),
    (
        "the largest distance is the best",
        'return "max" if higher else "min"',
        'return "max"',
        "cli/test_training_settings.py::test_a_mode_that_takes_the_worst_for_the_best",
    ),
)
mutate(
    "cli/monitors.py",
    (
        "monitors of a subclass are refused",
        "return bool(own) or type(module) is not SegmentationModule",
        "return bool(own)",
        SETTINGS + "test_what_a_subclass_logs_itself_is_accepted",
    ),
    (
        "monitors of a subclass end in a traceback",
        "if metric not in logged and metric in str(error):",
        "if metric in logged:",
        SETTINGS + "test_what_a_subclass_logs_itself_is_accepted",
    ),
    (
        "monitors may name any class",
        "if not isinstance(one, DiceScore) and",
        "if",
        SETTINGS + "test_names_that_are_logged_are_accepted",
    ),
    (
        "monitors of a validation need none",
        "if has_split and trainer.limit_val_batches != 0:",
        "if has_split:",
        SETTINGS + "test_watching_a_validation_needs_one",
    ),
)
mutate(
    "cli/optimizer_check.py",
    (
        "optimizer: the setting to blame is the first one",
        "blamed = [argument for argument, other in others.items() if other is None]",
        "blamed = list(given)",
        SETTINGS + "test_numbers_of_optimizer_and_schedule",
    ),
    (
        "optimizer: a step of a copy is taken for one of a training",
        "if _error_of(factory, build, lambda _: None) is None:",
        "if False:",
        SETTINGS + "test_any_optimizer_that_trains_is_accepted",
    ),
    (
        "optimizer: a schedule after a warm-up is not tried",
        "if isinstance(inner, partial):",
        "if False:",
        SETTINGS + "test_numbers_of_optimizer_and_schedule",
    ),
)
mutate(
    "callbacks/case_table.py",
    (
        "NaN logits are scored",
        "if values is not None and not brief and bool(values.isnan().any()):",
        "if False:",
        SETTINGS + "test_logits_that_are_nan_have_no_score",
    ),
)
mutate(
    "cli/config.py",
    (
        "a network that cannot be imported has no cause",
        "if target is not None and cause is not None:",
        "if False:",
        SETTINGS + "test_a_network_that_cannot_be_imported",
    ),
)
mutate(
    "cli/errors.py",
    (
        "a full disk is a traceback",
        "if error.errno not in _DISK:",
        "if True:",
        SETTINGS + "test_a_full_disk_is_one_line_and_loses_nothing",
    ),
)
TRAINER = "cli/test_trainer_settings.py::"
mutate(
    "cli/trainer_settings.py",
    (
        "a share of no batch of a validation ends in a traceback",
        'for split, count in {**counts, "overfit": batches}.items():',
        'for split, count in {"train": batches}.items():',
        TRAINER + "test_what_a_training_cannot_be_made_of",
    ),
    (
        "a negative norm clips nothing without a word",
        "or not clip >= 0",
        "",
        TRAINER + "test_what_a_training_cannot_be_made_of",
    ),
)
mutate(
    "cli/config.py",
    (
        "a word is a number for a callback",
        "and name in parameters and _takes_a_number(parameters[name])",
        "and False",
        TRAINER + "test_a_word_where_a_callback_takes_a_number",
    ),
    (
        "numbers that are none by default take words",
        'return bool(kinds) and kinds <= {"int", "float"}',
        "return False",
        TRAINER + "test_a_word_where_a_callback_takes_a_number",
    ),
    (
        "arguments of the Trainer that no file has need a plus",
        'if key in _MORE_OF_TRAINER and not argument.startswith("+"):',
        "if False:",
        TRAINER + "test_arguments_of_the_trainer_that_no_file_has",
    ),
)
mutate(
    "cli/experiment.py",
    (
        "callbacks that the Trainer turns off are refused",
        "if self.config.trainer.get(name) is False:",
        "if False:",
        TRAINER + "test_arguments_of_the_trainer_that_no_file_has",
    ),
    (
        "times of the Trainer are nodes of a config",
        '_convert_="all",',
        '_convert_="none",',
        TRAINER + "test_a_time_as_a_map",
    ),
)
mutate(
    "cli/run_folder.py",
    (
        "an evaluation that fails leaves its folder",
        "if files <= {CONFIG, TEMPLATE, FINGERPRINT}:",
        "if False:",
        TRAINER + "test_an_evaluation_needs_a_batch",
    ),
)
mutate(
    "metric_logging.py",
    (
        "metrics with hooks of a profiler cannot be copied",
        "copy = copy_without_hooks(metric)",
        "copy = metric.clone()",
        TRAINER + "test_a_profile_is_printed[pytorch]",
    ),
)
mutate(
    "cli/config.py",
    (
        "settings of the Trainer with a plus are refused",
        'return f"+{argument}" if known else argument',
        "return argument",
        TRAINER + "test_a_plus_is_neither_needed_nor_refused",
    ),
    (
        "settings of the Trainer that an older run lacks are refused",
        "or key in _trainer_settings()\n",
        "\n",
        TRAINER + "test_a_plus_is_neither_needed_nor_refused",
    ),
)
mutate(
    "cli/training_report.py",
    (
        "early stopping ends a training without a word",
        "callback.stopped_epoch >= trainer.current_epoch - 1",
        "False",
        TRAINER + "test_early_stopping_says_why",
    ),
    (
        "max_time ends a training without a word",
        "(callback.time_remaining() or 0.0) < 0",
        "False",
        TRAINER + "test_max_time_says_that_it_ended_the_training",
    ),
    (
        "profiles are not printed",
        "log.setLevel(logging.INFO)",
        "pass",
        TRAINER + "test_a_profile_is_printed",
    ),
)
mutate(
    "cli/adapt_checkpoint.py",
    (
        "resume with fewer steps than are trained does nothing",
        "if steps is not None and 0 <= steps < done:",
        "if False:",
        TRAINER + "test_max_steps_ends_within_an_epoch_and_resumes",
    ),
)
mutate(
    "cli/adapt_checkpoint.py",
    (
        "resume-moves-paths-of-other-folders",
        "value.startswith(old + os.sep)",
        "value.startswith(old)",
        "cli/test_adapt_checkpoint.py::test_callbacks_follow_a_folder_that_was_moved",
    ),
    (
        "resume-resets-a-lowered-rate",
        "if kept and state is not None and not rate_changed:",
        "if kept and state is not None and rate_changed:",
        "cli/test_adapt_checkpoint.py::test_a_rate_that_a_metric_has_lowered_stays",
    ),
    (
        "resume-starts-the-schedule-again",
        "for _ in range(steps):",
        "for _ in range(0):",
        "cli/test_adapt_checkpoint.py::test_settings_follow_in_every_form_of_configure_optimizers",
    ),
    (
        "resume-keeps-the-plateau-of-the-checkpoint",
        "return {**state, **counters}",
        "return {**state, **saved}",
        "cli/test_resume_settings.py::test_all_settings_at_once",
    ),
    (
        "resume-forgets-what-a-plateau-counted",
        "return {**state, **counters}",
        "return state",
        "cli/test_resume_settings.py::TestCounters::test_of_a_plateau",
    ),
    (
        "resume-compares-a-plateau-with-another-metric",
        'if saved.get("mode") != scheduler.mode or',
        "if",
        "cli/test_resume_settings.py::TestCounters::test_of_a_plateau",
    ),
    (
        "resume-counts-epochs-as-steps",
        'if interval == "step":',
        'if interval == "epoch":',
        "cli/test_adapt_checkpoint.py::test_another_schedule_interval_counts_what_is_trained",
    ),
    (
        "resume-forgets-the-epoch-that-ends",
        "+ int(ends and",
        "+ 0 * int(ends and",
        "cli/test_adapt_checkpoint.py::test_another_schedule_interval_counts_what_is_trained",
    ),
    (
        "resume-continues-a-plateau-one-epoch-late",
        'state is None or "num_bad_epochs" in state or',
        "state is None or",
        "cli/test_resume_settings.py::TestOptimizer::test_a_schedule_in_place_of_a_plateau",
    ),
    (
        "resume-uses-the-state-of-another-optimizer",
        'if "optimizer._target_" in changes:',
        'if "optimizer._target" in changes:',
        "cli/test_resume_settings.py::TestOptimizer::test_one_that_needs_another_state_starts_with_none_and_says_so",
    ),
    (
        "resume-ignores-what-the-optimizer-lacks",
        "if lacking else None",
        "if None else None",
        "cli/test_resume_settings.py::TestOptimizer::test_one_that_needs_another_state_starts_with_none_and_says_so",
    ),
    (
        "resume-ignores-other-groups",
        "if sizes[0] != sizes[1]:",
        "if not sizes:",
        "cli/test_adapt_checkpoint.py::test_other_groups_of_parameters_start_with_an_empty_state",
    ),
    (
        "resume-keeps-the-settings-of-callbacks",
        "    apply_callback_settings(checkpoint, callbacks, changes)\n",
        "",
        "cli/test_resume_settings.py::test_all_settings_at_once",
    ),
    (
        "resume-keeps-the-seed",
        'int(config["seed"]))',
        'int(saved["seed"]))',
        "cli/test_resume_settings.py::test_all_settings_at_once",
    ),
    (
        "resume-mixes-metrics-of-two-settings",
        'rank["metrics"] = {}',
        "pass",
        "cli/test_adapt_checkpoint.py::test_metrics_with_other_settings_forget_what_they_have_counted",
    ),
    (
        "resume-keeps-the-growth-of-the-scale",
        "if name in _GROWTH})",
        "if name not in _GROWTH})",
        "cli/test_adapt_checkpoint.py::test_growth_of_a_loss_scale_is_a_setting_and_the_scale_is_not",
    ),
    (
        "resume-continues-with-averaged-weights",
        'module.load_state_dict(checkpoint["current_model_state"])',
        "pass",
        "cli/test_resume_settings.py::TestWeights::test_averages_can_end",
    ),
    (
        "resume-lets-buffers-of-the-checkpoint-win",
        "    module.register_load_state_dict_pre_hook(",
        "    (lambda _: None)(",
        "cli/test_resume_settings.py::TestBuffersOfLosses::test_settings_win_and_state_stays",
    ),
    (
        "resume-takes-state-for-a-setting",
        "if prefix + name in state and _same(value, state[prefix + name]):",
        "if prefix + name in state:",
        "cli/test_resume_settings.py::TestBuffersOfLosses::test_settings_win_and_state_stays",
    ),
    (
        "resume-never-refuses-a-setting",
        "rule.effect if rule is not None and rule.refused else None",
        "None",
        "cli/test_resume_settings.py::test_refused_settings_leave_the_folder_as_it_was",
    ),
    (
        "resume-chooses-the-best-by-another-monitor",
        "if key in BEST and _has_best(checkpoint):",
        "if not key:",
        "cli/test_resume_settings.py::test_refused_settings_leave_the_folder_as_it_was",
    ),
    (
        "resume-mixes-gradients-of-two-batch-sizes",
        'rank and "gradients" in rank',
        'rank and "gradient" in rank',
        "cli/test_resume_settings.py::TestEpochs::test_between_optimizer_steps_batches_cannot_change",
    ),
    (
        "resume-with-fewer-epochs-than-are-trained",
        "and 0 <= epochs < trained:",
        "and 0 <= epochs < 0:",
        "cli/test_resume_settings.py::TestEpochs::test_fewer_than_are_trained",
    ),
)
mutate(
    "cli/config_consistency.py",
    (
        "resume-forgets-the-config-of-a-trained-run",
        "    def on_fit_end(",
        "    def on_fit_ends(",
        "cli/test_resume_settings.py::TestEpochs::test_a_run_that_has_nothing_to_train_keeps_the_new_settings",
    ),
)
mutate(
    "cli/setting_rules.py",
    (
        "commands-ignore-settings-of-training",
        "if any(fnmatchcase(key, pattern) for pattern in UNUSED[command]):",
        "if not key:",
        "cli/test_resume_settings.py::TestWithoutEffect::test_of_a_trained_run",
    ),
    (
        "resume-ignores-flags",
        'if text.startswith("-"):',
        'if text.startswith("/"):',
        "cli/test_resume_settings.py::TestWithoutEffect::test_of_a_single_run",
    ),
)
mutate(
    "cli/sweep.py",
    (
        "trials-lose-their-swept-values",
        "if override.key_or_group in swept:",
        "if not swept:",
        "cli/test_sweep.py::TestFailures::test_a_trial_keeps_what_is_swept",
    ),
)
mutate(
    "callbacks/save_on_interrupt.py",
    (
        "interrupt-saves-what-has-not-started",
        "or not self._started",
        "or self._handled",
        "callbacks/test_save_on_interrupt.py::test_a_training_that_fails_before_it_starts_leaves_the_checkpoint",
    ),
)
mutate(
    "callbacks/pruning.py",
    (
        "pruner-keeps-a-decision-of-other-settings",
        "and former == own",
        "and own == own",
        "cli/test_sweep.py::TestMedianPruner::test_remembers_its_best_score",
    ),
    (
        "pruner-keeps-scores-of-another-metric",
        "if former[:2] == own[:2]:",
        "if own:",
        "cli/test_sweep.py::TestMedianPruner::test_remembers_its_best_score",
    ),
)
mutate(
    "data/samplers.py",
    (
        "sampler-changes-the-order-within-an-epoch",
        "return self.other[1] if",
        "return self.entropy if",
        "test_resume.py::TestSeed::test_applies_from_the_next_epoch_on",
    ),
)
mutate(
    "data/datamodule.py",
    (
        "data-forgets-the-seed-of-the-next-epochs",
        '"next_seed": self._train_sampler.entropy',
        '"next_seed": self._train_sampler.seed_of(epoch.processed)',
        "test_resume.py::TestSeed::test_applies_from_the_next_epoch_on",
    ),
    (
        "data-resumes-an-epoch-without-an-end",
        "self.resumed_batches = max(0, batches - left)",
        "self.resumed_batches = None",
        "test_resume.py::test_an_epoch_that_resumes_with_another_batch_size_ends_as_any_other",
    ),
    (
        "data-resumes-an-epoch-without-a-batch",
        "left = max(1, (",
        "left = max(0, (",
        "test_resume.py::test_an_epoch_that_resumes_with_another_batch_size_ends_as_any_other",
    ),
)

# Commands, runs and sweeps.
mutate(
    "cli/run_folder.py",
    (
        "run-overwrites-a-folder",
        "path.mkdir()  # Fails",
        "path.mkdir(exist_ok=True)  # Fails",
        "cli/test_run_folder.py::test_folders_of_the_same_second_are_numbered",
    ),
    (
        "run-takes-weights-of-another-shape",
        "if key in saved and saved[key].shape != own[key].shape",
        "if key in saved and saved[key].ndim != own[key].ndim",
        "test_commands.py::TestResume::test_another_architecture",
    ),
)
mutate(
    "cli/config.py",
    (
        "override-of-any-name-is-taken",
        "override.is_add() or leaf in list(place.keys()) or key",
        "override.is_add() or leaf or key",
        "cli/test_config.py::TestApplyOverrides::test_the_rest_is_refused",
    ),
    (
        "schedule-ends-with-its-warm-up",
        "lambda total, first: max(1, total - first)",
        "lambda total, first: total - first",
        "test_schedules.py::test_the_catalogues_schedules_end_with_the_training",
    ),
)
mutate(
    "cli/command.py",
    (
        "override-merges-a-map",
        'if key in _MAPS and value.startswith("{"):',
        'if key in _MAPS and value.startswith("}"):',
        "cli/test_config.py::test_a_map_of_the_users_own_takes_the_place_of_the_configs",
    ),
)
mutate(
    "cli/launcher.py",
    (
        "run-with-a-mistake-leaves-its-folder",
        "            run_folder.remove_unused(folder)\n",
        "            pass\n",
        "test_commands.py::TestFit::test_mistakes_leave_no_folder",
    ),
    (
        "run-takes-any-number-of-processes",
        "started != (requested or started)",
        "started < 0",
        "test_commands.py::TestFit::test_processes_started_from_outside_must_be_asked_for",
    ),
    (
        "sweep-is-remembered-by-the-process",
        "                sweep.release()\n",
        "",
        "cli/test_sweep.py::TestFailures::test_a_run_after_it_in_the_same_process_is_no_trial",
    ),
    (
        "sweep-leaves-the-process-elsewhere",
        "            os.chdir(folder_before)\n",
        "",
        "cli/test_sweep.py::test_a_sweep_is_resumed_where_it_was_started_and_the_process_returns",
    ),
)
mutate(
    "cli/slurm.py",
    (
        "run-is-resumed-without-a-restart",
        "if self.path is None or not self.restarts or",
        "if self.path is None or",
        "cli/test_launcher.py::TestJob::test_only_a_restarted_job_has_an_earlier_run",
    ),
)
mutate(
    "cli/config_consistency.py",
    (
        "ranks-with-other-configs-train",
        "if len(set(digests)) == 1:",
        "if digests:",
        "cli/test_launcher.py::test_ranks_with_other_configs_are_stopped",
    ),
)
mutate(
    "cli/sweep.py",
    (
        "sweep-trains-a-finished-trial-again",
        'elif trial.status != "running":',
        'elif trial.status == "pruned":',
        "cli/test_sweep.py::TestRunTrial::test_what_has_ended_answers_with_its_record",
    ),
    (
        "sweep-goes-on-after-ctrl-c",
        "isinstance(error.code, int) and error.code > 128",
        "isinstance(error.code, int) and error.code > 1000",
        "cli/test_sweep.py::TestRunTrial::test_interrupts_end_the_sweep",
    ),
)

# Masks in files, exported files and reports.
mutate(
    "cli/prediction_manifest.py",
    (
        "predict-mixes-settings",
        "changed = differences(old.settings, manifest.settings)",
        "changed = differences(old.settings, old.settings)",
        "test_predict.py::TestGoingOn::test_other_settings_are_refused",
    ),
    (
        "predict-keeps-the-mask-of-a-changed-image",
        "return made >= max(path.stat().st_mtime for path in images)",
        "return made > 0",
        "test_predict.py::TestGoingOn::test_an_image_that_has_changed_is_predicted_again",
    ),
)
mutate(
    "exporting/verification.py",
    (
        "export-counts-cases-that-differ",
        "int((labels != expected).sum())",
        "int((labels != expected).any())",
        "test_export.py::TestCompare::test_counts_what_differs",
    ),
    (
        "export-takes-what-is-not-finite",
        "if output.is_floating_point() and not bool(output.isfinite().all()):",
        "if not output.is_floating_point():",
        "test_export.py::TestCompare::test_what_is_not_finite",
    ),
)
mutate(
    "report/score_predictions.py",
    (
        "evaluate-takes-overlays-for-masks",
        "if hidden or inside.parts[0] in NO_MASKS or",
        "if hidden or",
        "test_evaluate.py::test_what_predict_writes_beside_the_masks_is_no_mask",
    ),
    (
        "evaluate-scores-masks-of-another-size",
        "if tuple(labels.shape) != tuple(shape):",
        "if labels.ndim != len(shape):",
        "test_evaluate.py::test_everything_wrong_is_told_at_once_and_nothing_is_left",
    ),
)
mutate(
    "report/score_table.py",
    (
        "report-prints-large-numbers-with-decimals",
        "if abs(value) < 10 else",
        "if abs(value) < 1e9 else",
        "test_report.py::test_the_summary_for_a_terminal",
    ),
)


# Callbacks.
EMA = "callbacks/test_ema.py::test_"
GUARDS = "callbacks/test_guards.py::"
FREEZE = "callbacks/test_freeze.py::test_"
SIGNALS = "callbacks/test_signals.py::test_"
mutate(
    "callbacks/ema.py",
    (
        "ema-weights-swapped",
        "1 - self.decay_at(done)",
        "self.decay_at(done)",
        f"{EMA}validation_sees_the_average_of_the_steps",
    ),
    (
        "ema-first-step-left-out",
        "step_idx % self.update_every_n_steps == 0",
        "(step_idx + 1) % self.update_every_n_steps == 0",
        f"{EMA}every_other_step",
    ),
    (
        "ema-warmup-reversed",
        "return min(self.decay,",
        "return max(self.decay,",
        f"{EMA}validation_sees_the_average_of_the_steps",
    ),
    (
        "ema-checkpoint-swapped-within-validation",
        "if self.swapped and self.average_model is not None:\n            averaged, current",
        "if False:\n            averaged, current",
        f"{EMA}a_checkpoint_saved_within_a_validation_has_each_in_its_place",
    ),
    (
        "ema-tests-the-optimizers-weights",
        'if trainer.state.fn == "fit":',
        "if True:",
        f"{EMA}a_checkpoint_is_tested_alike_after_fit_and_afresh",
    ),
)
mutate(
    "callbacks/gradient_guard.py",
    (
        "guard-ignores-the-loss",
        "acts = bad_gradient if is_distributed(trainer) else bad_gradient or bad_loss",
        "acts = bad_gradient",
        f"{GUARDS}test_a_loss_that_is_not_finite_with_finite_gradients",
    ),
    (
        "guard-loss-stays-on-its-rank",
        "torch.where(kept.isfinite(), gradient, math.nan)",
        "gradient",
        f"{GUARDS}test_two_processes_stop_together_and_the_one_that_knows_saves",
    ),
    (
        "guard-keeps-running-statistics",
        "_copy_into(self._statistics, self._saved_statistics)\n        diagnoses",
        "diagnoses",
        f"{GUARDS}test_a_skipped_step_leaves_everything_as_it_was",
    ),
    (
        "guard-counts-all-skips",
        "            self._skipped = 0\n            # The same",
        "            # The same",
        f"{GUARDS}test_skips_that_are_not_in_a_row_do_not_add_up",
    ),
)
mutate(
    "callbacks/collapse_guard.py",
    (
        "collapse-of-one-rank",
        'total: Any = trainer.strategy.reduce(counts, reduce_op="sum")',
        "total: Any = counts",
        f"{GUARDS}test_two_processes_judge_all_predictions",
    ),
    (
        "collapse-never-recovers",
        "0 if collapsed is None else self._in_a_row + 1",
        "self._in_a_row + (collapsed is not None)",
        f"{GUARDS}TestCollapse::test_recovering_starts_anew",
    ),
)
mutate(
    "callbacks/freeze.py",
    (
        "freeze-keeps-gradients",
        "for parameter in self._frozen:\n            parameter.grad = None",
        "for _ in self._frozen:\n            pass",
        f"{FREEZE}two_processes_are_one",
    ),
    (
        "freeze-forgets-a-resumed-epoch",
        'has no `on_train_epoch_start`."""\n        self._apply(trainer.current_epoch)',
        'has no `on_train_epoch_start`."""',
        f"{FREEZE}going_on_in_the_middle_of_an_epoch",
    ),
    (
        "freeze-batch-norm-trains",
        "norm.eval()",
        "norm.train()",
        f"{FREEZE}batch_norm_evaluates_while_it_is_frozen_and_dropout_does_not",
    ),
)
for file, maker in (
    ("callbacks/collapse_guard.py", "CollapseGuard"),
    ("callbacks/input_check.py", "InputCheck"),
    ("data/datamodule.py", "SegmentationData"),
    ("inference/calibrator.py", "Calibrator"),
):
    mutate(
        file,
        (
            f"ignored-label-unchecked-{maker}",
            'check_label("ignore_index", ignore_index)',
            "ignore_index",
            f"test_ignored_labels.py::test_a_label_is_an_integer[{maker}]",
        ),
    )
for file, maker in (
    ("data/label_map.py", "LabelMap"),
    ("data/patches.py", "PatchSampler"),
    ("functional/target_reader.py", "SignedDistance"),
    ("scoring/settings.py", "CaseTable"),
):
    mutate(
        file,
        (
            f"ignored-label-unchecked-{maker}",
            'check_label("ignore_index", self.ignore_index)',
            "pass",
            f"test_ignored_labels.py::test_a_label_is_an_integer[{maker}]",
        ),
    )
WRAPPED = "test_resume.py::test_from_every_checkpoint[wrapped-metrics]"
mutate(
    "callbacks/exact_resume.py",
    (
        "exact-resume-forgets-what-wrappers-remember",
        '_restore_remembered(pl_module, saved.get("remembered", {}))',
        "pass",
        WRAPPED,
    ),
    ("exact-resume-forgets-a-window", " or any(memory(metric).values())", "", WRAPPED),
    ("exact-resume-forgets-the-extremes-of-an-epoch", "if epoch_ends and any(", "if False and any(", WRAPPED),
)
mutate(
    "callbacks/throughput.py",
    (
        "throughput-of-the-sum-of-times",
        'reduce_op="max"',
        'reduce_op="sum"',
        "callbacks/test_throughput.py::test_of_all_processes",
    ),
)
BEST = "callbacks/test_best_checkpoint.py::test_"
mutate(
    "callbacks/best_checkpoint.py",
    (
        "best-takes-an-old-score",
        "logged is None or logged is self._seen",
        "logged is None",
        f"{BEST}a_validation_within_an_epoch_is_not_saved_again_at_its_end",
    ),
    (
        "best-nan-is-best",
        "math.inf if math.isnan(value)",
        "-math.inf if math.isnan(value)",
        f"{BEST}the_best_of_scores",
    ),
    ("best-of-a-loss-is-the-largest", '-value if mode == "max" else value', "-value", f"{BEST}the_least_is_the_best"),
    ("best-is-the-last-of-the-top", "if is_best and path != best:", "if path != best:", f"{BEST}the_best_of_scores"),
    (
        "best-of-equal-scores-is-the-last",
        "return _rank(one, self.mode) < _rank(other, self.mode)",
        "return _rank(one, self.mode) <= _rank(other, self.mode)",
        f"{BEST}the_best_of_scores",
    ),
    (
        "best-considers-the-score-of-a-resumed-checkpoint",
        "self._seen, self._validated = self._logged(trainer), False",
        "self._seen, self._validated = None, False",
        f"{BEST}resumed_the_score_of_the_checkpoint_is_not_a_new_one",
    ),
    (
        "best-worst-is-kept",
        "self._ordered()[self.save_top_k :]",
        "self._ordered()[: -self.save_top_k]",
        f"{BEST}the_least_is_the_best",
    ),
    (
        "best-removes-what-is-resumed",
        "if name != best and Path(name).resolve() != resumed:",
        "if name != best:",
        f"{BEST}the_checkpoint_that_is_resumed_stays",
    ),
    (
        "best-of-each-rank",
        "trainer.strategy.broadcast(float(logged))",
        "float(logged)",
        f"{BEST}ranks_agree",
    ),
)
mutate(
    "callbacks/history.py",
    (
        "history-no-row-for-a-validation-within-an-epoch",
        "            self._validated = key\n            self._write(trainer)",
        "            self._rows.pop(key)",
        "callbacks/test_history.py::test_a_validation_within_an_epoch_has_a_row_of_its_own",
    ),
    (
        "history-forgets-validations-when-resumed",
        "if epoch < trainer.current_epoch or within:",
        "if epoch < trainer.current_epoch:",
        "callbacks/test_history.py::test_rows_of_validations_are_the_same_when_resumed_from_any_of_them",
    ),
    (
        "history-a-row-of-a-validation-is-an-epoch",
        'return "seconds" in row',
        "return True",
        "callbacks/test_history.py::test_rows_of_validations_are_the_same_when_resumed_from_any_of_them",
    ),
)
mutate(
    "cli/experiment.py",
    (
        "summary-of-the-last-row",
        'if (int(row["epoch"]), int(row["step"])) == saved]',
        "][-1:]",
        "cli/test_best_checkpoint.py::test_the_best_validation_is_kept_printed_and_scored[top-3]",
    ),
)
mutate(
    "callbacks/save_on_interrupt.py",
    (
        "interrupt-second-ctrl-c-waits",
        "if number == signal.SIGINT and self._received == signal.SIGINT:",
        "if False:",
        f"{SIGNALS}a_second_ctrl_c_stops_at_once",
    ),
    ("interrupt-on-one-rank-lost", "ReduceOp.MAX", "ReduceOp.MIN", f"{SIGNALS}all_ranks_stop_when_one_is_told"),
    (
        "interrupt-loses-the-end-of-an-epoch",
        """        if trainer.state.fn == "fit":
            keep_pending_validation(trainer, checkpoint)""",
        "        pass",
        f"{SIGNALS}after_the_last_batch_of_an_epoch_it_is_validated_without_exact_resume_too",
    ),
    (
        "interrupt-after-the-last-step-lost",
        'after the last step. {self._how_to_resume()}")\n        self._stop(trainer, reason)',
        'after the last step. {self._how_to_resume()}")',
        f"{SIGNALS}after_the_last_step",
    ),
    (
        "interrupt-after-the-last-step-not-saved",
        "if not trainer.strategy.broadcast(self.path.is_file()) and",
        "if trainer.strategy.broadcast(self.path.is_file()) and",
        f"{SIGNALS}after_the_last_step",
    ),
    (
        "interrupt-between-accumulated-batches",
        "if is_accumulating(trainer):",
        "if False:",
        f"{SIGNALS}not_between_batches_whose_gradients_add_up",
    ),
    (
        "interrupt-status-of-sigterm",
        "SystemExit(error.code or SIGTERM_STATUS)",
        "SystemExit(SIGTERM_STATUS)",
        f"{SIGNALS}after_the_step",
    ),
    (
        "interrupt-status-of-success",
        "raise SystemExit(SIGINT_STATUS) from None\n    except SystemExit",
        "raise SystemExit(0) from None\n    except SystemExit",
        "callbacks/test_save_on_interrupt.py::test_exit_status",
    ),
)
BAR = "callbacks/test_progress_bar.py::test_"
mutate(
    "callbacks/progress_bar.py",
    (
        "bar-shows-an-old-validation",
        'if self._validated or not name.startswith("val/")}',
        "}",
        f"{BAR}an_epoch_without_validation_shows_none_of_an_earlier_one",
    ),
    (
        "bar-too-long",
        "if wide else min(room, 8),",
        "if wide else 30,",
        f"{BAR}a_terminal_of_80_columns_shows_loss_and_dice_in_one_line",
    ),
)

# Data.
MODULE = "data/test_datamodule.py::test_"
PATCHES = "data/test_patches.py::"
WINDOWS = "data/test_windows.py::"
mutate(
    "data/samplers.py",
    (
        "order-of-every-epoch-the-same",
        "mixed_seed(self.seed_of(self.epoch), self.epoch))",
        "mixed_seed(self.seed_of(self.epoch), 0))",
        f"{MODULE}the_order_follows_seed_and_epoch",
    ),
    (
        "batches-of-mixed-sizes",
        " and sizes[i] == sizes[batches[-1][0]]:",
        ":",
        f"{MODULE}evaluation_batches_hold_one_size",
    ),
    (
        "ranks-with-fewer-batches",
        " + [[] for _ in range(most - len(shares[rank]))]",
        "",
        f"{MODULE}each_case_is_evaluated_once",
    ),
)
mutate(
    "data/batching.py",
    (
        "pixels-from-outside-have-a-class",
        "(shifted - 1).masked_fill(shifted == 0, ignore_index).to(dtype)",
        "(shifted - 1).clamp(min=0).to(dtype)",
        f"{MODULE}pixels_outside_the_image_are_ignored",
    ),
    (
        "crop-normalized-by-itself",
        "elif normalize is not None and augment is not None:",
        "elif False:",
        f"{MODULE}a_crop_is_normalized_as_in_evaluation",
    ),
    (
        "random-state-of-the-training-used",
        "with seeded(seed):  #",
        "if True:  #",
        f"{MODULE}training_is_reproducible_with_any_number_of_workers",
    ),
)
mutate(
    "data/patches.py",
    (
        "patch-padding-has-a-class",
        "self.sampler.ignore_index or 0))",
        "0))",
        f"{PATCHES}TestPositions::test_a_small_image_is_padded_on_both_sides_and_the_padding_ignored",
    ),
    (
        "patch-centred-on-ignored",
        "if n not in (0, ignore_index)]",
        "if n != 0]",
        f"{PATCHES}TestPositions::test_ignored_voxels_are_not_foreground",
    ),
    (
        "patch-classes-by-pixels",
        "rng.choice(np.unique(ids))",
        "rng.choice(ids)",
        f"{PATCHES}TestPositions::test_patches_are_centred_on_evenly_drawn_classes",
    ),
    (
        "patch-cache-outdated",
        'f"{stamp} {self.sampler.ignore_index}"',
        'f"{number} {self.sampler.ignore_index}"',
        f"{PATCHES}TestCache::test_a_changed_case_is_read_again",
    ),
)
mutate(
    "data/images/datasets.py",
    (
        "tiles-of-unequal-size",
        "rest + (length - rest + 1) // 2]",
        "rest + tile]",
        f"{WINDOWS}TestTiles::test_tiles_cover_every_pixel_once",
    ),
    (
        "foreground-of-the-majority",
        'if raters is not None and self.cases.fusion in ("mean", "random") else []',
        "if False else []",
        f"{WINDOWS}test_foreground_is_that_of_any_rater",
    ),
    (
        "holes-filled-by-the-window",
        "self.cases.image_format.means(self.image)",
        "self.cases.image_format.means(image)",
        f"{WINDOWS}TestNodata::test_holes_have_the_mean_of_the_whole_image_and_are_ignored",
    ),
    (
        "large-images-decoded-whole",
        "windowed = None if whole else open_windowed_tiff(pair.image)",
        "windowed = None",
        f"{WINDOWS}test_memory_does_not_grow_with_the_image",
    ),
)
mutate(
    "data/volumes/resampling.py",
    (
        "resampled-ties-go-up",
        "better = share > best",
        "better = share >= best",
        "data/test_volumes.py::TestResampling::test_masks_against_their_definition",
    ),
)

# Inference.
SLIDING = "inference/test_sliding_window.py::test_"
CALIBRATOR = "inference/test_calibrator.py::test_"
mutate(
    "inference/sliding_window.py",
    (
        "window-stride-rounded",
        "int(window * (1 - self.overlap))",
        "round(window * (1 - self.overlap))",
        f"{SLIDING}starts_equal_monai",
    ),
    (
        "window-weights-vanish",
        "return weights.clamp(min=max(float(weights.min()), 1e-3))",
        "return weights",
        f"{SLIDING}weights_equal_monai_to_the_last_bit",
    ),
    (
        "window-rows-not-cleared",
        "            self.sums[:, places], self.weights[places] = 0, 0\n",
        "",
        f"{SLIDING}equals_monai",
    ),
)
mutate(
    "inference/component_filter.py",
    (
        "smallest-size-removed",
        "removable = sizes < min_size",
        "removable = sizes <= min_size",
        "inference/test_component_filter.py::test_planes_by_flooding",
    ),
)
mutate(
    "inference/calibrator.py",
    (
        "threshold-of-the-first-best",
        "(best - self.threshold_logit).abs().argmin()",
        "0",
        f"{CALIBRATOR}of_equally_good_thresholds_the_present_one_stays",
    ),
    (
        "calibration-pixels-unweighted",
        "len(valid) / max(1, len(drawn))",
        "1.0",
        f"{CALIBRATOR}a_case_of_many_pixels_weighs_as_much_as_it_has",
    ),
    (
        "calibration-at-the-threshold",
        "torch.bucketize(logits[part], candidates)",
        "torch.bucketize(logits[part], candidates, right=True)",
        f"{CALIBRATOR}a_logit_at_a_threshold_is_not_above_it",
    ),
)

# Scores.
SURFACES = "scoring/test_surfaces.py::test_"
CASE = "scoring/test_case.py::test_"
COMPARISON = "scoring/test_comparison.py::test_"
SUMMARY = "scoring/test_summary.py::test_"
mutate(
    "scoring/surfaces.py",
    (
        "surface-tolerance-exact",
        "reach = tolerance * (1 + 1e-9)",
        "reach = tolerance",
        f"{SURFACES}a_distance_equal_to_the_tolerance_is_within",
    ),
    (
        "hausdorff-of-the-better-side",
        "max(np.percentile(forward, 95)",
        "min(np.percentile(forward, 95)",
        f"{SURFACES}scores_agree_with_monai",
    ),
    (
        "surface-open-at-the-border",
        "np.pad(predicted[box], 1), np.pad(actual[box], 1)",
        "predicted[box], actual[box]",
        f"{SURFACES}the_border_of_the_image_is_a_surface",
    ),
)
mutate(
    "scoring/lesions.py",
    (
        "lesions-matched-twice",
        "_count_matches(first[matching], second[matching])",
        "int(matching.sum())",
        "scoring/test_lesions.py::test_matching_is_maximum",
    ),
)
mutate(
    "scoring/case.py",
    ("area-in-millilitres", "(1000 if len(spacing) == 3 else 1)", "1000", f"{CASE}areas_are_in_square_millimetres"),
    (
        "ignored-pixels-predicted",
        "predicted_mask = predicted_mask & (labels != scoring.ignore_index)",
        "pass",
        f"{CASE}ignored_pixels_belong_to_no_class",
    ),
)
mutate(
    "scoring/comparison.py",
    (
        "higher-distances-win",
        '-known if better == "low"',
        'known if better == "low"',
        f"{COMPARISON}lower_distances_are_better",
    ),
    ("ties-broken-by-rounding", "(second - first).round(9)", "second - first", f"{COMPARISON}many_cases_with_ties"),
    (
        "comparison-mean-is-a-rounding-error",
        "float(nan_mean(known, 0))",
        "float(known.mean()) if len(known) else math.nan",
        f"{COMPARISON}differences_that_cancel_have_a_mean_of_0",
    ),
)
mutate(
    "scoring/summary.py",
    ("summary-mean-is-a-rounding-error", "= 1e-9", "= -1.0", f"{SUMMARY}differences_that_cancel_are_0"),
    ("summary-small-means-are-0", "= 1e-9", "= 1e-6", f"{SUMMARY}a_small_mean_is_not_0"),
    (
        "summary-resample-is-a-rounding-error",
        "if (filled[name] < 0).any():",
        "if False:",
        f"{SUMMARY}resamples_that_cancel_are_0",
    ),
)

# What `inspect` finds.
FINDINGS = "data_check/test_findings.py::"
mutate(
    "data_check/duplicates.py",
    (
        "constant-images-are-duplicates",
        "cases = [case for case in cases if case.range[0] < case.range[4]]",
        "cases = list(cases)",
        f"{FINDINGS}TestDuplicates::test_black_images_are_not_duplicates",
    ),
    (
        "common-structure-is-duplicated",
        "if len(cases) >= MIN_FOR_MEAN",
        "if False",
        f"{FINDINGS}TestDuplicates::test_common_structure_does_not_make_duplicates",
    ),
    (
        "duplicates-not-turned",
        "    if len(cases) > MAX_REORIENTED:\n        candidates",
        "    if cases:\n        candidates",
        f"{FINDINGS}TestDuplicates::test_across_splits",
    ),
)
mutate(
    "data_check/mask_checks.py",
    ("inverted-masks-pass", "if share > 0.5:", "if share > 0.99:", f"{FINDINGS}TestContents::test_inverted_masks"),
    (
        "full-masks-with-ignored-pixels-pass",
        ">= case.pixels - case.ignored for",
        ">= case.pixels for",
        f"{FINDINGS}TestContents::test_full_and_ignored_masks",
    ),
    (
        "specks-pass",
        "if tiny > MANY_SMALL * len(sizes):",
        "if tiny > len(sizes):",
        f"{FINDINGS}TestContents::test_hints_for_the_loss",
    ),
)


@contextlib.contextmanager
def copy_of_package() -> Iterator[Path]:
    """Yield a temporary folder with the package, its configs and its tests, compiled."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        folder = Path(name)
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "benchmarks")
        for part in ("lightning_dice", "conf", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", folder)
        # Checked by contents: two mutations of the same length within a second have the same size and time.
        compileall.compile_dir(
            folder / "lightning_dice", quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
        )
        yield folder


def pytest_process(folder: Path, tests: tuple[str, ...], log: Path, cache: Path | None, mutated: bool) -> None:
    """Run tests in the copy; the body of a process, which exits with pytest's status."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)  # For the processes that tests start.
    os.environ.pop("LIGHTNING_DICE_KERNEL", None)
    if cache is not None:
        os.environ["XDG_CACHE_HOME"] = str(cache)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = mutated
    import pytest

    # Plugins that are imported already cannot be rewritten, which does no harm.
    options = ["-x", "-q", "-m", "", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main([*(f"tests/{test}" for test in tests), *options])
    import lightning_dice

    if not Path(lightning_dice.__file__).is_relative_to(folder):
        print(f"tests imported {lightning_dice.__file__}, not the copy")
        status = 99
    sys.stdout.flush()
    os._exit(int(status))


def run_tests(folder: Path, tests: tuple[str, ...], log: Path, *, cache: Path | None = None, mutated: bool) -> int:
    """Run tests in the copy and return pytest's exit status; -1 if they took too long."""
    # Forked from a process that has imported what tests need, which takes longer than most of them.
    context = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
    context.set_forkserver_preload(
        ["torch", "scipy.ndimage", "torchmetrics", "monai.losses", "optuna", "lightning.pytorch", "torchvision"]
    )
    process = context.Process(target=pytest_process, args=(folder, tests, log, cache, mutated))
    process.start()
    process.join(TIMEOUT)
    if process.exitcode is None:
        process.kill()
        process.join()
        return -1
    return process.exitcode


def apply(mutation: Mutation, folder: Path) -> str | None:
    """Apply a mutation to the copy; return why it cannot be applied."""
    file = folder / "lightning_dice" / mutation.file
    if not file.is_file():
        return f"no file {mutation.file}"
    text = file.read_text(encoding="utf-8")
    if (found := text.count(mutation.old)) != 1:
        return f"its text occurs {found} times in {mutation.file}"
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    return None


def outcome(mutation: Mutation, folder: Path) -> str:
    """Apply a mutation, run its tests, undo it; return what happened."""
    file = folder / "lightning_dice" / mutation.file
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    if (problem := apply(mutation, folder)) is not None:
        return f"DOES NOT APPLY: {problem}"
    log = folder / f"{mutation.name}.log"
    # Mutated C++ is built into a cache of its own.
    cache = folder / f"cache-{mutation.name}" if "native/" in mutation.file and file.suffix != ".py" else None
    try:
        status = run_tests(folder, mutation.tests, log, cache=cache, mutated=True)
    finally:
        file.write_text(before, encoding="utf-8")
    printed = log.read_text(encoding="utf-8")
    # Code with a name that does not exist fails in any test.
    if status == FAILED and "NameError: " not in printed:
        lines = [line for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))]
        test = lines[0].split(" - ")[0].split("::", 1)[-1] if lines else "a test"
        return f"caught by {test}"
    if status == PASSED:
        return "SURVIVED"
    tail = "\n".join(printed.splitlines()[-12:])
    return f"BROKEN, pytest exited with {status}:\n{tail}"


def main(arguments: list[str] | None = None) -> int:
    """Run the mutations and print a table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names or of paths; all mutations by default")
    parser.add_argument("-j", "--jobs", type=int, default=1, help="how many to run at once; 1 by default")
    parser.add_argument("--list", action="store_true", help="only list the mutations and their tests")
    options = parser.parse_args(arguments)
    chosen = [
        one for one in MUTATIONS if not options.names or any(name in f"{one.name} {one.file}" for name in options.names)
    ]
    names = [one.name for one in MUTATIONS]
    if twice := {name for name in names if names.count(name) > 1}:
        parser.error(f"several mutations are named {', '.join(sorted(twice))}")
    if not chosen:
        parser.error(f"no mutation is named {' or '.join(options.names)}")
    if options.list:
        for one in chosen:
            print(f"{one.name:44} {one.file}: {', '.join(one.tests)}")
        return 0
    width = max(len(one.name) for one in chosen)
    start = time.monotonic()
    missed = []
    with contextlib.ExitStack() as stack:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for _ in range(options.jobs):
            copies.put(folder := stack.enter_context(copy_of_package()))
        log = folder / "before.log"
        every = tuple(sorted({test for one in chosen for test in one.tests}))
        if (status := run_tests(folder, every, log, mutated=False)) != PASSED:
            print(log.read_text(encoding="utf-8"))
            print(f"the tests fail without a mutation: pytest exited with {status}")
            return 1
        print(f"{len(every)} groups of tests pass without a mutation ({time.monotonic() - start:.0f} s)", flush=True)

        def run(one: Mutation) -> str:
            copy = copies.get()
            try:
                return outcome(one, copy)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(options.jobs) as pool:
            for one, result in zip(chosen, pool.map(run, chosen), strict=True):
                if not result.startswith("caught"):
                    missed.append(one.name)
                print(f"{one.name:{width}}  {result}", flush=True)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutations caught ({time.monotonic() - start:.0f} s)")
    if missed:
        print("not caught:", *missed)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
