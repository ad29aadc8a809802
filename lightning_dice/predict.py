"""Masks of images: `python -m lightning_dice.predict run=<folder> input=<folder or file> output=<folder>`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from lightning_dice.configs import (
    CONF_DIR,
    UserError,
    help_text,
    instantiate,
    mistakes_told,
    quoted,
    register_resolvers,
    split_arguments,
)

SETTINGS = ("run", "input", "output", "checkpoint", "overlays", "overwrite", "device")

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


def main() -> None:
    """Entry point of `python -m lightning_dice.predict` and `dice-predict`."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text("predict"))
        return
    register_resolvers()
    sys.argv[1:], overrides = split_arguments(quoted(sys.argv[1:]), SETTINGS)

    @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="predict")
    def from_command_line(config: DictConfig) -> None:
        with mistakes_told():
            failed = predict(config, overrides)
        if failed:
            print(f"\n{len(failed)} of the images could not be predicted:", *failed, sep="\n  ", file=sys.stderr)
            raise SystemExit(1)

    from_command_line()


def predict(config: DictConfig, overrides: list[str]) -> list[str]:
    """Write a mask for each image, as soon as it is made.

    Masks are PNG files of the image's size and name and hold label ids, written as the values that the training's masks
    had (`data.values`). Classes that may overlap (sigmoid, more than one) get a folder each. An image that cannot be
    read is skipped.

    Args:
        config: as of `conf/predict.yaml`.
        overrides: of the run's config, in Hydra's syntax: `module.threshold=0.3`.

    Returns:
        What went wrong, a line for each image that was skipped.

    Raises:
        UserError: the run, its checkpoint, the input or the output is not as it should be; before any work.
    """
    import torch
    from rich.progress import track

    from lightning_dice import runs
    from lightning_dice.data import DataError
    from lightning_dice.data.readers import read_picture, to_image
    from lightning_dice.session import quiet

    quiet()
    run = runs.reopen(config.run, overrides)
    images = input_images(Path(config.input).expanduser())
    output = Path(config.output).expanduser()
    channels = class_folders(run)
    names = {path: [output / folder / f"{path.stem}.png" for folder in channels] for path in images}
    refuse_overwriting(names, output, overwrite=config.overwrite)
    module = runs.build_module(run, trained=True)
    checkpoint = runs.check_weights(module, runs.find_checkpoint(config.run, config.checkpoint))
    module.load_state_dict(checkpoint["state_dict"])
    device = choose_device(config.trainer.accelerator)
    module.eval().to(device)
    normalize: Any = instantiate(run.normalize, "normalize")

    failed: list[str] = []
    for path in track(images, description=f"predicting on {device}"):
        try:
            image = to_image(read_picture(path), run.data.channels)
        except DataError as error:
            failed.append(str(error))
            continue
        prepared = image if normalize is None else normalize(image)
        with torch.inference_mode():
            labels = module.predict_step(prepared.unsqueeze(0).to(device))[0]
        for file, mask in zip(names[path], label_images(labels, run), strict=True):
            write_png(file, mask)
        if config.overlays:
            write_png(output / "overlays" / f"{path.stem}.png", overlay(image, labels, run))
    print(f"{len(images) - len(failed)} of {len(images)} images: masks in {output.absolute()}")
    return failed


def input_images(path: Path) -> list[Path]:
    """The image files to predict.

    Raises:
        UserError: there are none, or two would have masks of one name.
    """
    from lightning_dice.data.layout import image_files

    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"input {path} is neither a file nor a folder")
    images = image_files(path)
    if not images:
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise UserError(f"input {path} holds no PNG, JPEG, BMP or TIFF file; there is {inside}")
    first: dict[str, Path] = {}
    for image in images:
        if image.stem in first:
            raise UserError(f"{first[image.stem].name} and {image.name} would have masks of one name; rename one")
        first[image.stem] = image
    return images


def class_folders(run: DictConfig) -> list[str]:
    """Where masks go in the output folder: right there, or in a folder for each of several overlapping classes."""
    several = run.data.activation == "sigmoid" and len(run.data.classes) > 1
    return [str(name) for name in run.data.classes] if several else [""]


def refuse_overwriting(names: dict[Path, list[Path]], output: Path, *, overwrite: bool) -> None:
    """See that no mask is there yet and no image would be replaced, and make the folders.

    Raises:
        UserError: otherwise, or the folders cannot be made.
    """
    files = [file for group in names.values() for file in group]
    if output.resolve() in {image.parent.resolve() for image in names}:
        raise UserError(f"output {output} is the folder of the images; choose another")
    there = [file for file in files if file.exists()]
    if there and not overwrite:
        raise UserError(f"{len(there)} masks exist, such as {there[0]}; choose another output, or overwrite=true")
    try:
        for folder in {file.parent for file in files}:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the output folder {output}: {error.strerror}") from error


def choose_device(name: str) -> torch.device:
    """An accelerator of Lightning's, `auto`, `cpu`, `gpu`, `cuda` or `mps`, as a device.

    Raises:
        UserError: there is no such device.
    """
    import torch

    if name == "cpu":
        return torch.device("cpu")
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    found = [kind for kind, available in kinds.items() if available and name in ("auto", "gpu", kind)]
    if not found and name != "auto":
        raise UserError(f"no {name} is available; use device=cpu")
    return torch.device(found[0] if found else "cpu")


def label_images(labels: torch.Tensor, run: DictConfig) -> list[NDArray[np.unsignedinteger[Any]]]:
    """A picture of label values for each file: the inverse of how the training's masks were read."""
    import numpy as np

    array = labels.cpu().numpy()
    values = {int(new): int(old) for old, new in (run.data.get("values") or {}).items()}
    planes = [array.astype(np.int64)] if run.data.activation == "softmax" else list(array.astype(np.int64))
    highest = max([len(run.data.classes), *values.values()])
    table = np.arange(len(run.data.classes) + 1)
    for new, old in values.items():
        if new < len(table):
            table[new] = old
    dtype = np.uint8 if highest < 256 else np.uint16
    return [table[plane].astype(dtype) for plane in planes]


def overlay(image: torch.Tensor, labels: torch.Tensor, run: DictConfig) -> NDArray[np.uint8]:
    """The image in gray or colour, `(height, width, 3)`, with each class in a colour of its own over it."""
    import numpy as np

    from lightning_dice.callbacks.colors import class_colors

    shown = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    low, high = np.percentile(shown.numpy(), [1, 99])
    picture = ((shown - low) / max(float(high - low), 1e-6)).clamp(0, 1).permute(1, 2, 0).numpy() * 255
    background = [int(index) for index in run.data.exclude_classes]
    colors = class_colors(len(run.data.classes), skip=background)
    found = labels.cpu().numpy()
    for index, color in enumerate(colors):
        where = (found == index) if run.data.activation == "softmax" else found[index]
        if index not in background:
            picture[where] = 0.5 * picture[where] + 0.5 * np.array(color)
    pixels: NDArray[np.uint8] = picture.round().astype(np.uint8)
    return pixels


def write_png(path: Path, pixels: NDArray[Any]) -> None:
    """Write a picture whole or not at all."""
    from PIL import Image

    from lightning_dice.callbacks.files import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: Image.fromarray(pixels).save(part, format="PNG"))


if __name__ == "__main__":
    main()
