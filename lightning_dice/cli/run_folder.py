"""A run's folder: made once, never overwritten, read by every later command."""

from __future__ import annotations

import datetime
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_dice.checkpoints import newest_readable, remove_partial_files
from lightning_dice.cli.adapt_checkpoint import changes_since, check_changes, prefer_settings
from lightning_dice.cli.config import apply_overrides, instantiate, resolve_from_files
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.setting_rules import check_used
from lightning_dice.inference import find_postprocessing
from lightning_dice.io import write_atomically
from lightning_dice.library_internals.torch import original_name
from lightning_dice.loading import build_module as build_trained_module
from lightning_dice.renamed_settings import refuse_old_config

if TYPE_CHECKING:
    from lightning_dice.module import SegmentationModule

CONFIG = "config.yaml"  # resolved, plain values: all that evaluate and predict need
TEMPLATE = "config_unresolved.yaml"  # with its interpolations: what `resume=` lets overrides change
CHECKPOINTS = "checkpoints"
FINGERPRINT = "fingerprint.json"  # of volumes: what their normalization and spacing come from


def new_folder(parent: str | Path, name: str, *, dated: bool = True) -> Path:
    """Make a folder that did not exist, `<parent>/<date>_<name>`, numbered if that is taken.

    Raises:
        UserError: it cannot be made.
    """
    stamp = f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_" if dated else ""
    base = Path(parent).expanduser().absolute() / f"{stamp}{name}"
    for number in range(1, 10_000):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()  # Fails if it exists, also when another process was quicker.
        except FileExistsError:
            if not path.parent.is_dir():
                raise UserError(f"cannot make the run's folder {path}: {path.parent} is a file") from None
            continue
        except OSError as error:
            raise UserError(f"cannot make the run's folder {path}: {error.strerror}; choose runs=<folder>") from error
        return path
    raise UserError(f"cannot make a folder named {base}: 9999 of them exist")


def exact_folder(path: str | Path) -> Path:
    """Make the folder `path`, which must not exist.

    Raises:
        UserError: it exists, or cannot be made.
    """
    path = Path(path).expanduser().absolute()
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        hint = f", or resume={path}" if (path / CONFIG).is_file() else ""
        raise UserError(f"{path} exists, and nothing is overwritten: choose a new folder{hint}") from None
    except OSError as error:
        raise UserError(f"cannot make the run's folder {path}: {error.strerror}") from error
    return path


def remove_unused(folder: Path) -> None:
    """Remove a new folder that holds no files but its config, after a mistake was found."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    if files <= {CONFIG, TEMPLATE, FINGERPRINT}:
        shutil.rmtree(folder)


def resolve_data(config: DictConfig) -> None:
    """Make `data.root` absolute, and replace interpolations that read files of the data by their values.

    Raises:
        UserError: a file cannot be read.
    """
    if "data" in config and not OmegaConf.is_missing(config.data, "root") and config.data.get("root"):
        config.data.root = str(Path(config.data.root).expanduser().absolute())
    resolve_from_files(config)


def resolve(config: DictConfig) -> DictConfig:
    """Return a config with plain values in place of its interpolations.

    Raises:
        UserError: a value is missing, or an interpolation cannot be resolved.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        resolved = cast("DictConfig", OmegaConf.create(OmegaConf.to_container(config, resolve=True)))
    except Exception as error:
        unset = re.search(r"Missing mandatory value: (\S+)", str(error))
        if unset:
            raise UserError(f"{unset[1]} has no value: give {unset[1]}=...") from error
        raise UserError(f"config: {error}") from error
    if missing:
        raise UserError(f"{missing[0]} has no value: give {missing[0]}=...")
    return resolved


def save_config(folder: Path, config: DictConfig) -> DictConfig:
    """Write the config with its interpolations, and resolved to plain values.

    Returns:
        The resolved config.

    Raises:
        UserError: a value is missing, or an interpolation cannot be resolved.
    """
    resolved = resolve(config)
    for name, content in ((TEMPLATE, config), (CONFIG, resolved)):
        write_atomically(folder / name, partial(_write_text, OmegaConf.to_yaml(content)))
    return resolved


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def load_config(folder: str | Path, name: str = CONFIG) -> DictConfig:
    """Load the config of a run.

    Raises:
        UserError: this is not a run's folder, or version 0.1 wrote it.
    """
    path = Path(folder).expanduser() / name
    if not path.is_file():
        raise UserError(f"{Path(folder).absolute()} is not the folder of a run: it has no {name}")
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} is not a config")
    try:
        refuse_old_config(cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False)), path.parent)
    except ValueError as error:
        raise UserError(str(error)) from None
    return config


def reopen(
    folder: str | Path, overrides: Iterable[str] = (), *, command: str = "fit", output: Path | None = None
) -> DictConfig:
    """Load the config of a run with its interpolations, and apply overrides; the folder may have been moved.

    Args:
        folder: the run's folder.
        overrides: in Hydra's syntax; for values, not groups.
        command: the command that uses the run, and refuses settings that it would ignore.
        output: where files go from now on; by default the folder itself.

    Raises:
        UserError: this is not a run's folder, or an override does not fit.
    """
    config, given = load_config(folder, TEMPLATE), list(overrides)
    apply_overrides(config, given)
    check_used(given, command)
    resolve_data(config)
    config.folder = str(output if output is not None else Path(folder).expanduser().absolute())
    return config


def build_module(config: DictConfig, *, trained: bool = False) -> SegmentationModule:
    """Build the module that a run's config describes, with new weights.

    Args:
        config: the run's config.
        trained: whether the weights of a checkpoint will replace them, so that no pretrained ones need be downloaded.

    Raises:
        UserError: a setting is refused.
    """
    if not trained:
        fresh: SegmentationModule = instantiate(config.module, "module")
        return fresh
    plain = cast("dict[str, Any]", OmegaConf.to_container(config.module, resolve=True))
    try:
        module: SegmentationModule = build_trained_module(plain)
    except Exception as error:  # Of any type, by the classes that the config names.
        raise UserError(f"module: {error}") from error
    return module


def find_checkpoint(folder: str | Path, which: str = "best") -> Path:
    """Find a checkpoint of a run: `"best"`, `"last"`, or the path of a file.

    Raises:
        UserError: it does not exist; the message lists those that do.
    """
    if which not in ("best", "last"):
        path = Path(which).expanduser()
        if path.is_file():
            return path
        raise UserError(f"checkpoint must be best, last or the path of a file, got {which}")
    path = Path(folder).expanduser() / CHECKPOINTS / f"{which}.ckpt"
    if not path.is_file():
        there = sorted(file.name for file in path.parent.glob("*.ckpt"))
        raise UserError(f"the run has no {path.name}; in {path.parent} there is {', '.join(there) or 'nothing'}")
    return path


def calibrate(module: SegmentationModule, folder: str | Path, choice: str | Path, checkpoint: Path) -> str | None:
    """Apply `calibration=auto`, `none` or a file to a module; see `lightning_dice.inference.find_postprocessing`.

    Returns:
        A line to print, which names the calibration; `None` without one.

    Raises:
        UserError: the file does not exist, cannot be read, belongs to another checkpoint, or does not fit the module.
    """
    try:
        decision = find_postprocessing(folder, choice, checkpoint)
        module.calibrate(decision)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    return f"calibrated by {decision.origin}: {decision}" if decision.origin else None


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Find the checkpoint to resume from, the newest intact one; `None` if the run has not saved any.

    Raises:
        UserError: all checkpoints are damaged.
    """
    try:
        return newest_readable(Path(folder).expanduser() / CHECKPOINTS)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_resume(path: Path, config: DictConfig) -> None:
    """Check that a run can be resumed from a checkpoint with this config, and that the weights fit.

    Raises:
        UserError: names a setting that cannot change, or the weights that do not fit.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    check_changes(read_checkpoint(path), plain)
    check_weights(build_module(config, trained=True), path, config)


def accept_config(folder: Path, template: DictConfig) -> None:
    """Write the config of a run that is resumed, when its training starts, and tidy up after one that was killed."""
    save_config(folder, template)
    remove_partial_files(folder / CHECKPOINTS)


def read_position(path: str | Path) -> tuple[int, int]:
    """Return the epoch and the number of optimizer steps of a checkpoint, without reading its weights."""
    file = Path(path)
    file = file / "meta.pt" if file.is_dir() else file  # A folder of shards.
    saved = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    return int(saved["epoch"]), int(saved["global_step"])


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running code that it may contain.

    Raises:
        UserError: it cannot be read.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if "state_dict" not in checkpoint:
        raise UserError(f"{path} is not a checkpoint of a module: it has no state_dict")
    return checkpoint


def check_weights(
    module: nn.Module, path: str | Path, config: DictConfig | Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read a checkpoint and check that its weights fit the module, without loading them.

    Buffers that are settings, such as the weights of classes in a loss, keep their values in the module, whatever
    checkpoint is loaded into it from now on.

    Args:
        module: built from `config`.
        path: the checkpoint.
        config: the run's config; `None`: the checkpoint's.

    Returns:
        The checkpoint, with the module's settings.

    Raises:
        UserError: names the first weights that are missing, unexpected or of another shape.
    """
    checkpoint = read_checkpoint(path)
    plain: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    prefer_settings(module, checkpoint, plain)
    saved = {original_name(name): value for name, value in checkpoint["state_dict"].items()}
    own = module.state_dict()
    missing = [key for key in own if key not in saved]
    extra = [key for key in saved if key not in own]
    shapes = [
        f"{key}: {tuple(saved[key].shape)} in the checkpoint, {tuple(own[key].shape)} in the module"
        for key in own
        if key in saved and saved[key].shape != own[key].shape
    ]
    if missing or extra or shapes:
        parts = [
            f"{len(keys)} {what}, such as {keys[0]}"
            for keys, what in ((missing, "missing"), (extra, "unexpected"), (shapes, "of another shape"))
            if keys
        ]
        changes = {} if plain is None else changes_since(checkpoint, plain)
        named = [f"{key} was {old} and is now {new}" for key, (old, new) in changes.items() if _shapes_weights(key)]
        raise UserError(
            f"{path} has another architecture or number of classes than the config: weights {'; '.join(parts)}"
            + "".join(f"; {change}" for change in named[:3])
        )
    return checkpoint


def _shapes_weights(key: str) -> bool:
    return key.startswith(("model", "loss", "metrics", "module.")) or key in ("data.channels", "data.classes")
