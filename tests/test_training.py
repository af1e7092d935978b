"""The trainer: batches, recipes, resuming to the same result, several processes with the same update as one."""

import inspect
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import main
from experiments import settings
from experiments import training as train
from models import build
from neuron_merging.checkpoint import load_checkpoint
from neuron_merging.errors import NeuronMergingError
from tests.conftest import ROOT
from tests.helpers import images, same

CPU = torch.device("cpu")


RECIPE = settings.Recipe(epochs=3, lr=0.05, weight_decay=1e-4, schedule=(1,), gammas=(0.1,), batch_size=32)


class Tiny(nn.Module):
    """A network with BatchNorm and dropout: both have to come back after an interruption."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Linear(256, 10)

    def forward(self, x):
        return self.fc(F.dropout(F.relu(self.bn(self.conv(x))).flatten(1), 0.2, self.training))


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def run(model, recipe=RECIPE, **options):
    lines = []
    last = train.train(
        model, images("cifar10"), images("cifar10", 50, 1), recipe, device=CPU, say=lines.append, **options
    )
    return last, lines


def interrupt_at(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal in the middle of a training step."""
    steps, cross_entropy = 0, F.cross_entropy

    def interrupted(*args, **kwargs):
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), number)
        return cross_entropy(*args, **kwargs)

    patch.setattr(train.F, "cross_entropy", interrupted)


@pytest.mark.parametrize(
    "recipe",
    [RECIPE, replace(RECIPE, one_cycle=True, schedule=(), gammas=(), norm_decay=0.0)],
    ids=["steps", "one-cycle"],
)
@pytest.mark.parametrize("stop_at", [4, 5, 8], ids=["inside an epoch", "at its end", "in the next"])
def test_a_resumed_run_gives_the_same_network(tmp_path, monkeypatch, recipe, stop_at):
    whole = tiny()
    run(whole, recipe, curve=tmp_path / "whole.csv")
    state = tmp_path / "state"
    with monkeypatch.context() as patch:
        interrupt_at(patch, stop_at)
        with pytest.raises(KeyboardInterrupt, match="go on with --resume"):
            run(tiny(), recipe, state=state)
    resumed = tiny()
    with torch.no_grad():
        resumed.fc.weight.zero_()  # whatever it starts from
    run(resumed, recipe, state=state, resume=True, curve=tmp_path / "resumed.csv")
    assert same(whole, resumed)
    without_seconds = [
        [line.rsplit(",", 1)[0] for line in (tmp_path / f"{name}.csv").read_text().splitlines()]
        for name in ("whole", "resumed")
    ]
    assert without_seconds[0] == without_seconds[1]
    assert len(without_seconds[0]) == 1 + recipe.epochs


def test_what_cannot_be_resumed_is_said(tmp_path):
    with pytest.raises(NeuronMergingError, match="nothing to resume"):
        run(tiny(), state=tmp_path / "state", resume=True)
    run(tiny(), state=tmp_path / "state")
    with pytest.raises(NeuronMergingError, match="another recipe"):
        run(tiny(), replace(RECIPE, lr=1.0), state=tmp_path / "state", resume=True)
    with pytest.raises(NeuronMergingError, match="another seed"):
        run(tiny(), state=tmp_path / "state", resume=True, seed=2)
    saved = torch.load(tmp_path / "state", weights_only=True)
    del saved["recipe"]["cutout"]  # as states were before there was one
    torch.save(saved, tmp_path / "earlier")
    assert run(tiny(), replace(RECIPE, epochs=3), state=tmp_path / "earlier", resume=True)[0]["epoch"] == 3
    with pytest.raises(NeuronMergingError, match="another recipe"):
        run(tiny(), replace(RECIPE, cutout=3), state=tmp_path / "earlier", resume=True)
    with pytest.raises(NeuronMergingError, match="--cutout 32 can hide all of an image"):
        run(tiny(), replace(RECIPE, cutout=32))
    torch.save(saved | {"recipe": None}, tmp_path / "damaged")
    with pytest.raises(NeuronMergingError, match="not a training state"):
        run(tiny(), state=tmp_path / "damaged", resume=True)
    torch.save(["no state"], tmp_path / "list")
    with pytest.raises(NeuronMergingError, match="not a training state"):
        run(tiny(), state=tmp_path / "list", resume=True)
    with pytest.raises(NeuronMergingError, match="at least 2 a process"):
        run(tiny(), replace(RECIPE, batch_size=1))
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:1000])
    with pytest.raises(NeuronMergingError, match="not a training state"):
        run(tiny(), state=tmp_path / "state", resume=True)


def test_a_loss_that_is_not_finite_ends_the_run():
    with pytest.raises(NeuronMergingError, match="no longer finite in epoch 1"):
        run(tiny(), replace(RECIPE, lr=1e30))


def test_one_line_an_epoch_and_the_last_epoch_counts():
    last, lines = run(tiny())
    assert len(lines) == 3
    assert last["epoch"] == 3
    _, chatty = run(tiny(), log_interval=2)
    assert [line.split(" loss")[0] for line in chatty[:2]] == ["epoch 1 batch 2/5", "epoch 1 batch 4/5"]


def test_the_batches_of_an_epoch_are_all_images_once():
    data = images(count=100)
    shown = [(x, labels, size) for x, labels, size in train.batches(data, 32, seed=3)]
    assert [size for *_, size in shown] == [32, 32, 32, 4]
    pixels = torch.cat([x for x, *_ in shown])
    assert torch.equal(
        pixels.flatten(1).sum(1).sort().values, data.normalised(data.pixels).flatten(1).sum(1).sort().values
    )
    again = torch.cat([x for x, *_ in train.batches(data, 32, seed=3)])
    assert torch.equal(pixels, again)
    assert not torch.equal(pixels, torch.cat([x for x, *_ in train.batches(data, 32, seed=4)]))
    assert [size for *_, size in train.batches(images(count=97), 32, seed=3)] == [32] * 3  # one alone has no variance


def test_crops_and_flips_are_what_torchvision_would_cut():
    """Every augmented image is one of the 81 crops of the padded image or of its mirror image."""
    data = images("cifar10", 6)
    padded = F.pad(data.pixels, (4, 4, 4, 4))
    crops = {}
    for i in range(6):
        for y in range(9):
            for x in range(9):
                crop = padded[i, :, y : y + 32, x : x + 32]
                crops[crop.numpy().tobytes()] = i, (y, x), False
                crops[crop.flip(2).numpy().tobytes()] = i, (y, x), True
    seen, flips = set(), []
    for epoch in range(30):
        for x, labels, _ in train.batches(data, 6, seed=epoch):
            std, mean = torch.tensor(data.dataset.std).view(3, 1, 1), torch.tensor(data.dataset.mean).view(3, 1, 1)
            for image, label in zip(((x * std + mean) * 255).round().to(torch.uint8), labels):
                i, place, flipped = crops[image.contiguous().numpy().tobytes()]
                assert data.labels[i] == label
                seen.add(place)
                flips.append(flipped)
    assert len(seen) > 60
    assert len(flips) == 180 and 60 < sum(flips) < 120


@pytest.mark.parametrize("dataset, side", [("cifar10", 5), ("cifar10", 12), ("FashionMNIST", 4)])
def test_cutout_hides_one_square_of_every_image_and_changes_nothing_else(dataset, side):
    data = images(dataset, 200)
    _, height, width = data.dataset.shape
    whole, cut = ([x for x, *_ in train.batches(data, 64, seed=2, cutout=cutout)] for cutout in (0, side))
    whole, cut = torch.cat(whole), torch.cat(cut)
    data.pixels[:] = (255 * torch.tensor(data.dataset.mean)).round().to(torch.uint8)[:, None, None]
    mean = data.normalised(data.pixels)[0, :, 0, 0]
    corners = set()
    for before, after in zip(whole, cut):
        hidden = (after == mean[:, None, None]).all(0) & (before != after).any(0)
        down, across = hidden.any(1).nonzero().flatten(), hidden.any(0).nonzero().flatten()
        top, left, bottom, right = int(down[0]), int(across[0]), int(down[-1]) + 1, int(across[-1]) + 1
        assert bottom - top == side or (bottom - top < side and (top == 0 or bottom == height))  # past the border
        assert right - left == side or (right - left < side and (left == 0 or right == width))
        inside = torch.zeros(height, width, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(after, torch.where(inside, mean[:, None, None], before))
        corners.add((top, left))
    assert len(corners) > 100


def test_a_recipe_s_cutout_reaches_the_training_images(monkeypatch):
    asked = []

    def watched(*args, batches=train.batches, **options):
        asked.append(inspect.signature(batches).bind(*args, **options).arguments.get("cutout"))
        return batches(*args, **options)

    monkeypatch.setattr(train, "batches", watched)
    run(tiny(), replace(RECIPE, cutout=7))
    assert asked == [7, 7, 7]


def test_the_shares_of_several_processes_make_up_the_global_batch():
    data = images("cifar10", 70)
    whole = list(train.batches(data, 32, seed=1))
    shares = [list(train.batches(data, 32, seed=1, part=(rank, 2))) for rank in range(2)]
    for (x, labels, size), first, second in zip(whole, *shares, strict=True):
        assert torch.equal(x[0::2], first[0]) and torch.equal(x[1::2], second[0])
        assert torch.equal(labels[0::2], first[1]) and first[2] == size


def test_learning_rates():
    published = settings.recipe("ResNet")
    assert [train.learning_rate(published, epoch, 0) for epoch in (0, 99, 100, 149, 150)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001]
    )
    fast = settings.recipe("VGG", "fast")
    rates = [train.learning_rate(fast, 0, progress) for progress in (0, 0.2, 0.6, 1)]
    assert rates == pytest.approx([0.02, 0.2, 0.1, 0.0])


SIZES = ((0.0, 0.5), (0.4, 0.75), (0.7, 1.0))
STEPS = {
    "momentum": 0.9,
    "nesterov": False,
    "label_smoothing": 0.0,
    "norm_decay": None,
    "cutout": 0,
    "one_cycle": False,
    "winograd": False,
    "sizes": (),
}
CYCLE = {
    "momentum": 0.9, "nesterov": True, "label_smoothing": 0.1, "norm_decay": 0.0, "cutout": 0, "one_cycle": True,
    "winograd": True,
}  # fmt: skip
LENET = {
    "epochs": 60,
    "lr": 0.1,
    "weight_decay": 1e-4,
    "schedule": (15, 30, 45),
    "gammas": (0.1,) * 3,
    "batch_size": 128,
}
CIFAR = {
    "epochs": 200,
    "lr": 0.1,
    "weight_decay": 5e-4,
    "schedule": (100, 150),
    "gammas": (0.1,) * 2,
    "batch_size": 128,
}
SHORT = {"epochs": 30, "lr": 0.2, "schedule": (), "gammas": ()}


def test_the_recipes_are_what_they_are():
    assert asdict(settings.recipe("LeNet_300_100")) == LENET | STEPS
    assert asdict(settings.recipe("LeNet_300_100", "fast")) == LENET | SHORT | CYCLE | {"sizes": ()}
    for arch in ("VGG", "ResNet", "WideResNet"):
        assert asdict(settings.recipe(arch)) == CIFAR | STEPS
        assert asdict(settings.recipe(arch, "fast")) == CIFAR | SHORT | CYCLE | {"sizes": SIZES}


@pytest.mark.parametrize("name", settings.RECIPES)
def test_the_optimiser_is_that_of_the_recipe(name):
    recipe = settings.recipe("ResNet", name)
    made = train.sgd(Tiny(), recipe).defaults
    assert (made["lr"], made["momentum"], made["nesterov"]) == (recipe.lr, 0.9, name == "fast")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_smoothed_as_the_recipe_says(monkeypatch, smoothing):
    monkeypatch.setattr(train, "autocast_dtype", lambda device: None)
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), images(count=64)
    with torch.no_grad():
        log_p = model(data.normalised(data.pixels)).log_softmax(1)
    wanted = -(1 - smoothing) * log_p.gather(1, data.labels[:, None]).mean() - smoothing * log_p.mean()
    recipe = replace(RECIPE, epochs=1, batch_size=64, label_smoothing=smoothing)
    last = train.train(model, data, data, recipe, device=CPU, say=lambda line: None)
    assert last["loss"] == pytest.approx(float(wanted), abs=1e-4)


@pytest.mark.parametrize(
    "recipe, decays",
    [
        (settings.recipe("ResNet"), [5e-4, 5e-4]),
        (settings.recipe("ResNet", "fast"), [5e-4, 0]),
        (replace(settings.recipe("ResNet"), norm_decay=5e-3), [5e-4, 5e-3]),
    ],
    ids=["published", "fast", "given"],
)
def test_batchnorm_and_biases_have_the_decay_that_the_recipe_gives_them(recipe, decays):
    model = build("ResNet", (20,))
    weights, vectors = train.sgd(model, recipe).param_groups
    assert [weights["weight_decay"], vectors["weight_decay"]] == decays
    assert all(p.ndim > 1 for p in weights["params"]) and all(p.ndim == 1 for p in vectors["params"])
    assert len(weights["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def trained(path, monkeypatch):
    """Train a LeNet, alone or as one of torchrun's processes, and write what became of it."""
    monkeypatch.setattr(train, "autocast_dtype", lambda device: None)  # bfloat16 rounds halves and wholes differently
    torch.manual_seed(0)
    model = build("LeNet_300_100")
    with train.process_group(CPU) as (device, rank):
        last = train.train(model, images(), images(count=51, seed=1), RECIPE, device=device, say=lambda line: None)
        if rank == 0:
            last.pop("seconds")
            torch.save({"state_dict": model.state_dict(), "last": last}, path)


TRAINED = "import sys, pytest; from tests.test_training import trained; trained(sys.argv[1], pytest.MonkeyPatch())"


def torchrun(tmp_path, code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run `code` in two processes."""
    script = tmp_path / "script.py"
    script.write_text(code)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*run, script, *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    aborted = "terminate called without an active exception"  # by a thread of PyTorch's own, rarely, when all is done
    for _ in range(2):
        done = subprocess.run([*map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True)
        if aborted not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done


def test_two_processes_give_the_update_of_one(tmp_path, monkeypatch):
    trained(tmp_path / "one", monkeypatch)
    torchrun(tmp_path, TRAINED, tmp_path / "two")
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    for name, weights in one["state_dict"].items():
        assert torch.allclose(weights, two["state_dict"][name], atol=1e-5), name
    assert one["last"] == pytest.approx(two["last"], abs=1e-3)


MAIN = """
import sys, torch, data, main
from experiments import training as train
from tests.helpers import images
data.load = lambda name, split, root: images(name, 60 if split == "train" else 40)

def kept(model, *args, train=train.train, **options):
    last = train(model, *args, **options)
    torch.save(dict(model.named_buffers()), f"{sys.argv[1]}.{torch.distributed.get_rank()}")
    return last

train.train = kept
sys.exit(main.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_torchrun_trains_one_network_and_saves_it_once(tmp_path):
    """Also its BatchNorms, which see half of every batch each, are the same in both processes in the end."""
    options = ["--arch", "ResNet", "--depth-wide", 8, "--epochs", 1, "--schedule", 1, "--gammas", 1, "--batch-size", 20]
    done = torchrun(tmp_path, MAIN, tmp_path / "buffers", *options, "--save", tmp_path / "made" / "net", "--json", "-")
    row = json.loads(done.stdout)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["net", "net.csv"]
    assert done.stderr.count("saved ") == done.stderr.count("epoch 1 ") == 1
    one, two = (torch.load(tmp_path / f"buffers.{rank}", weights_only=True) for rank in range(2))
    saved = load_checkpoint(tmp_path / "made" / "net")
    assert saved.accuracy == row["accuracy"] and any("running_var" in name for name in one)
    for name, value in one.items():
        assert torch.equal(value, two[name]) and torch.equal(value, saved.state_dict[name]), name


@pytest.mark.parametrize("options", [["--evaluate"], ["--summary"]])
def test_torchrun_is_for_training(cli, monkeypatch, options):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    done = cli(*options)
    assert (done.code, done.out) == (2, "") and done.err == "main.py: torchrun is for training: run this without it\n"


@pytest.fixture
def fashion(monkeypatch):
    """FashionMNIST of a few made-up images."""
    monkeypatch.setattr("data.load", lambda name, split, root: images(name, 120 if split == "train" else 40))


def test_training_and_fine_tuning_on_the_command_line(cli, fashion, tmp_path):
    trained = tmp_path / "trained.pth.tar"
    done = cli("--epochs", 2, "--schedule", 1, "--gammas", 0.1, "--save", trained, "--json", "-")
    assert done.row["params"] == 266_610
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trained.pth.tar", "trained.pth.tar.csv"]
    tuned = tmp_path / "tuned.pth.tar"
    options = ["--epochs", 1, "--schedule", 1, "--gammas", 1, "--save", tuned]
    done = cli("--pretrained", trained, "--model-type", "merge", "--retrain", "--pruning-ratio", 0.8, *options)
    assert done.code == 0, done.err
    row = cli("--pretrained", tuned, "--evaluate", "--json", "-").row
    assert (row["params"], row["widths"]) == (48_530, [60, 20])
    again = tmp_path / "again.pth.tar"
    done = cli("--pretrained", tuned, "--retrain", "--epochs", 1, "--schedule", 1, "--gammas", 1, "--save", again)
    assert done.code == 0, done.err  # a pruned file fine-tuned keeps its widths
    assert cli("--pretrained", again, "--evaluate", "--json", "-").row["widths"] == [60, 20]


def test_a_state_belongs_to_one_experiment(cli, fashion, tmp_path, pretrained, monkeypatch):
    options = [
        "--pretrained",
        pretrained,
        "--retrain",
        "--epochs",
        2,
        "--schedule",
        1,
        "--gammas",
        1,
        "--save",
        tmp_path / "x",
    ]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert cli("--model-type", "prune", *options).code == 130
    done = cli("--model-type", "merge", *options, "--resume")
    assert done.refused
    assert "another experiment" in done.err
    assert cli("--model-type", "prune", *options, "--resume").code == 0


def test_what_was_trained_twice_says_both_commands_and_shows_no_small_images(cli, fashion, tmp_path, monkeypatch):
    from experiments.manifest import _as_shipped
    from experiments.options import parser, recipe

    made = tmp_path / "made.pth.tar"
    for options in ((), ("--retrain", "--pretrained", made)):
        command = ["--recipe", "fast", "--epochs", 1, *options, "--save", made]
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, command)])
        assert cli(*command).code == 0
    about = load_checkpoint(made).about
    first, second = about["command"].split(" && ")
    assert first == f"python main.py --recipe fast --epochs 1 --save {made}"
    assert second == f"python main.py --recipe fast --epochs 1 --retrain --pretrained {made} --save {made}"
    assert about["epochs"] == 2
    assert _as_shipped(f"{first} --data /tmp/x --resume", "y") == first.replace(str(made), "pretrained/y")
    others = torch.load(made, weights_only=True) | {"epochs": "thirty"}  # a file of others' may say anything
    torch.save(others, made)
    assert cli("--retrain", "--recipe", "fast", "--epochs", 1, "--pretrained", made, "--save", made).code == 0
    assert load_checkpoint(made).about["epochs"] == 1
    line = ["--arch", "VGG", "--recipe", "fast"]
    assert recipe(parser().parse_args(line)).sizes
    assert not recipe(parser().parse_args([*line, "--retrain"])).sizes


def test_a_file_holds_half_precision_where_it_keeps_the_weights(monkeypatch, tmp_path):
    """Where one would overflow or vanish, the tensor stays float32."""
    from neuron_merging import checkpoint

    monkeypatch.setattr(checkpoint, "HALF_ABOVE", 0)
    model = Tiny()
    with torch.no_grad():
        model.fc.weight[0, 0], model.conv.weight[0, 0, 0, 0] = 1e6, 0.123456789
    stored = checkpoint.stored(model)
    assert stored["fc.weight"].dtype == stored["bn.running_var"].dtype == torch.float32
    assert stored["conv.weight"].dtype == torch.float16
    checkpoint.save_checkpoint(tmp_path / "x", model)
    model.load_state_dict(stored)
    again = checkpoint.load_weights(Tiny(), checkpoint.load_checkpoint(tmp_path / "x"))
    assert same(model, again)


def test_a_second_signal_does_not_wait_for_the_step():
    with train._StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


ONE_EPOCH = ("--epochs", 1, "--schedule", 1, "--gammas", 1)


@pytest.mark.parametrize("options", [("--evaluate",), ONE_EPOCH], ids=["evaluated", "trained"])
def test_a_row_is_of_the_network_as_the_file_holds_it(cli, fashion, tmp_path, monkeypatch, options):
    """Here storing it costs it its last layer: all that is left to say is class 0."""
    from neuron_merging import checkpoint

    def without_the_last(model, *args, stored=checkpoint.stored):
        return {name: torch.zeros_like(w) if name.startswith("ip3") else w for name, w in stored(model, *args).items()}

    for place in ("main.stored", "neuron_merging.checkpoint.stored"):
        monkeypatch.setattr(place, without_the_last)
    row = cli(*options, "--save", tmp_path / "x", "--json", "-").row
    assert row["correct"] == int((images("FashionMNIST", 40).labels == 0).sum())
    again = cli("--pretrained", tmp_path / "x", "--evaluate", "--json", "-").row
    assert again["correct"] == row["correct"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_on_the_command_line(cli, fashion, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, number)
        done = cli("--save", tmp_path / "x")
    assert done.code == 130
    assert done.err == f"main.py: stopped in epoch 1 of 60; go on with --resume ({tmp_path / 'x.state'})\n"
    short = ["--epochs", 1, "--schedule", 1, "--gammas", 1]
    assert "another recipe" in cli("--save", tmp_path / "x", "--resume", *short).err
    assert main.main(["--save", str(tmp_path / "y"), "--resume", *map(str, short)]) == 2
    state = (tmp_path / "x.state").read_bytes()
    done = cli("--save", tmp_path / "x", *short)  # the same without --resume would lose what was trained
    assert done.refused and "go on with --resume, or delete it" in done.err
    assert (tmp_path / "x.state").read_bytes() == state


def test_a_default_name_that_is_taken_is_not_overwritten(cli, fashion, tmp_path, monkeypatch):
    monkeypatch.setattr(main, "HERE", tmp_path)
    options = ["--epochs", 1, "--schedule", 1, "--gammas", 1]
    assert cli(*options).code == 0
    (made,) = (tmp_path / "saves").glob("*.tar")
    before = made.read_bytes()
    done = cli(*options)
    assert done.code == 2 and "is there already: give --save" in done.err and made.read_bytes() == before


def test_the_fast_recipe_shows_small_images_first():
    recipe = settings.recipe("ResNet", "fast")
    assert [train.image_share(recipe, p) for p in (0, 0.39, 0.4, 0.69, 0.7, 1)] == [0.5, 0.5, 0.75, 0.75, 1, 1]
    assert train.image_share(settings.recipe("LeNet_300_100", "fast"), 0) == 1
    assert train.image_share(settings.recipe("ResNet"), 0) == 1
    x, _, _ = next(train.batches(images("cifar10"), 16, seed=1, share=0.75))
    assert x.shape == (16, 3, 24, 24)


@pytest.mark.parametrize(("arch", "depth_wide"), [("ResNet", (8,)), ("WideResNet", (10, 1)), ("VGG", (11,))])
def test_convolutional_networks_take_small_images(arch, depth_wide):
    for side in (16, 24, 32):
        assert build(arch, depth_wide)(torch.randn(2, 3, side, side)).shape == (2, 10)
