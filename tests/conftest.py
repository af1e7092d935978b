"""What the tests share. Data and reference files that are not part of the repository come from the environment:

NEURON_MERGING_DATA: folder with the data sets in torchvision's layout;
NEURON_MERGING_REFERENCE: folder with golden_scaling.npz and the published LeNet checkpoint.
Tests that need one of them skip, with the reason, where it is unset.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import main
from models import build

ROOT = Path(__file__).resolve().parents[1]
if os.environ.get("PYTEST_XDIST_WORKER"):  # each worker has its share of the cores
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
NETWORKS = [
    ("LeNet_300_100", ()),
    ("VGG", (16,)),
    ("ResNet", (20,)),
    ("WideResNet", (16, 2)),
]  # small ones of each family


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
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys):
    """Run main.py's command line in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main.main([str(a) for a in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(params=NETWORKS, ids=lambda network: "-".join([network[0], *map(str, network[1])]))
def network(request) -> torch.nn.Module:
    """Each of the four families with BatchNorm statistics as if it had seen data, in evaluation mode."""
    torch.manual_seed(0)
    return with_statistics(build(*request.param))


def with_statistics(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with BatchNorms as if it had been trained, in evaluation mode."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
                module.momentum = 1.0
        model.train()(example(model, 64))
    return model.eval()


def example(model: torch.nn.Module, count: int = 8) -> torch.Tensor:
    """Random inputs of the right shape."""
    shape = (1, 28, 28) if type(model).__name__ == "LeNet_300_100" else (3, 32, 32)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
