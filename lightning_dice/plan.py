"""Propose settings for volumes: `python -m lightning_dice.plan data=nnunet data.root=<folder> memory=8`."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lightning_dice.cli.command import run_command
from lightning_dice.cli.config import compose, instantiate
from lightning_dice.cli.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from lightning_dice.models.planner import Proposal, Topology

SETTINGS = ("memory", "output", "overwrite")
LEAST_LEVELS = 3  # of MONAI's DynUNet


def main() -> None:
    """Entry point of `python -m lightning_dice.plan` and `dice-plan`."""

    def act(config: DictConfig, overrides: list[str]) -> None:
        plan(config, overrides)

    run_command("plan", act, SETTINGS)


def plan(config: DictConfig, overrides: list[str]) -> Path:
    """Read the data once, propose settings, print them and write them as an experiment.

    Args:
        config: as of `conf/plan.yaml`.
        overrides: of the config of a training: `data=nnunet data.root=...`.

    Returns:
        The file.

    Raises:
        UserError: a setting, the data, or the output is not as it should be.
    """
    from lightning_dice.data import DataError
    from lightning_dice.data.volumes.sources import VolumeSet
    from lightning_dice.models import planner

    if not isinstance(config.memory, (int, float)) or not config.memory > 0:
        raise UserError(f"memory must be GiB for a training step, more than 0, got {config.memory}")
    path = Path(config.output).expanduser().absolute() / "experiment" / "plan.yaml"
    if path.exists() and not config.overwrite:
        raise UserError(f"{path} exists; choose another output, or overwrite=true")
    run = _composed(overrides)
    source = instantiate(run.data.datamodule.source, "data")
    if not isinstance(source, VolumeSet):
        raise UserError(f"plan is for volumes, data=nnunet or data=volumes, got a {type(source).__name__}")
    try:
        print(source.check(), flush=True)
    except DataError as error:
        raise UserError(str(error)) from error
    fingerprint, spacing = source.fingerprint(), source.preparation().spacing
    # Without resampling the levels follow from what a voxel is like in the median case.
    steps, median = spacing or fingerprint.median_spacing(), fingerprint.median_size(spacing)
    make = partial(_network, run)
    cases = len(fingerprint.train())
    try:
        proposal = planner.propose(steps, median, cases, make, source.channels, int(config.memory * planner.GIB))
    except ValueError as error:
        raise UserError(str(error)) from error
    text = _experiment(run, overrides, proposal, spacing)
    _write(path, text)
    shape, sizes = proposal.topology, "x".join(map(str, proposal.topology.size))
    print(f"\nmedian image {'x'.join(map(str, median))} at {'x'.join(f'{step:.4g}' for step in steps)} mm")
    print(f"patch {sizes}, batch {proposal.batch_size}, {len(shape.strides)} levels")
    print(f"about {proposal.memory / planner.GIB:.2g} GiB for a training step in float32, of {config.memory:g}")
    print("\nAs overrides:\n  " + " ".join(_overrides(proposal, spacing)))
    place = shlex.quote(str(path.parent.parent))
    print(f"\nAs an experiment:\n  python -m lightning_dice.fit --config-dir {place} experiment=plan")
    return path


def _composed(overrides: list[str]) -> DictConfig:
    from lightning_dice.cli import run_folder

    run = compose("fit", overrides)
    run_folder.resolve_data(run)
    missing = sorted(OmegaConf.missing_keys(run))
    if missing:
        raise UserError(f"{missing[0]} has no value: give {missing[0]}=...")
    return run


def _model(topology: Topology) -> dict[str, Any]:
    """The settings of `conf/model/dynunet.yaml` that follow from a topology."""
    spare = max(0, LEAST_LEVELS - len(topology.strides))
    ones = [1] * len(topology.size)
    strides = [list(stride) for stride in topology.strides] + [ones] * spare
    kernels = [list(kernel) for kernel in topology.kernels] + [[3] * len(ones)] * spare
    # All levels of the decoder have a loss but the coarsest, as in nnU-Net.
    levels = max(1, len(strides) - 3)
    features = [*topology.features, *topology.features[-1:] * spare]
    return {"kernel_size": kernels, "strides": strides, "filters": features, "deep_supr_num": levels}


def _network(run: DictConfig, topology: Topology) -> nn.Module:
    from lightning_dice.models import DynUNet

    return DynUNet(
        spatial_dims=len(topology.size),
        in_channels=int(run.data.channels),
        out_channels=len(run.data.classes),
        norm_name="instance",
        deep_supervision=True,
        **_model(topology),
    )


def _values(proposal: Proposal, spacing: tuple[float, ...] | None) -> dict[str, dict[str, Any]]:
    shape = proposal.topology
    data = {
        "patch_size": list(shape.size),
        "batch_size": proposal.batch_size,
        "spacing": None if spacing is None else list(spacing),
    }
    return {"data": data, "model": _model(shape), "module": {"size_divisor": max(shape.divisors)}}


def _overrides(proposal: Proposal, spacing: tuple[float, ...] | None) -> list[str]:
    parts = ["model=dynunet"]
    for group, values in _values(proposal, spacing).items():
        for name, value in values.items():
            parts.append(f"{group}.{name}={'null' if value is None else str(value).replace(' ', '')}")
    return parts


def _experiment(run: DictConfig, overrides: list[str], proposal: Proposal, spacing: tuple[float, ...] | None) -> str:
    choices = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    given: dict[str, Any] = {}
    for key in choices:
        group, _, name = key.lstrip("+").partition(".")
        if group == "data" and name and "." not in name:
            value = OmegaConf.select(run, f"data.{name}")
            given[name] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    values = _values(proposal, spacing)
    content: dict[str, Any] = {
        "defaults": [{"override /data": choices.get("data", "synthetic")}, {"override /model": "dynunet"}],
        **values,
        "data": {**given, **values["data"], "root": str(run.data.root)},
    }
    about = f"# Proposed by lightning_dice.plan for {run.data.root}: every value may be changed."
    return f"# @package _global_\n{about}\n{OmegaConf.to_yaml(OmegaConf.create(content))}"


def _write(path: Path, text: str) -> None:
    from lightning_dice.io import write_atomically

    try:
        write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    main()
