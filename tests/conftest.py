"""What the tests share. Data and reference files that are not part of the repository come from the environment:

NEURON_MERGING_DATA: folder with the data sets in torchvision's layout;
NEURON_MERGING_REFERENCE: folder with golden_scaling.npz and the published LeNet checkpoint.
Tests that need one of them skip, with the reason, where it is unset.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import main
from models import build
from tests.helpers import with_statistics

ROOT = Path(__file__).resolve().parents[1]
if os.environ.get("PYTEST_XDIST_WORKER"):  # each worker has its share of the cores
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
NARROW = {  # one of each family, thin: what is tested does not depend on the width
    "LeNet": ("LeNet_300_100", (), None),
    "VGG-11": ("VGG", (11,), (16, 16, 24, 24, 32, 32, 32, 32)),
    "ResNet-8": ("ResNet", (8,), None),
    "WRN-10-2": ("WideResNet", (10, 2), None),
}
SCRIPTS = {  # in scripts/, with the flags that each has
    "LeNet_300_100_FashionMNIST": "-t -c -r",
    "VGG16_CIFAR10": "-t -c",
    "VGG16_CIFAR100": "-t -c",
    "VGG16_CIFAR100_train": "",
    "ResNet56_CIFAR10": "-t -c -r",
    "WideResNet_40_4_CIFAR10": "-t -c -r",
}


@pytest.fixture(scope="session")
def reference() -> Path:
    return _folder("NEURON_MERGING_REFERENCE", "the golden scaling matrices and the published LeNet")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    return _folder("NEURON_MERGING_DATA", "CIFAR-10 and the FashionMNIST training split")


def _folder(variable: str, what: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} is not set: it names the folder with {what}")
    return Path(folder)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test's random numbers are its own, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def pretrained() -> Path:
    return ROOT / "pretrained" / "LeNet_300_100.original.300_100.bias.pth.tar"


@dataclass
class Outcome:
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def row(self) -> dict:
        """What it printed for `--json -`."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def refused(self) -> bool:
        """Whether all that came of it is one line that says why."""
        return (self.code, self.out, self.err.count("\n")) == (2, "", 1)


@pytest.fixture
def cli(capsys):
    """Run main.py's command line in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main.main([str(a) for a in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(params=NARROW)
def network(request) -> torch.nn.Module:
    """Each of the four families with BatchNorm statistics as if it had seen data, in evaluation mode."""
    torch.manual_seed(0)
    arch, depth_wide, widths = NARROW[request.param]
    return with_statistics(build(arch, depth_wide, widths=widths))
