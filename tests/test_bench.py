"""The benchmark on a small network: it compares what is the same, and its document says what was measured."""

import json
import platform
import subprocess
import sys
from functools import partial

import pytest
import torch

from experiments import bench, bench_train
from experiments.grid import Grid

SMALL = {"small": Grid("ResNet-8 on CIFAR-10", "ResNet", (8,), "cifar10", (0.5,))}


@pytest.mark.slow
def test_the_benchmark_of_a_small_network(monkeypatch):
    monkeypatch.setattr(bench, "STARTS", {"python main.py --help": ["--help"]})
    monkeypatch.setattr(bench, "IMAGES", {"small": 64})
    monkeypatch.setattr(bench, "peak", partial(bench.peak, 64))
    monkeypatch.setattr("neuron_merging.benchmark.SECONDS", 0.02)
    report = bench.measured(SMALL, widths=(8, 16, 32))
    assert [m["kind"] for m in report["merging"]] == ["prune", "merge", "merge-derived"]
    # The loop gave the same, or `merging` had raised.
    assert all(m["units"] == 3 and m["loop"] > 0 and m["ours"] > 0 for m in report["merging"])
    (shown,), (made,) = report["evaluation"], report["bought"]
    assert shown["accuracy"][0] == shown["accuracy"][1]
    assert made["smaller"]["macs"] < 0.6 * made["original"]["macs"]
    text = bench.document(report)
    assert text.count("| ResNet-8 |") == 3 + 1 + 1 + 1 and "| 32 |" in text and "from width 16 on" in text


def test_the_document_is_what_was_measured():
    measured = json.loads((bench.RESULTS / "bench.json").read_text())
    assert (bench.RESULTS / "BENCH.md").read_text() == bench.document(measured)
    measured = json.loads((bench.RESULTS / "bench_train.json").read_text())
    assert (bench.RESULTS / "BENCH_TRAIN.md").read_text() == bench_train.document(measured)


def test_slopes_are_those_of_the_wide_half():
    grown = [{"width": w, "ours": 1.0 if w < 64 else w**2 / 4096} for w in (8, 16, 32, 64, 128, 256)]
    assert abs(bench.slope(grown, "ours") - 2) < 1e-9


def test_the_trainer_that_is_timed_takes_steps(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_train, "RESULTS", tmp_path)
    monkeypatch.setitem(bench_train.settings.NETWORKS, "ResNet", bench_train.settings.Network((8,), (3, 32, 32)))
    monkeypatch.setattr(bench_train.torch, "compile", lambda model, **_: model)  # takes a minute
    steps, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *args: steps.append(1) or step(self, *args))
    assert bench_train.main(["ResNet", "--batches", "1", "--batch-size", "8"]) == 0
    assert len(steps) == 3 * 5  # the usual loop, ours at three sizes, and compiled
    text = (tmp_path / "BENCH_TRAIN.md").read_text()
    assert text == bench_train.document(json.loads((tmp_path / "bench_train.json").read_text()))
    assert text in capsys.readouterr().out and text.count("| ResNet |") == 1


@pytest.mark.parametrize("told", [["--batches", "0"], ["--batch-size", "1"], ["--bathces", "3"]])
def test_senseless_numbers_are_one_line(told, capsys):
    assert bench_train.main(told) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_memory_that_the_system_does_not_tell_is_left_out(monkeypatch):
    monkeypatch.setattr(bench.memory, "reset", lambda device: False)
    report = json.loads((bench.RESULTS / "bench.json").read_text())
    merged, restored = bench.growth(8), bench.restoration(SMALL["small"])
    assert merged["memory"] is None and restored["peak_mb"] is None
    report["growth"][0], report["restoration"][0] = merged, {"network": "small"} | restored
    assert "None" not in bench.document(report)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library: memory.keep_freed does nothing there")
@pytest.mark.parametrize("keeps", [True, False])
def test_a_command_keeps_the_memory_that_it_frees(keeps):
    work = f"""if True:
        import ctypes, re
        from neuron_merging import memory
        held = lambda: int(re.search(r"VmRSS:\\s*(\\d+)", memory.STATUS.read_text())[1]) * 1024
        if {keeps}:
            memory.keep_freed()
        before = held()
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
        tensor = libc.malloc(100_000_000)
        ctypes.memset(tensor, 1, 100_000_000)
        libc.free(tensor)
        print(held() - before > 90_000_000)
    """
    done = subprocess.run([sys.executable, "-c", work], cwd=bench.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(keeps)
