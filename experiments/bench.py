"""How long decomposing takes: every published network against a literal, per-neuron loop, in one run (results/BENCH.md)."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from decompose import BatchNorm, decompose, read, rebuild, select
from experiment import versions
from experiments.grid import GRIDS, Grid
from experiments.rows import RESULTS
from experiments.tables import markdown
from files import write_atomically
from models import build
from tests import literal
from trace import units


def bench(grid: Grid, repeats: int = 5) -> dict[str, Any]:
    """Seconds of tracing, of decompose + rebuild (median of `repeats`) and of the loop: l1-norm, merge, half of every unit."""
    torch.manual_seed(0)
    model = build(grid.arch, grid.depth_wide).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):  # statistics that are not all alike
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
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
    about = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "versions": versions()}
    report = json.dumps({**about, "rows": measured}, indent=2) + "\n"
    text = (
        "# Benchmark\n\nMade by `make bench`: l1-norm, merge, half of every unit's neurons; random weights of the\n"
        "published shapes. "
        f"{about['threads']} threads, PyTorch {about['versions']['torch']}.\n\n{table}\n"
    )
    for path, content in ((RESULTS / "bench.json", report), (RESULTS / "BENCH.md", text)):
        write_atomically(path, lambda file, content=content: file.write(content.encode()))
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
