"""Fetches what a machine with a GPU may lack, for PYTHONPATH there; it may have no network.

python -m bench.gpu.wheels wheels/ && tar cf wheels.tar wheels/
PYTHONPATH=wheels python -m bench.gpu     # on that machine
"""

from __future__ import annotations

import argparse
import subprocess
import sys

# Nothing that JAX and PyTorch bring themselves: NumPy, ml_dtypes and their CUDA libraries.
NAMES = ("awscrt", "keras", "namex", "optree", "absl-py", "h5py", "packaging")
PEERS = ("torch_checkpointing", "safetensors")  # the second is for the first
NAMES_OF_RICH = ("rich", "markdown-it-py", "mdurl", "pygments")  # Keras imports it


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.wheels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="where they go, unpacked")
    parser.add_argument("--python", default="3.12", help="of that machine")
    parser.add_argument("--platform", default="manylinux_2_28_x86_64")
    options = parser.parse_args()
    command = [sys.executable, "-m", "pip", "install", "--target", options.folder]
    command += ["--no-deps", "--no-compile", "--only-binary", ":all:"]
    command += ["--python-version", options.python]
    older = ["manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]
    for platform in (options.platform, *(older if "x86_64" in options.platform else ())):
        command += ["--platform", platform]
    sys.exit(subprocess.run([*command, *NAMES, *NAMES_OF_RICH, *PEERS], check=False).returncode)


if __name__ == "__main__":
    main()
