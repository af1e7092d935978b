"""One loader for all data sets: gives a whole split as uint8 tensors. torchvision reads it, and downloads it if it is missing.

A folder is used if it has all files; if their checksums are wrong, there is a warning. An incomplete folder is never used.
torchvision is imported only to read, since the import takes seconds; a wrong command line fails before that.
"""

import contextlib
import gzip
import hashlib
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_merging.errors import NeuronMergingError, reason
from neuron_merging.images import counted, drawn, pictures

T = TypeVar("T")
HERE = Path(__file__).resolve().parent
SPLITS = ("train", "test", "val", "fit")
HELD_OUT = 5000  # images of the training split that form `val`; the others form `fit`
FASHION_MNIST_MD5 = {  # of the unpacked images and labels
    "train": ("f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9"),
    "test": ("8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965"),
}


@dataclass(frozen=True)
class Dataset:
    """What the networks need to know about a data set. Pixels are scaled to [0, 1], then normalised with `mean` and `std`."""

    shape: tuple[int, int, int]  # channels, height, width
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool  # training crops (padding 4) and flips


# Measured on CIFAR-10; the paper uses them for both data sets.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
DATASETS = {
    "FashionMNIST": Dataset((1, 28, 28), 10, (0.5,), (0.5,), augment=False),
    "cifar10": Dataset((3, 32, 32), 10, CIFAR_MEAN, CIFAR_STD, augment=True),
    "cifar100": Dataset((3, 32, 32), 100, CIFAR_MEAN, CIFAR_STD, augment=True),
}


@dataclass(frozen=True)
class Images:
    """A split in memory. pixels: uint8 [N, C, H, W] in 0…255; labels: int64 [N]."""

    pixels: Tensor
    labels: Tensor
    dataset: Dataset
    split: str = "test"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice | Tensor) -> "Images":
        """Some of the images."""
        return replace(self, pixels=self.pixels[part], labels=self.labels[part])

    def to(self, device: torch.device | str) -> "Images":
        """The same images on `device`."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def normalised(self, batch: Tensor, share: float = 1.0) -> Tensor:
        """uint8 pixels [B, C, H, W] → float32 network input on the batch's device, with its sides shrunk to `share`."""
        mean = torch.tensor(self.dataset.mean, device=batch.device).view(-1, 1, 1)
        std = torch.tensor(self.dataset.std, device=batch.device).view(-1, 1, 1)
        batch = (batch.float() / 255 - mean) / std
        if share == 1:
            return batch
        side = [round(n * share) for n in batch.shape[2:]]
        return F.interpolate(batch, side, mode="bilinear", antialias=True)


def load(name: str, split: str, root: str | Path = HERE) -> Images:
    """The `split` of the data set `name`. It is read from `root`, in torchvision's layout, or downloaded into it.

    "train" and "test" are the official splits. "val" is a fixed choice of 5,000 training images, for choosing settings without
    the test set. "fit" is all other training images.

    Raises NeuronMergingError for an unknown name, an incomplete folder, or a download that fails.
    """
    if name not in DATASETS:
        raise NeuronMergingError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise NeuronMergingError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    read = _fashion_mnist if name == "FashionMNIST" else _cifar
    pixels, labels = read(name, "test" if split == "test" else "train", Path(root))
    dataset = DATASETS[name]
    sound = len(pixels) > 0 and pixels.shape[1:] == dataset.shape and len(pixels) == len(labels)
    if not sound or labels.min() < 0 or labels.max() >= dataset.classes:
        raise NeuronMergingError(
            f"{name} in {root} is not what it should be: images {list(pixels.shape)}, {len(labels)} labels"
            f" that should be 0 to {dataset.classes - 1}; delete it to download it again"
        )
    images = Images(pixels, labels, dataset, split)
    if split in ("val", "fit"):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        held_out = min(HELD_OUT, len(labels) // 10)
        return images[(order[:held_out] if split == "val" else order[held_out:]).sort().values]
    return images


def calibration(text: str, dataset: str, root: str | Path = HERE, seed: int = 1) -> Images:
    """Real images for the methods that use some. text: "cifar10:512" for 512 images of "fit", or a folder ("DIR" or "DIR:N").

    The images of a folder are cut to the shape of `dataset`; their labels are unknown and set to 0. Raises NeuronMergingError
    if there are none.
    """
    source, number = counted(text)
    if source == dataset:
        images = load(dataset, "fit", root)
    elif source in DATASETS:
        raise NeuronMergingError(f"--calibrate {text}: the network was trained on {dataset}; use that, or a folder")
    else:
        pixels = pictures(text, _cut(DATASETS[dataset].shape), seed)
        return Images(pixels, torch.zeros(len(pixels), dtype=torch.int64), DATASETS[dataset], "calibrate")
    return images[drawn(text, len(images), number, seed)]


def _cut(shape: tuple[int, int, int]) -> Callable[[Any], Tensor]:
    """A function from a PIL image to uint8 pixels of this shape."""
    from torchvision import transforms

    channels, height, width = shape
    gray = [transforms.Grayscale()] if channels == 1 else []
    size = [transforms.Resize(min(height, width)), transforms.CenterCrop((height, width))]
    return transforms.Compose([*size, *gray, transforms.PILToTensor()])


def _fashion_mnist(name: str, split: str, root: Path) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.mnist import read_image_file, read_label_file

    prefix = "train" if split == "train" else "t10k"
    names = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    for raw in (root / name / "raw", HERE / name / "raw"):  # the test split is part of the repository
        files = [next((f for f in (raw / n, raw / f"{n}.gz") if f.is_file()), None) for n in names]
        if all(files):
            (images, first), (labels, second) = _idx(files[0], read_image_file), _idx(files[1], read_label_file)
            if (first, second) != FASHION_MNIST_MD5[split]:
                _warn_of_checksums(raw)
            return images[:, None], labels
        if any(files):
            missing = names[files.index(None)]
            raise NeuronMergingError(
                f"{raw} is half there: {missing} is missing; delete the folder to download it again"
            )
    _download(FashionMNIST, root, f"{name}/raw")
    return _fashion_mnist(name, split, root)


def _idx(path: Path, read: Callable[..., Tensor]) -> tuple[Tensor, str]:
    """The tensor in an IDX file, gzipped or not, and the MD5 of the unpacked file. torchvision reads it, unpacked."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / path.stem
            _write_temporary(plain, content)
            return read(plain), hashlib.md5(content).hexdigest()
    except NeuronMergingError:
        raise
    except Exception as error:  # torchvision can raise nearly anything for a damaged file
        raise NeuronMergingError(f"{path} is cut short or damaged; delete it to download it again") from error


def _write_temporary(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise NeuronMergingError(
            f"cannot write to {tempfile.gettempdir()}: {error.strerror}; make room, or set TMPDIR to another folder"
        ) from error


def _cifar(name: str, split: str, root: Path) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import check_integrity

    source = CIFAR10 if name == "cifar10" else CIFAR100
    folder = root / source.base_folder
    if not folder.exists():
        _download(source, root, source.base_folder)
    files = [file for file, _ in source.train_list + source.test_list] + [source.meta["filename"]]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise NeuronMergingError(
            f"{folder} is half there: {', '.join(missing)} missing; complete it, or delete the folder to download it again"
        )
    of_split = source.train_list if split == "train" else source.test_list
    official = all(check_integrity(folder / file, md5) for file, md5 in of_split)
    try:
        _check_pickles(folder / file for file in (source.meta["filename"], *(f for f, _ in of_split if not official)))
        images = _without_checksums(source)(root, train=split == "train")
        pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(images.targets, dtype=torch.int64)
    except Exception as error:  # a damaged file can raise nearly anything out of the unpickler and torchvision
        raise NeuronMergingError(
            f"{folder} is cut short or damaged ({reason(error)}); delete the folder to download it again"
        ) from error
    if not official:
        _warn_of_checksums(folder)
    return pixels, labels


class _Plain(pickle.Unpickler):
    """Reads plain values and arrays, of which CIFAR's batches consist, and refuses to call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function that a pickle names. Raises UnpicklingError for all but NumPy's constructors."""
        if (module, name) == ("_codecs", "encode") or (
            module.partition(".")[0] == "numpy" and name in ("_reconstruct", "_frombuffer", "ndarray", "dtype")
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def _check_pickles(files: Iterable[Path]) -> None:
    """Raises UnpicklingError if reading the files, as torchvision does, could run code in them."""
    for file in files:
        with open(file, "rb") as content:
            _Plain(content, encoding="latin1").load()


def _warn_of_checksums(folder: Path) -> None:
    warnings.warn(f"{folder} is complete, but its checksums are not those of the official archive", stacklevel=4)


def _without_checksums(source: type) -> type:
    """torchvision's data set, without its check of checksums."""
    return type(
        source.__name__,
        (source,),
        {
            "train_list": [(file, None) for file, _ in source.train_list],
            "test_list": [(file, None) for file, _ in source.test_list],
            "meta": {**source.meta, "md5": None},
        },
    )


def _download(source: type, root: Path, folder: str) -> None:
    """Let torchvision download a data set into a temporary folder, then move it into place.

    If the folder exists already, files are moved one by one.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=root, prefix=".download-") as fresh,
            contextlib.redirect_stdout(sys.stderr),
        ):
            source(fresh, download=True)
            target = root / folder
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():  # some of FashionMNIST's files are there already
                for file in (Path(fresh) / folder).iterdir():
                    os.replace(file, target / file.name)
                return
            try:
                os.rename(Path(fresh) / folder, target)
            except OSError:
                if not target.is_dir():  # if it is there now, another process was faster
                    raise
    except (OSError, RuntimeError) as error:
        raise NeuronMergingError(
            f"{source.__name__} is not in {root} and could not be downloaded ({reason(error)});"
            " say where it is with --data or NEURON_MERGING_DATA"
        ) from error
