"""Measures how long everything takes, beside something to compare with from the same run: results/BENCH.md and bench.json.

- merging: a literal loop over neurons, and the float64 matrix product in its formulas; also for growing layers
- restoration: the peak of this machine's matrix products
- evaluation: the usual DataLoader loop
- the smaller network: the original one
- starting: nothing to compare with
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data import DATASETS, Images
from experiments import command, literal, settings
from experiments.bench_train import usual
from experiments.evaluate import accuracy
from experiments.experiment import planned
from experiments.grid import GRIDS, Grid
from experiments.rows import RESULTS
from experiments.tables import FIGURES, markdown
from models import build
from neuron_merging import memory, synthetic
from neuron_merging.benchmark import compare
from neuron_merging.commandline import Parser, versions
from neuron_merging.compensation import Contents
from neuron_merging.config import ShrinkConfig
from neuron_merging.counting import count_macs
from neuron_merging.decompose import BatchNorm, dropped
from neuron_merging.errors import NeuronMergingError
from neuron_merging.files import write_text
from neuron_merging.graph.spaces import find_spaces
from neuron_merging.graph.surgery import cut
from neuron_merging.graph.weights import Absorbed
from neuron_merging.plan import Plan
from neuron_merging.restore import restore
from neuron_merging.restore.batches import Source
from neuron_merging.widths.batches import count
from neuron_merging.widths.cost import Cost

CPU = torch.device("cpu")
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
IMAGES = {"lenet": 10_000, "vgg": 1024, "resnet": 1024, "wideresnet": 256}  # number of images that are evaluated
ROOT = RESULTS.parent
Measured = dict[str, Any]


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """How long `work` takes: the median of `repeats` runs, after one to warm up."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def peak(side: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations per second of PyTorch's float32 matrix product; the best of `repeats` runs."""
    a = torch.randn(side, side)
    return max(2 * side**3 / seconds(lambda: a @ a, 1) for _ in range(repeats))


def processor() -> str:
    """The name of the processor: from Linux, elsewhere from Python."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------- merging


def random_network(grid: Grid) -> nn.Module:
    """A network of the published shape whose BatchNorm statistics are not all alike."""
    torch.manual_seed(0)
    return _with_statistics(build(grid.arch, grid.depth_wide))


def _with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.eval()


def merging(model: nn.Module, shape: tuple[int, ...], kind: str, repeats: int = 15) -> Measured:
    """Seconds of decompose + rebuild, of the same by the literal loop, and of the matrix product: l1-norm, half of every unit.

    memory: the most that decompose + rebuild took in addition, divided by the bytes of the model's weights.
    """
    survey = find_spaces(model, torch.zeros(2, *shape))
    units = [space for space in survey.spaces if space.unit is not None]

    def decomposed() -> tuple[list[torch.Tensor], list[list[Absorbed]]]:
        contents = [Contents(survey, space, {}) for space in units]
        keep = [part.choose(part.space.size // 2, "l1-norm") for part in contents]
        return keep, [part.absorbed(kept, kind, t=0.0, lam=0.85) for part, kept in zip(contents, keep)]

    def work() -> nn.Module:
        keep, absorbed = decomposed()
        return cut(survey, dict(zip(units, keep)), list(chain.from_iterable(absorbed))).model

    ours = seconds(work, repeats)
    forgets, before = memory.reset(CPU), memory.peak(CPU)
    small = work()
    held = memory.peak(CPU) - before
    keep, absorbed = decomposed()
    weights = [Contents(survey, space, {}).neurons.W for space in units]
    pairs = [(W[kept], W[dropped(W, kept)]) for W, kept in zip(weights, keep)]
    product = seconds(lambda: [kept @ others.T for kept, others in pairs])
    start = time.perf_counter()
    by_loop = [loop(Contents(survey, space, {}), kind) for space in units]
    seconds_loop = time.perf_counter() - start
    for space, kept, taken, (literally, Z, W_next) in zip(units, keep, absorbed, by_loop):  # both have to give the same
        assert kept.tolist() == literally, space.layer
        assert all(abs(Z - part.Z.numpy()).max() < 1e-9 for part in taken), space.layer
        after = small.get_submodule(space.unit.next).weight.detach().numpy()
        mine = next((k for other, k in zip(units, keep) if other.layer == space.unit.next), slice(None))
        assert abs(after - W_next[mine]).max() < 1e-5, space.layer
    size = sum(p.nbytes for p in model.parameters())
    return {"kind": kind, "units": len(units), "ours": ours, "loop": seconds_loop, "product": product,
            "memory": 1e6 * held / size if forgets else None}  # fmt: skip


def loop(contents: Contents, kind: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """keep, Z and W_next ×₂ Z of half of a unit, computed neuron by neuron in NumPy (experiments/literal.py)."""
    space, neurons = contents.space, contents.neurons
    W = neurons.W.numpy()
    keep = literal.select(W, space.size // 2, "l1-norm")
    Z = literal.scaling_matrix(W, arrays(neurons.bn), keep, kind, 0.0, 0.85)
    W_next = contents.survey.network.tensor(space.readers[0].name).detach().double().numpy()
    return keep, Z, literal.absorb_by_neuron(W_next, Z)


def arrays(bn: BatchNorm | None) -> tuple | None:
    """A BatchNorm in the form that the literal loop takes."""
    return bn and (*(x.numpy() for x in (bn.gamma, bn.beta, bn.mu, bn.var)), bn.eps)


def growth(width: int) -> Measured:
    """`merging` of one layer with `width` neurons, as many inputs, and a BatchNorm."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 10, 1)]
    return {"width": width} | merging(_with_statistics(nn.Sequential(*layers)), (width, 1, 1), "merge", repeats=3)


def slope(measured: Sequence[Measured], key: str) -> float:
    """The slope of log seconds over log width: of a line through the wider half of the widths."""
    wide = measured[len(measured) // 2 :]
    return float(np.polyfit(*(np.log([m[name] for m in wide]) for name in ("width", key)), 1)[0])


# ---------------------------------------------------------------- restoration


def halved(model: nn.Module, grid: Grid) -> Plan:
    """The neurons that l2-norm keeps: half of every unit, or the paper's widths if it fixes them."""
    return planned(model, grid.experiment("restore", criterion="l2-norm"))


def restoration(grid: Grid) -> Measured:
    """Seconds of making the probe and of restoration; restoration's matrix products and convolutions, and its peak memory."""
    model = random_network(grid)
    made = halved(model, grid)
    macs = Cost(made.survey, []).whole[1]
    synthetic.make(model, settings.NETWORKS[grid.arch].shape, 8)  # warms up
    forgets = memory.reset(CPU)
    start = time.perf_counter()
    probe = Source(made.survey.network, ShrinkConfig(compensation="restore"))()
    probe_done = time.perf_counter()

    def work() -> None:
        restore(made.survey, made.keep, probe, macs=macs * count(made.survey.network, probe))

    work()
    taken = time.perf_counter() - probe_done
    held = memory.peak(CPU) if forgets else None
    with FlopCounterMode(display=False) as counter:
        work()
    return {"probe": probe_done - start, "restore": taken, "operations": counter.get_total_flops(), "peak_mb": held}


# ---------------------------------------------------------------- the smaller network, evaluation, starting


def bought(grid: Grid) -> dict[str, Measured]:
    """benchmark.compare of a network and its smaller form. The method makes no difference here, so it is pruned."""
    model = random_network(grid)
    made = halved(model, grid)
    return compare(
        {"original": model, "smaller": cut(made.survey, made.keep).model}, settings.NETWORKS[grid.arch].shape
    )


def evaluation(grid: Grid, count: int, batch_size: int = 128) -> Measured:
    """Images per second of `evaluate.accuracy` and of the DataLoader loop on `count` made-up images, and both accuracies."""
    model, dataset = random_network(grid), DATASETS[grid.dataset]
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, *dataset.shape), dtype=torch.uint8, generator=random)
    images = Images(pixels, torch.randint(0, dataset.classes, (count,), generator=random), dataset)
    correct = []

    def by_loader() -> None:
        with torch.no_grad():
            hits = [model(x).argmax(1) == labels for x, labels in usual(images, batch_size, CPU, augment=False)]
        correct.append(int(torch.cat(hits).sum()))

    loader = seconds(by_loader, 3)
    ours = seconds(lambda: correct.append(accuracy(model, images)[0]), 3)
    return {"images": count, "loader": count / loader, "ours": count / ours, "macs": count_macs(model, dataset.shape),
            "accuracy": [100 * c / count for c in (correct[0], correct[-1])]}  # fmt: skip


def starting(*arguments: str) -> float:
    """Seconds of a whole `main.py` process."""
    line = [sys.executable, "main.py", *arguments]
    try:
        return seconds(lambda: subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True), 3)
    except subprocess.CalledProcessError as error:
        raise NeuronMergingError(f"{' '.join(line)} failed: {error.stderr.strip()}") from error


STARTS = {
    "python main.py --help": ["--help"],
    "… --arch LeNet_300_100 --model-type merge --evaluate": [
        "--arch", "LeNet_300_100", "--model-type", "merge", "--evaluate"
    ],
}  # fmt: skip


# ---------------------------------------------------------------- the document


def _times(ratio: float) -> str:
    """A ratio as text. Below 10 it has a decimal, so that a ratio just below 1 is not shown as 1."""
    return f"{ratio:,.0f} ×" if ratio >= 10 else f"{ratio:.1f} ×"


def _held(ratio: float | None) -> str:
    """Memory as text; empty if the system cannot measure it."""
    return "" if ratio is None else f"{ratio:.1f} ×"


def document(report: Measured) -> str:
    """The text of BENCH.md."""
    gemm = report["gemm_peak"]
    merged = [
        [m["network"], m["kind"], str(m["units"]), f"{m['ours']:.4f}", f"{m['loop']:.3f}",
         _times(m["loop"] / m["ours"]), "" if m["kind"] == "prune" else f"{m['ours'] / m['product']:.1f} ×",
         _held(m["memory"])]
        for m in report["merging"]
    ]  # fmt: skip
    grown = [
        [str(m["width"]), f"{m['ours']:.4f}", f"{m['loop']:.3f}", _times(m["loop"] / m["ours"]),
         f"{m['ours'] / m['product']:.1f} ×", _held(m["memory"])]
        for m in report["growth"]
    ]  # fmt: skip
    restored = [
        [m["network"], f"{m['probe']:.2f}", f"{m['restore']:.2f}", f"{m['operations'] / 1e9:,.0f}",
         f"{100 * m['operations'] / m['restore'] / gemm:.0f} %",
         "" if m["peak_mb"] is None else f"{m['peak_mb']:,.0f}"]
        for m in report["restoration"]
    ]  # fmt: skip
    evaluated = [
        [m["network"], f"{m['images']:,}", f"{m['loader']:,.0f}", f"{m['ours']:,.0f}", f"{m['ours'] / m['loader']:.2f} ×",
         f"{100 * 2 * m['macs'] * m['ours'] / gemm:.0f} %", " / ".join(f"{a:.2f}" for a in m["accuracy"])]
        for m in report["evaluation"]
    ]  # fmt: skip
    sizes = [
        [m["network"], *(f"{m['smaller'][key] / m['original'][key]:.2f}" for key in ("parameters", "macs", "file_mb")),
         *(f"{m[name]['latency_ms']:.2f}" for name in ("original", "smaller")),
         f"{m['original']['latency_ms'] / m['smaller']['latency_ms']:.2f} ×",
         *(f"{m[name]['images_per_second']:,.0f}" for name in ("original", "smaller")),
         f"{m['smaller']['images_per_second'] / m['original']['images_per_second']:.2f} ×"]
        for m in report["bought"]
    ]  # fmt: skip
    both = "accuracy: usual / ours"
    of_loop, of_product = ["literal loop s", "ratio"], ["of the product", "memory of the weights"]
    slopes = {name: slope(report["growth"], name) for name in ("ours", "loop")}
    wide = report["growth"][len(report["growth"]) // 2]["width"]
    return f"""# Benchmark

Made by `make bench`, on networks of the published shapes with random weights. {report["threads"]} threads,
{report["processor"]}, PyTorch {report["versions"]["torch"]}.
Every time stands beside that of something else, measured in the same run.

## Merging

Half of every unit's neurons are dropped, by l1-norm. A *unit* is a layer that loses neurons, with the layer that reads them.

- *decompose + rebuild*: from the network to the smaller one. The median of several runs, after one to warm up.
- *literal loop*: the same result by a loop over neurons in NumPy (experiments/literal.py), run once. Both are checked to agree.
  *Ratio*: how much longer the loop takes.
- *of the product*: the time as a multiple of one float64 matrix product of kept and dropped neurons. The formulas cannot do
  without it.
- *memory of the weights*: the most memory held meanwhile, as a multiple of the network's weights.

{markdown(["network", "compensation", "units", "decompose + rebuild s", *of_loop, *of_product], merged, 2)}

One layer by itself, with as many inputs as neurons and a BatchNorm, merged:

{markdown(["width", "decompose + rebuild s", *of_loop, *of_product], grown, 0)}

![Seconds against width](figures/growth.png)

Seconds grow with the power {slopes["ours"]:.2f} of the width, those of the loop with {slopes["loop"]:.2f}
(from width {wide} on). The work of the matrix product grows with the power 3, the layer itself with 2.

## Restoration (ours)

Half of every unit's neurons are dropped, by l2-norm; VGG-16 has the paper's widths. Everything else is at its default.

- *probe s*: making the inputs up. *restore s*: restoration itself. Add the two.
- *10⁹ operations*: those of matrix products and convolutions. Cholesky factors are not counted.
- *of the GEMM peak*: operations per second, as a share of a float32 matrix product of side 2048, which did
  {report["gemm_peak"] / 1e9:.0f} · 10⁹ in this run.
- *peak memory*: of the whole process.

{markdown(["network", "probe s", "restore s", "10⁹ operations", "of the GEMM peak", "peak memory MB"], restored)}

## What it buys

The same widths. *Parameters*, *MACs* and *file* are the shares that are left. *Latency* is for one image, *images/s* for
batches of 64: medians, both networks in turn (`--benchmark`). Nothing is fused. Small layers do not keep the machine busy, so
time falls less than MACs do.

{markdown(["network", "parameters", "MACs", "file", "latency ms", "smaller", "faster", "images/s", "smaller", "faster"], sizes)}

## Evaluation

Images per second in float32. The *usual loop* is a DataLoader with two workers, ToTensor, Normalize and batches of 128. Above
100 % of the peak, a network's convolutions run faster than the matrix product.

{markdown(["network", "images", "usual loop, images/s", "ours", "ratio", "of the GEMM peak", both], evaluated)}

## Starting

Seconds of a whole process.

{markdown(["command", "s"], [[f"`{name}`", f"{taken:.2f}"] for name, taken in report["starting"].items()])}
"""


def measured(grids: dict[str, Grid], widths: Sequence[int] = WIDTHS) -> Measured:
    """All measurements for the networks `grids`. Starting comes first, while this process has little memory."""
    report: Measured = {"starting": {name: starting(*arguments) for name, arguments in STARTS.items()}}
    report |= {"processor": processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    report |= {"versions": versions(), "gemm_peak": peak()}
    named = {grid.title.split()[0]: grid for grid in grids.values()}
    report["merging"] = [
        {"network": name} | merging(random_network(grid), settings.NETWORKS[grid.arch].shape, kind)
        for name, grid in named.items()
        for kind in literal.FORMS
    ]
    report["growth"] = [growth(width) for width in widths]
    for what, measure in (("restoration", restoration), ("bought", bought)):
        report[what] = [{"network": name} | measure(grid) for name, grid in named.items()]
    report["evaluation"] = [{"network": g.title.split()[0]} | evaluation(g, IMAGES[key]) for key, g in grids.items()]
    return report


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Time everything and write the tables."""
    Parser(prog="python -m experiments.bench", description=main.__doc__).parse_args(argv)
    from experiments.figures import growth as draw

    memory.keep_freed()  # as main.py does
    report = measured(GRIDS)
    text = document(report)
    for path, content in ((RESULTS / "bench.json", json.dumps(report, indent=2) + "\n"), (RESULTS / "BENCH.md", text)):
        write_text(path, content)
    draw(report["growth"], [FIGURES / f"growth.{ending}" for ending in ("png", "svg")])
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
