"""The trainer: runs the paper's recipe or a short one, in one process or many (torchrun). A resumed run gives the same result.

The whole data set is on the device as uint8; crops and flips are a single gather for each batch. The last epoch is saved,
not the one that is best on the *test* set, which the paper's published code kept. The curve's test accuracy is measured in the
precision of the training and, if a recipe shows smaller images first, at the epoch's image size.
"""

import contextlib
import csv
import gc
import io
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import Images
from experiments.evaluate import accuracy
from experiments.settings import Recipe
from experiments.winograd import Winograd
from neuron_merging.errors import NeuronMergingError
from neuron_merging.files import remove_partials, write_atomically, write_text

SAVE_SECONDS = 300  # within an epoch, the state is saved each time this many seconds have passed


def learning_rate(recipe: Recipe, epoch: int, progress: float) -> float:
    """The learning rate in `epoch` (from 0) when `progress` (0…1) of the whole training is done.

    published: constant within an epoch; from epoch schedule[i] on, it is multiplied by gammas[i].
    fast: one cycle, linear from 0.1 lr to lr over the first fifth, then linear to 0.
    """
    if recipe.one_cycle:
        return recipe.lr * (0.1 + 0.9 * progress / 0.2 if progress < 0.2 else (1 - progress) / 0.8)
    return recipe.lr * math.prod(g for start, g in zip(recipe.schedule, recipe.gammas) if epoch >= start)


def image_share(recipe: Recipe, progress: float) -> float:
    """The side of the training images, as a share of the full one, when `progress` (0…1) of the training is done."""
    return max((entry for entry in recipe.sizes if entry[0] <= progress + 1e-9), default=(0.0, 1.0))[1]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 if the hardware computes in it, else None (float32): emulated bfloat16 is many times slower."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return torch.bfloat16 if any(getattr(torch.cpu, p, bool)() for p in probes) else None
    return None


def arithmetic(
    device: torch.device, winograd: bool = False, share: float = 1.0
) -> contextlib.AbstractContextManager[Any]:
    """A context for the arithmetic of training: bfloat16 if the device has it, else float32.

    winograd: on a CPU, use Winograd's convolutions in float32 when they are quicker. That is without bfloat16, or if the
    images' sides are shrunk (`share` < 1).
    """
    dtype = autocast_dtype(device)
    if winograd and device.type == "cpu" and (dtype is None or share < 1):
        return Winograd()
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def batches(
    images: Images,
    batch_size: int,
    seed: int,
    part: tuple[int, int] = (0, 1),
    share: float = 1.0,
    first: int = 0,
    cutout: int = 0,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """One epoch of (network input, labels, size of the global batch) in a random order; augmented if the data set says so.

    Order and crops depend on `seed` alone, so they are the same for one process and for many. `part`: (rank, world size); picks
    every world-th image of each global batch. `share`: the sides of the images are shrunk to it after the crop. `first`: the
    number of the first batch. A last batch that is too small for BatchNorm is left out. `cutout`: side in pixels of a square
    that shows the mean colour; its centre can be anywhere in the image (DeVries & Taylor 2017).
    """
    rank, world = part
    device, count = images.labels.device, len(images)
    _, height, width = images.dataset.shape
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=random).to(device)
    pad = 4 if images.dataset.augment else 0
    shift = torch.randint(0, 2 * pad + 1, (2, count), generator=random).to(device)
    flip = (torch.rand(count, generator=random) < 0.5).to(device) & images.dataset.augment
    centre = torch.stack([torch.randint(0, side, (count,), generator=random) for side in (height, width)]).to(device)
    mean = (255 * torch.tensor(images.dataset.mean, device=device)).round().to(torch.uint8)
    padded = F.pad(images.pixels, (pad, pad, pad, pad))  # black, as RandomCrop(padding=4) pads
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    for start in range(first * batch_size, count, batch_size):
        size = min(batch_size, count - start)
        if size < 2 * world:
            return
        i = order[start : start + batch_size][rank::world]
        y = rows + shift[0, i, None]  # [B, H]
        x = torch.where(flip[i, None], columns.flip(0), columns) + shift[1, i, None]  # [B, W]
        crops = padded[i[:, None, None], :, y[:, :, None], x[:, None, :]]  # [B, H, W, C]
        if cutout:
            top, left = centre[:, i, None] - cutout // 2  # [B, 1] each
            hidden = ((rows - top) // cutout == 0)[:, :, None] & ((columns - left) // cutout == 0)[:, None]  # [B, H, W]
            crops[hidden] = mean
        yield images.normalised(crops.permute(0, 3, 1, 2), share), images.labels[i], size


def train(
    model: nn.Module,
    images: Images,
    test: Images,
    recipe: Recipe,
    *,
    device: torch.device,
    seed: int = 1,
    state: Path | None = None,
    resume: bool = False,
    curve: Path | None = None,
    experiment: dict[str, Any] | None = None,
    log_interval: int = 0,
    compiled: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train `model` in place. The last epoch's row: epoch, lr, image_share, loss, train and test accuracy in %, seconds.

    `state`: a file with all that `resume` needs to continue as if nothing had happened: model, optimiser, RNG and place in the
    epoch. It also says which run it belongs to: recipe, seed, network and `experiment`, which is plain values of the caller. It
    is written after every epoch; a single process also writes it every five minutes and at Ctrl-C. `curve`: a CSV file with a
    row for each epoch. With several processes, BatchNorm is synchronised on GPUs; on CPUs each normalises its own part.
    Raises NeuronMergingError if the loss is no longer finite, or the state does not belong to this run.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    torch.manual_seed(seed + rank)  # dropout; the batches have a generator of their own
    if min(recipe.batch_size, len(images)) < 2 * world:
        raise NeuronMergingError(
            f"--batch-size and the training images have to be at least 2 a process, here {2 * world}"
        )
    if recipe.cutout >= min(images.dataset.shape[1:]):
        raise NeuronMergingError(f"--cutout {recipe.cutout} can hide all of an image: choose a smaller square")
    identity = {"recipe": _plain(recipe), "seed": seed, "network": str(model), "experiment": experiment}
    model.to(device, memory_format=torch.channels_last)
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = sgd(model, recipe)
    epoch, step, rows, earlier = 0, 0, [], 0.0  # seconds of the epoch before this run
    # Sums over the epoch so far: loss, correct, images. On the device, and read rarely, since reading waits for the device.
    seen = torch.zeros(3, device=device)
    if resume:
        saved = _read_state(state, identity)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        for group in optimizer.param_groups:
            group["fused"] = optimizer.defaults["fused"]  # the state may come from another device
        epoch, step, rows, earlier = saved["epoch"], saved["step"], saved["rows"], saved.get("seconds", 0.0)
        if rank == 0:  # the sums of all processes are added up later
            seen = saved["seen"].to(device)
        torch.set_rng_state(saved["rng"])
        if device.type == "cuda" and "rng_cuda" in saved:  # a run that began on a CPU has none
            torch.cuda.set_rng_state(saved["rng_cuda"], device)
    parallel = DistributedDataParallel(model) if world > 1 else model
    forward = torch.compile(parallel, dynamic=False) if compiled else parallel
    images, test = images.to(device), test.to(device)
    steps = math.ceil(len(images) / recipe.batch_size)
    saved_at = time.monotonic()

    def save() -> None:
        nonlocal saved_at
        if state is not None and rank == 0:
            content = {**identity, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            content |= {"epoch": epoch, "step": step, "seen": seen, "rows": rows, "rng": torch.get_rng_state()}
            content["seconds"] = time.monotonic() - started if step else 0.0
            if device.type == "cuda":
                content["rng_cuda"] = torch.cuda.get_rng_state(device)
            write_atomically(state, lambda file: torch.save(content, file))
        saved_at = time.monotonic()

    if state is not None and rank == 0:
        remove_partials(state)
    with _StopRequest() as stop:
        while epoch < recipe.epochs:
            started, earlier = time.monotonic() - earlier, 0.0
            forward.train()
            share = image_share(recipe, epoch / recipe.epochs)
            computing = arithmetic(device, recipe.winograd, share)
            bar = tqdm(
                batches(images, recipe.batch_size, seed * 1_000_003 + epoch, (rank, world), share, step, recipe.cutout),
                f"epoch {epoch + 1}/{recipe.epochs}", steps, initial=step, unit="batch", leave=False,
                disable=None if rank == 0 else True,
            )  # fmt: skip
            for number, (x, labels, size) in enumerate(bar, step):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, epoch, (epoch + number / steps) / recipe.epochs)
                with computing:
                    logits = forward(x)
                losses = F.cross_entropy(
                    logits.float(), labels, reduction="sum", label_smoothing=recipe.label_smoothing
                )
                optimizer.zero_grad(set_to_none=True)
                (losses * world / size).backward()  # DistributedDataParallel averages over the processes
                optimizer.step()
                step = number + 1
                seen[0] += losses.detach()
                seen[1] += (logits.argmax(1) == labels).sum()
                seen[2] += len(labels)
                if log_interval and step % log_interval == 0 and rank == 0:
                    say(f"epoch {epoch + 1} batch {step}/{steps} loss {float(seen[0] / seen[2]):.4f}")
                if (stop.asked or time.monotonic() - saved_at > SAVE_SECONDS) and world == 1:
                    save()
                if stop.asked:
                    there = state is not None and (world == 1 or epoch > 0)
                    where = f"; go on with --resume ({state})" if there else ""
                    raise KeyboardInterrupt(f"stopped in epoch {epoch + 1} of {recipe.epochs}{where}")
            loss, hits, shown = _summed(seen)
            if not math.isfinite(loss):
                anew = f" and delete {state}" if state is not None and state.exists() else ""
                raise NeuronMergingError(f"the loss is no longer finite in epoch {epoch + 1}: lower --lr{anew}")
            if world > 1:
                for buffer in model.buffers():  # measure with the running statistics that are saved
                    dist.broadcast(buffer, 0)
            with computing:
                counts = accuracy(model, test, part=(rank, world), share=share)
            correct, total = _summed(torch.tensor(counts, device=device))
            epoch, step, seen = epoch + 1, 0, torch.zeros_like(seen)
            rows.append(
                {
                    "epoch": epoch, "lr": round(optimizer.param_groups[0]["lr"], 6), "image_share": share,
                    "loss": round(loss / shown, 4),
                    "train_accuracy": round(100 * hits / shown, 2), "test_accuracy": round(100 * correct / total, 2),
                    "seconds": round(time.monotonic() - started, 1),
                }
            )  # fmt: skip
            save()
            if rank == 0:
                _write_curve(curve, rows)
                say("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    return rows[-1]


def sgd(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """The optimiser of a recipe. Its first group is the weights; its second is BatchNorm and biases, with their own decay."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]  # γ, β and biases
    decay = recipe.weight_decay if recipe.norm_decay is None else recipe.norm_decay
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": decay}]
    device = next(model.parameters()).device.type
    fused = device in ("cpu", "cuda")  # one pass over the weights instead of five, a tenth of VGG-16's time on CPUs
    return torch.optim.SGD(
        [g for g in groups if g["params"]], recipe.lr, recipe.momentum, nesterov=recipe.nesterov, fused=fused
    )


def _read_state(state: Path | None, identity: dict[str, Any]) -> dict[str, Any]:
    try:
        saved = torch.load(state, map_location="cpu", weights_only=True)
    except OSError as error:
        raise NeuronMergingError(f"there is nothing to resume: cannot read {state}; run it without --resume") from error
    except Exception as error:  # a damaged file can raise nearly anything out of the unpickler
        raise NeuronMergingError(
            f"{state} is not a training state that can be read: delete it and begin anew without --resume"
        ) from error
    if (
        not isinstance(saved, dict)
        or not {*identity, "model", "optimizer", "epoch", "step", "seen", "rows", "rng"} <= saved.keys()
        or not isinstance(saved["recipe"], dict)
    ):
        raise NeuronMergingError(f"{state} is not a training state: delete it and begin anew without --resume")
    saved["recipe"] = {"cutout": 0, "winograd": saved["recipe"].get("one_cycle")} | saved["recipe"]  # of older states
    for key, value in identity.items():
        if saved[key] != value:
            raise NeuronMergingError(
                f"{state} belongs to a run with another {key}: repeat that run's options to resume it"
            )
    return saved


def _plain(recipe: Recipe) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}


def _summed(values: Tensor) -> list[float]:
    """The element-wise sum over all processes."""
    total = values.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def _write_curve(curve: Path | None, rows: list[dict[str, Any]]) -> None:
    if curve is None:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(curve, text.getvalue())


class _StopRequest:
    """Lets Ctrl-C and SIGTERM wait for the end of the step, when the state can be saved. A second one does not wait."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, signum: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> "_StopRequest":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[tuple[torch.device, int]]:
    """Join the other processes, if torchrun started this one. Gives the device and the rank of this process."""
    if not launched():
        yield device, 0
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, dist.get_rank()
        dist.barrier()  # no process ends before all are done
    finally:
        gc.collect()  # frees what still refers to the group: DistributedDataParallel is in a reference cycle
        dist.destroy_process_group()
