"""The command line: what it prints, writes and accepts, and that bad input ends in one line, exit code 2, nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
from experiments import settings, tuning
from experiments.experiment import Experiment, depth_wide, load
from experiments.literal import FORMS
from models import NETWORKS, build
from neuron_merging.checkpoint import load_checkpoint, save_checkpoint
from neuron_merging.decompose import COMPENSATIONS, CRITERIA
from neuron_merging.errors import NeuronMergingError
from neuron_merging.files import write_atomically
from neuron_merging.methods import METHODS
from neuron_merging.shrink import shrink
from tests.conftest import ROOT
from tests.helpers import images, smaller, units

PUBLISHED_LENET = {  # ratio: (prune, merge), l1-norm, Table 1
    0.5: (88.40, 88.69), 0.6: (85.17, 86.92), 0.7: (71.26, 82.75), 0.8: (66.76, 80.02),
}  # fmt: skip


@pytest.mark.parametrize("ratio", PUBLISHED_LENET)
@pytest.mark.parametrize("kind", ["prune", "merge"])
def test_the_published_lenet_gives_the_published_table_to_the_digit(cli, reference, ratio, kind):
    file = reference / "LeNet_300_100.original.300_100.bias.pth.tar"
    done = cli(
        "--arch", "LeNet_300_100", "--pretrained", file, "--model-type", kind, "--target", "ip", "--criterion", "l1-norm",
        "--pruning-ratio", ratio, "--threshold", 0.45, "--evaluate", "--json", "-",
    )  # fmt: skip
    row = done.row
    assert row["accuracy"] == PUBLISHED_LENET[ratio][kind == "merge"]


def test_the_published_lenet_itself(cli, reference):
    done = cli("--pretrained", reference / "LeNet_300_100.original.300_100.bias.pth.tar", "--evaluate", "--json", "-")
    assert done.row["accuracy"] == 89.80


@pytest.mark.parametrize(
    ("arch", "dataset", "options", "params"),
    [
        ("LeNet_300_100", "FashionMNIST", {}, 125_810),
        ("LeNet_300_100", "FashionMNIST", {"ratio": 0.8}, 48_530),
        ("VGG", "cifar10", {}, 5_397_034),
        ("VGG", "cifar100", {}, 8_393_348),
    ],
)
def test_parameters_of_the_published_widths(arch, dataset, options, params):
    from experiments.experiment import Experiment, shrink
    from neuron_merging.counting import count_parameters

    experiment = Experiment(arch=arch, dataset=dataset, pretrained=Path("none"), compensation="merge", **options)
    assert count_parameters(shrink(experiment.network(), experiment).model) == params


@pytest.mark.parametrize(
    ("arch", "classes", "params"),
    [
        ("LeNet_300_100", 10, 266_610),
        ("VGG", 10, 14_987_722),
        ("VGG", 100, 15_033_892),
        ("ResNet", 10, 855_770),
        ("WideResNet", 10, 8_949_210),
    ],
)
def test_parameters_of_the_published_networks(arch, classes, params):
    from models import build
    from neuron_merging.counting import count_parameters

    assert count_parameters(build(arch, settings.NETWORKS[arch].depth_wide, classes)) == params


def test_widths_are_rounded_as_in_the_paper():
    assert settings.uniform_widths("LeNet_300_100", (), [300, 100], 0.8) == [60, 20]
    assert settings.uniform_widths("ResNet", (56,), [16, 32, 64], 0.3) == [11, 22, 44]
    assert settings.uniform_widths("WideResNet", (40, 4), [64, 128, 256], 0.3) == [44, 88, 176]


def test_the_defaults_are_those_of_the_published_scripts():
    published = {
        ("LeNet_300_100", "FashionMNIST"): (0.45, None), ("VGG", "cifar10"): (0.1, 0.85), ("VGG", "cifar100"): (0.1, 0.7),
        ("ResNet", "cifar10"): (0.1, 0.85), ("WideResNet", "cifar10"): (0.1, 0.8),
    }  # fmt: skip
    for which, (threshold, lamda) in published.items():
        method = settings.MERGING[which]
        assert method.threshold == threshold
        assert lamda is None or method.lamda == lamda


@pytest.mark.parametrize("text", ["40,4", "[40,4]", "(40, 4)", "[40, 4]"])
def test_depth_wide_is_parsed(text):
    assert depth_wide(text) == (40, 4)


def test_the_summary_for_people(cli, pretrained):
    done = cli("--pretrained", pretrained, "--model-type", "merge", "--evaluate")
    lines = done.out.splitlines()
    assert done.code == 0
    assert lines[0] == "LeNet_300_100 on FashionMNIST: merge, l1-norm, ratio 0.5"
    assert [line.split()[0] for line in lines[2:]] == ["accuracy", "parameters", "MACs", "decompose", "evaluate"]
    assert "125,810   -52.8 %" in done.out


@pytest.mark.parametrize("kind", ["original", *COMPENSATIONS])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_type_and_criterion_saves_what_reloads_to_the_same_accuracy(cli, pretrained, tmp_path, kind, criterion):
    small, report = tmp_path / "small.pth.tar", tmp_path / "row.json"
    options = [
        "--model-type",
        kind,
        "--criterion",
        criterion,
        "--widths",
        "90,30",
        "--evaluate",
        "--save",
        small,
        "--json",
        report,
    ]
    assert cli("--pretrained", pretrained, *options).code == 0
    first = json.loads(report.read_text())
    again = cli("--pretrained", small, "--evaluate", "--json", "-").row
    assert again["correct"] == first["correct"]
    assert again["params"] == first["params"] == (266_610 if kind == "original" else 73_690)
    assert again["widths"] == (None if kind == "original" else [90, 30])


def test_the_json_says_all_that_belongs_to_a_result(cli, pretrained):
    row = cli("--pretrained", pretrained, "--model-type", "prune", "--evaluate", "--json", "-").row
    assert {
        "arch", "dataset", "type", "criterion", "ratio", "accuracy", "correct", "total", "params", "params_original", "macs",
        "macs_original", "seconds_decompose", "seconds_evaluate", "checkpoint", "checkpoint_sha256", "versions",
    } <= row.keys()  # fmt: skip
    assert row["macs_original"] == 784 * 300 + 300 * 100 + 100 * 10
    assert row["macs"] == 784 * 150 + 150 * 50 + 50 * 10
    assert row["accuracy"] == round(100 * row["correct"] / row["total"], 2)


def test_the_published_flags_are_all_there():
    args = main.parser().parse_args(
        [
            "--arch",
            "ResNet",
            "--depth-wide",
            "56",
            "--dataset",
            "cifar10",
            "--pretrained",
            "x",
            "--model-type",
            "merge",
            "--criterion",
            "l2-GM",
            "--pruning-ratio",
            ".3",
            "--threshold",
            ".1",
            "--lamda",
            ".85",
            "--evaluate",
            "--retrain",
            "--target",
            "conv",
            "--batch-size",
            "128",
            "--test-batch-size",
            "256",
            "--epochs",
            "2",
            "--lr",
            ".1",
            "--momentum",
            ".9",
            "--weight-decay",
            "5e-4",
            "--gammas",
            ".1",
            ".1",
            "--schedule",
            "100",
            "150",
            "--seed",
            "1",
            "--no-cuda",
            "--log-interval",
            "100",
        ]
    )
    assert (args.lamda, args.gammas, args.schedule) == (0.85, [0.1, 0.1], [100, 150])
    assert main.parser().parse_args(["--lambda", "0.7"]).lamda == 0.7


def test_help_names_everything_that_can_be_chosen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # no name is cut at the end of a line
    for options in (["--help"], ["--model", "x", "--help"]):
        with pytest.raises(SystemExit):
            main.main(options)
        text = " ".join(capsys.readouterr().out.split())
        for name in [*CRITERIA, *FORMS, *METHODS, *(NETWORKS if options == ["--help"] else ())]:
            assert name in text


def test_restoration_by_command_reloads_and_says_what_it_took(cli, pretrained, tmp_path):
    saved = tmp_path / "small.pth.tar"
    options = ["--pretrained", pretrained, "--model-type", "restore", "--pruning-ratio", 0.8, "--probe-samples", 512]
    done = cli(*options, "--evaluate", "--save", saved, "--json", "-")
    row = done.row
    assert (row["type"], row["probe"], row["probe_samples"], row["ridge"], row["seed"]) == (
        "restore",
        "auto: leaves or white",
        512,
        0.03,
        1,
    )
    assert row["peak_mb"] > 50
    assert "peak memory" in done.err
    merged = cli(
        "--pretrained", pretrained, "--model-type", "merge", "--pruning-ratio", 0.8, "--evaluate", "--json", "-"
    ).row
    assert row["accuracy"] > merged["accuracy"] + 3
    assert (row["params"], row["macs"], row["widths"]) == (merged["params"], merged["macs"], merged["widths"])
    again = cli("--pretrained", saved, "--evaluate", "--json", "-").row
    assert again["correct"] == row["correct"]


def test_settings_are_chosen_on_held_out_images(cli, pretrained, data_folder):
    done = cli("--pretrained", pretrained, "--evaluate", "--split", "val", "--data", data_folder, "--json", "-")
    row = done.row
    assert (row["split"], row["total"]) == ("val", 5000)


def test_training_for_a_choice_and_looking_leave_the_held_out_images_alone(cli, pretrained, tmp_path, monkeypatch):
    asked = []

    def load(name, split, root):
        asked.append(split)
        raise NeuronMergingError("enough")

    for place in ("data.load", "data.loader.load", "experiments.tuning.load"):
        monkeypatch.setattr(place, load)
    look = ["--model-type", "restore", "--calibrate", "FashionMNIST:9"]
    for told, splits in (
        (["--split", "val", "--save", tmp_path / "net"], ["fit"]),
        (["--save", tmp_path / "net"], ["train"]),
        (["--pretrained", pretrained, *look, "--evaluate"], ["fit"]),
        (["--pretrained", pretrained, "--evaluate", "--split", "val"], ["val"]),
        (["--pretrained", pretrained, "--evaluate"], ["test"]),
    ):
        asked.clear()
        assert "enough" in cli(*told).err and asked == splits
    asked.clear()
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)  # where nothing is measured yet
    assert tuning.main([]) == 2 and set(asked) == {"val"}


def test_real_images_to_look_at_on_the_command_line(cli, pretrained, monkeypatch):
    for place in ("data.load", "data.loader.load"):
        monkeypatch.setattr(place, lambda name, split, root: images(name, 40))
    looks = ["--calibrate", "FashionMNIST:30", "--evaluate", "--json", "-"]
    row = cli("--pretrained", pretrained, "--model-type", "restore", *looks).row
    assert (row["calibrate"], row["probe"], row["seed"]) == ("FashionMNIST:30", None, 1)


# ---------------------------------------------------------------- bad input


HARMS = ("truncated", "empty", "text", "nan", "code", "no-weights", "sparse")


def damaged(tmp_path: Path, pretrained: Path, how: str) -> Path:
    path = tmp_path / f"{how}.pth.tar"
    content = torch.load(pretrained, weights_only=True)
    if how == "truncated":
        path.write_bytes(pretrained.read_bytes()[:100_000])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("no checkpoint")
    elif how == "nan":
        content["state_dict"]["ip2.weight"][3, 4] = float("nan")
        torch.save(content, path)
    elif how == "code":  # a pickle that would run something
        import pickle

        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'executed'}",)

        path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    elif how == "sparse":
        content["state_dict"]["ip2.weight"] = content["state_dict"]["ip2.weight"].to_sparse()
        torch.save(content, path)
    elif how == "no-weights":
        torch.save({"acc": 90.0}, path)
    return path


BAD = {
    "missing": (["--pretrained", "{tmp}/nothing.pth.tar"], "is not there; train it with: python main.py --arch LeNet_300_100"),
    "truncated": (["--pretrained", "{truncated}"], "not a checkpoint that can be read"),
    "empty": (["--pretrained", "{empty}"], "not a checkpoint that can be read"),
    "text": (["--pretrained", "{text}"], "not a checkpoint that can be read"),
    "code": (["--pretrained", "{code}"], "not a checkpoint that can be read"),
    "no weights": (["--pretrained", "{no-weights}"], "holds no state_dict"),
    "nan": (["--pretrained", "{nan}"], "ip2.weight has 1 values that are NaN or infinite"),
    "folder": (["--pretrained", "{tmp}"], "cannot read the checkpoint"),
    "another network's": (["--arch", "ResNet", "--pretrained", "{lenet}"], "is a checkpoint of LeNet_300_100, not of ResNet"),
    "ratio 1": (["--pruning-ratio", "1"], "outside [0, 1)"),
    "ratio -0.1": (["--pruning-ratio", "-0.1"], "outside [0, 1)"),
    "ratio nan": (["--pruning-ratio", "nan"], "outside [0, 1)"),
    "ratio text": (["--pruning-ratio", "half"], "invalid float value: 'half'"),
    "ratio that leaves nothing": (["--model-type", "prune", "--pruning-ratio", "0.999"], "leaves no neuron"),
    "criterion": (["--criterion", "l3-norm"], "unknown --criterion 'l3-norm': choose one of " + ", ".join(CRITERIA)),
    "type": (["--model-type", "glue"], "unknown --model-type 'glue': choose one of original, " + ", ".join(METHODS)),
    "network": (["--arch", "AlexNet"], "unknown network 'AlexNet': choose one of LeNet_300_100"),
    "data set": (["--dataset", "imagenet"], "unknown data set 'imagenet'"),
    "data set of another shape": (["--dataset", "cifar10"], "use --dataset FashionMNIST"),
    "depth": (["--arch", "ResNet", "--depth-wide", "57"], "depth = 6n + 2"),
    "depth text": (["--depth-wide", "__import__('os')"], "neither a depth nor depth,width"),
    "widths count": (["--model-type", "prune", "--widths", "3"], "has 1 numbers, LeNet_300_100 has 2 units"),
    "widths range": (["--model-type", "prune", "--widths", "301,5"], "301 of 300 neurons cannot be kept in ip1"),
    "widths text": (["--widths", "many"], "neither published, uniform, auto, quick nor numbers"),
    "lamda": (["--lamda", "2"], "outside [0, 1]"),
    "threshold": (["--threshold", "2"], "no cosine"),
    "device": (["--device", "abacus"], "unknown --device 'abacus'"),
    "unknown flag": (["--prunning-ratio", "0.5"], "unrecognized arguments: --prunning-ratio"),
    "schedule": (["--schedule", "10"], "--schedule has 1 epochs, --gammas 3"),
    "schedule of the fast recipe": (["--recipe", "fast", "--schedule", "10"], "belong to --recipe published"),
    "momentum": (["--momentum", "-1"], "--momentum has to be in [0, 1)"),
    "learning rate": (["--lr", "nan"], "--lr has to be above 0"),
    "weight decay": (["--weight-decay", "-1"], "--weight-decay cannot be negative"),
    "decay of BatchNorm": (["--norm-decay", "-1"], "--norm-decay cannot be negative"),
    "cutout": (["--cutout", "-1"], "--cutout cannot be negative"),
    "seed": (["--seed", str(2**80)], "has to be in [0, 2**32)"),
    "a name too long": (["--pretrained", "x" * 5000], "File name too long"),
    "a name of two lines": (["--pretrained", "no\nthing"], "is not there"),
    "a pipe to save into": (["--save", "/dev/null"], "no regular file"),
    "sparse": (["--pretrained", "{sparse}"], "sparse or quantised"),
    "recipe": (["--recipe", "slow"], "invalid choice: 'slow'"),
    "epochs": (["--epochs", "0"], "at least 1"),
    "budget": (["--model-type", "merge", "--widths", "auto", "--budget", "half"], "give NAME=NUMBER"),
    "budget above 1": (["--model-type", "merge", "--widths", "auto", "--budget", "macs=2"], "say the shares to keep"),
    "budget of something else": (["--model-type", "merge", "--widths", "auto", "--budget", "s=0.5"], "say the shares"),
    "budget too small": (
        ["--model-type", "merge", "--widths", "auto", "--budget", "params=0.0001"], "no widths are within the budget"
    ),
    "budget of uniform widths": (["--model-type", "merge", "--budget", "params=0.5"], "--budget and --drop-blocks are for"),
    "multiple": (["--model-type", "merge", "--multiple", "0"], "--multiple 0 has to be at least 1"),
    "split": (["--split", "train"], "invalid choice: 'train'"),
    "probe": (["--model-type", "restore", "--probe", "brown"], "unknown --probe 'brown'"),
    "ridge": (["--model-type", "restore", "--ridge", "-1"], "not negative"),
    "ridge nan": (["--model-type", "restore", "--ridge", "nan"], "not negative"),
    "probe samples": (["--model-type", "restore", "--probe-samples", "1"], "--probe-samples 1 has to be at least 2"),
    "nothing to look at": (["--model-type", "merge-bn"], "give --calibrate, such as FashionMNIST:512"),
    "nobody who looks": (["--model-type", "merge", "--calibrate", "FashionMNIST:9"], "merge needs no data"),
    "another network's images": (["--model-type", "restore", "--calibrate", "cifar10:9"], "was trained on FashionMNIST"),
    "no images": (["--model-type", "restore", "--calibrate", "{tmp}:9"], "there is no folder"),
    "one image": (["--model-type", "restore", "--calibrate", "{tmp}:1"], "at least 2 images"),
    "save into a file's folder": (["--save", "{lenet}/small.pth.tar"], "cannot write"),
    "save into nowhere": (["--save", "/proc/nowhere/small.pth.tar"], "cannot write"),
    "save onto a folder": (["--save", "{tmp}"], "is a folder"),
    "json into nowhere": (["--json", "/proc/nowhere/row.json"], "cannot write"),
    "two outputs, one file": (["--json", "{tmp}/a", "--append", "{tmp}/x/../a"], "are to be different files"),
    "rows of a summary": (["--summary", "--append", "{tmp}/rows.jsonl"], "--summary has none"),
    "memory": (["--model-type", "restore", "--probe-samples", "1000000000000"], "out of memory: a smaller"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_line_and_exit_code_2(cli, pretrained, tmp_path, name):
    options, message = BAD[name]
    files = {how: damaged(tmp_path, pretrained, how) for how in HARMS if f"{{{how}}}" in options}
    places = {"tmp": tmp_path, "lenet": pretrained, **files}
    target = tmp_path / "small.pth.tar"
    options = [option.format(**places) for option in options]
    defaults = ["--evaluate"]
    if "--save" not in options:
        defaults += ["--save", target]
    if "--pretrained" not in options and "ResNet" not in options:
        defaults += ["--pretrained", pretrained]
    before = sorted(tmp_path.iterdir())
    done = cli(*defaults, *options)
    assert done.refused and done.err.startswith("main.py: ") and message in done.err
    assert sorted(tmp_path.iterdir()) == before


def test_exports_and_benchmarks_do_not_train(cli, tmp_path):
    done = cli("--model-type", "prune", "--export", tmp_path / "small.onnx")
    assert done.code == 2 and "--export and --benchmark need --evaluate" in done.err and not list(tmp_path.iterdir())


def test_a_checkpoint_without_a_name_that_does_not_fit_is_described(cli, pretrained, tmp_path):
    """Published checkpoints do not say what they are: their parameters' names and shapes decide."""
    bare = tmp_path / "bare.pth.tar"
    torch.save({"acc": 90.0, "state_dict": torch.load(pretrained, weights_only=True)["state_dict"]}, bare)
    done = cli("--arch", "ResNet", "--pretrained", bare, "--evaluate")
    assert done.refused
    assert "does not fit ResNet: it lacks conv1.weight and" in done.err
    weights = torch.load(bare, weights_only=True)
    weights["state_dict"]["ip1.weight"] = torch.zeros(10, 784)
    torch.save(weights, bare)
    assert "ip1.weight is [10, 784] where [300, 784] is expected" in cli("--pretrained", bare, "--evaluate").err


def test_a_run_that_fails_makes_no_folder(cli, tmp_path):
    assert cli("--evaluate", "--pretrained", tmp_path / "missing", "--save", tmp_path / "new" / "x").code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    def full_disk(file):
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    (tmp_path / "row.json").write_text("old")
    with pytest.raises(NeuronMergingError, match="No space left on device"):
        write_atomically(tmp_path / "row.json", full_disk)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.fixture
def unprivileged():
    """Root may write everywhere: be nobody for a while."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


def test_no_write_permission(cli, pretrained, unprivileged):
    done = cli("--pretrained", pretrained, "--evaluate", "--save", "/usr/small.pth.tar")
    assert done.refused
    assert "Permission denied; check the folder's permission" in done.err


def test_an_existing_file_survives_a_run_that_fails(cli, pretrained, tmp_path):
    target = tmp_path / "precious.pth.tar"
    target.write_text("precious")
    cli("--pretrained", tmp_path / "missing", "--evaluate", "--save", target)
    assert target.read_text() == "precious"


def test_a_bare_state_dict_is_read_too(cli, pretrained, tmp_path):
    path = tmp_path / "bare.pt"
    torch.save(torch.load(pretrained, weights_only=True)["state_dict"], path)
    assert cli("--pretrained", path, "--evaluate").code == 0


@pytest.mark.parametrize("acc", ["high", float("nan"), torch.tensor(81.5)])
def test_an_accuracy_of_any_kind_in_the_file_is_no_reason_to_fail(cli, pretrained, tmp_path, acc):
    path = tmp_path / "odd.pt"
    torch.save(torch.load(pretrained, weights_only=True) | {"acc": acc}, path)
    row = cli("--pretrained", path, "--evaluate", "--json", "-").row
    assert row["accuracy_checkpoint"] == (81.5 if isinstance(acc, torch.Tensor) else None)


def test_a_link_is_written_through(cli, pretrained, tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    assert cli("--pretrained", pretrained, "--evaluate", "--json", link).code == 0
    assert link.is_symlink()
    assert json.loads(real.read_text())["total"] == 10_000


def test_a_result_is_appended_as_a_row(cli, pretrained, tmp_path):
    for already in (False, True):
        done = cli("--pretrained", pretrained, "--evaluate", "--append", tmp_path / "rows.jsonl")
        assert done.code == 0 and ("holds a row of these settings already" in done.err) == already
    (line,) = (tmp_path / "rows.jsonl").read_text().splitlines()  # the same measurement is one row
    assert json.loads(line)["checkpoint"] == pretrained.name


def test_a_file_of_what_no_network_has_is_one_line(cli, tmp_path):
    variances = {"1.running_var": torch.tensor([1.0, -1.0])}
    for content, message in (({0: torch.ones(2)}, "no state_dict"), (variances, "1.running_var has variances below 0")):
        torch.save(content, tmp_path / "odd.pth.tar")
        said = cli("--pretrained", tmp_path / "odd.pth.tar", "--evaluate")
        assert said.refused and message in said.err


def test_a_network_that_has_lost_all_its_blocks_has_nothing_to_prune(cli, tmp_path):
    torch.manual_seed(0)
    model = build("ResNet", (8,))
    found = units(model)
    model = smaller("prune", model, found, [torch.tensor([], dtype=torch.int64)] * len(found))
    save_checkpoint(tmp_path / "none.pth.tar", model, widths=[0, 0, 0])
    common = ("--arch", "ResNet", "--depth-wide", 8, "--pretrained", tmp_path / "none.pth.tar")
    said = cli(*common, "--model-type", "prune", "--evaluate")
    assert said.refused, said.err
    assert cli(*common, "--summary", "--pruning-ratio", "0.5").code == 0


def test_a_ratio_without_a_type_is_no_silent_nothing(cli, pretrained):
    done = cli("--pretrained", pretrained, "--pruning-ratio", "0.5", "--evaluate", "--json", "-")
    assert done.code == 0 and done.row["params"] == 266_610
    assert "warning: nothing is dropped: without --model-type" in done.err
    said = cli("--pretrained", pretrained, "--model-type", "original", "--pruning-ratio", "0.5", "--evaluate")
    assert said.code == 0 and "warning" not in said.err


@pytest.mark.parametrize("widths", [[10**9, 3], torch.tensor([90, 30]), [torch.tensor(90), 30], "90,30"])
def test_a_file_that_says_odd_things_of_its_widths_is_read_by_its_shapes(cli, pretrained, tmp_path, widths):
    small = tmp_path / "small.pth.tar"
    cli("--pretrained", pretrained, "--model-type", "prune", "--widths", "90,30", "--evaluate", "--save", small)
    torch.save(torch.load(small, weights_only=True) | {"widths": widths}, small)
    row = cli("--pretrained", small, "--evaluate", "--json", "-").row
    assert row["params"] == 73_690


def test_no_memory_in_the_middle_of_restoration_is_one_line(cli, pretrained, monkeypatch):
    def run(self, *_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 bytes")

    monkeypatch.setattr("neuron_merging.graph.walk.Walk.compute", run)
    done = cli("--pretrained", pretrained, "--model-type", "restore", "--evaluate")
    assert done.refused and "out of memory: a smaller --batch-size" in done.err


@pytest.mark.slow
def test_a_closed_pipe_does_not_lose_the_row(pretrained, tmp_path):
    done = shell(f"--pretrained {pretrained} --evaluate --append {tmp_path / 'rows.jsonl'} | true")
    assert "Traceback" not in done.stderr
    (line,) = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert json.loads(line)["total"] == 10_000


def test_the_summary_is_of_the_file_that_is_named(cli, pretrained, tmp_path):
    small = tmp_path / "small.pth.tar"
    cli("--pretrained", pretrained, "--model-type", "prune", "--widths", "90,30", "--evaluate", "--save", small)
    assert cli("--pretrained", small, "--summary").out.startswith("ip1 -> ip2: 90\nip2 -> ip3: 30\n")
    assert "is not there" in cli("--pretrained", tmp_path / "none", "--summary").err


@torch.no_grad()
def test_a_coupled_file_can_be_saved_again(tmp_path):
    """What it says of its widths counts channels of several layers too: its shapes are what is read."""
    small, _ = shrink(build("ResNet", (20,), 10), 0.4, compensation="prune", coupled=True)
    save_checkpoint(tmp_path / "small", small, widths=[1, 2, 3], coupled=True)
    xs = torch.randn(2, 3, 32, 32)
    for file in ("small", "again"):
        experiment = Experiment(arch="ResNet", dataset="cifar10", pretrained=tmp_path / file, depth_wide=(20,))
        model, checkpoint = load(experiment)
        assert torch.equal(model.eval()(xs), small.eval()(xs))
        save_checkpoint(tmp_path / "again", model, widths=checkpoint.widths)


def test_an_accuracy_on_other_images_is_not_set_beside(cli, pretrained, tmp_path):
    checkpoint = load_checkpoint(pretrained)
    for split, known in (("test", 50.0), ("val", None), (None, 50.0)):  # what says nothing is of the test set
        about = {"acc": 50.0} | ({} if split is None else {"split": split})
        torch.save({**about, "state_dict": checkpoint.state_dict}, tmp_path / "file")
        row = cli("--pretrained", tmp_path / "file", "--evaluate", "--json", "-").row
        assert row["accuracy_checkpoint"] == known


def test_a_pruned_file_is_not_called_the_original(cli, pretrained, tmp_path):
    small = tmp_path / "small.pth.tar"
    cli("--pretrained", pretrained, "--model-type", "merge", "--evaluate", "--save", small)
    lines = cli("--pretrained", small, "--evaluate").out.splitlines()
    assert lines[0] == "LeNet_300_100 on FashionMNIST: small.pth.tar"
    assert lines[2].split()[2] == "%"  # one accuracy only: no accuracy of an original is known
    assert "125,810" in lines[3]


def shell(command: str, **env: str) -> subprocess.CompletedProcess:
    command = f"exec {sys.executable} main.py {command}"
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, env=os.environ | env)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_nobody_takes():
    full = shell("--evaluate --json - > /dev/full")
    assert full.returncode == 2
    assert full.stderr.splitlines()[-1] == "main.py: output: No space left on device"
    assert "Traceback" not in full.stderr
    assert shell("--help", PYTHONIOENCODING="ascii").returncode == 0


def test_no_depth_at_all_is_one_line(cli):
    for arch in ("VGG", "ResNet", "WideResNet"):
        done = cli("--arch", arch, "--depth-wide", "", "--evaluate")
        assert done.refused and f"does not fit {arch}" in done.err


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    done = shell("--evaluate", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the package torch is missing: run make demo" in done.stderr
