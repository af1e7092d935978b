"""Random networks with every criterion and compensation, and random command lines: never a wrong shape, never a traceback.

The same few examples every time; NEURON_MERGING_FUZZ=N (`make fuzz`) tries N new ones in each test, and says how many of what.
"""

import copy
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms.functional import to_pil_image

from experiments.zoo import plant
from models import build
from neuron_merging.counting import count_macs, count_parameters
from neuron_merging.decompose import CRITERIA
from neuron_merging.errors import NeuronMergingError
from neuron_merging.methods import METHODS, NEED_IMAGES
from neuron_merging.plan import prunable
from neuron_merging.shrink import shrink
from tests.helpers import images, same, smaller, surveyed, with_statistics

MANY = int(os.environ.get("NEURON_MERGING_FUZZ", "0"))
FREE = [name for name in METHODS if name not in NEED_IMAGES]


def few(count):
    """So many examples, or as many as the environment asks for."""
    return settings(
        max_examples=MANY or count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=not MANY
    )


class Block(nn.Module):
    """conv–(BatchNorm)–ReLU–conv–(BatchNorm), added to its input; `before`: the BatchNorm and ReLU stand in front."""

    def __init__(self, channels, inner, norm, before, kernel):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, kernel, padding=kernel // 2, bias=not norm)
        self.conv2 = nn.Conv2d(inner, channels, kernel, padding=kernel // 2, bias=not norm)
        self.bn1, self.bn2 = (nn.BatchNorm2d(n) if norm else nn.Identity() for n in (inner, channels))
        self.first = nn.BatchNorm2d(channels) if before else nn.Identity()

    def forward(self, x):
        return x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(F.relu(self.first(x)))))))


@st.composite
def networks(draw):
    """A chain of convolutions, pools and residual blocks, then linear layers; with statistics as if it had seen data."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    layers, channels, side = [], draw(st.integers(1, 3)), 12
    shape = (channels, side, side)
    for _ in range(draw(st.integers(1, 3))):
        out, kernel = draw(st.integers(1, 9)), draw(st.sampled_from([k for k in (1, 2, 3) if k <= side]))
        stride, padding = draw(st.sampled_from([1, 2])), draw(st.integers(0, kernel - 1))
        norm = draw(st.booleans())
        layers.append(nn.Conv2d(channels, out, kernel, stride, padding, bias=not norm or draw(st.booleans())))
        layers += [nn.BatchNorm2d(out)] if norm else []
        layers.append(nn.ReLU(inplace=draw(st.booleans())))
        channels, side = out, (side + 2 * padding - kernel) // stride + 1
        if side >= 4 and draw(st.booleans()):
            layers.append(draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))(2))
            side //= 2
        if draw(st.booleans()):
            inner = draw(st.integers(1, 6))
            layers.append(
                Block(channels, inner, draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([1, 3])))
            )
    if draw(st.booleans()):
        layers, side = [*layers, nn.AdaptiveAvgPool2d(1)], 1
    layers += [nn.Flatten()]
    features = channels * side * side
    if draw(st.booleans()):
        hidden = draw(st.integers(1, 8))
        layers += [nn.Linear(features, hidden, bias=draw(st.booleans())), nn.ReLU(), nn.Dropout(0.3)]
        features = hidden
    model = nn.Sequential(*layers, nn.Linear(features, 4))
    return with_statistics(model, torch.randn(64, *shape)), shape


def spaces(model, shape, coupled):
    """What can lose indices."""
    return prunable(surveyed(model, shape), coupled)[0]


def thinned(found, share):
    """Kept widths: this share of every space, one index at least."""
    return [max(1, round(share * space.size)) for space in found]


def inputs(shape, count=5):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.slow
@few(60)
@given(
    networks(), st.sampled_from([*CRITERIA, "auto"]), st.sampled_from(list(METHODS)), st.floats(0.1, 1), st.booleans()
)
@torch.no_grad()
def test_any_network_any_method(made, criterion, kind, share, coupled):
    model, shape = made
    x, before = inputs(shape), copy.deepcopy(model.state_dict())
    wanted, coupled = model(x), coupled and kind not in ("lbyl", "fold")
    found = spaces(model, shape, coupled)
    event(f"{kind}, {criterion}" if found else "nothing can be pruned")
    told = {"example_input": shape, "criterion": criterion, "compensation": kind, "probe_samples": 32}
    told |= {"images": inputs(shape, 16)} if kind in NEED_IMAGES else {}
    try:
        small, report = shrink(model, thinned(found, share), coupled=coupled, **told)
    except NeuronMergingError as error:
        assert not found and "has no layer that can be pruned" in str(error), error
        return
    assert small(x).shape == wanted.shape and torch.isfinite(small(x)).all()
    assert same(before, model)
    dropped = any(kept < full for kept, full in zip(report.widths, report.full))
    assert report.params == (count_parameters(model), count_parameters(small))
    assert report.macs == (count_macs(model, shape), count_macs(small, shape))
    if not dropped and kind not in ("fold", *NEED_IMAGES):
        assert torch.allclose(small(x), wanted, rtol=0, atol=1e-4 * float(1 + wanted.abs().max()))
    if dropped and kind != "restore":
        assert report.params[1] < report.params[0]


@few(40)
@given(networks(), st.sampled_from(["merge-derived", "restore"]), st.booleans())
@torch.no_grad()
def test_twins_are_folded_without_loss(made, kind, coupled):
    model, shape = made
    found = spaces(model, shape, coupled)
    if not found:
        return
    keep, x = plant(model, found), inputs(shape)
    small = smaller(kind, model, found, keep, shape, threshold=0.1, probe_samples=64)
    assert torch.allclose(small(x), model(x), rtol=0, atol=2e-3 * float(1 + model(x).abs().max()))


@pytest.mark.slow
@few(40)
@given(
    networks(),
    st.sampled_from(["prune", "merge", "merge-derived", "restore"]),
    st.sampled_from(["auto", "quick"]),
    st.floats(0.3, 0.9),
)
@torch.no_grad()
def test_any_network_any_budget(made, kind, rule, share):
    model, shape = made
    told = {"example_input": shape, "compensation": kind, "probe_samples": 48, "widths": rule, "drop_blocks": True}
    try:
        small, report = shrink(model, budget={"params": share, "macs": share}, **told)
    except NeuronMergingError as error:
        assert "no widths are within the budget" in str(error) or "can be pruned" in str(error), error
        return
    assert report.params[1] <= share * report.params[0] and report.macs[1] <= share * report.macs[0]
    assert torch.isfinite(small(inputs(shape))).all()


@pytest.mark.slow
@few(20)
@given(networks(), st.sampled_from(FREE), st.booleans())
@torch.no_grad()
def test_the_number_of_threads_changes_nothing(made, kind, double):
    model, shape = made
    model = model.double() if double else model
    coupled = kind not in ("lbyl", "fold")
    found = spaces(model, shape, coupled)
    if not found:
        return
    told = {"example_input": shape, "compensation": kind, "probe_samples": 64, "coupled": coupled}
    networks, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            networks.append(shrink(model, thinned(found, 0.5), **told)[0])
    finally:
        torch.set_num_threads(threads)
    outputs = [small(inputs(shape).to(next(model.parameters()))) for small in networks]
    scale = float(1 + outputs[0].abs().max())
    assert torch.allclose(*outputs, rtol=0, atol=1e-6 * scale)


FLAGS = {
    "--model-type": ["merge", "prune", "original", "merge-derived", "restore", "lbyl", "glue", ""],
    "--criterion": ["l1-norm", "l2-norm", "l2-GM", "auto", "l0"],
    "--pruning-ratio": ["0.5", "0", "0.999", "1", "-1", "nan", "inf", "half", "1e-9"],
    "--widths": ["uniform", "auto", "quick", "published", "10,10", "1,1", "300,100", "0,5", "3", "x", "-1,4", "9" * 30 + ",1"],
    "--budget": ["params=0.5", "macs=0.3,params=0.9", "params=", "=", "params=nan", "a=1", "params=0.5,params=0.4"],
    "--multiple": ["1", "8", "0", "-3", "1000"],
    "--threshold": ["0.45", "0", "1", "-1", "2", "nan"],
    "--lamda": ["0", "1", "0.5", "7", "nan"],
    "--ridge": ["0.03", "0", "-1", "inf", "1e9"],
    "--probe": ["auto", "leaves", "pink", "white", "brown"],
    "--probe-samples": ["64", "2", "1", "-5", "x"],
    "--seed": ["0", "1", "-1", "4294967296"],
    "--calibrate": ["pictures", "FashionMNIST:0", "cifar10:5", "nowhere", ":", "nowhere:3"],
    "--split": ["test", "val", "some"],
    "--test-batch-size": ["1000", "0", "7777"],
    "--device": ["cpu", "abacus", "auto"],
    "--depth-wide": ["", "56", "40,4", "x"],
    "--dataset": ["FashionMNIST", "cifar10", "x"],
    "--arch": ["LeNet_300_100", "VGG", "AlexNet"],
    "--pretrained": ["lenet.pth.tar", "nothing.pth.tar", "/", "", "\x00"],
    "--recipe": ["fast", "slow"],
    "--epochs": ["0", "3"],
    "--input-size": ["3,8,8", "0"],
    "--data": ["", "/proc/nothing"],
}  # fmt: skip
SWITCHES = ["--coupled", "--drop-blocks", "--no-cuda", "--summary", "--resume", "--compile", "--what", "-", "extra"]
OWN_FLAGS = {
    "--model": ["tests.test_fuzz:tiny", "torch.nn:Identity", "tests.test_fuzz:MANY", "tests.test_fuzz", "nobody:f"],
    "--model-args": ["{}", '{"width": 5}', '{"width": 0}', '{"color": 1}', "[]", "{"],
    "--input-size": ["3,8,8", "1,8,8", "3", "3,1,1", "8,8,8,8", "x"],
    "--weights": ["tiny.pth", "nothing.pth", ".", "IMAGENET1K_V1"],
    "--ratios": ["0=0.5", "*=0.9", "7=0.5", "0=2", "0", "0=nan"],
    "--ignore": ["0", "*", "7", ""],
    "--json": ["-", "row.json", "/proc/row.json", "."],
    "--save": ["net.pth", "net.safetensors", "/proc/net", "."],
    "--export": ["net.pt", "net.bin", "/proc/net.pt", "net.pt2", "net.onnx"],
    "--calibrate": ["pictures", "pictures:3", "pictures:9", "nowhere:3", "."],
    "--dataset": ["imagefolder:pictures", "imagefolder:.", "imagefolder:gone", "cifar10", "x", ""],
} | {
    name: FLAGS[name]
    for name in (
        "--model-type",
        "--criterion",
        "--pruning-ratio",
        "--widths",
        "--budget",
        "--multiple",
        "--threshold",
        "--lamda",
        "--ridge",
        "--probe",
        "--probe-samples",
        "--seed",
        "--device",
        "--test-batch-size",
    )
}
TRAIN_FLAGS = {
    "--epochs": ["1", "0", "-1"], "--lr": ["0.1", "0", "nan", "1e30"], "--batch-size": ["16", "1", "0", "999"],
    "--momentum": ["0.5", "1", "nan"], "--weight-decay": ["0", "-1", "inf"], "--norm-decay": ["0", "-1", "nan"],
    "--cutout": ["0", "8", "-1", "999"],
    "--schedule": ["1", "-1", "x"],
    "--gammas": ["0.1", "0", "nan"], "--recipe": ["fast", "published", "slow"], "--log-interval": ["1", "-1"],
    "--save": ["net.pth", "/proc/net", "."], "--model-type": FLAGS["--model-type"], "--pretrained": FLAGS["--pretrained"],
    "--widths": FLAGS["--widths"], "--append": ["rows.jsonl", "net.pth", "/proc/rows"],
}  # fmt: skip


def tiny(width=4):
    """A network for the command line."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 4),
    )  # fmt: skip


def lines(flags, switches):
    """Random command lines: some of the flags with a value each, every other time the first, which is sound, and switches."""
    number = st.one_of(st.just(0), st.integers(0, 100))
    values = st.dictionaries(st.sampled_from(sorted(flags)), number, max_size=5)
    return st.tuples(values, st.lists(st.sampled_from(switches), max_size=2)).map(
        lambda drawn: [part for f, i in drawn[0].items() for part in (f, flags[f][i % len(flags[f])])] + drawn[1]
    )


def ends_well(code, err, command):
    """0, or 2 and one line."""
    event(f"exit code {code}")
    assert code in (0, 2), (command, err)
    if code == 2:
        complaints = [line for line in err.splitlines() if not line.startswith("warning")]
        assert len(complaints) == 1 and complaints[0].startswith("main.py: "), (command, err)


@few(120)
@given(lines(FLAGS, SWITCHES))
def test_no_command_line_ends_in_a_traceback(cli_quiet, command):
    ends_well(*cli_quiet(["--evaluate", *command]), command)


@few(80)
@given(lines(OWN_FLAGS, ["--benchmark", "--evaluate", "--summary", "--coupled", "--drop-blocks", "--retrain"]))
def test_nor_does_one_for_a_network_of_ones_own(cli_quiet, command):
    usual = {"--model": "tests.test_fuzz:tiny", "--input-size": "3,8,8", "--json": "-"}
    usual = [part for flag, value in usual.items() if flag not in command for part in (flag, value)]
    ends_well(*cli_quiet([*usual, *command]), command)


@few(60)
@given(lines(TRAIN_FLAGS, ["--retrain", "--resume", "--coupled", "--evaluate"]))
def test_nor_does_one_that_trains(cli_quiet, command):
    usual = [] if "--epochs" in command else ["--epochs", "1", "--schedule", "1", "--gammas", "0.1"]
    ends_well(*cli_quiet([*([] if "--save" in command else ["--save", "net.pth"]), *usual, *command]), command)


@pytest.fixture
def cli_quiet(capsys, tmp_path, monkeypatch):
    import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("neuron_merging.benchmark.SECONDS", 0.01)
    for place in ("data.load", "data.loader.load"):  # no download, no 10,000 images
        monkeypatch.setattr(place, lambda name, split, root: images(name, 40))
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.save(tiny().state_dict(), tmp_path / "tiny.pth")
    torch.save(build("LeNet_300_100").state_dict(), tmp_path / "lenet.pth.tar")
    for number in range(4):
        pixels = torch.randint(256, (3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        path = tmp_path / "pictures" / str(number) / "image.png"
        path.parent.mkdir(parents=True)
        to_pil_image(pixels).save(path)

    def run(arguments):
        capsys.readouterr()
        try:
            code = main.main(arguments)
        except SystemExit as stop:  # --help and its like
            code = stop.code
        return code, capsys.readouterr().err

    return run


@pytest.mark.slow
@torch.no_grad()
def test_numbers_that_are_odd_but_right():
    """γ = 0, filters of zeros, one neuron kept, a single channel, no BatchNorm, other precisions, transposed weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 1, 3), nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 64, 3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[1].weight[2:4] = 0
        model[1].running_var[4] = 0
        model[3].weight.data = model[3].weight.data.transpose(2, 3)
    for dtype, off in ((torch.float64, 1e-6), (torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 1e-2)):
        odd = copy.deepcopy(model).to(dtype)
        x = torch.randn(1, 1, 12, 12, dtype=dtype)
        for kind in FREE:
            for widths in ([6, 5], [1, 1], [3, 2]):  # the single neuron of 3 stays
                small, _ = shrink(odd, widths, example_input=(1, 12, 12), compensation=kind, probe_samples=16)
                assert {p.dtype for p in small.parameters()} == {dtype}
                out = small(x)
                assert out.shape == (1, 3) and torch.isfinite(out).all(), (dtype, kind, widths)
                if widths == [6, 5] and kind != "fold":  # nothing is dropped
                    assert torch.allclose(out, odd(x), rtol=0, atol=off * float(1 + odd(x).abs().max())), (dtype, kind)
    for harm in (float("nan"), float("inf")):
        sick = copy.deepcopy(model)
        sick[3].weight.data[0, 0, 0, 0] = harm
        for kind in FREE:
            with pytest.raises(NeuronMergingError, match="3 has weights that are NaN or infinite"):
                shrink(sick, [3, 2], example_input=(1, 12, 12), compensation=kind, probe_samples=8)
