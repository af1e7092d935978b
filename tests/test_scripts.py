"""The shell scripts: their flags, from any folder, what they say of a wrong one and of a checkpoint that is not there."""

import json
import os
import subprocess

import pytest
from torchvision.datasets import CIFAR100

from tests.conftest import ROOT, SCRIPTS
from tests.made import cifar


def run(name: str, *arguments: str, cwd="/") -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts" / f"{name}.sh"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})


def test_every_script_is_tested():
    assert {path.stem for path in (ROOT / "scripts").glob("*.sh")} == {"common", *SCRIPTS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_flags_the_script_has(name):
    done = run(name, "-h")
    assert done.returncode == 0
    shown = {line.split()[0] for line in done.stdout.splitlines()[1:]}
    assert shown == {"-h", *SCRIPTS[name].split()}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("wrong", [["-x"], ["merge"], ["-t"]])
def test_a_wrong_flag_is_answered_with_the_right_ones(name, wrong):
    done = run(name, *wrong)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"usage: bash scripts/{name}.sh" in done.stderr
    assert all(flag in done.stderr.split("usage")[1] for flag in SCRIPTS[name].split())


def test_the_published_command_from_another_folder(tmp_path):
    done = run(
        "LeNet_300_100_FashionMNIST", *["-t", "merge", "-c", "l1-norm", "-r", "0.5", "--", "--json", "-"], cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["type"], row["criterion"], row["ratio"], row["params"]) == ("merge", "l1-norm", 0.5, 125_810)
    assert (row["threshold"], row["total"]) == (0.45, 10_000)


def test_the_original_is_evaluated_without_a_warning():
    done = run("LeNet_300_100_FashionMNIST", "-t", "original")
    assert done.returncode == 0 and done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("accuracy")]
    measured = line.split("%")[1]  # behind what the file says
    assert abs(float(measured) - 89.36) < 0.02


@pytest.mark.parametrize("name", ["VGG16_CIFAR10", "VGG16_CIFAR100", "ResNet56_CIFAR10", "WideResNet_40_4_CIFAR10"])
def test_a_checkpoint_that_is_not_there_says_how_to_train_it(name, tmp_path):
    done = run(name, "-t", "merge", "--", "--pretrained", str(tmp_path / "missing.pth.tar"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "missing.pth.tar is not there; train it with: python main.py --arch" in done.stderr


def test_the_training_script_trains_on_data_of_cifar100s_shape(tmp_path):
    cifar(tmp_path, CIFAR100, per_file=24)
    short = ["--epochs", "1", "--schedule", "1", "--gammas", "1", "--batch-size", "12", "--device", "cpu"]
    target = tmp_path / "VGG.cifar100.original.pth.tar"
    done = run("VGG16_CIFAR100_train", "--", "--data", str(tmp_path), "--save", str(target), *short)
    assert done.returncode == 0, done.stderr
    done = run(
        "VGG16_CIFAR100", *["-t", "merge", "-c", "l2-GM", "--"], "--data", str(tmp_path), "--pretrained", str(target)
    )
    assert done.returncode == 0, done.stderr
    assert "8,393,348" in done.stdout
