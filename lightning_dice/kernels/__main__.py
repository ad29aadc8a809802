"""`python -m lightning_dice.kernels`: what computes the sums here; `--build` for machines without a compiler."""

from __future__ import annotations

import argparse

from lightning_dice.kernels import available
from lightning_dice.kernels.native import build


def main() -> None:
    """Print the implementations, or build the C++ kernels into the package."""
    parser = argparse.ArgumentParser(prog="python -m lightning_dice.kernels", description=__doc__)
    parser.add_argument(
        "--build",
        metavar="PROCESSOR",
        nargs="?",
        const="native",
        help="build the C++ kernels into the package, as for an image of a container that has no compiler: for a "
        "processor as the compiler's -march names it, such as x86-64-v3; by default for this one",
    )
    processor = parser.parse_args().build
    if processor is not None:
        try:
            print(build.build(build.PREBUILT, build.compiler(), processor))
        except OSError as error:
            parser.exit(1, f"{error}\n")
        return
    for name, why in available().items():
        print(f"{name:10} {'can run' if why is None else why}")
    print(f"\nprebuilt: {build.PREBUILT if build.PREBUILT.is_file() else 'none'}; cache: {build.cache()}")


if __name__ == "__main__":
    main()
