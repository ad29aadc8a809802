"""Propose settings for volumes: `python -m lightning_dice.plan data=nnunet data.root=<folder> memory=8`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from lightning_dice.cli.command import run_command
from lightning_dice.cli.config import compose, instantiate
from lightning_dice.cli.errors import UserError
from lightning_dice.cli.required_extras import check_extras

if TYPE_CHECKING:
    from torch import nn

    from lightning_dice.data.volumes.sources import BaseVolumeSource
    from lightning_dice.models.planner import Proposal, Topology

SETTINGS = ("memory", "output", "overwrite")
MIN_LEVELS = 3  # of MONAI's DynUNet


class Plan(NamedTuple):
    """A proposal, and the data that it is for.

    Attributes:
        spacing: the spacing that images are resampled to, in mm; `None` without resampling.
        voxel_size: spacing of the median case, in mm.
        median_size: voxels of the median case, after resampling.
        proposal: the planner's proposal.
    """

    spacing: tuple[float, ...] | None
    voxel_size: tuple[float, ...]
    median_size: tuple[int, ...]
    proposal: Proposal


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m lightning_dice.plan` or `dice-plan`.

    Args:
        arguments: the command line, such as `["data=nnunet", "data.root=Dataset004"]`; `None`: this process's.

    Raises:
        SystemExit: the command failed; its exit status.
    """

    def act(config: DictConfig, overrides: list[str]) -> None:
        plan(config, overrides)

    run_command("plan", act, SETTINGS, arguments)


def plan(config: DictConfig, overrides: list[str]) -> Path:
    """Read the data once, propose settings, print them and write them as an experiment.

    Args:
        config: the settings of `conf/plan.yaml`.
        overrides: applied to a run's config: `data=nnunet data.root=...`.

    Returns:
        The path of the experiment.

    Raises:
        UserError: a setting or the data are invalid, or the output cannot be written.
    """
    if not isinstance(config.memory, (int, float)) or not config.memory > 0:
        raise UserError(f"memory must be GiB for a training step, more than 0, got {config.memory}")
    path = Path(config.output).expanduser().absolute() / "experiment" / "plan.yaml"
    if path.exists() and not config.overwrite:
        raise UserError(f"{path} exists; choose another output, or set overwrite=true")
    run = compose_training(overrides)
    source = check_volumes(run)
    found = propose_plan(source, run, config.memory)
    write_experiment(path, format_experiment(run, overrides, found))
    print_plan(found, config.memory, path)
    return path


def compose_training(overrides: list[str]) -> DictConfig:
    """Compose the config of a run.

    Raises:
        UserError: a setting has no value.
    """
    from lightning_dice.cli import run_folder

    run = compose("fit", overrides)
    check_extras(run, leave_out=("logger",))
    run_folder.resolve_data(run)
    if missing := sorted(OmegaConf.missing_keys(run)):
        raise UserError(f"{missing[0]} has no value: give {missing[0]}=...")
    return run


def check_volumes(run: DictConfig) -> BaseVolumeSource:
    """Read the data once, and print what they are.

    Raises:
        UserError: the data are not volumes, or something is wrong with them.
    """
    from lightning_dice.data import DataError
    from lightning_dice.data.volumes.sources import BaseVolumeSource

    source = instantiate(run.data.datamodule.source, "data")
    if not isinstance(source, BaseVolumeSource):
        raise UserError(f"plan is for volumes, data=nnunet or data=volumes, got a {type(source).__name__}")
    try:
        print(source.check(), flush=True)
    except DataError as error:
        raise UserError(str(error)) from error
    return source


def propose_plan(source: BaseVolumeSource, run: DictConfig, memory: float) -> Plan:
    """Propose patch size, network and batch size.

    Args:
        source: the source of the volumes.
        run: a run's config.
        memory: GiB for a training step.

    Raises:
        UserError: the memory is too small.
    """
    from lightning_dice.models import planner

    fingerprint, spacing = source.fingerprint(), source.preprocessor().spacing
    # Without resampling, the levels follow from the voxels of the median case.
    voxel_size, median_size = spacing or fingerprint.median_spacing(), fingerprint.median_size(spacing)
    make = partial(build_network, run)
    cases = len(fingerprint.train_cases)
    try:
        proposal = planner.propose(voxel_size, median_size, cases, make, source.channels, int(memory * planner.GIB))
    except ValueError as error:
        raise UserError(str(error)) from error
    return Plan(spacing, voxel_size, median_size, proposal)


def build_network(run: DictConfig, topology: Topology) -> nn.Module:
    """Build the DynUNet of a topology, for the channels and classes of a run."""
    from lightning_dice.models import DynUNet

    return DynUNet(
        spatial_dims=len(topology.size),
        in_channels=int(run.data.channels),
        out_channels=len(run.data.classes),
        norm_name="instance",
        deep_supervision=True,
        **model_settings(topology),
    )


def model_settings(topology: Topology) -> dict[str, Any]:
    """Return the settings of `conf/model/dynunet.yaml` that follow from a topology.

    >>> from lightning_dice.models.planner import plan_topology
    >>> model_settings(plan_topology((1.0, 1.0), (32, 32)))["filters"]
    [32, 64, 128, 256]
    """
    missing = max(0, MIN_LEVELS - len(topology.strides))
    ones = [1] * len(topology.size)
    strides = [list(stride) for stride in topology.strides] + [ones] * missing
    kernels = [list(kernel) for kernel in topology.kernels] + [[3] * len(ones)] * missing
    # As in nnU-Net, all levels of the decoder but the coarsest have a loss.
    levels = max(1, len(strides) - 3)
    features = [*topology.features, *topology.features[-1:] * missing]
    return {"kernel_size": kernels, "strides": strides, "filters": features, "deep_supr_num": levels}


def settings(found: Plan) -> dict[str, dict[str, Any]]:
    """Return the proposed settings, by config group."""
    topology = found.proposal.topology
    data = {
        "patch_size": list(topology.size),
        "batch_size": found.proposal.batch_size,
        "spacing": None if found.spacing is None else list(found.spacing),
    }
    module = {"size_divisor": max(topology.divisors)}
    return {"data": data, "model": model_settings(topology), "module": module}


def format_overrides(found: Plan) -> list[str]:
    """Format the proposed settings as overrides for the command line."""
    parts = ["model=dynunet"]
    for group, values in settings(found).items():
        for name, value in values.items():
            parts.append(f"{group}.{name}={'null' if value is None else str(value).replace(' ', '')}")
    return parts


def format_experiment(run: DictConfig, overrides: list[str], found: Plan) -> str:
    """Format the proposed settings as the YAML of an experiment, together with the given settings of the data."""
    choices = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    given: dict[str, Any] = {}
    for key in choices:
        group, _, name = key.lstrip("+").partition(".")
        if group == "data" and name and "." not in name:
            value = OmegaConf.select(run, f"data.{name}")
            given[name] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    proposed = settings(found)
    content: dict[str, Any] = {
        "defaults": [{"override /data": choices.get("data", "synthetic")}, {"override /model": "dynunet"}],
        **proposed,
        "data": {**given, **proposed["data"], "root": str(run.data.root)},
    }
    comment = f"# Proposed by lightning_dice.plan for {run.data.root}; change any value you like."
    return f"# @package _global_\n{comment}\n{OmegaConf.to_yaml(OmegaConf.create(content))}"


def write_experiment(path: Path, text: str) -> None:
    """Write the experiment.

    Raises:
        UserError: the file cannot be written.
    """
    from lightning_dice.io import write_atomically

    try:
        write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def print_plan(found: Plan, memory: float, path: Path) -> None:
    """Print the proposal, as overrides and as an experiment."""
    from lightning_dice.models.planner import GIB

    proposal, topology = found.proposal, found.proposal.topology
    voxel_size = "x".join(f"{step:.4g}" for step in found.voxel_size)
    print(f"\nmedian image {'x'.join(map(str, found.median_size))} at {voxel_size} mm")
    print(
        f"patch {'x'.join(map(str, topology.size))}, batch {proposal.batch_size}, {len(topology.strides)} levels\n"
        f"about {proposal.memory / GIB:.2g} GiB for a training step in float32, of {memory:g}"
    )
    print("\nAs overrides:\n  " + " ".join(format_overrides(found)))
    folder = shlex.quote(str(path.parent.parent))
    print(f"\nAs an experiment:\n  python -m lightning_dice.fit --config-dir {folder} experiment=plan")


if __name__ == "__main__":
    main()
