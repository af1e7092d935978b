"""The benchmark on a small network: it compares what is the same, and its document says what was measured."""

import json

from experiments import bench, bench_train
from experiments.grid import Grid

SMALL = {"small": Grid("ResNet-8 on CIFAR-10", "ResNet", (8,), "cifar10", (0.5,))}


def test_the_benchmark_of_a_small_network(monkeypatch):
    monkeypatch.setattr(bench, "STARTS", {"python main.py --help": ["--help"]})
    monkeypatch.setattr(bench, "IMAGES", {"small": 64})
    monkeypatch.setattr(bench, "peak", lambda: 1e11)
    monkeypatch.setattr("latency.SECONDS", 0.02)
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


def test_slopes_are_those_of_the_wide_half():
    grown = [{"width": w, "ours": 1.0 if w < 64 else w**2 / 4096} for w in (8, 16, 32, 64, 128, 256)]
    assert abs(bench.slope(grown, "ours") - 2) < 1e-9


def test_the_trainer_that_is_timed_takes_steps(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_train, "RESULTS", tmp_path)
    monkeypatch.setitem(bench_train.settings.NETWORKS, "ResNet", bench_train.settings.Network((8,), (3, 32, 32)))
    monkeypatch.setattr(bench_train.torch, "compile", lambda model, **_: model)  # takes a minute
    assert bench_train.main(["ResNet", "--batches", "1", "--batch-size", "8"]) == 0
    text = (tmp_path / "BENCH_TRAIN.md").read_text()
    assert text in capsys.readouterr().out and text.count("| ResNet |") == 1
