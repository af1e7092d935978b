"""The shell scripts: their flags, from any folder, what they say of a wrong one and of a checkpoint that is not there.

And the published command lines: what the authors' scripts hand to main.py means the same here.
"""

import json
import os
import shutil
import subprocess

import pytest
from torchvision.datasets import CIFAR100

import main
from experiments import training
from experiments.options import experiment_of
from tests.conftest import ROOT, SCRIPTS
from tests.helpers import cifar

AUTHORS = {  # script: network and data, --target, file, what merging has beside the criterion, default ratio
    "LeNet_300_100_FashionMNIST": (
        "--arch LeNet_300_100 --dataset FashionMNIST", "ip", "LeNet_300_100.original.300_100.bias", "--threshold 0.45", "0.5",
    ),
    "ResNet56_CIFAR10": (
        "--arch ResNet --depth-wide 56 --dataset cifar10", "conv", "ResNet.cifar10.original.56",
        "--threshold 0.1 --lamda 0.85", "0.2",
    ),
    "VGG16_CIFAR10": (
        "--arch VGG --dataset cifar10", "conv", "VGG.cifar10.original", "--threshold 0.1 --lamda 0.85", None,
    ),
    "VGG16_CIFAR100": (
        "--arch VGG --dataset cifar100", "conv", "VGG.cifar100.original", "--threshold 0.1 --lamda 0.7", None,
    ),
    "WideResNet_40_4_CIFAR10": (
        "--arch WideResNet --depth-wide [40,4] --dataset cifar10", "conv", "WideResNet.cifar10.original.40_4",
        "--threshold 0.1 --lamda 0.8", "0.2",
    ),
}  # fmt: skip
TYPES = ("original", "prune", "merge")


def authors(script: str, kind: str, criterion: str, ratio: str | None) -> list[str]:
    """The options that a script of the authors has for main.py, in its order."""
    network, target, name, merging, _ = AUTHORS[script]
    file = f"--pretrained saved_models/{name}.pth.tar"
    if kind == "original":
        return f"{network} {file} --evaluate".split()
    line = f"{network} --retrain --target {target} --criterion {criterion} --model-type {kind} {file}"
    line += f" --pruning-ratio {ratio}" if ratio else ""
    return f"{line} {merging if kind == 'merge' else ''} --evaluate".split()


def checked(options: list[str]):
    args = main.parser().parse_args(options)
    main.check(args)
    return args


@pytest.fixture
def handed_on(tmp_path):
    """What a script hands to main.py: its options."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "main.py").write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")

    def of(name: str, *arguments: str) -> list[str]:
        command = ["bash", str(tmp_path / "scripts" / f"{name}.sh"), *arguments]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    return of


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
    defaults = {"-t": "[original]", "-c": "[l1-norm]", "-r": f"[{AUTHORS[name][-1]}]"} if name in AUTHORS else {}
    assert all(line.endswith(defaults.get(line.split()[0], "")) for line in done.stdout.splitlines()[1:])


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


@pytest.mark.parametrize("name", AUTHORS)
def test_scripts_mean_what_the_authors_mean(name, handed_on, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no saved_models is
    default = AUTHORS[name][-1]
    for ratio in {default, default and "0.3"}:
        for kind in TYPES:
            for criterion in ("l1-norm", "l2-GM"):
                given = ["-t", kind, "-c", criterion, *(["-r", ratio] if ratio else [])]
                ours, theirs = checked(handed_on(name, *given)), checked(authors(name, kind, criterion, ratio))
                assert ours.evaluate and theirs.evaluate
                about, expected = experiment_of(ours), experiment_of(theirs)
                assert about.settings() == expected.settings()
                assert about.pretrained.name == expected.pretrained.name
                assert about.pretrained == expected.pretrained or not about.pretrained.exists()
    said = ["-t", "original", "-c", "l1-norm", *(["-r", default] if default else [])]
    assert vars(checked(handed_on(name))) == vars(checked(handed_on(name, *said)))


def test_the_training_script_trains_what_the_authors_train(handed_on):
    ours, theirs = checked(handed_on("VGG16_CIFAR100_train")), checked(["--arch", "VGG", "--dataset", "cifar100"])
    assert not ours.evaluate and not theirs.evaluate
    assert experiment_of(ours) == experiment_of(theirs) and main.recipe(ours) == main.recipe(theirs)


@pytest.mark.parametrize("kind", TYPES)
def test_the_authors_lines_run_and_train_nothing(cli, kind, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "train", None)
    done = cli(*authors("LeNet_300_100_FashionMNIST", kind, "l1-norm", "0.5"))
    assert done.code == 0 and "accuracy" in done.out and done.err == ""
    assert not list(tmp_path.iterdir())


def test_the_published_flags_are_understood():
    line = (
        "--batch-size 64 --test-batch-size 256 --epochs 200 --lr 0.1 --momentum 0.9 --wd 5e-4 --no-cuda --seed 1"
        " --log-interval 100 --arch VGG --retrain --target conv --dataset cifar10 --gammas 0.1 0.1 --schedule 100 150"
    )
    args = checked(line.split())
    recipe = main.recipe(args)
    assert (recipe.batch_size, recipe.weight_decay, recipe.schedule) == (64, 5e-4, (100, 150)) and args.retrain


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("-r 50", "--pruning-ratio 50.0 is outside [0, 1): did you mean 0.5?"),
        ("-t mrge", "unknown --model-type 'mrge': choose one of original, prune, merge,"),
        ("-c l1", "unknown --criterion 'l1': choose one of l1-norm, l2-norm, l2-GM"),
    ],
)
def test_a_wrong_value_is_answered_with_the_right_one(wrong, said):
    done = run("LeNet_300_100_FashionMNIST", *wrong.split())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr


def test_without_any_option_main_prints_its_usage(cli):
    done = cli()
    assert done.code == 0 and done.out.startswith("usage: main.py") and done.err == ""


@pytest.mark.parametrize("name", ["VGG16_CIFAR10", "VGG16_CIFAR100", "ResNet56_CIFAR10", "WideResNet_40_4_CIFAR10"])
def test_a_checkpoint_that_is_not_there_says_how_to_train_it(name, tmp_path):
    done = run(name, "-t", "merge", "--", "--pretrained", str(tmp_path / "missing.pth.tar"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "missing.pth.tar is not there; train it with: python main.py --arch" in done.stderr


@pytest.mark.slow
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
