"""What a smaller network gains: its latency, throughput, size and memory beside the original's, measured in one run."""

import io
import math
import statistics
import time
from typing import Any

import torch
from torch import nn

from neuron_merging import memory
from neuron_merging.checkpoint import stored
from neuron_merging.counting import count_macs, count_parameters

SECONDS = 2.0  # that every measurement takes, about
REPEATS = 7


def compare(networks: dict[str, nn.Module], shape: tuple[int, ...], batch: int = 64) -> dict[str, dict[str, Any]]:
    """By name of each network: its sizes, the latency of one input, the throughput in batches of `batch`, and its memory.

    Times are medians of several rounds; in each round the networks take turns. shape: of one input, without the batch. Every
    network runs in its own precision, on its own device.
    """
    measured: dict[str, dict[str, Any]] = {}
    for name, model in networks.items():
        file = io.BytesIO()
        torch.save(stored(model, math.inf), file)
        measured[name] = {
            "parameters": count_parameters(model),
            "macs": count_macs(model, shape),
            "file_mb": round(file.getbuffer().nbytes / 1e6, 3),
        }
    for count, label in ((1, "latency_ms"), (batch, "images_per_second")):
        seconds: dict[str, list[float]] = {name: [] for name in networks}
        runs = {name: _runs(model, shape, count) for name, model in networks.items()}  # this warms up
        for _ in range(REPEATS):
            for name, model in networks.items():
                seconds[name].append(_time(model, shape, count, runs[name]))
        for name, times in seconds.items():
            median = statistics.median(times)
            measured[name][label] = round(1000 * median, 4) if count == 1 else round(count / median, 1)
    for name, model in networks.items():
        parameter = next(model.parameters())
        device = parameter.device
        forgets, before = memory.reset(device), memory.peak(device)
        _time(model, shape, batch, 1)
        measured[name]["memory_mb"] = round(memory.peak(device) - before, 1) if forgets else None
        measured[name]["device"] = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else str(device)
        measured[name]["dtype"] = str(parameter.dtype).removeprefix("torch.")
    return measured


def _runs(model: nn.Module, shape: tuple[int, ...], count: int) -> int:
    """How many passes take `SECONDS` / `REPEATS`."""
    _time(model, shape, count, 1)
    return max(1, round(SECONDS / REPEATS / max(_time(model, shape, count, 2), 1e-6)))


@torch.inference_mode()
def _time(model: nn.Module, shape: tuple[int, ...], count: int, runs: int) -> float:
    """Seconds of one pass of `count` inputs."""
    model.eval()
    parameter = next(model.parameters())
    device = parameter.device
    x = torch.zeros(count, *shape, dtype=parameter.dtype, device=device)
    start = time.perf_counter()
    for _ in range(runs):
        model(x)
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
    return (time.perf_counter() - start) / runs


def table(measured: dict[str, dict[str, Any]]) -> str:
    """A table for people: a line for every quantity, with the second network's value as a share of the first's."""
    first, second = measured.values()
    lines = [f"{'':<22}{''.join(f'{name:>16}' for name in measured)}   ratio"]
    labels = {
        "parameters": "parameters", "macs": "MACs", "file_mb": "file, MB", "memory_mb": "memory of a batch, MB",
        "latency_ms": "latency of one, ms", "images_per_second": "inputs a second",
    }  # fmt: skip
    for key, label in labels.items():
        if first[key] is None:  # it cannot be measured on this system
            continue
        ratio = f"{second[key] / first[key]:.2f}" if first[key] else ""
        lines.append(f"{label:<22}{first[key]:>16,}{second[key]:>16,}   {ratio}".rstrip())
    return "\n".join(
        [
            *lines,
            f"{first['dtype']}, {first['device']}; medians of {REPEATS} rounds after a warm-up, both networks in turn",
        ]
    )
