"""Faults: a training run that is killed, a disk that is full, files that are cut or flipped, processes that write at once."""

import os
import random
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from models import build
from neuron_merging.checkpoint import load_checkpoint, load_weights, save_checkpoint
from neuron_merging.errors import NeuronMergingError
from neuron_merging.files import remove_partials
from tests.conftest import ROOT
from tests.helpers import same

TRAIN = """
import io, os, signal, sys, torch, data, main
from experiments import training as train
from tests.helpers import images

def killed_at(call, function, before):
    def counted(*args, **options):
        nonlocal call
        call -= 1
        if call == 0:
            before(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return counted

def write_half(content, file, save=torch.save):
    whole = io.BytesIO()
    save(content, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()

data.load = lambda name, split, root: images(name, 600 if split == "train" else 40)
train.SAVE_SECONDS = 0  # the state is written after every step
torch.save = killed_at(int(sys.argv[1]), torch.save, write_half)
train.F.cross_entropy = killed_at(int(sys.argv[2]), train.F.cross_entropy, lambda *_: None)
sys.exit(main.main(["--epochs", "4", "--schedule", "1", "--gammas", "0.1", "--save", *sys.argv[3:]]))
"""


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_goes_on():
    """A test that fails leaves no process behind."""
    yield
    while STARTED:
        STARTED.pop().kill()


def training(*arguments, limit=None, write=0, step=0):
    """A process that trains. limit: bytes that a file can have. write, step: in which it is killed, the write half done."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [sys.executable, "-c", TRAIN, *map(str, (write, step, *arguments))],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
    )  # fmt: skip
    STARTED.append(run)
    return run


@pytest.mark.slow
def test_a_run_killed_between_and_inside_writes_goes_on_to_the_same_network(tmp_path):
    def train(name, *arguments, code=0, **killed):
        run = training(tmp_path / name, *arguments, **killed)
        assert run.wait(600) == code, run.stdout.read()
        return len(list(tmp_path.glob(f".{name}.state.*.partial")))

    assert train("whole") == 0
    assert train("killed", code=-signal.SIGKILL, write=9) == 1  # in the second of four epochs, as the next one
    assert train("killed", "--resume", code=-signal.SIGKILL, step=2) == 0  # which has removed what the first one left
    assert train("killed", "--resume") == 0
    assert not list(tmp_path.glob(".*"))
    networks = [load_weights(build("LeNet_300_100"), load_checkpoint(tmp_path / name)) for name in ("whole", "killed")]
    assert same(*networks)


def test_a_write_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.state"
    path.write_bytes(b"old")
    code = """
import os, pathlib, signal, sys
from neuron_merging.files import write_atomically
def write(file):
    file.write(b"new" * 100_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
write_atomically(pathlib.Path(sys.argv[1]), write)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".net.state.csv.x.partial").touch()  # somebody else's
    remove_partials(path)
    assert {p.name for p in tmp_path.iterdir()} == {"net.state", ".net.state.csv.x.partial"}


def test_a_disk_that_fills_up_while_training_is_one_line(tmp_path):
    run = training(tmp_path / "net", limit=50_000)
    said = run.communicate(timeout=600)[0].decode().splitlines()
    assert run.returncode == 2 and said[-1].startswith(
        f"main.py: cannot write {tmp_path / 'net.state'}: File too large"
    )
    assert not any("Traceback" in line for line in said) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".pth.tar", ".safetensors"])
def test_a_checkpoint_cut_anywhere_is_refused(tmp_path, ending):
    path = tmp_path / f"net{ending}"
    save_checkpoint(path, build("ResNet", (8,)), acc=90.0)
    content = path.read_bytes()
    for i in range(200):
        path.write_bytes(content[: len(content) * i // 200])
        with pytest.raises(NeuronMergingError, match="is not a checkpoint that can be read"):
            load_checkpoint(path)


@pytest.mark.parametrize("ending", [".pth.tar", ".safetensors"])
def test_flipped_bytes_are_refused_or_harmless(tmp_path, ending):
    """What cannot be read is said; what can be read has every weight in place and finite, or is said not to fit."""
    path, rng = tmp_path / f"net{ending}", random.Random(1)
    torch.manual_seed(0)
    save_checkpoint(path, build("ResNet", (8,)), acc=90.0)
    sound, refused = path.read_bytes(), 0
    header = 2000 if ending == ".safetensors" else len(sound)  # what comes behind it are numbers, and any will do
    for i in range(200):
        content = bytearray(sound)
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(header if i % 2 else len(sound))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            model = load_weights(build("ResNet", (8,)), load_checkpoint(path))
            assert all(torch.isfinite(w).all() for w in model.state_dict().values())
        except NeuronMergingError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused


@pytest.mark.parametrize("ending", [".pth.tar", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_files_in_any_precision_are_read(tmp_path, dtype, ending):
    torch.manual_seed(0)
    model, path = build("ResNet", (8,)), tmp_path / f"net{ending}"
    weights = {name: w.to(dtype).contiguous() if w.is_floating_point() else w for name, w in model.state_dict().items()}
    if ending == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights}, path)
    again = load_weights(build("ResNet", (8,)), load_checkpoint(path)).state_dict()
    assert all(w.dtype in (torch.float32, torch.int64) for w in again.values())
    assert all(torch.equal(w, weights[name].to(w)) for name, w in again.items())


NETWORK = ("--model", "models.resnet:ResNet", "--model-args", '{"depth": 8}', "--input-size", "3,32,32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*NETWORK, "--model-type", "prune", "--save"), "cannot write {target}: File too large"),
        ((*NETWORK, "--model-type", "prune", "--export"), "cannot write {target}: File too large"),
        (("--arch", "LeNet_300_100", "--evaluate", "--json"), "cannot write to "),
    ],
    ids=["saving", "exporting", "reading data through a temporary file"],
)
def test_a_full_disk_keeps_the_old_file(tmp_path, options, message):
    """A limit on the size of files stands for the disk."""
    target = tmp_path / "small.pt"
    target.write_bytes(b"what was there")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [sys.executable, "main.py", *options, str(target)]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert message.format(target=target) in lines[0]
    assert target.read_bytes() == b"what was there" and [p.name for p in tmp_path.iterdir()] == ["small.pt"]
