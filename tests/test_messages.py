"""Lines and numbers that say what they are: files as people save them, calls that are nearly right, summaries, measurements.

Of each fault that was reported the right value is here, and others of its kind.
"""

import argparse
import copy
import json
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
import torchvision.models.feature_extraction as extraction
from torch import nn
from torch.utils.checkpoint import checkpoint

import main
from experiments import experiment as xp
from experiments import settings
from models import build
from neuron_merging import cli, export, load_checkpoint, load_weights, shrink, summarize
from neuron_merging.checkpoint import save_checkpoint
from neuron_merging.errors import NeuronMergingError
from neuron_merging.loading import build_model
from neuron_merging.report import name_of

CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )

def gray():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))

@torch.inference_mode()
def inferred():
    return net().eval()

def twice():
    return [(torch.zeros(3, 3, 8, 8), torch.tensor([0, 1, 2]))] * 2

def once():
    yield from twice()

def short():
    return [(torch.zeros(3, 3, 8, 8), torch.zeros(3, 10))]

def beyond():
    return [(torch.zeros(3, 3, 8, 8), torch.tensor([1, 2, 10]))]

def dicts():
    return [{"x": torch.zeros(3, 3, 8, 8)}]

def seven():
    return 7
"""
NET = ("--model", "nets:net", "--input-size", "3,8,8")


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """The user's module `nets` in the current folder."""
    (tmp_path / "nets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "nets", raising=False)
    return tmp_path


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


# ---------------------------------------------------------------- files as people save them


def prefixed(prefix: str, weights: dict) -> dict:
    return {prefix + name: w for name, w in weights.items()}


WRAPPED = {
    "DataParallel": lambda m: nn.DataParallel(m).state_dict(),
    "compile": lambda m: torch.compile(m).state_dict(),
    "compiled part": lambda m: nn.Sequential(torch.compile(m[0]), *m[1:]).state_dict(),
    "parallel part": lambda m: nn.Sequential(nn.DataParallel(m[0]), *m[1:]).state_dict(),
    "model.": lambda m: prefixed("model.", m.state_dict()),
    "net.": lambda m: prefixed("net.", m.state_dict()),
    "two": lambda m: prefixed("module._orig_mod.", m.state_dict()),
    "average": lambda m: torch.optim.swa_utils.AveragedModel(m).state_dict(),
    "average of parallel": lambda m: torch.optim.swa_utils.AveragedModel(nn.DataParallel(m)).state_dict(),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_prefixes_of_wrappers_are_stripped(tmp_path, wrapper):
    model, path = small_net(), tmp_path / "w.pth"
    for content in (WRAPPED[wrapper](model), {"epoch": 3, "state_dict": WRAPPED[wrapper](model)}):
        torch.save(content, path)
        again = load_weights(small_net(), load_checkpoint(path))
        assert all(torch.equal(w, again.state_dict()[name]) for name, w in model.state_dict().items())


def test_a_prefix_of_the_network_itself_stays(tmp_path):
    model = nn.ModuleDict({"module": nn.Linear(2, 3)})
    for content in (model.state_dict(), prefixed("module.", model.state_dict())):
        torch.save(content, tmp_path / "w.pth")
        again = load_weights(nn.ModuleDict({"module": nn.Linear(2, 3)}), load_checkpoint(tmp_path / "w.pth"))
        assert torch.equal(again["module"].weight, model["module"].weight)


def test_what_does_not_fit_is_named_as_the_network_has_it(tmp_path):
    torch.save(prefixed("module.", nn.Sequential(nn.Linear(2, 3)).state_dict()), tmp_path / "w.pth")
    with pytest.raises(NeuronMergingError, match=r"it lacks 1.weight and 1 more"):
        load_weights(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), load_checkpoint(tmp_path / "w.pth"))


NESTED = {
    "torchvision": lambda sd: {"model": sd, "optimizer": {"state": {}}, "epoch": 9},
    "kuangliu": lambda sd: {"net": sd, "acc": 93.1, "epoch": 9},
    "tutorial": lambda sd: {"model_state_dict": sd, "optimizer_state_dict": {}},
    "NumPy": lambda sd: {"state_dict": sd, "acc": np.float32(91.25), "n": np.int64(3), "done": np.bool_(True)},
    "Namespace": lambda sd: {"state_dict": sd, "args": argparse.Namespace(lr=0.1, momentum=np.float64(0.9))},
    "EMA beside": lambda sd: {"model": sd, "ema": {name: w + 1 for name, w in sd.items()}},
    "EMA alone": lambda sd: {"model_ema": sd, "epoch": 3},
    "two deep": lambda sd: {"model": {"state_dict": sd, "acc": 80.0}, "epoch": 3},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", NESTED)
def test_checkpoints_are_opened_by_their_usual_keys(tmp_path, recwarn, kind, zipped):
    model, path = small_net(), tmp_path / "w.pth"
    torch.save(NESTED[kind](model.state_dict()), path, _use_new_zipfile_serialization=zipped)
    checkpoint = load_checkpoint(path)
    assert all(torch.equal(w, checkpoint.state_dict[name]) for name, w in model.state_dict().items())
    assert checkpoint.accuracy == {"kuangliu": 93.1, "NumPy": 91.25, "two deep": 80.0}.get(kind)
    said = [str(w.message) for w in recwarn if "is read" in str(w.message)]
    assert said == ([f"{path} holds model, ema: model is read; save another alone"] if kind == "EMA beside" else [])


class Theirs:
    """Something that only its own code can make again."""


UNOPENED = {
    "whole": (lambda sd: nn.Linear(2, 2), "it holds torch.nn.modules.linear.Linear"),
    "theirs": (
        lambda sd: {"state_dict": sd, "x": Theirs()},
        r"it holds tests.test_messages.Theirs.*state_dict\(\) alone",
    ),
    "path": (lambda sd: {"state_dict": sd, "x": PurePosixPath("a")}, "it holds pathlib.PurePosixPath"),
    "two networks": (
        lambda sd: {"generator": sd, "critic": sd},
        r"but generator \(OrderedDict\), critic \(OrderedDict\)",
    ),
    "a number": (lambda sd: {**sd, "step": 3}, r"but step \(int\), "),
    "list": (lambda sd: [sd], "but list: save"),
    "nothing": (lambda sd: {}, "but dict: save"),
}


@pytest.mark.parametrize("kind", UNOPENED)
def test_what_else_a_file_holds_is_named(tmp_path, kind):
    content, message = UNOPENED[kind]
    torch.save(content(nn.Linear(2, 2).state_dict()), tmp_path / "w.pth")
    with pytest.raises(NeuronMergingError, match=message) as error:
        load_checkpoint(tmp_path / "w.pth")
    assert "cut short" not in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_holds_itself_is_refused(tmp_path):
    content = {"epoch": 3}
    content["model"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(NeuronMergingError, match="holds no state_dict"):
        load_checkpoint(tmp_path / "w.pth")


# ---------------------------------------------------------------- calls that are nearly right


class Two(nn.Module):
    def __init__(self, number=2):
        super().__init__()
        self.body, self.number = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU()), number
        self.head = nn.Sequential(nn.Conv2d(4 * number, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))

    def forward(self, a, b):
        return self.head(torch.cat([self.body(a), self.body(b)], 1))


IMAGE = torch.randn(2, 3, 8, 8)
NEARLY = {
    "with the batch": (small_net, (1, 3, 32, 32), r"give it without the batch: \(3, 32, 32\)"),
    "an image": (small_net, torch.randn(3, 8, 8), r"give example_input\[None\]"),
    "another input": (small_net, (1, 8, 8), r"does not run on an input of shape \[1, 8, 8\]: Given groups=1"),
    "one of two": (Two, (3, 8, 8), r"Two takes 2 inputs \(a, b\), and only one can be made up"),
    "a tensor of two": (Two, IMAGE, r"Two takes 2 inputs \(a, b\)"),
    "a list": (Two, [IMAGE], "cannot be exported: missing a required argument: 'b'|can only be pruned so far"),
    "an array": (small_net, np.zeros((1, 3, 8, 8)), "example_input of type ndarray: give a tensor"),
    "a number": (small_net, 8, "example_input 8: give a tensor"),
}


@pytest.mark.parametrize("kind", NEARLY)
@pytest.mark.parametrize("compensation", ["prune", "restore"])
def test_an_example_that_is_nearly_one(kind, compensation):
    make, example, message = NEARLY[kind]
    with pytest.raises(NeuronMergingError, match=message) as error:
        shrink(make(), 0.5, example_input=example, compensation=compensation)
    assert len(str(error.value)) < 250 and "\n" not in str(error.value) and "tensor(" not in str(error.value)


def test_two_inputs_need_an_example():
    model = Two().eval()
    for kind in ("prune", "merge"):
        with pytest.raises(NeuronMergingError, match="Two: give example_input, which shows what it takes"):
            shrink(model, 0.0, compensation=kind)
        small, _ = shrink(model, 0.0, compensation=kind, example_input=(IMAGE, IMAGE))
        torch.testing.assert_close(small(IMAGE, IMAGE), model(IMAGE, IMAGE))


def test_images_that_are_no_tensor():
    with pytest.raises(NeuronMergingError, match="images of type list: give a tensor"):
        shrink(small_net(), 0.5, images=[IMAGE], example_input=(3, 8, 8))


@pytest.mark.parametrize("ratio", [50, {"0": 50}, torch.tensor(50.0)])
def test_half_of_a_hundred(ratio):
    with pytest.raises(NeuronMergingError, match=r"ratio 50(.0)? for layer 0 is outside \[0, 1\): did you mean 0.5\?"):
        shrink(small_net(), ratio, example_input=(3, 8, 8))


SPECS = {
    "nets.py:net": "nets:net", "./nets.py:net": "nets:net", "a/nets.py:net": "a.nets:net", "nets:net()": "nets:net",
    "torchvision.models.resnet18": "torchvision.models:resnet18", "7": "torchvision.models:resnet18",
}  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_a_model_that_is_nearly_named(cli, spec):
    done = cli("--model", spec, "--input-size", "3,8,8", "--json", "-")
    assert done.refused and done.err == f"main.py: --model {spec}: give module:callable, such as {SPECS[spec]}\n"


PARTS = {
    "its .module": lambda: torch.optim.swa_utils.AveragedModel(small_net()),
    r"0 \(OptimizedModule\).*its ._orig_mod, in its place": lambda: nn.Sequential(torch.compile(small_net())),
    r"0 \(RecursiveScriptModule\).*as it was before, in its place": lambda: nn.Sequential(
        torch.jit.script(small_net())
    ),
}


@pytest.mark.parametrize("message", PARTS)
def test_a_wrapper_is_named_wherever_it_is(message):
    model = PARTS[message]()
    for call in (lambda: shrink(model, 0.5, example_input=(3, 8, 8)), lambda: summarize(model)):
        with pytest.raises(NeuronMergingError, match=message):
            call()


def test_layers_inside_of_a_wrapper_are_found_and_unused_ones_named():
    inside = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(nn.DataParallel(inside), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    model = Heads(model)
    report = shrink(model, 0.5, compensation="prune", example_input=(3, 8, 8))[1]
    left_out = report.left_out
    assert {"net.0.module.0", "net.0.module.2"} <= {unit.layer for unit in report.units}  # inside of DataParallel
    assert left_out["auxiliary"] == "the forward pass never calls it in evaluation"
    with pytest.raises(NeuronMergingError, match=r"auxiliary cannot be pruned: the forward pass never calls it"):
        shrink(model, {"auxiliary": 0.5}, compensation="prune")


class Heads(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.auxiliary = net, nn.Linear(2, 2)

    def forward(self, x):
        y = self.net(x)
        return (y, self.auxiliary(y)) if self.training else y


# ---------------------------------------------------------------- copies, inference mode, whole numbers, what has run once


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["prune", "merge"])
def test_a_feature_extractor_keeps_its_mode_and_outputs(kind, training):
    model = extraction.create_feature_extractor(small_net(), {"2": "low", "7": "out"}).train(training)
    model.get_submodule("1").eval()  # one part is frozen
    before = {name: module.training for name, module in model.named_modules()}
    small, _ = shrink(model, 0.0, example_input=(3, 8, 8), compensation=kind)
    for network in (model, small):
        assert {name: module.training for name, module in network.named_modules()} == before
    for found, wanted in zip(small.eval()(IMAGE).values(), model.eval()(IMAGE).values()):
        torch.testing.assert_close(found, wanted)


class Forgets(nn.Module):
    """A copy of it has lost something."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(8, 6), nn.Linear(6, 2), 3.0

    def forward(self, x):
        return self.scale * self.b(self.a(x).relu())

    def __deepcopy__(self, memo):
        copied = Forgets()
        copied.load_state_dict(copy.deepcopy(self.state_dict(), memo))
        copied.scale = 1.0
        return copied


def test_a_copy_that_is_something_else_is_said():
    with pytest.raises(NeuronMergingError, match=r"a copy of Forgets .* off by 66.7%"):
        shrink(Forgets(), 0.5, example_input=(8,), compensation="prune")


class Counts(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        self.last = x
        return super().forward(x)


def test_comparing_a_copy_leaves_the_network_alone():
    model = Counts().train()
    shrink(model, 0.5, example_input=(8,), compensation="merge")
    assert model.training and model.calls == 0 and model.seen == 0 and not hasattr(model, "last")


class Places(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.n(self.a(x)).relu())


def test_places_and_features_are_told_apart_by_an_example():
    """As many places as features: what is left of this does not run on [B, 8, 8], and does on [B, 8]."""
    whole, report = shrink(Places().eval(), 0.5, coupled=True, compensation="prune", example_input=(8, 8))
    assert report.widths == [4] and whole.n.num_features == 8 and whole(torch.zeros(3, 8, 8)).shape == (3, 8, 2)
    small, _ = shrink(Places().eval(), 0.5, coupled=True, compensation="prune", example_input=(8,))
    assert small(torch.zeros(3, 8)).shape == (3, 2)


@pytest.mark.parametrize("kind", ["prune", "merge", "restore"])
def test_a_network_made_in_inference_mode_works(kind):
    with torch.inference_mode():
        model = small_net()
        wanted = model(IMAGE)
    small, _ = shrink(model, 0.0, example_input=(3, 8, 8), compensation=kind, probe_samples=32)
    torch.testing.assert_close(small(IMAGE), wanted.clone(), atol=1e-5, rtol=1e-4)
    assert shrink(model, 0.5, compensation=kind, example_input=(3, 8, 8), probe_samples=32)[1].widths == [8, 4]
    assert not any(p.is_inference() for p in small.parameters()) and "8 of 16" in summarize(model, 0.5)


def test_a_command_on_a_network_made_in_inference_mode(cli, nets):
    torch.save(build_model("nets:net").state_dict(), "w.pth")
    made = cli("--model", "nets:inferred", *NET[2:], "--weights", "w.pth", "--model-type", "merge", "--json", "-")
    assert made.row["widths"] == {"0": 8, "3": 4}


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, ids):
        return self.b(self.a(self.e(ids)).relu()).mean(1)


def test_words_are_whole_numbers():
    torch.manual_seed(0)
    model, ids = Words().eval(), torch.randint(0, 50, (64, 10))
    for example in ((10,), ids, ids.int()):
        assert shrink(model, 0.5, example_input=example, compensation="prune", coupled=False)[1].macs == (6080, 3040)
        with pytest.raises(NeuronMergingError, match=r"the inputs of Words are whole numbers.*: give images"):
            shrink(model, 0.5, example_input=example, compensation="restore")
    for told in ({}, {"example_input": (10,)}):
        small, report = shrink(model, 0.5, images=ids, compensation="restore", **told, coupled=False)
        assert small(ids).shape == (64, 3) and report.macs[1] == 3040
    assert shrink(model, 0.5, images=ids, widths="auto")[1].params[1] < 1600  # nothing is made up
    pruned, _ = shrink(model, 0.5, compensation="prune")
    restored, _ = shrink(model, 0.5, images=ids)
    assert (restored(ids) - model(ids)).norm() < (pruned(ids) - model(ids)).norm()


def test_pixels_that_are_whole_numbers_are_pixels():
    images = torch.randint(0, 255, (32, 3, 8, 8))
    assert shrink(small_net(), 0.5, images=images)[1].widths == [8, 4]


# ---------------------------------------------------------------- summaries


def sizes(text: str) -> dict[str, str]:
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines() if " -> " in line and "%" in line}


@pytest.mark.parametrize("kind", ["prune", "merge", "merge-derived", "restore", "lbyl", "fold"])
@pytest.mark.parametrize("make", [small_net, lambda: build("ResNet", (8,)).eval(), lambda: Words().eval()])
def test_a_summary_has_the_sizes_that_the_method_leaves(make, kind):
    model = make()
    shape = (10,) if isinstance(model, Words) else (3, 32, 32)
    images = torch.randint(0, 50, (64, 10)) if isinstance(model, Words) and kind == "restore" else None
    if images is not None:
        shape = None  # nothing can be made up
    report = shrink(model, 0.5, example_input=shape, images=images, compensation=kind)[1]
    text = summarize(model, 0.5, compensation=kind, example_input=shape)
    for unit, kept, full in zip(report.units, report.widths, report.full):
        assert f"{name_of(unit)}: {kept} of {full}\n" in text
    if shape is None:
        assert "MACs        not counted: give example_input" in text
        return
    said = sizes(text)
    assert said["parameters"].startswith(f"{report.params[0]:,} -> {report.params[1]:,} (")
    assert said["MACs"].startswith(f"{report.macs[0]:,} -> {report.macs[1]:,} (")


def test_a_summary_of_widths_that_are_chosen():
    model = build("ResNet", (8,)).eval()
    told = {"compensation": "merge", "widths": "quick", "budget": {"macs": 0.5}, "example_input": (3, 32, 32)}
    report = shrink(model, probe_samples=32, **told)[1]
    text = summarize(model, probe_samples=32, **told)
    assert f"{report.macs[1]:,} (" in text and f"layer1.0.conv1 -> layer1.0.conv2: {report.widths[0]} of 16" in text
    with pytest.raises(NeuronMergingError, match="give example_input"):
        shrink(model, **told | {"example_input": None})


def test_summaries_on_the_command_line(cli, nets):
    text = cli(*NET, "--summary", "--pruning-ratio", "0.5").out
    assert "0 -> 3: 8 of 16" in text and "parameters" in text and "MACs" in text
    text = cli(*NET[:2], "--summary", "--pruning-ratio", "0.5", "--model-type", "restore").out
    assert "0 -> 3: 8 of 16" in text and "MACs        not counted: give example_input (--input-size)" in text
    text = cli(*NET, "--summary", "--model-type", "merge", "--widths", "quick", "--budget", "macs=0.5").out
    assert "parameters" in text and "of 16" in text
    assert "--budget says how" in cli(*NET, "--summary", "--budget", "macs=0.5").err
    assert "--widths quick says how" in cli(*NET, "--summary", "--widths", "quick").err
    assert "--evaluate is for results" in cli(*NET, "--summary", "--evaluate-with", "nets:twice").err
    text = cli("--arch", "LeNet_300_100", "--summary", "--pruning-ratio", "0.5").out
    assert sizes(text)["parameters"] == "266,610 -> 125,810 (-52.8 %)"
    assert sizes(text)["MACs"] == "266,200 -> 125,600 (-52.8 %)"
    assert "--retrain is for results" in cli("--arch", "LeNet_300_100", "--summary", "--retrain").err
    options = ("--model-type", "merge", "--widths", "quick", "--budget", "params=0.4")
    text = cli("--arch", "LeNet_300_100", "--summary", *options).out
    assert int(sizes(text)["parameters"].split()[2].replace(",", "")) <= 0.4 * 266_610 + 1


# ---------------------------------------------------------------- what is measured


def test_a_data_set_says_how_it_is_normalised(cli, nets):
    gray = ("--model", "nets:gray", "--input-size", "1,28,28", "--evaluate", "--dataset", "FashionMNIST")
    usual = cli(*gray)
    assert "normalised with mean 0.5 and standard deviation 0.5: other ones are given by --mean and --std" in usual.out
    other = cli(*gray, "--mean", "0.286", "--std", "0.353", "--json", "-")
    assert "normalised with mean 0.286 and standard deviation 0.353\n" in other.err
    images = main.data.load("FashionMNIST", "test")
    x = (images.pixels.float() / 255 - 0.286) / 0.353
    assert other.row["correct"] == int((build_model("nets:gray").eval()(x).argmax(1) == images.labels).sum())


def test_a_folder_of_images_is_normalised_as_is_said(nets):
    from neuron_merging.images import transforms

    for spec, shape in (("nets:net", (3, 8, 8)), ("torchvision.models:resnet18", (3, 224, 224))):
        scale = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
        image = torchvision_image(torch.full((3, 300, 300), 51, dtype=torch.uint8))
        found = transforms(spec, None, shape, scale)(image).mean((1, 2))
        torch.testing.assert_close(found, (0.2 - torch.tensor(scale[0])) / torch.tensor(scale[1]))


def torchvision_image(pixels):
    from torchvision.transforms.functional import to_pil_image

    return to_pil_image(pixels)


SCALES = {
    "one": (["--mean", "0.5", "--evaluate", "--dataset", "imagefolder:x"], "--mean and --std go together"),
    "channels": (["--mean", "0.5", "--std", "0.5", "--evaluate", "--dataset", "imagefolder:x"], "give 3 numbers each"),
    "zero": (["--mean", "0,0,0", "--std", "1,0,1", "--evaluate", "--dataset", "imagefolder:x"], "above 0"),
    "words": (["--mean", "a", "--std", "0.5", "--json", "-"], "give a number for every channel"),
    "no images": (["--mean", "0,0,0", "--std", "1,1,1", "--json", "-"], "are for the images of --dataset and --calibrate"),
    "no data set": (["--evaluate"], "give --dataset imagefolder:DIR, or --evaluate-with MODULE:NAME for a loader"),
    "not evaluated": (["--dataset", "FashionMNIST", "--json", "-"], "--dataset is to measure on: give --evaluate too"),
    "both": (["--dataset", "FashionMNIST", "--evaluate-with", "nets:twice"], "give one of them"),
    "unknown": (["--evaluate", "--dataset", "MNIST"], "--dataset MNIST is not known: give imagefolder:DIR"),
    "soft labels": (["--evaluate-with", "nets:short"], "gives labels of shape [3, 10] (float32) for 3 inputs"),
    "other labels": (["--evaluate-with", "nets:beyond"], "gives labels from 1 to 10, the network has outputs 0 to 9"),
    "dicts": (["--evaluate-with", "nets:dicts"], "gives batches of type dict, not pairs of tensors"),
    "a number": (["--evaluate-with", "nets:seven"], "gives int: let it give batches"),
    "nothing": (["--evaluate-with", "nets:none"], "has no attribute 'none'"),
    "a file": (["--evaluate-with", "nets.py:twice"], "--evaluate-with nets.py:twice: give module:callable, such as nets:twice"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALES)
def test_what_is_measured_on_is_said_wrongly(cli, nets, kind):
    options, message = SCALES[kind]
    done = cli(*NET, *options)
    lines = [line for line in done.err.splitlines() if not line.startswith("warning")]
    assert done.code == 2 and len(lines) == 1 and message in lines[0], done.err


@pytest.mark.parametrize("loader", ["twice", "once"])
def test_a_loader_of_ones_own(cli, nets, loader):
    made = cli(*NET, "--evaluate-with", f"nets:{loader}", "--model-type", "prune", "--json", "-")
    hit = int(build_model("nets:net").eval()(torch.zeros(1, 3, 8, 8)).argmax())
    row = made.row
    assert (row["total"], row["evaluate_with"]) == (6, f"nets:{loader}")
    assert row["accuracy_original"] == round(100 * (hit < 3) / 3, 2) and row["accuracy"] is not None


def test_a_file_that_was_pruned_is_not_headed_original(cli, nets, pretrained):
    assert cli(*NET, "--model-type", "merge", "--save", "small.pt").code == 0
    done = cli("--model", "nets:net", *NET[2:], "--weights", "small.pt", "--save", "again.pt")
    assert done.out.startswith("nets:net: merge, as small.pt has it\n")
    done = cli("--model", "nets:net", *NET[2:], "--weights", "again.pt", "--json", "-")
    assert done.row["type"] == "merge" and done.row["widths"] == {"0": 8, "3": 4} and done.row["ratio"] == 0.5
    assert cli("--model-type", "merge", "--pruning-ratio", "0.5", "--evaluate", "--save", "lenet.pt").code == 0
    done = cli("--pretrained", "lenet.pt", "--evaluate", "--save", "copy.pt")
    heading = done.out.splitlines()[1].split()
    assert heading == ["original", "merge"] and "measured" not in done.out
    assert load_checkpoint("copy.pt").made_by == "merge"


def test_a_fine_tuned_merged_network_is_named_so(tmp_path):
    """Its file says what made it, and so do the name and the contents of what comes of it."""
    args = argparse.Namespace(
        arch="LeNet_300_100", compensation="original", criterion="l1-norm", pretrained="x", retrain=True
    )
    experiment = xp.Experiment()
    path = tmp_path / "merged.pt"
    names = {
        "original": {},
        "merge_l2-norm_0.5": {"type": "merge", "criterion": "l2-norm", "ratio": 0.5, "command": "x"},
    }
    names["fold_widths"] = {"type": "fold", "widths": [30, 10], "command": "x"}
    names["original "] = {"type": "merge"}  # somebody else's: who knows what that says
    for name, about in names.items():
        save_checkpoint(path, build("LeNet_300_100"), **about)
        start = load_checkpoint(path)
        assert (
            main.trained_name(args, experiment, start) == f"LeNet_300_100.{name.strip()}_retrained.300_100.bias.pth.tar"
        )
        main.save(tmp_path / "new.pt", build("LeNet_300_100"), {"type": "original", "accuracy": 1.0}, start)
        assert load_checkpoint(tmp_path / "new.pt").about["type"] == (about if "command" in about else {}).get(
            "type", "original"
        )
    args.compensation = "prune"
    assert "prune_l1-norm_0.5_retrained" in main.trained_name(args, xp.Experiment(compensation="prune"), start)
    assert main.trained_name(
        args | {} if isinstance(args, dict) else args, experiment, None
    ) == settings.checkpoint_name("LeNet_300_100", (), "FashionMNIST")


def test_peak_memory_says_of_what():
    report = shrink(small_net(), 0.5, compensation="prune")[1]
    assert "peak memory of the whole process" in str(report) and report.device == "cpu"


def test_two_accuracies_are_explained():
    last = {"test_accuracy": 91.0, "image_share": 1.0}
    assert main._two_accuracies(last, {"accuracy": 91.0}, torch.device("cpu")) == ""
    line = main._two_accuracies(last | {"image_share": 0.75}, {"accuracy": 91.02}, torch.device("cpu"))
    assert line.startswith("the epoch's test accuracy, 91.00 %, was computed as in training (")
    assert (
        "on images of 75% of their size" in line
        and "91.02 %, is that of the file in float32" in line
        and line.count("\n") == 1
    )


def test_rows_of_a_pruned_file_are_json(cli, nets):
    assert cli(*NET, "--model-type", "prune", "--ratios", "0=0.5", "--save", "small.pt").code == 0
    row = cli("--model", "nets:net", *NET[2:], "--weights", "small.pt", "--json", "-").row
    assert json.loads(json.dumps(row)) == row and row["ratio"] == {"0": 0.5} and row["type"] == "prune"


def test_a_head_behind_convolutions_needs_no_example():
    """There a BatchNorm behind a linear layer can only be of features: images have no places left."""
    head = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head).eval()
    small, _ = shrink(model, 0.5, coupled=True, compensation="prune")
    assert small[4].out_features == 6 and small(IMAGE).shape == (2, 3)


@pytest.mark.filterwarnings("ignore")
def test_a_gradient_that_cannot_be_had_is_no_wrong_shape():
    """The class step does without: through a checkpoint of the old kind, and where a layer passes no gradient."""

    for model in (Old().eval(), nn.Sequential(Hard(), *small_net()).eval()):
        assert shrink(model, 0.5, example_input=(3, 8, 8), probe_samples=32)[1].widths == [8, 4]


class Old(nn.Module):
    def __init__(self):
        super().__init__()
        net = small_net()
        self.first, self.rest = net[:3], net[3:]

    def forward(self, x):
        return self.rest(checkpoint(self.first, x, use_reentrant=True))


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return None


class Hard(nn.Module):
    def forward(self, x):
        return Sign.apply(x) if isinstance(x, torch.Tensor) else x.sign()


# ---------------------------------------------------------------- what a newcomer does first


@pytest.mark.parametrize("call", [lambda m: shrink(m, 0.5, compensation="merge"), summarize])
def test_a_state_dict_is_no_network(call):
    with pytest.raises(NeuronMergingError, match="model is of type OrderedDict: give the network"):
        call(nn.Linear(3, 4).state_dict())


def test_a_single_layer_stays_whole():
    with pytest.raises(
        NeuronMergingError, match="Linear has no layer that can be pruned: weight: it is an output of the network"
    ):
        shrink(nn.Linear(3, 4), 0.5, compensation="merge")


def test_an_export_takes_a_path_as_text(tmp_path):
    assert export(nn.Linear(3, 4), str(tmp_path / "small.pt2"), (3,)) < 1e-4
    with pytest.raises(NeuronMergingError, match="name a file that ends in"):
        export(nn.Linear(3, 4), "small.h5", (3,))


def test_the_help_says_which_method_is_the_default():
    text = " ".join(cli.parser().format_help().split())
    assert "[original]" in text and "[None]" not in text
