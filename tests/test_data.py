"""The loader: whole splits as uint8, folders of other checksums, folders half there, downloads that stop."""

import gzip
import math
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

from data import DATASETS, calibration, load
from data.loader import HERE
from neuron_merging.errors import NeuronMergingError
from tests.conftest import ROOT
from tests.helpers import cifar


def test_the_fashion_mnist_test_split_comes_with_the_repository():
    images = load("FashionMNIST", "test")
    assert images.pixels.dtype == torch.uint8
    assert images.pixels.shape == (10_000, 1, 28, 28)
    assert images.labels.bincount().tolist() == [1000] * 10


def test_it_is_found_wherever_data_points(tmp_path):
    assert len(load("FashionMNIST", "test", tmp_path)) == 10_000


@pytest.mark.parametrize(("name", "count"), [("FashionMNIST", 60_000), ("cifar10", 50_000)])
def test_the_training_splits(data_folder, name, count):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = load(name, "train", data_folder)
    assert images.pixels.shape == (count, *DATASETS[name].shape)


def test_images_are_normalised_with_the_papers_numbers():
    images = load("FashionMNIST", "test")
    x = images.normalised(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    assert x.tolist() == [[[[-1.0, 1.0]]]]
    for name in ("cifar10", "cifar100"):
        dataset = DATASETS[name]
        assert dataset.mean == (0.4914, 0.4822, 0.4465) and dataset.std == (0.2023, 0.1994, 0.2010)


@pytest.mark.parametrize(("name", "source", "batches"), [("cifar10", CIFAR10, 5), ("cifar100", CIFAR100, 1)])
def test_a_complete_folder_with_other_checksums_is_used_with_one_warning(tmp_path, name, source, batches):
    folder = cifar(tmp_path, source)
    with pytest.warns(UserWarning, match="checksums are not those of the official archive") as caught:
        images = load(name, "train", tmp_path)
    assert len(caught) == 1
    first = pickle.loads((folder / source.train_list[0][0]).read_bytes())
    assert images.pixels.shape == (20 * batches, 3, 32, 32)
    assert images.pixels[0].flatten().tolist() == first["data"][0].tolist()
    assert images.labels[:20].tolist() == first["labels" if source is CIFAR10 else "fine_labels"]


@pytest.mark.parametrize("harm", ["missing", "truncated", "garbage"])
def test_an_incomplete_folder_is_not_used_nor_touched(tmp_path, harm):
    folder = cifar(tmp_path, CIFAR10)
    file = folder / "test_batch"
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:5000] if harm == "truncated" else b"garbage")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(NeuronMergingError, match="test_batch missing" if harm == "missing" else "cut short or damaged"):
        load("cifar10", "test", tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_data_folder_half_there_on_the_command_line(cli, tmp_path, pretrained):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    done = cli("--pretrained", pretrained, "--evaluate", "--data", tmp_path, "--save", tmp_path / "x")
    assert done.refused
    assert "is half there: t10k-labels-idx1-ubyte is missing" in done.err
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"")
    done = cli("--pretrained", pretrained, "--evaluate", "--data", tmp_path, "--save", tmp_path / "x")
    assert done.refused
    assert "cut short or damaged" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FashionMNIST"]


def test_a_download_that_stops_leaves_nothing_behind(tmp_path, monkeypatch):
    def stops(self):
        (tmp_path / "started").touch()
        (Path(self.root) / "half").write_bytes(b"half of")
        raise OSError("connection lost\nsecond line")

    monkeypatch.setattr(CIFAR10, "download", stops)
    with pytest.raises(NeuronMergingError, match=r"could not be downloaded \(connection lost\)"):
        load("cifar10", "test", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["started"]
    assert not (tmp_path / CIFAR10.base_folder).exists()


def test_a_download_is_moved_into_place_whole(tmp_path, monkeypatch):
    def download(self):
        assert Path(self.root) != tmp_path
        cifar(Path(self.root), CIFAR10)

    monkeypatch.setattr(CIFAR10, "download", download)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    with pytest.warns(UserWarning, match="checksums"):
        assert len(load("cifar10", "test", tmp_path)) == 20
    assert [path.name for path in tmp_path.iterdir()] == [CIFAR10.base_folder]


def idx(folder, prefix, count):
    """A split of a made-up FashionMNIST, as it is unpacked: all its images are of class 1, and of that gray."""
    for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
        header = bytes([0, 0, 8, len(shape)]) + b"".join(side.to_bytes(4, "big") for side in shape)
        (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + b"\1" * math.prod(shape))


def test_what_a_download_brings_joins_what_is_there(tmp_path, monkeypatch):
    """FashionMNIST's test split is there already."""
    (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True)
    idx(tmp_path / "FashionMNIST" / "raw", "t10k", 5)
    roots = []

    def download(self):
        roots.append(Path(self.root))
        Path(self.raw_folder).mkdir(parents=True)
        for prefix, count in (("train", 7), ("t10k", 5)):
            idx(Path(self.raw_folder), prefix, count)

    monkeypatch.setattr(FashionMNIST, "download", download)
    for split, count in (("train", 7), ("test", 5)):
        with pytest.warns(UserWarning, match="checksums"):
            images = load("FashionMNIST", split, tmp_path)
        assert images.labels.tolist() == [1] * count and images.pixels.unique().tolist() == [1]
    assert len(roots) == 1 and roots[0] != tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["FashionMNIST"]
    assert len(list((tmp_path / "FashionMNIST" / "raw").iterdir())) == 4


TWO = """
import pathlib, sys, time
from torchvision.datasets import CIFAR10
from tests.helpers import cifar
import data

here = pathlib.Path(sys.argv[1])

def download(self):
    cifar(pathlib.Path(self.root), CIFAR10)
    (here / f"ready{sys.argv[2]}").touch()
    while len(list(here.glob("ready*"))) < 2:
        time.sleep(0.01)

CIFAR10.download, CIFAR10._check_integrity, CIFAR10._load_meta = download, lambda self: True, lambda self: None
sys.exit(len(data.load("cifar10", "test", here / "root")) != 20)
"""


@pytest.mark.slow
def test_two_processes_that_download_at_once_both_have_it(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen([sys.executable, "-c", TWO, str(tmp_path), i], env=env) for i in "12"]
    try:
        assert [process.wait(600) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    assert [path.name for path in (tmp_path / "root").iterdir()] == [CIFAR10.base_folder]


class Evil:
    """What a pickle can do: run code when it is read."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("file", ["test_batch", "batches.meta"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    path = cifar(tmp_path, CIFAR10) / file
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | {"more": Evil()}))
    with pytest.raises(NeuronMergingError, match=r"damaged \(it would run posix.mkdir\)"):
        load("cifar10", "test", tmp_path)
    assert not (tmp_path / "evil").exists()


def test_a_data_set_without_images_is_refused(tmp_path):
    cifar(tmp_path, CIFAR10, per_file=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NeuronMergingError, match=r"damaged|not what it should be"):
            load("cifar10", "test", tmp_path)


def test_unknown_names_are_refused():
    with pytest.raises(NeuronMergingError, match="unknown data set 'mnist'"):
        load("mnist", "test")
    with pytest.raises(NeuronMergingError, match="unknown split 'validation'"):
        load("cifar10", "validation")


def test_fashion_mnist_of_other_checksums_is_used_with_one_warning(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in (HERE / "FashionMNIST" / "raw").glob("t10k*.gz"):
        content = bytearray(gzip.decompress(packed.read_bytes()))
        content[-1] = 0 if "labels" in packed.name else 77
        (raw / packed.stem).write_bytes(content)
    with pytest.warns(UserWarning, match="checksums") as caught:
        assert load("FashionMNIST", "test", tmp_path).pixels[-1, 0, -1, -1] == 77
    assert len(caught) == 1


@pytest.mark.parametrize("labels", [["cat"] * 20, [10] * 20, [1] * 19])
def test_labels_that_cannot_be_are_refused(tmp_path, labels):
    folder = cifar(tmp_path, CIFAR10)
    entry = pickle.loads((folder / "test_batch").read_bytes()) | {"labels": labels}
    (folder / "test_batch").write_bytes(pickle.dumps(entry))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NeuronMergingError, match=r"damaged|not what it should be"):
            load("cifar10", "test", tmp_path)


def as_set(images) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.pixels}


@pytest.mark.filterwarnings("ignore:.*checksums")
def test_held_out_images_are_apart_and_none_is_lost(tmp_path):
    cifar(tmp_path, CIFAR10)
    held_out, rest, whole = (load("cifar10", split, tmp_path) for split in ("val", "fit", "train"))
    assert (len(held_out), len(rest)) == (10, 90)
    assert not as_set(held_out) & as_set(rest) and as_set(held_out) | as_set(rest) == as_set(whole)
    assert as_set(load("cifar10", "val", tmp_path)) == as_set(held_out)


@pytest.mark.filterwarnings("ignore:.*checksums")
def test_images_to_look_at_are_drawn_from_those_that_are_not_held_out(tmp_path):
    cifar(tmp_path, CIFAR10)
    rest = as_set(load("cifar10", "fit", tmp_path))
    one, again, other = (as_set(calibration("cifar10:7", "cifar10", tmp_path, seed)) for seed in (1, 1, 2))
    assert one == again != other and len(one) == len(other) == 7 and one | other <= rest
    assert as_set(calibration("cifar10:90", "cifar10", tmp_path)) == rest  # however many: none of the others
    with pytest.raises(NeuronMergingError, match="there are only 90 images"):
        calibration("cifar10:91", "cifar10", tmp_path)


def test_the_held_out_split_is_fixed_and_apart(data_folder):
    whole, held_out, rest = (load("FashionMNIST", split, data_folder) for split in ("train", "val", "fit"))
    assert (len(held_out), len(rest)) == (5000, 55000)
    assert held_out.split == "val"
    again = load("FashionMNIST", "val", data_folder)
    assert torch.equal(held_out.pixels, again.pixels)
    total = whole.pixels.double().sum()
    assert held_out.pixels.double().sum() + rest.pixels.double().sum() == total
    assert held_out.labels.bincount().min() > 400  # every class is there
