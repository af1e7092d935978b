"""Labelled inputs: of folders of images, whose names are the labels, or of a loader of one's own."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from neuron_merging.accuracy import CPU_BATCH
from neuron_merging.errors import NeuronMergingError, reason, reported_as
from neuron_merging.loading import called, torchvision_weights

T = TypeVar("T")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of its pixels


@dataclass(frozen=True)
class Labelled:
    """Labelled inputs to measure a network on.

    batches: gives them anew at every call, (inputs [B, …], labels [B]). number: of batches; classes: how many, `named` for
    people; None where that is not known. about: what a result row says of them.
    """

    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    number: int | None
    classes: int | None
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
    with reported_as(what, typed=True):
        images: ImageFolder = ImageFolder(folder, transform)
    loader = torch.utils.data.DataLoader(images, batch_size or CPU_BATCH, num_workers=min(8, os.cpu_count() or 1))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for x, labels in readable(loader, what, (file for file, _ in images.samples)):
            yield x.to(device), labels

    classes = len(images.classes)
    about = {"transforms": " ".join(str(transform).split())}
    return Labelled(batches, len(loader), classes, f"imagefolder:{folder} has {classes} folders", about)


def loader(spec: str, device: torch.device) -> Labelled:
    """What the callable that `spec` names gives: batches (inputs [B, …], labels [B]), as a DataLoader of one's own does.

    Raises NeuronMergingError where it is not there, or (while they are read) gives something else.
    """
    what = f"--evaluate-with {spec}"

    def given() -> Iterable[Any]:
        found = called("--evaluate-with", spec, "mine:test_loader")
        if not isinstance(found, Iterable):
            raise NeuronMergingError(f"{what} gives {type(found).__name__}: let it give batches (inputs, labels)")
        return found

    first = [given()]  # what is wrong with it is said before a network is made smaller

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        with reported_as(what, typed=True):
            for batch in first.pop() if first else given():  # which may be read only once
                yield _labelled_batch(what, batch, device)

    number = len(first[0]) if isinstance(first[0], Sized) else None
    return Labelled(batches, number, None, what, {"evaluate_with": spec})


def _labelled_batch(what: str, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    x, labels = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (None, None)
    if not isinstance(x, Tensor) or not isinstance(labels, Tensor):
        raise NeuronMergingError(
            f"{what} gives batches of type {type(batch).__name__}, not pairs of tensors (inputs, labels)"
        )
    if labels.shape != x.shape[:1] or labels.is_floating_point():
        raise NeuronMergingError(
            f"{what} gives labels of shape {list(labels.shape)} ({str(labels.dtype).removeprefix('torch.')}) for"
            f" {len(x)} inputs: one whole number is needed for each"
        )
    return x.to(device), labels


def transforms(
    spec: str, weights: str | None, shape: tuple[int, ...], scale: tuple[Sequence[float], Sequence[float]] | None = None
) -> Callable[[Any], Tensor]:
    """How an image becomes an input: as torchvision's `weights` say, or else its default weights of the model `spec`.

    Where there are none, or they are for inputs of another size: the shorter side to the input's, the centre, ImageNet's mean
    and standard deviation. scale: a mean and a standard deviation for every channel, instead of those.
    """
    from torchvision import transforms as T

    if len(shape) != 3:
        raise NeuronMergingError(f"images are channels, height, width: --input-size {','.join(map(str, shape))} is not")
    known = torchvision_weights(spec)
    entry = known.get(weights) or known.get("DEFAULT")
    theirs = entry and entry.transforms()
    if theirs and [*getattr(theirs, "crop_size", [])] * 2 == [*shape[1:]]:
        theirs.mean, theirs.std = map(list, scale or (theirs.mean, theirs.std))
        return theirs
    scale = scale or (IMAGENET if shape[0] == 3 else ((0.5,), (0.5,)))
    gray = [T.Grayscale()] if shape[0] == 1 else []
    return T.Compose(
        [T.Resize(min(shape[1:])), T.CenterCrop(tuple(shape[1:])), *gray, T.ToTensor(), T.Normalize(*scale)]
    )


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
                with reported_as(f"{what}: a file is no image that can be read: {file}"):
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
    with reported_as(what, typed=True):
        return torch.stack([*readable((transform(default_loader(file)) for file in chosen), what, chosen)])
