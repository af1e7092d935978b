"""Folders of images: read, turned into network inputs, and labelled by the names of their folders."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from neuron_merging.accuracy import CPU_BATCH
from neuron_merging.errors import NeuronMergingError, reason, said
from neuron_merging.loading import torchvision_weights

if TYPE_CHECKING:
    pass

T = TypeVar("T")


@dataclass(frozen=True)
class Labelled:
    """Labelled inputs to measure a network on.

    batches: gives them anew at every call, (inputs [B, …], labels [B]). number: of batches. classes: how many, `named` for
    people. about: what a result row says of them.
    """

    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    number: int
    classes: int
    named: str
    about: dict[str, Any]


def image_folder(
    folder: str, transform: Callable[[Any], Tensor], device: torch.device, batch_size: int | None
) -> Labelled:
    """The images of `folder`, a folder for each class, which come in the order of the network's outputs.

    Raises NeuronMergingError where there are none, or (while they are read) one is no image.
    """
    from torchvision.datasets import ImageFolder

    what = f"--dataset imagefolder:{folder}"
    if not Path(folder).is_dir():
        raise NeuronMergingError(f"{what} is no folder")
    with said(what, typed=True):
        images: ImageFolder = ImageFolder(folder, transform)
    loader = torch.utils.data.DataLoader(images, batch_size or CPU_BATCH, num_workers=min(8, os.cpu_count() or 1))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for x, labels in readable(loader, what, (file for file, _ in images.samples)):
            yield x.to(device), labels

    classes = len(images.classes)
    about = {"transforms": " ".join(str(transform).split())}
    return Labelled(batches, len(loader), classes, f"imagefolder:{folder} has {classes} folders", about)


def transforms(spec: str, weights: str | None, shape: tuple[int, ...]) -> Callable[[Any], Tensor]:
    """How an image becomes an input: as torchvision's `weights` say, or else its default weights of the model `spec`.

    Where there are none, or they are for inputs of another size: the shorter side to the input's, the centre, ImageNet's mean
    and standard deviation.
    """
    from torchvision import transforms as T

    if len(shape) != 3:
        raise NeuronMergingError(f"images are channels, height, width: --input-size {','.join(map(str, shape))} is not")
    known = torchvision_weights(spec)
    entry = known.get(weights) or known.get("DEFAULT")
    theirs = entry and entry.transforms()
    if theirs and [*getattr(theirs, "crop_size", [])] * 2 == [*shape[1:]]:
        return theirs
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    gray = [T.Grayscale()] if shape[0] == 1 else []
    scale = T.Normalize(mean, std) if shape[0] == 3 else T.Normalize((0.5,), (0.5,))
    return T.Compose([T.Resize(min(shape[1:])), T.CenterCrop(tuple(shape[1:])), *gray, T.ToTensor(), scale])


def counted(text: str) -> tuple[str, int | None]:
    """SOURCE:N → the source and the number, None where there is none. Raises NeuronMergingError for less than two images."""
    source, _, number = text.rpartition(":")
    if not source or not number.isdigit():
        return text, None
    if int(number) < 2:
        raise NeuronMergingError(f"--calibrate {text}: at least 2 images are needed")
    return source, int(number)


def drawn(text: str, there: int, number: int | None, seed: int) -> Tensor:
    """Indices of `number` images (all, if None) of those that are there, by lot. Raises NeuronMergingError for too few."""
    if number is not None and number > there:
        raise NeuronMergingError(f"--calibrate {text}: there are only {there} images")
    return torch.randperm(there, generator=torch.Generator().manual_seed(seed))[:number]


def _image_files(folder: Path) -> list[Path]:
    """Every image file below `folder`, none where there is no folder."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMG_EXTENSIONS) if folder.is_dir() else []


def readable(images: Iterable[T], what: str, files: Iterable[str | Path]) -> Iterator[T]:
    """`images`, read from `files`; where that fails, a NeuronMergingError that names the first file that is no image."""
    from torchvision.datasets.folder import default_loader

    images = iter(images)
    while True:
        try:
            image = next(images)
        except StopIteration:
            return
        except Exception as error:  # PIL raises many things
            for file in files:
                with said(f"{what}: a file is no image that can be read: {file}"):
                    default_loader(str(file))
            raise NeuronMergingError(f"{what}: {type(error).__name__}: {reason(error)}") from error
        yield image


def pictures(text: str, transform: Callable[[Any], Tensor], seed: int) -> Tensor:
    """Images of a folder, "DIR" or, N of them by lot, "DIR:N", each as `transform` makes it of a PIL image: [N, …].

    Raises NeuronMergingError where there are fewer, or one cannot be read.
    """
    from torchvision.datasets.folder import default_loader

    source, number = counted(text)
    files, what = _image_files(Path(source)), f"--calibrate {text}"
    if len(files) < 2:
        raise NeuronMergingError(f"{what}: there is no folder {source} with two images or more")
    chosen = [files[i] for i in drawn(text, len(files), number, seed)]
    with said(what, typed=True):
        return torch.stack([*readable((transform(default_loader(file)) for file in chosen), what, chosen)])
