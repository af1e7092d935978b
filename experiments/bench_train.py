"""Measures images per second of the trainer and of the usual loop (DataLoader, transforms, float32): BENCH_TRAIN.md."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

from data import DATASETS, Images
from experiments import command, settings
from experiments.rows import RESULTS
from experiments.tables import markdown
from experiments.training import arithmetic, autocast_dtype, batches, sgd
from experiments.winograd import Winograd
from models import build
from neuron_merging import memory
from neuron_merging.commandline import Parser, choose_device, versions
from neuron_merging.errors import NeuronMergingError
from neuron_merging.files import write_text

TRAINED = ("VGG", "ResNet", "WideResNet")  # on images of CIFAR's shape


class Transformed(TensorDataset):
    """Sends images one by one through torchvision's transforms, as the paper's code does."""

    def __init__(self, images: Images, augment: bool) -> None:
        super().__init__(images.pixels, images.labels)
        steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if augment else []
        steps += [transforms.ToTensor(), transforms.Normalize(images.dataset.mean, images.dataset.std)]
        self.transform = transforms.Compose([transforms.ToPILImage(), *steps])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image [C, H, W] and its label."""
        pixels, label = super().__getitem__(index)
        return self.transform(pixels), label


def usual(
    images: Images, batch_size: int, device: torch.device, augment: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a DataLoader, moved to the device one by one. With `augment` as in training, else all images in order."""
    for x, labels in DataLoader(
        Transformed(images, augment), batch_size, shuffle=augment, num_workers=2, drop_last=augment
    ):
        yield x.to(device), labels.to(device)


def ours(images: Images, batch_size: int, device: torch.device, share: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
    """The trainer's batches, cropped on the device; the images' sides are shrunk to `share`."""
    for x, labels, _ in batches(images.to(device), batch_size, seed=1, share=share):
        yield x, labels


def whole_cycle(sizes: settings.Sizes, rate: Callable[[float], float]) -> float:
    """Images per second over a whole training. rate: gives those for one `share` of the images' sides."""
    ends = [start for start, _ in sizes[1:]] + [1.0]
    return 1 / sum((end - start) / rate(share) for (start, share), end in zip(sizes, ends))


def images_per_second(
    arch: str, feed: Callable, images: Images, batch_size: int, device: torch.device, fast: bool, compiled: bool = False
) -> float:
    """Images per second of training on `images`, without the first two batches. fast: as the trainer does it."""
    torch.manual_seed(0)
    model = build(arch, settings.NETWORKS[arch].depth_wide).to(device).train()
    if fast:
        model.to(memory_format=torch.channels_last)
    forward = torch.compile(model, dynamic=False) if compiled else model
    if fast:
        optimizer = sgd(model, replace(settings.recipe(arch), lr=0.01))
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    computing = arithmetic(device, winograd=True) if fast else nullcontext()
    count, start = 0, time.perf_counter()
    for number, (x, labels) in enumerate(feed(images, batch_size, device)):
        with computing:
            loss = F.cross_entropy(forward(x).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        count += len(labels)
        if number == 1:
            loss.item()  # waits for the device
            count, start = 0, time.perf_counter()
    loss.item()
    return count / (time.perf_counter() - start)


def document(report: dict[str, Any]) -> str:
    """The text of BENCH_TRAIN.md from the content of bench_train.json."""
    lines = []
    for rates in report["rates"]:
        usual, *others = (rates[name] for name in ("usual", "trainer", "compiled", "cycle"))
        lines.append([rates["network"], *(f"{rate:,.0f}" for rate in (usual, *others))])
        lines[-1] += [f"{rate / usual:.2f} ×" for rate in others]
    header = ["network", "usual loop, images/s", "trainer", "--compile", "fast recipe"]
    table = markdown([*header, *(f"{name}, ratio" for name in header[2:])], lines)
    precision = report["dtype"] or "float32 (no bfloat16 here)"
    winograd = ", wide 3 × 3 convolutions by Winograd's algorithm\n  (experiments/winograd.py),"
    convolutions = winograd if report["winograd"] else ""
    return (
        "# Training speed\n\nMade by `make bench-train`: {batches} batches of {batch_size} on {device}, {threads} threads,"
        " PyTorch {torch}.\n\n- *Usual loop*: a DataLoader with two workers, in float32.\n"
        "- The trainer computes in {precision}{convolutions} and keeps the memory that it frees (neuron_merging/memory.py).\n"
        "- *Trainer* and *--compile* see images at full size, as the published recipe does.\n"
        "- *Fast recipe* is the rate over a whole training, which shows smaller images first (not compiled).\n\n{table}\n"
    ).format(**report, precision=precision, convolutions=convolutions, table=table)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Time both loops on made-up images of CIFAR's shape and write the table."""
    parser = Parser(prog="python -m experiments.bench_train", description=main.__doc__)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(TRAINED)} [the first two]")
    parser.add_argument("--batches", type=int, default=32, help="batches to time, after two to warm up [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    networks = args.networks or TRAINED[:2]
    if not set(networks) <= set(TRAINED):
        raise NeuronMergingError(f"networks {' '.join(networks)}: choose of {', '.join(TRAINED)}")
    if args.batches < 1 or args.batch_size < 2:
        raise NeuronMergingError("--batches has to be at least 1, --batch-size at least 2")
    device, size = choose_device(args.device), args.batch_size
    count = size * (args.batches + 2)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    images = Images(pixels, torch.randint(0, 10, (count,)), DATASETS["cifar10"])
    plain = {arch: images_per_second(arch, usual, images, size, device, fast=False) for arch in networks}
    memory.keep_freed()  # as main.py does, and the usual loop does not
    rates = []
    for arch in networks:

        @cache
        def at(share: float, arch: str = arch) -> float:
            return images_per_second(arch, partial(ours, share=share), images, size, device, fast=True)

        fast, cycle = at(1.0), whole_cycle(settings.recipe(arch, "fast").sizes, at)
        compiled = images_per_second(arch, ours, images, size, device, fast=True, compiled=True)
        rates.append({"network": arch, "usual": plain[arch], "trainer": fast, "compiled": compiled, "cycle": cycle})
    dtype = autocast_dtype(device)
    report = {
        "batches": args.batches, "batch_size": size, "device": str(device), "threads": torch.get_num_threads(),
        "torch": versions()["torch"], "dtype": None if dtype is None else str(dtype),
        "winograd": isinstance(arithmetic(device, winograd=True), Winograd), "rates": rates,
    }  # fmt: skip
    text = document(report)
    write_text(RESULTS / "bench_train.json", json.dumps(report, indent=1) + "\n")
    write_text(RESULTS / "BENCH_TRAIN.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
