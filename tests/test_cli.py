"""A network of one's own: the call, the command, exports, files, measurements, and what is said where something is wrong."""

import json
import struct
import sys
import zlib

import pytest
import torch
import torchvision
from torch import nn

from experiments.experiment import Experiment
from experiments.experiment import shrink as of_experiment
from models import build
from neuron_merging import benchmark as latency
from neuron_merging import cli as cli_of_package
from neuron_merging import images, loading, memory
from neuron_merging.errors import NeuronMergingError
from neuron_merging.export import export
from neuron_merging.shrink import shrink, summarize
from tests.helpers import decompose, example, rebuild, units, widths_of

CODE = """
import torch
import torch.nn.utils.prune
from torch import nn

def small(classes=10, width=16):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes),
    )

def broken():
    raise ValueError("no\\nsuch thing")

def branches():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)
        def forward(self, x):
            if x.sum() > 0:
                return self.a(x)
            return x
    return Net()

def alone():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 2)
        def forward(self, x):
            return self.b(self.a(x.view(1, 6)).relu())
    return Alone()

def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))

def talks():
    print("a network of seven classes")
    return gray()

def gray():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 9), nn.ReLU(), nn.Linear(9, 7))

def plain():  # a BatchNorm without factors, one that counts nothing
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )

def curved():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 3))

def normed():
    model = small()
    torch.nn.utils.weight_norm(model[0])
    return model

def half():
    return small().half()

def half_gray():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10)).half()

number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with the user's module `mine`, and its files."""
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("mine", None)
    torch.save({"state_dict": mine_small().state_dict()}, tmp_path / "mine.pth.tar")
    return tmp_path


@pytest.fixture
def pictures(mine):
    """A folder of images, a folder for each of ten classes."""
    from torchvision.transforms.functional import to_pil_image

    for label in range(10):
        folder = mine / "pictures" / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(3):
            noise = torch.randint(
                0, 256, (3, 24, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(label + i)
            )
            to_pil_image(noise).save(folder / f"{i}.png")
    return mine / "pictures"


def mine_small(**arguments):
    """A network of the user's module."""
    namespace: dict = {}
    exec(CODE, namespace)
    return namespace["small"](**arguments)


OWN = ("--model", "mine:small", "--weights", "mine.pth.tar", "--input-size", "3,16,16")

# ---------------------------------------------------------------- the call


@torch.no_grad()
def test_the_call_is_the_papers_where_it_is_told_so():
    torch.manual_seed(0)
    model = build("VGG", (11,)).eval()
    found = units(model)
    widths = [n // 2 for n in widths_of(model)]
    by_hand = rebuild(model, found, decompose(model, found, widths, "l1-norm", "merge", t=0.1, lam=0.85))
    small, report = shrink(model, 0.5, criterion="l1-norm", compensation="merge", coupled=False)
    assert report.widths == widths and report.macs is None
    assert torch.equal(small(example(model)), by_hand(example(model)))
    assert all(0 < cosine <= 1 for cosine in report.cosine)


def test_ratios_by_name_and_widths():
    model = build("ResNet", (14,)).eval()
    told = {"compensation": "prune", "coupled": False}
    _, report = shrink(model, {"layer1.*": 0.5, "layer3.0.conv1": 0.25}, **told)
    kept = dict(zip((unit.layer for unit in report.units), report.widths))
    assert kept["layer1.0.conv1"] == 8 and kept["layer3.0.conv1"] == 48 and kept["layer2.0.conv1"] == 32
    _, report = shrink(model, [3, 4, 5, 6, 7, 8], **told)
    assert report.widths == [3, 4, 5, 6, 7, 8]
    _, report = shrink(model, 0.3, multiple=8, ignore=["layer2.*"], **told)
    assert report.widths == [8, 8, 48, 48] and "it is ignored" in report.left_out["layer2.0.conv1"]
    text = str(report)
    assert "layer1.0.conv1 -> layer1.0.conv2" in text and "8 of 16" in text and "conv1 stays whole" in text
    _, report = shrink(
        model, example_input=torch.zeros(1, 3, 32, 32), compensation="merge", widths="auto", budget={"params": 0.5},
        probe_samples=32,
    )  # fmt: skip
    assert report.params[1] <= 0.5 * report.params[0] and report.search is not None
    _, again = shrink(model, 0.7, example_input=(3, 32, 32), compensation="merge", widths="auto", search=report.search)
    assert again.seconds_widths is None and sum(again.widths) < sum(report.widths)


BAD_CALLS = {
    "ratio": ({"ratio": 1.0}, "ratio 1.0 for layer layer1.0.conv1 is outside"),
    "no neuron left": ({"ratio": 0.99}, "leaves no neuron of 16 in layer1.0.conv1"),
    "unknown name": ({"ratio": {"layer9.*": 0.5}}, "no convolution or linear layer is called layer9"),
    "a name that cannot": ({"ratio": {"conv1": 0.5}}, "conv1 cannot be pruned: it is written 2 times and read 3 times"),
    "ignored nothing": ({"ignore": ["nobody"]}, "no convolution or linear layer is called nobody"),
    "everything ignored": ({"ignore": ["*"]}, "has no layer that can be pruned"),
    "widths": ({"ratio": [1, 2]}, "2 widths for 3 units: layer1.0.conv1, "),
    "compensation": ({"compensation": "glue"}, "unknown compensation 'glue'"),
    "criterion": ({"criterion": "l3"}, "unknown criterion 'l3'"),
    "rule": ({"widths": "some"}, "unknown widths 'some'"),
    "budget": ({"widths": "auto", "budget": {"bytes": 1}}, "say the shares to keep"),
    "no input": ({"example_input": None}, "give example_input"),
    "an input that does not run": ({"example_input": (1, 32, 32)}, r"does not run on an input of shape \[1, 32, 32\]"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_call_that_cannot_be_says_why(name):
    arguments, message = BAD_CALLS[name]
    with pytest.raises(NeuronMergingError, match=message):
        shrink(
            build("ResNet", (8,)).eval(),
            **({"example_input": (3, 32, 32), "probe_samples": 8, "coupled": False} | arguments),
        )


@pytest.mark.parametrize("name", ["ip1", "ip3"])
def test_weights_that_are_no_numbers_are_named(name):
    """Also in the last layer, which nothing is decided by."""
    model = build("LeNet_300_100").eval()
    with torch.no_grad():
        model.get_submodule(name).bias[0] = float("nan")
    for call in (lambda: shrink(model, 0.5, compensation="prune"), lambda: summarize(model)):
        with pytest.raises(NeuronMergingError, match=f"{name} has weights that are NaN or infinite"):
            call()


def test_a_layer_without_a_size_is_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LazyLinear(2))
    with pytest.raises(NeuronMergingError, match=r"2 \(LazyLinear\) has no size yet"):
        shrink(model, 0.5, example_input=(3,))


def test_linear_layers_with_batchnorm_are_reached_where_channels_are_coupled():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with pytest.raises(NeuronMergingError, match=r"goes through batch_norm.*; coupled channels .* can be"):
        shrink(model, 0.5, compensation="prune", coupled=False)
    for kind in ("prune", "merge", "restore"):
        small, report = shrink(model, 0.5, compensation=kind, coupled=True, example_input=(6,))
        assert report.widths == [4] and small(torch.randn(2, 6)).shape == (2, 3)
    with pytest.raises(NeuronMergingError, match=r"can be pruned: 3: [^;]*; 0: [^;]*$"):
        shrink(model, 0.5, compensation="prune", ignore="*")


def test_a_batchnorm_over_places_is_not_one_over_features():
    """Of [B, places, features], also where there are as many of the one as of the other."""
    other = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )
    small, report = shrink(other.eval(), 0.5, compensation="prune", coupled=True, example_input=(8, 6))
    assert report.widths == [8, 6] and small(torch.randn(2, 8, 6)).shape == (2, 8, 3)
    square = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    for kind in ("prune", "restore"):
        small, report = shrink(square, 0.5, compensation=kind, coupled=True, example_input=(8, 6))
        assert report.widths == [4] and len(small[1].weight) == 8 and small(torch.randn(2, 8, 6)).shape == (2, 8, 3)
    assert not square[1]._forward_pre_hooks


def test_a_call_in_inference_mode_gives_an_ordinary_network():
    model = build("ResNet", (8,)).eval()
    with torch.inference_mode():
        small, _ = shrink(model, 0.5, example_input=(3, 32, 32), compensation="restore", probe_samples=32)
    assert not any(tensor.is_inference() for tensor in small.state_dict().values())


@pytest.mark.parametrize("compensation", ["merge", "restore"])
def test_autocast_around_a_call_makes_no_difference(compensation, monkeypatch):
    model = build("ResNet", (8,)).eval()
    told = {"example_input": (3, 32, 32), "compensation": compensation, "probe_samples": 32}
    plain, _ = shrink(model, 0.5, **told)
    with torch.autocast("cpu", torch.bfloat16):
        small, _ = shrink(model, 0.5, **told)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, small.state_dict()[name]), name


def test_what_stays_whole_keeps_its_width():
    """Whatever widths are rounded to."""
    model = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3))
    assert shrink(model, {"2": 0.5}, compensation="prune", multiple=8)[1].widths == [20, 8]
    assert shrink(model, 0.0, compensation="prune", multiple=8)[1].widths == [20, 20]
    assert "0 -> 2: 20 of 20" in summarize(model, {"2": 0.5}, multiple=8)


def test_weights_that_are_not_there_yet_are_named():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(NeuronMergingError, match=r"0 \(Linear\) has no weights yet: it is on the meta device"):
        summarize(model)


def test_an_untraceable_network_names_the_line(mine):
    namespace: dict = {}
    source = compile(CODE, str(mine / "mine.py"), "exec")
    exec(source, namespace)
    with pytest.raises(NeuronMergingError, match=r"Net cannot be exported \(mine.py, line \d+: if x.sum\(\) > 0:\)"):
        shrink(namespace["branches"](), compensation="prune")


# ---------------------------------------------------------------- the command


def test_the_command_makes_saves_and_reloads(cli, mine, pictures):
    options = (*OWN, "--model-type", "restore", "--pruning-ratio", "0.5", "--probe-samples", "32")
    for file in ("small.pth.tar", "small.safetensors"):
        made = cli(*options, "--evaluate", "--dataset", f"imagefolder:{pictures}", "--save", file, "--json", "row.json")
        assert made.code == 0, made.err
        row = json.loads((mine / "row.json").read_text())
        assert row["widths"] == {"0": 8, "3": 16} and row["total"] == 30
        assert "0 -> 3" in made.out and "8 of 16" in made.out and "accuracy" in made.out
        again = cli("--model", "mine:small", "--weights", file, "--input-size", "3,16,16", "--evaluate",
                    "--dataset", f"imagefolder:{pictures}", "--json", "-")  # fmt: skip
        assert again.row["correct"] == row["correct"]


def test_the_command_has_ratios_budgets_and_real_images(cli, mine, pictures):
    common = (*OWN, "--json", "-", "--model-type", "restore", "--probe-samples", "32")
    row = cli(*common, "--ratios", "3=0.5").row
    assert row["widths"] == {"0": 16, "3": 16}
    row = cli(*common, "--widths", "auto", "--budget", "macs=0.5").row
    assert row["macs"] <= 0.5 * row["macs_original"]
    row = cli(*common, "--widths", "5,6", "--calibrate", f"{pictures}:20").row
    assert row["widths"] == {"0": 5, "3": 6} and row["calibrate"].endswith("pictures:20")
    assert row["ratio"] is None and row["widths_rule"] == "given" and row["ridge"] == 0.03
    torch.save(torch.nn.Module.state_dict(mine_small(width=8)), "narrow.pth")
    common = ("--model", "mine:small", "--input-size", "3,16,16", "--json", "-", "--model-type", "prune")
    made = cli(*common, "--model-args", '{"width": 8}', "--weights", "narrow.pth", "--ignore", "3")
    assert made.row["widths"] == {"0": 4} and "warning" not in made.err
    made = cli(*common, "--weights", "narrow.pth")
    assert "warning: narrow.pth has other widths than mine:small: the network was cut to them" in made.err


def test_a_network_of_half_precision_is_measured(cli, pictures):
    """On a folder of images, and on a data set."""
    common = ("--model-type", "merge", "--pruning-ratio", "0.25", "--evaluate", "--json", "-")
    made = cli("--model", "mine:half", "--input-size", "3,24,24", "--dataset", f"imagefolder:{pictures}", *common)
    assert made.code == 0 and made.row["total"] == 30 and made.row["widths"] == {"0": 12, "3": 24}
    made = cli("--model", "mine:half_gray", "--input-size", "1,28,28", "--dataset", "FashionMNIST", *common)
    assert made.code == 0 and made.row["total"] == 10_000 and made.row["widths"] == {"1": 6}


def test_a_summary_says_what_would_be_left(cli, mine):
    common = ("--model", "mine:small", "--summary")
    assert "0 -> 3: 16\n" in cli(*common).out
    assert "0 -> 3: 12 of 16" in cli(*common, "--pruning-ratio", "0.25").out
    assert "0 -> 3: 16 of 16\n3 -> 8: 3 of 32" in cli(*common, "--ratios", "3=0.9").out
    assert "0 -> 3: 5 of 16" in cli(*common, "--widths", "5,6").out
    assert "0 -> 3: 8 of 16" in cli(*common, "--model-type", "restore", "--multiple", "8").out
    assert "give example_input" in cli(*common, "--model-type", "restore", "--widths", "auto").err
    assert "outside [0, 1)" in cli(*common, "--ratios", "3=2").err
    curved = ("--model", "mine:curved", "--summary", "--model-type")
    assert "0 -> 2: 4 of 8\n" in cli(*curved, "restore").out
    assert "0: gelu is not positively homogeneous" in cli(*curved, "merge").err
    said = cli("--summary", "--pruning-ratio", "0.9")
    assert "ip1 -> ip2: 30 of 300" in said.out and "ip2 -> ip3: 10 of 100" in said.out


def test_a_summary_touches_nothing(cli, mine):
    said = cli("--model", "torchvision.models:resnet18", "--summary", "--coupled")
    assert said.code == 0 and "layer1.0.conv1 -> layer1.0.conv2: 64" in said.out
    assert "conv1 and 2 more -> 4 layers: 64" in said.out and "fc stays whole" in said.out


UNREADABLE = "a file is no image that can be read"
BAD_COMMANDS = {
    "no colon": (["--model", "mine", "--input-size", "3,8,8", "--json", "-"], "give module:callable"),
    "no name": (["--model", "", "--json", "-"], "--model names nothing: give module:callable"),
    "no module": (["--model", "nobody:f", "--input-size", "3,8,8", "--json", "-"], "No module named 'nobody'"),
    "what cannot be copied": (["--model", "mine:normed", "--input-size", "3,8,8", "--json", "-"], "0.weight cannot be copied"),
    "no callable": (["--model", "mine:f", "--input-size", "3,8,8", "--json", "-"], "has no attribute 'f'"),
    "it raises": (["--model", "mine:broken", "--input-size", "3,8,8", "--json", "-"], "ValueError: no"),
    "no network": (["--model", "builtins:int", "--input-size", "3,8,8", "--json", "-"], "gives int, no torch.nn.Module"),
    "arguments": (["--model", "mine:small", "--model-args", "{", "--input-size", "3,8,8", "--json", "-"], "a JSON object"),
    "no weights file": ([*OWN[:2], "--weights", "gone", *OWN[4:], "--json", "-"], "is no file that is there"),
    "torchvision's weights": (
        ["--model", "torchvision.models:resnet18", "--weights", "V9", "--input-size", "3,8,8", "--json", "-"],
        "nor one of IMAGENET1K_V1, DEFAULT",
    ),
    "weights that do not fit": ([*OWN, "--model-args", '{"classes": 5}', "--json", "-"], "does not fit Sequential"),
    "nothing to do": ([*OWN], "say what to do"),
    "no input size": (["--model", "mine:small", "--json", "-"], "--model needs --input-size"),
    "input size": (["--model", "mine:small", "--input-size", "3,0", "--json", "-"], "is no shape"),
    "an input that does not run": ([*OWN[:4], "--input-size", "1,8,8", "--model-type", "merge", "--json", "-"], "does not run"),
    "an output of no format": ([*OWN, "--export", "small.bin"], "name a file that ends in .onnx, .pt2, .pt"),
    "no images": ([*OWN, "--evaluate", "--dataset", "imagefolder:gone"], "is no folder"),
    "a broken image": (
        [*OWN[:2], "--model-args", '{"classes": 1}', *OWN[4:], "--evaluate", "--dataset", "imagefolder:torn"],
        f"{UNREADABLE}: torn/class/b.png: ",
    ),
    "a broken image to look at": (
        [*OWN, "--model-type", "restore", "--calibrate", "torn", "--json", "-"], f"{UNREADABLE}: torn/class/b.png: "
    ),
    "a multiple of widths that are given": (
        [*OWN, "--model-type", "prune", "--widths", "3,4", "--multiple", "8", "--json", "-"], "--multiple is for widths that"
    ),
    "a file, not a module": (["--model", "./mine.py:small", "--input-size", "3,8,8", "--json", "-"], "give module:callable"),
    "a layer without a size": (["--model", "mine:lazy", "--weights", "mine.pth.tar", "--summary"], "has no size yet"),
    "a summary of no method": (["--model", "mine:small", "--summary", "--model-type", "glue"], "unknown compensation 'glue'"),
    "a single image": ([*OWN, "--model-type", "restore", "--calibrate", "pictures:1", "--json", "-"], "at least 2 images"),
    "an image too large": (
        [*OWN, "--model-type", "restore", "--calibrate", "vast", "--json", "-"], f"{UNREADABLE}: vast/b.png: "
    ),
    "a folder of too few classes": (
        [*OWN, "--model-args", '{"classes": 11}', "--weights", "eleven.pth", "--evaluate", "--dataset", "imagefolder:pictures"],
        "imagefolder:pictures has 10 folders, the network 11 outputs",
    ),
    "a folder without images": ([*OWN, "--evaluate", "--dataset", "imagefolder:hollow"], "FileNotFoundError"),
    "a network without parameters": (
        ["--model", "torch.nn:Identity", "--input-size", "3", "--model-type", "prune", "--json", "-"], "without parameters"
    ),
    "a speed on an input that does not run": ([*OWN[:4], "--input-size", "1,8,8", "--benchmark"], "does not run"),
    "a ratio that leaves no neuron": (
        [*OWN, "--model-type", "merge", "--pruning-ratio", "0.99", "--json", "-"], "leaves no neuron of 16 in 0"
    ),
    "ratios of nothing": ([*OWN, "--ratios", "0=0.5", "--json", "-"], "give --model-type too"),
    "no data set": ([*OWN, "--evaluate"], "give --dataset imagefolder:DIR"),
    "ratios": ([*OWN, "--ratios", "0", "--json", "-"], "give NAME=NUMBER"),
    "too few images": ([*OWN, "--model-type", "restore", "--calibrate", "gone:9", "--json", "-"], "there is no folder gone"),
    "ratios and widths": ([*OWN, "--ratios", "0=0.5", "--widths", "3,4", "--json", "-"], "give one of them"),
    "rows of its own": ([*OWN, "--json", "-", "--append", "rows.jsonl"], "unrecognized arguments: --append"),
    "budget of uniform widths": (
        [*OWN, "--model-type", "merge", "--budget", "params=0.3", "--json", "-"], "--budget and --drop-blocks are for"
    ),
    "a data set of another shape": (
        ["--model", "mine:small", "--input-size", "3,28,28", "--evaluate", "--dataset", "FashionMNIST"],
        "--dataset FashionMNIST has images of 1,28,28",
    ),
    "a data set of other classes": (
        ["--model", "mine:gray", "--input-size", "1,28,28", "--evaluate", "--dataset", "FashionMNIST"],
        "FashionMNIST has 10 classes, the network 7 outputs",
    ),
    "both shares": (
        [*OWN, "--ratios", "3=0.5", "--pruning-ratio", "0.5", "--json", "-"], "--ratios stands instead of --pruning-ratio"
    ),
    "shares and a budget": ([*OWN, "--ratios", "3=0.5", "--budget", "macs=0.5", "--json", "-"], "and --budget"),
    "a summary that is saved": ([*OWN[:2], "--summary", "--save", "small.pt"], "--save is for results, and --summary has none"),
    "vectors from images": (
        ["--model", "torch.nn:Linear", "--model-args", '{"in_features": 9, "out_features": 3}', "--input-size", "9",
         "--model-type", "restore", "--calibrate", "pictures:2", "--json", "-"],
        "images are channels, height, width",
    ),
    "published flags": ([*OWN, "--pretrained", "x", "--json", "-"], "unrecognized arguments: --pretrained"),
    "own flags": (["--weights", "x"], "unrecognized arguments: --weights"),
    "untraceable": (["--model", "mine:branches", "--summary"], "cannot be exported (mine.py, line"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_a_command_that_cannot_be_is_one_line(cli, mine, pictures, name):
    options, message = BAD_COMMANDS[name]
    torch.save(mine_small(classes=11).state_dict(), "eleven.pth")
    (mine / "hollow" / "class").mkdir(parents=True)
    (mine / "torn" / "class").mkdir(parents=True)
    sound = (pictures / "class0" / "0.png").read_bytes()
    for file, content in (("a", sound), ("b", sound[:200])):
        (mine / "torn" / "class" / f"{file}.png").write_bytes(content)
    (mine / "vast").mkdir()
    (mine / "vast" / "a.png").write_bytes(sound)
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (mine / "vast" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    (mine / "trace.py").write_text(CODE)
    before = {path.name for path in mine.iterdir()}
    said = cli(*options)
    assert said.code == 2 and said.out == ""
    lines = [line for line in said.err.splitlines() if not line.startswith("warning")]
    assert len(lines) == 1 and message in lines[0], said.err
    assert {path.name for path in mine.iterdir()} - {"__pycache__"} == before - {"__pycache__"}


def test_what_is_measured_is_told_where_the_rest_fails(cli, mine):
    said = cli(
        "--model", "mine:alone", "--input-size", "6", "--benchmark", "--model-type", "prune", "--save", "small.pt"
    )
    assert said.code == 2 and "a -> b       2 of 4" in said.out and (mine / "small.pt").exists()
    lines = [line for line in said.err.splitlines() if not line.startswith("warning")]
    assert (
        len(lines) == 1
        and "--benchmark: the networks do not run on one input and on a batch of them: shape" in lines[0]
    )


def test_packages_that_an_export_needs_are_asked_for_before_anything_is_made(cli, mine, monkeypatch):
    monkeypatch.setattr("neuron_merging.commandline.find_spec", lambda name: None if name == "onnxscript" else name)
    said = cli(*OWN, "--model-type", "prune", "--save", "small.pt", "--export", "small.onnx")
    assert said.code == 2 and said.err.endswith("onnxscript is missing: pip install -e '.[export]'\n")
    assert not (mine / "small.pt").exists()


def test_what_other_code_prints_is_no_part_of_the_result(cli, mine, monkeypatch):
    made = cli("--model", "mine:talks", "--input-size", "1,28,28", "--json", "-")
    assert made.row["params"] == 784 * 9 + 9 + 9 * 7 + 7 and "a network of seven" in made.err
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1

    def download(self, **_):
        print("Downloading")
        return torchvision.models.resnet18().state_dict()

    monkeypatch.setattr(type(entry), "get_state_dict", download)
    common = ("--model", "torchvision.models:resnet18", "--weights", "IMAGENET1K_V1", "--input-size", "3,32,32")
    made = cli(*common, "--json", "-")
    assert made.row["weights"] == "IMAGENET1K_V1" and "Downloading" in made.err
    made = cli(*common, "--json", "-", "--model-args", '{"num_classes": 7}')
    assert made.code == 2 and "fc.weight is [1000, 512] where [7, 512] is expected and 1 more" in made.err


@pytest.mark.parametrize("kind", ["fold", "prune"])
def test_batchnorms_without_factors_or_statistics_are_saved_and_read_again(cli, mine, kind):
    common = ("--model", "mine:plain", "--input-size", "3,16,16", "--json", "-")
    made = cli(*common, "--model-type", kind, "--save", "small.pt").row
    assert cli(*common, "--weights", "small.pt").row["params"] == made["params"] < made["params_original"]


def test_images_become_inputs_as_the_weights_say():
    weights = torchvision.models.get_model_weights
    for name, side, resized in (
        ("resnet50", 224, {"IMAGENET1K_V1": 256, "IMAGENET1K_V2": 232}),
        ("inception_v3", 299, {}),
    ):
        spec, known = f"torchvision.models:{name}", weights(name)
        for entry, size in resized.items():
            assert images.transforms(spec, entry, (3, side, side)).resize_size == [size]
        assert str(images.transforms(spec, None, (3, side, side))) == str(known.DEFAULT.transforms())
        assert "Resize(size=64" in str(images.transforms(spec, None, (3, 64, 64)))


def test_a_smaller_file_remembers_the_weights_it_began_with(cli, mine, monkeypatch):
    """torchvision's weights, without a download; what is saved is measured with the same transforms."""
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(type(entry), "get_state_dict", lambda self, **_: torchvision.models.resnet18().state_dict())
    seen, original = [], images.transforms
    monkeypatch.setattr(cli_of_package, "transforms", lambda *a: seen.append(a[1]) or original(*a))
    common = ("--model", "torchvision.models:resnet18", "--input-size", "3,224,224", "--json", "-")
    made = cli(*common, "--weights", entry.name, "--model-type", "prune", "--save", "small.safetensors")
    assert made.code == 0, made.err
    cli(*common, "--weights", "small.safetensors", "--evaluate", "--dataset", "imagefolder:gone")
    assert seen == [entry.name]


def test_images_are_looked_for_before_any_work(cli, mine, monkeypatch):
    monkeypatch.setattr(cli_of_package, "shrink", lambda *_, **__: pytest.fail("the work was done before"))
    said = cli(*OWN, "--model-type", "restore", "--evaluate", "--dataset", "imagefolder:gone")
    assert said.code == 2 and "is no folder" in said.err


def test_inception_sees_its_inputs_as_its_weights_did(monkeypatch):
    """torchvision makes it so where it loads the weights itself."""
    entry = torchvision.models.GoogLeNet_Weights.IMAGENET1K_V1
    spec, arguments = "torchvision.models:googlenet", '{"init_weights": false, "aux_logits": false, "num_classes": 7}'
    monkeypatch.setattr(
        type(entry), "get_state_dict", lambda self, **_: loading.build_model(spec, arguments).state_dict()
    )
    model = loading.build_model(spec, arguments)
    assert not model.transform_input
    loading.with_weights(model, spec, entry.name)
    assert model.transform_input


# ---------------------------------------------------------------- out of here


class Heads(nn.Module):
    """Two outputs, and an activation that is no ReLU."""

    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x):
        x = nn.functional.silu(self.body(x))
        return self.a(x), self.b(x)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".onnx", ".pt2", ".pt"])
@pytest.mark.parametrize("kind", ["coupled", "without a block", "two outputs"])
def test_exports_give_the_same_outputs(tmp_path, ending, kind):
    """For batches of one and of several (export.CHECKED)."""
    if ending == ".onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, shape = (Heads(), (6,)) if kind == "two outputs" else (build("ResNet", (8,)), (3, 32, 32))
    small = model.eval()
    if kind != "two outputs":
        ratio = 0.5 if kind == "coupled" else [8, 0, 32]
        small, _ = shrink(model, ratio, example_input=shape, compensation="merge", coupled=kind == "coupled")
    path = tmp_path / f"small{ending}"
    assert export(small, path, shape) <= 1e-4
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_export_that_would_be_wrong_is_not_written(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return x + torch.rand(())

    class Hollow(nn.Module):
        def forward(self, x):
            return x, x / torch.zeros(()) * 0  # NaN, behind an output that is right

    for last in (Odd(), Hollow()):
        with pytest.raises(NeuronMergingError, match="was not written: its outputs would be off"):
            export(nn.Sequential(nn.Linear(3, 3), last), tmp_path / "odd.pt", (3,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".pt2", ".pt"])
def test_a_network_that_overwrites_its_input_is_exported(tmp_path, ending):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            x.sub_(0.5)
            return self.a(x)

    assert export(Scaled(), tmp_path / f"scaled{ending}", (3,)) < 1e-4


def test_speeds_are_compared_in_one_run(monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.02)
    torch.manual_seed(0)
    model = build("VGG", (11,)).eval()
    small, _ = shrink(model, 0.5, compensation="prune")
    found = latency.compare({"original": model, "smaller": small}, (3, 32, 32), batch=8)
    assert found["smaller"]["parameters"] < 0.4 * found["original"]["parameters"]
    assert found["smaller"]["file_mb"] < 0.4 * found["original"]["file_mb"]
    assert all(found[name][key] > 0 for name in found for key in ("latency_ms", "images_per_second"))
    lines = latency.table(found).splitlines()
    assert len(lines) == 7 + memory.reset(torch.device("cpu")) and "float32" in lines[-1] and "threads" in lines[-1]
    halves = {"original": model.bfloat16(), "smaller": small.bfloat16()}
    assert latency.compare(halves, (3, 32, 32), batch=2)["smaller"]["dtype"] == "bfloat16"


def test_a_smaller_file_is_compared_with_what_it_was_made_from(cli, mine, monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.02)
    assert cli(*OWN, "--model-type", "prune", "--save", "small.safetensors").code == 0
    reloaded = ("--model", "mine:small", "--weights", "small.safetensors", "--input-size", "3,16,16")
    row = cli(*reloaded, "--benchmark", "--json", "-").row
    found = row["benchmark"]
    assert found["smaller"]["parameters"] < 0.5 * found["original"]["parameters"]


def test_an_experiment_can_be_coupled(pretrained):
    experiment = Experiment(pretrained=pretrained, compensation="merge", coupled=True)
    assert experiment.settings()["coupled"] is True
    shrunk = of_experiment(build("LeNet_300_100").eval(), experiment)
    assert shrunk.widths == [150, 50]  # nothing is shared in it


@pytest.mark.parametrize("ratio", [[0.5], [float("nan")], "0.5"])
def test_ratios_in_a_list_are_no_widths(ratio):
    """Cut to whole numbers they would take everything away."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(NeuronMergingError, match=r"are no kept widths; ratios go by layer name|is no number"):
        shrink(model, ratio, compensation="prune")
