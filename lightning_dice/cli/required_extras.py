"""Find out from a config which optional packages it needs, before anything is read or made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightning_dice.cli.errors import UserError
from lightning_dice.extras import MissingExtra, require_all

# The modules that a target needs; of several entries that fit, the longest counts. Constructors check the same.
_NEEDS = {
    "lightning.pytorch.loggers.MLFlowLogger": ["mlflow"],
    "lightning.pytorch.loggers.TensorBoardLogger": ["tensorboard"],
    "lightning.pytorch.loggers.WandbLogger": ["wandb"],
    "lightning_dice.data.MonaiAugment": ["monai"],
    "lightning_dice.data.NnunetSource": ["nibabel"],
    "lightning_dice.data.VolumeSource": ["nibabel"],
    "lightning_dice.losses.SkeletonRecallLoss": ["skimage"],
    "lightning_dice.models.DynUNet": ["monai"],
    "monai": ["monai"],
    "monai.networks.nets.SwinUNETR": ["monai", "einops"],
    "monai.networks.nets.UNETR": ["monai", "einops"],
}


def check_extras(config: DictConfig, leave_out: tuple[str, ...] = ()) -> None:
    """Check that the packages that a config needs are installed.

    Args:
        config: of a run, or of a sweep with what all trials share; it need not be resolved.
        leave_out: groups that will not be used, such as `logger`.

    Raises:
        UserError: names the settings, the packages, and how to install them.
    """
    plain: Any = OmegaConf.to_container(config, resolve=False)
    hydra_config: Any = plain.pop("hydra", None) or (HydraConfig.get() if HydraConfig.initialized() else {})
    choices = hydra_config.get("runtime", {}).get("choices", {})
    needs: dict[str, list[str]] = {}
    for group, content in plain.items():
        if group in leave_out:
            continue
        modules = {module for target in _targets(content) for module in _needed_by(target)}
        if modules:
            # Named as the choice that it came from, such as model=dynunet, if Hydra knows it.
            needs[f"{group}={choices[group]}" if choices.get(group) else group] = sorted(modules)
    try:
        require_all(needs)
    except MissingExtra as error:
        raise UserError(str(error)) from error


def _targets(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        target = content.get("_target_")
        if isinstance(target, str):
            yield target
        content = list(content.values())
    if isinstance(content, list):
        for part in content:
            yield from _targets(part)


def _needed_by(target: str) -> list[str]:
    """Return the modules that a target needs.

    >>> _needed_by("monai.networks.nets.UNETR"), _needed_by("monai.networks.nets.UNet"), _needed_by("monaibox.Net")
    (['monai', 'einops'], ['monai'], [])
    """
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        modules = _NEEDS.get(".".join(parts[:length]))
        if modules is not None:
            return modules
    return []
