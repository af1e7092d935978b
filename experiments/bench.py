"""How long it takes, in one run (results/BENCH.md): decomposing every published network against a literal, per-neuron loop,
and restoring it against the peak of this machine's matrix products."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import memory
import probe
import settings
from decompose import BatchNorm, choose, decompose, read, rebuild, select
from experiment import Experiment, kept_widths, versions
from experiments.grid import GRIDS, Grid
from experiments.rows import RESULTS
from experiments.tables import markdown
from files import write_atomically
from models import build
from restore import restore
from tests import literal
from trace import units


def random_network(grid: Grid) -> torch.nn.Module:
    """A network of the published shape whose BatchNorm statistics are not all alike."""
    torch.manual_seed(0)
    model = build(grid.arch, grid.depth_wide).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
    return model


def bench(grid: Grid, repeats: int = 5) -> dict[str, Any]:
    """Seconds of tracing, of decompose + rebuild (median of `repeats`) and of the loop: l1-norm, merge, half of every unit."""
    model = random_network(grid)
    start = time.perf_counter()
    found = units(model)
    seconds_trace = time.perf_counter() - start
    widths = [len(model.get_submodule(unit.layer).weight) // 2 for unit in found]
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        parts = decompose(model, found, widths, "l1-norm", "merge", t=0.1, lam=0.85)
        rebuild(model, found, parts)
        seconds.append(time.perf_counter() - start)
    ours = sorted(seconds[1:])[repeats // 2]  # the first one warms up
    start = time.perf_counter()
    for unit, width, part in zip(found, widths, parts):
        neurons = read(model, unit)
        W = neurons.W.numpy()
        keep = literal.select(W, width, "l1-norm")
        Z = literal.scaling_matrix(W, arrays(neurons.bn), keep, "merge", 0.1, 0.85)
        assert select(neurons.W, width, "l1-norm").tolist() == keep
        assert abs(Z - part.Z.numpy()).max() < 1e-9, unit  # the same result, or there is nothing to compare
    loop = time.perf_counter() - start
    return {
        "network": grid.title.split()[0],
        "units": len(found),
        "trace": seconds_trace,
        "decompose_rebuild": ours,
        "loop": loop,
    }


def peak(side: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations a second of a float32 matrix product, the best of `repeats`."""
    a, best = torch.randn(side, side), 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def bench_restore(grid: Grid) -> dict[str, Any]:
    """Seconds of the probe and of restoration, the operations of its matrix products and convolutions, and its peak memory.

    Half of every unit, or the paper's widths where it fixes them.
    """
    model = random_network(grid)
    found = units(model)
    experiment = Experiment(grid.arch, grid.dataset, grid.checkpoint, grid.depth_wide, "restore")
    keep = choose(model, found, kept_widths(model, found, experiment), "l2-norm")
    shape = settings.NETWORKS[grid.arch].shape
    probe.make(model, shape, 8)  # warms up
    memory.reset(torch.device("cpu"))
    start = time.perf_counter()
    x = probe.make(model, shape)
    made = time.perf_counter()
    restore(model, found, keep, x)
    seconds = time.perf_counter() - made
    held = memory.peak(torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        restore(model, found, keep, x)
    return {
        "network": grid.title.split()[0],
        "probe": made - start,
        "restore": seconds,
        "operations": counter.get_total_flops(),
        "peak_mb": held,
    }


def arrays(bn: BatchNorm | None) -> tuple | None:
    """A BatchNorm for the literal loop."""
    return bn and (*(x.numpy() for x in (bn.gamma, bn.beta, bn.mu, bn.var)), bn.eps)


def main(argv: Sequence[str] | None = None) -> int:
    """Time every network and write the table."""
    argparse.ArgumentParser(description=main.__doc__).parse_args(argv)
    measured = [bench(grid) for grid in GRIDS.values()]
    lines = [
        [
            m["network"],
            str(m["units"]),
            *(f"{m[k]:.3f}" for k in ("trace", "decompose_rebuild", "loop")),
            f"{m['loop'] / m['decompose_rebuild']:,.0f} ×",
        ]
        for m in measured
    ]
    header = ["network", "units", "tracing s", "decompose + rebuild s", "literal loop (decompose only) s", "ratio"]
    table = markdown(header, lines)
    fastest, restored = peak(), [bench_restore(grid) for grid in GRIDS.values()]
    lines = [
        [
            m["network"], f"{m['probe']:.2f}", f"{m['restore']:.2f}", f"{m['operations'] / 1e9:,.0f}",
            f"{100 * m['operations'] / m['restore'] / fastest:.0f} %", f"{m['peak_mb']:,.0f}",
        ]
        for m in restored
    ]  # fmt: skip
    header = ["network", "probe s", "restore s", "10⁹ operations", "of the GEMM peak", "peak memory MB"]
    second = markdown(header, lines)
    about = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "gemm_peak": fastest, "versions": versions()}
    report = json.dumps({**about, "rows": measured, "restore": restored}, indent=2) + "\n"
    text = (
        "# Benchmark\n\nMade by `make bench`; random weights of the published shapes. "
        f"{about['threads']} threads, PyTorch {about['versions']['torch']}.\n\n## Merging\n\n"
        f"l1-norm, half of every unit's neurons.\n\n{table}\n\n## Restoration (ours)\n\n"
        "l2-norm, half of every unit's neurons, VGG-16 with the paper's widths; everything else at its default.\n"
        "Operations: matrix products and convolutions, the Cholesky factors not counted. The peak is that of a float32 matrix\n"
        f"product of side 2048, {fastest / 1e9:.0f} · 10⁹ operations a second in this run. Memory: the whole process.\n\n"
        f"{second}\n"
    )
    for path, content in ((RESULTS / "bench.json", report), (RESULTS / "BENCH.md", text)):
        write_atomically(path, lambda file, content=content: file.write(content.encode()))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
