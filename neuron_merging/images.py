"""Labelled inputs to measure on: from folders of images, one folder for each class, or from the user's own loader."""

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

    batches: a function whose every call gives all batches (inputs [B, …], labels [B]) from the start. number: how many batches;
    classes: how many classes; both None if not known. named: what to call the data in messages. about: entries for the row.
    """

    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    number: int | None
    classes: int | None
    named: str
    about: dict[str, Any]


def image_folder(
    folder: str, transform: Callable[[Any], Tensor], device: torch.device, batch_size: int | None
) -> Labelled:
    """The images of `folder`, which has one folder for each class. In alphabetical order they are the network's outputs.

    Raises NeuronMergingError if there are none, or, while they are read, for a file that is no image.
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
    """The batches (inputs [B, …], labels [B]) of the user's own loader: of what the callable that `spec` names returns.

    Raises NeuronMergingError if there is no such callable, or, while the batches are read, if they are something else.
    """
    what = f"--evaluate-with {spec}"

    def user_loader() -> Iterable[Any]:
        loaded = called("--evaluate-with", spec, "mine:test_loader")
        if not isinstance(loaded, Iterable):
            raise NeuronMergingError(f"{what} gives {type(loaded).__name__}: let it give batches (inputs, labels)")
        return loaded

    first = [user_loader()]  # called now, so that its errors come before a network is made smaller

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        with reported_as(what, typed=True):
            for batch in first.pop() if first else user_loader():  # a loader may be readable only once
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
    """A function from an image to an input: that of torchvision's `weights`, or else of its default weights of model `spec`.

    If there are no such weights, or they are for another size: resize the shorter side, cut out the centre, normalise with the
    mean and standard deviation of ImageNet (other than 3 channels: 0.5 each).
    scale: a mean and a standard deviation for every channel, to normalise with instead.
    """
    from torchvision import transforms as T

    if len(shape) != 3:
        raise NeuronMergingError(f"images are channels, height, width: --input-size {','.join(map(str, shape))} is not")
    known = torchvision_weights(spec)
    entry = known.get(weights) or known.get("DEFAULT")
    preset = entry and entry.transforms()
    if preset and [*getattr(preset, "crop_size", [])] * 2 == [*shape[1:]]:
        preset.mean, preset.std = map(list, scale or (preset.mean, preset.std))
        return preset
    scale = scale or (IMAGENET if shape[0] == 3 else ((0.5,), (0.5,)))
    gray = [T.Grayscale()] if shape[0] == 1 else []
    return T.Compose(
        [T.Resize(min(shape[1:])), T.CenterCrop(tuple(shape[1:])), *gray, T.ToTensor(), T.Normalize(*scale)]
    )


def counted(text: str) -> tuple[str, int | None]:
    """SOURCE:N → the source and the number; SOURCE → the source and None. Raises NeuronMergingError if N is below 2."""
    source, _, number = text.rpartition(":")
    if not source or not number.isdigit():
        return text, None
    if int(number) < 2:
        raise NeuronMergingError(f"--calibrate {text}: at least 2 images are needed")
    return source, int(number)


def drawn(text: str, available: int, number: int | None, seed: int) -> Tensor:
    """Random indices of `number` (None: all) of the `available` images. Raises NeuronMergingError if there are too few."""
    if number is not None and number > available:
        raise NeuronMergingError(f"--calibrate {text}: there are only {available} images")
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed), device="cpu")[:number]


def _image_files(folder: Path) -> list[Path]:
    """All image files below `folder`; none if there is no such folder."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMG_EXTENSIONS) if folder.is_dir() else []


def readable(images: Iterable[T], what: str, files: Iterable[str | Path]) -> Iterator[T]:
    """Pass on `images`, which are read from `files`. If that fails, raises NeuronMergingError that names the bad file."""
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
    """The images of a folder, each as `transform` makes it of a PIL image: [N, …]. text: "DIR", or "DIR:N" for N random ones.

    Raises NeuronMergingError if there are fewer, or one cannot be read.
    """
    from torchvision.datasets.folder import default_loader

    source, number = counted(text)
    files, what = _image_files(Path(source)), f"--calibrate {text}"
    if len(files) < 2:
        raise NeuronMergingError(f"{what}: there is no folder {source} with two images or more")
    chosen = [files[i] for i in drawn(text, len(files), number, seed)]
    with reported_as(what, typed=True):
        return torch.stack([*readable((transform(default_loader(file)) for file in chosen), what, chosen)])
