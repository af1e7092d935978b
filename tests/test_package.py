"""What `pip install` gives: the wheel and the sdist, and the package at work beside modules of a user's own names."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import decompose
import neuron_merging.decompose
from tests.conftest import ROOT

CORE = "neuron_merging/decompose.py"
BUILD = (
    "from setuptools import build_meta; print(build_meta.build_{}({!r}))"  # what pip and build call; needs no network
)
USERS = {  # modules that many projects have; trace is also one of Python's own
    "data.py": "train = 'my data'\n",
    "train.py": "epochs = 90\n",
    "utils.py": "raise ImportError('not meant to be imported')\n",
    "trace.py": "raise ImportError('not meant to be imported')\n",
    "models.py": """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )
""",
}


def run(*command: object, cwd: Path, **environment: str) -> str:
    """The output of a command that must not fail, and that knows nothing of this repository."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind: str, sources: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    return target / run(sys.executable, "-c", BUILD.format(kind, str(target)), cwd=sources).splitlines()[-1]


def names(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """A copy of what is built from, and of all Python that is not meant to be: building leaves files behind."""
    copy = tmp_path_factory.mktemp("sources") / "clone"
    unwanted = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "FashionMNIST", "pretrained", "results", "saves"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=unwanted)
    return copy


@pytest.fixture(scope="session")
def wheel(sources) -> Path:
    return build("wheel", sources, sources.parent / "wheel")


@pytest.fixture(scope="session")
def sdist(sources) -> Path:
    return build("sdist", sources, sources.parent / "sdist")


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the installed wheel."""
    folder = tmp_path_factory.mktemp("installed")
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--target"]
    run(sys.executable, *pip, folder, wheel, cwd=folder)
    return folder


@pytest.fixture
def project(tmp_path) -> Path:
    """A user's working folder."""
    for name, text in USERS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    package = ROOT / "neuron_merging"
    files = {path.relative_to(ROOT).as_posix() for path in (*package.rglob("*.py"), package / "py.typed")}
    assert names(wheel) == files


def test_the_link_is_a_file_wherever_the_wheel_is_built_from(sources, wheel, sdist, tmp_path):
    text = (ROOT / "decompose.py").read_bytes()
    assert (ROOT / CORE).is_symlink() and zipfile.ZipFile(wheel).read(CORE) == text
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert not (unpacked / CORE).is_symlink() and (unpacked / CORE).read_bytes() == text
    assert not (unpacked / "tests").exists()
    assert names(build("wheel", unpacked, tmp_path / "from-sdist")) == names(wheel)
    as_text = tmp_path / "zip"  # of a commit, which pip unpacks with links as text
    shutil.copytree(sources, as_text, symlinks=True)
    (as_text / CORE).unlink()
    (as_text / CORE).write_text("../decompose.py")
    assert zipfile.ZipFile(build("wheel", as_text, tmp_path / "from-zip")).read(CORE) == text


def test_a_clone_has_one_module_of_the_method():
    assert decompose is neuron_merging.decompose
    first = "import decompose, neuron_merging.decompose as package, neuron_merging.graph.weights as user; "
    assert (
        run(sys.executable, "-c", first + "print(decompose is package, user.absorb is decompose.absorb)", cwd=ROOT)
        == "True True\n"
    )


@pytest.mark.slow
def test_the_readmes_first_example_runs_beside_modules_of_the_users(installed, project):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    mine = "import data, models, train, neuron_merging\n"
    after = "\nprint(neuron_merging.errors.missing('sklearn'))"
    after += "\nprint(neuron_merging.__file__, data.train, models.net().__class__.__name__, train.epochs)\n"
    (project / "example.py").write_text(mine + example + after)
    out = run(sys.executable, "example.py", cwd=project, PYTHONPATH=str(installed))
    assert out.splitlines()[-1] == f"{installed}/neuron_merging/__init__.py my data Sequential 90"
    assert out.splitlines()[-2] == "the package sklearn is missing: pip install 'neuron-merging[baselines]'"
    assert len(out.splitlines()) > 2  # what the example prints


@pytest.mark.slow
def test_the_command_runs_beside_modules_of_the_users(installed, project):
    command = (installed / "bin" / "neuron-merging", "--model", "models:net")
    summary = run(*command, "--summary", cwd=project, PYTHONPATH=str(installed))
    assert "0 -> 3" in summary
    options = (
        "--input-size",
        "3,8,8",
        "--model-type",
        "restore",
        "--pruning-ratio",
        "0.5",
        "--save",
        "small.pth.tar",
        "--json",
        "-",
    )
    row = json.loads(run(*command, *options, cwd=project, PYTHONPATH=str(installed)))
    assert (row["type"], row["widths"]) == ("restore", {"0": 4, "3": 4}) and row["params"] < row["params_original"]
    assert (project / "small.pth.tar").exists()


def test_the_command_ends_with_the_code_of_the_program(installed, project):
    command = [installed / "bin" / "neuron-merging", "--model", "models:nothing", "--summary"]
    done = subprocess.run(
        command, cwd=project, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("neuron-merging: --model models:nothing cannot be made")
