"""`python -m lightning_dice.kernels`: list the implementations that can run here, or build the C++ kernels."""

from __future__ import annotations

import argparse

from lightning_dice.kernels import available
from lightning_dice.kernels.native import build


def main() -> None:
    """List the implementations, or build the C++ kernels into the package."""
    parser = argparse.ArgumentParser(prog="python -m lightning_dice.kernels", description=__doc__)
    parser.add_argument(
        "--build",
        metavar="PROCESSOR",
        nargs="?",
        const="native",
        help="build the C++ kernels into the package, for machines or containers without a compiler. PROCESSOR is a "
        "value of the compiler's -march, such as x86-64-v3; the default is this machine's processor",
    )
    processor = parser.parse_args().build
    if processor is not None:
        try:
            print(build.build(build.PREBUILT, build.find_compiler(), processor))
        except OSError as error:
            parser.exit(1, f"{error}\n")
        return
    for name, reason in available().items():
        print(f"{name:10} {'can run' if reason is None else reason}")
    print(f"\nprebuilt: {build.PREBUILT if build.PREBUILT.is_file() else 'none'}; cache: {build.cache_folder()}")


if __name__ == "__main__":
    main()
