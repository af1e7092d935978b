"""Random networks with every criterion and compensation, and random command lines: never a wrong shape, never a traceback."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from decompose import CRITERIA
from errors import NeuronMergingError
from evaluate import count_macs, count_parameters
from experiments.zoo import plant
from methods import METHODS, Settings
from shrink import prunable, shrink, width
from trace import NORMS

FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
FREE = [name for name in METHODS if not name.endswith("-bn")]


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
    for module in model.modules():
        if isinstance(module, NORMS):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            module.momentum = 1.0
    model.train()(torch.randn(64, *shape))
    return model.eval(), shape


def inputs(shape, count=5):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(7))


@FEW
@given(networks(), st.sampled_from(list(CRITERIA)), st.sampled_from(FREE), st.floats(0, 0.9), st.booleans())
@torch.no_grad()
def test_any_network_any_method(made, criterion, kind, ratio, coupled):
    model, shape = made
    x, before = inputs(shape), copy.deepcopy(model.state_dict())
    wanted = model(x)
    told = {"example_input": shape, "criterion": criterion, "compensation": kind, "probe_samples": 32}
    try:
        small, report = shrink(model, ratio, coupled=coupled and kind not in ("lbyl", "fold"), **told)
    except NeuronMergingError as error:
        assert "leaves no neuron" in str(error) or "has no layer that can be pruned" in str(error), error
        return
    assert small(x).shape == wanted.shape and torch.isfinite(small(x)).all()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    dropped = any(kept < full for kept, full in zip(report.widths, report.full))
    assert report.params == (count_parameters(model), count_parameters(small))
    assert report.macs == (count_macs(model, shape), count_macs(small, shape))
    if not dropped and kind != "fold":
        assert torch.allclose(small(x), wanted, atol=1e-4 * float(1 + wanted.abs().max()))
    if dropped and kind != "restore":
        assert report.params[1] < report.params[0]


@FEW
@given(networks(), st.sampled_from(["merge-derived", "restore"]), st.booleans())
@torch.no_grad()
def test_twins_are_folded_without_loss(made, kind, coupled):
    model, shape = made
    found, _ = prunable(model, coupled)
    if not found:
        return
    keep, x = plant(model, found), inputs(shape)
    small = METHODS[kind](model, found, keep, Settings(shape, t=0.1, samples=64))
    assert torch.allclose(small(x), model(x), atol=2e-3 * float(1 + model(x).abs().max()))


@FEW
@given(
    networks(), st.sampled_from(["prune", "merge", "restore"]), st.sampled_from(["auto", "quick"]), st.floats(0.3, 0.9)
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
    biases = sum(m.bias.numel() for m in small.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None)
    constants = sum(p.numel() for name, p in small.named_parameters() if name.endswith("value"))
    assert report.params[1] <= share * report.params[0] + (biases if kind == "restore" else 0) + constants
    assert report.macs[1] <= share * report.macs[0]
    assert torch.isfinite(small(inputs(shape))).all()


@settings(FEW, max_examples=15)
@given(networks(), st.sampled_from(["merge", "restore"]))
@torch.no_grad()
def test_the_number_of_threads_changes_nothing(made, kind):
    model, shape = made
    found, _ = prunable(model, coupled=True)
    if not found:
        return
    outputs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            told = {"example_input": shape, "compensation": kind, "probe_samples": 64, "coupled": True}
            keep = [max(1, width(model, unit) // 2) for unit in found]
            outputs.append(shrink(model, keep, **told)[0](inputs(shape)))
    finally:
        torch.set_num_threads(threads)
    scale = float(1 + outputs[0].abs().max())
    assert torch.allclose(*outputs, atol=(1e-6 if kind == "merge" else 1e-4) * scale)


FLAGS = {
    "--model-type": ["original", "prune", "merge", "merge-derived", "restore", "lbyl", "glue", ""],
    "--criterion": ["l1-norm", "l2-norm", "l2-GM", "auto", "l0"],
    "--pruning-ratio": ["0", "0.5", "0.999", "1", "-1", "nan", "inf", "half", "1e-9"],
    "--widths": ["uniform", "auto", "quick", "published", "10,10", "1,1", "300,100", "0,5", "3", "x", "-1,4", "9" * 30 + ",1"],
    "--budget": ["params=0.5", "macs=0.3,params=0.9", "params=", "=", "params=nan", "a=1", "params=0.5,params=0.4"],
    "--multiple": ["1", "8", "0", "-3", "1000"],
    "--threshold": ["0", "0.45", "1", "-1", "2", "nan"],
    "--lamda": ["0", "1", "0.5", "7", "nan"],
    "--ridge": ["0.03", "0", "-1", "inf", "1e9"],
    "--probe": ["auto", "pink", "white", "brown"],
    "--probe-samples": ["2", "64", "1", "-5", "x"],
    "--seed": ["0", "1", "-1", "4294967296"],
    "--calibrate": ["FashionMNIST:0", "cifar10:5", "nowhere", ":", "nowhere:3"],
    "--split": ["test", "val", "some"],
    "--test-batch-size": ["1000", "0", "7777"],
    "--device": ["cpu", "abacus", "auto"],
    "--depth-wide": ["", "56", "40,4", "x"],
    "--dataset": ["FashionMNIST", "cifar10", "x"],
    "--arch": ["LeNet_300_100", "VGG", "AlexNet"],
    "--pretrained": ["nothing.pth.tar", "/", "", "\x00"],
    "--recipe": ["fast", "slow"],
    "--epochs": ["0", "3"],
    "--input-size": ["3,8,8", "0"],
    "--data": ["/proc/nothing", ""],
}  # fmt: skip
SWITCHES = ["--coupled", "--drop-blocks", "--no-cuda", "--summary", "--resume", "--compile", "--what", "-", "extra"]


@settings(FEW, max_examples=120)
@given(
    st.dictionaries(st.sampled_from(sorted(FLAGS)), st.integers(0, 100), max_size=5),
    st.lists(st.sampled_from(SWITCHES), max_size=2),
)
def test_no_command_line_ends_in_a_traceback(cli_quiet, chosen, switches):
    command = [part for flag, i in chosen.items() for part in (flag, FLAGS[flag][i % len(FLAGS[flag])])]
    code, err = cli_quiet(["--evaluate", *command, *switches])
    assert code in (0, 2), (command, switches, err)
    if code == 2:
        complaints = [line for line in err.splitlines() if not line.startswith("warning")]
        assert len(complaints) == 1 and complaints[0].startswith("main.py: "), err


@pytest.fixture
def cli_quiet(capsys, tmp_path, monkeypatch):
    import main

    monkeypatch.chdir(tmp_path)

    def run(arguments):
        capsys.readouterr()
        try:
            code = main.main(arguments)
        except SystemExit as stop:  # --help and its like
            code = stop.code
        return code, capsys.readouterr().err

    return run


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
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        odd = copy.deepcopy(model).to(dtype)
        for kind in FREE:
            for widths in ([6, 1, 5], [1, 1, 1], [3, 1, 2]):
                small, _ = shrink(odd, widths, example_input=(1, 12, 12), compensation=kind, probe_samples=16)
                assert {p.dtype for p in small.parameters()} == {dtype}
                out = small(torch.ones(1, 1, 12, 12, dtype=dtype))
                assert out.shape == (1, 3) and torch.isfinite(out).all(), (dtype, kind, widths)
    for harm in (float("nan"), float("inf")):
        sick = copy.deepcopy(model)
        sick[3].weight.data[0, 0, 0, 0] = harm
        for kind in FREE:
            with pytest.raises(NeuronMergingError, match="3 has weights that are NaN or infinite"):
                shrink(sick, [3, 1, 2], example_input=(1, 12, 12), compensation=kind, probe_samples=8)
    assert np.isfinite(shrink(model, [3, 1, 2], compensation="prune")[1].params).all()
