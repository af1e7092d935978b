"""Trained networks of other people: their inputs and scores, the command that measures methods on them, its table and figure.

Tests that need the networks skip where their packages are not installed (`make real` does that).
"""

import subprocess

import numpy as np
import pytest
import torch
from torch import nn

from experiments import packages, real, real_inputs, real_networks, real_tables, rows
from experiments.real_networks import NETWORKS, Network
from neuron_merging.errors import NeuronMergingError

SCORES = {"mobilenet_v2": 87.5, "captum_cifar": 59.07, "legere": 89.9, "crepe_tiny": 99.5}  # of all inputs
CELL = {"network": "made_up", "split": "tune", "channels": "uncoupled", "ratio": 0.5, "method": "prune", "options": {}}


@pytest.fixture
def made_up(monkeypatch):
    """A network of its own among NETWORKS, whose inputs come in pairs; nothing else is measured or needs packages."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)).eval()
    x = torch.randn(40, 6)
    network = Network(
        "made up", "top-1", lambda: model, (6,), lambda: (x, np.arange(40) % 4), lambda number: torch.randn(number, 6),
        real_networks.largest, real_networks.share_equal, (), group=2, parts={"first": "0"},
    )  # fmt: skip
    monkeypatch.setattr(real, "NETWORKS", {"made_up": network})
    monkeypatch.setattr(real_tables, "NETWORKS", {"made_up": network})
    real.original.cache_clear()
    real.answers.cache_clear()
    return network


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Rows, table and figure in a folder of the test."""
    for module in (real, real_tables):
        monkeypatch.setattr(module, "PATH", tmp_path / "real.jsonl")
    monkeypatch.setattr(real_tables, "TABLE", tmp_path / "real.md")
    monkeypatch.setattr(real_tables, "FIGURES", [tmp_path / "real.svg", tmp_path / "real.png"])
    return tmp_path


def test_the_halves_share_no_group(made_up):
    halves = {split: made_up.scored(split)[0] for split in ("tune", "report", "all")}
    tune, report, everything = ({tuple(x.tolist()) for x in half} for half in halves.values())
    assert len(tune) == len(report) == 20 and not tune & report and tune | report == everything
    assert torch.equal(halves["tune"], halves["all"].view(10, 2, 2, 6)[:, 0].flatten(0, 1))


def test_a_row_says_what_is_left(made_up):
    row = real.measure("made_up", "prune", 0.5)
    assert {name: row[name] for name in CELL} == CELL
    x, truth = made_up.scored("tune")
    with torch.inference_mode():
        assert row["original"] == 100 * np.mean(made_up.load()(x).argmax(1).numpy() == truth)
    assert row["params"] == (84 + 130 + 44, 42 + 35 + 24) and row["macs"] == (72 + 120 + 40, 36 + 30 + 20)
    whole = real.measure("made_up", "prune", 0.0)
    pairs = (made_up.answered(made_up.load(), "tune") == truth).reshape(10, 2).mean(1)
    assert whole["standard_error"] == pytest.approx(100 * pairs.std(ddof=1) / 10**0.5, abs=0.06)
    assert whole["score"] == whole["original"] and whole["agreement"] == 100


def test_methods_have_real_inputs_and_chosen_widths(made_up, monkeypatch):
    given = []
    monkeypatch.setattr(real, "shrink", lambda *args, **options: given.append(options) or (args[0], _Report()))
    for method in ("restore", "restore+8", "restore+8+widths"):
        real.measure("made_up", method, ridge=0.2)
    assert [len(options.get("images", ())) for options in given] == [0, 8, 8]
    assert [options.get("widths") for options in given] == [None, None, "auto"]
    assert all(options["ridge"] == 0.2 and options["compensation"] == "restore" for options in given)


class _Report:
    params = macs = (2, 1)
    seconds = peak_mb = 1.0


def test_a_part_alone_loses_neurons(made_up):
    row = real.measure("made_up", "prune", 0.5, part="first")
    assert row["channels"] == "first" and row["params"][1] == 42 + 70 + 44


def test_what_cannot_be_done_is_a_row(made_up):
    row = real.measure("made_up", "prune-bn")
    assert row["why_not"] == "prune-bn measures BatchNorm on real images: give images" and "score" not in row
    assert "prune-bn measures" in real_tables.line(row) and "prune-bn measures" in real_tables.document(
        [row], ["prune-bn"]
    )


@pytest.mark.parametrize("method", ["magic", "restore+many", "restore+8+9", "restore+"])
def test_an_unknown_method_is_one_line(made_up, method, capsys):
    assert real.main(["--methods", method]) == 2
    assert capsys.readouterr().err.startswith(f"unknown method '{method}': choose from prune, ")


def test_measured_rows_are_not_measured_again(made_up, results, capsys):
    line = ["--networks", "made_up", "--methods", "prune,lbyl", "--ratios", "0.3,0.5"]
    assert real.main(line) == 0 and len(capsys.readouterr().out.splitlines()) == 12
    assert real.main([*line, "--channels", "coupled"]) == 0 and not capsys.readouterr().out
    measured = rows.load(real.PATH)
    assert len(measured) == 12 and {row["split"] for row in measured} == {"report"}
    assert (results / "real.png").stat().st_size > 1000
    assert real.main(["--check"]) == 0
    text = (results / "real.md").read_text()
    assert "## made up: top-1" in text and "| uncoupled | 30 % |" in text and "| coupled |" not in text
    (results / "real.md").write_text("another")
    assert real.main(["--check"]) == 2
    assert capsys.readouterr().err == "real.md does not match real.jsonl: run python -m experiments.real --tables\n"
    assert real.main(["--tables"]) == 0 and (results / "real.md").read_text() == text


def test_rows_of_other_settings_are_only_printed(made_up, results, capsys):
    assert real.main(["--methods", "prune", "--ratios", "0.5", "--split", "tune"]) == 0
    assert real.main(["--methods", "prune", "--ratios", "0.5", "--criterion", "l1-norm"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6 and not real.PATH.exists()


def test_the_table_matches_its_rows():
    real_tables.make(real.VARIANTS, check=True)


def test_a_missing_package_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(packages.VARIABLE, str(tmp_path))
    assert real.main(["--networks", "legere"]) == 2
    assert capsys.readouterr().err == (
        f"legere==0.11.0 is not in {tmp_path}: run make real, or python -m experiments.real --install\n"
    )


def test_only_missing_packages_are_installed(monkeypatch, tmp_path):
    monkeypatch.setenv(packages.VARIABLE, str(tmp_path))
    (tmp_path / "foolbox").mkdir()
    runs = []
    monkeypatch.setattr(
        subprocess, "run", lambda line, check: runs.append(line) or subprocess.CompletedProcess(line, 1)
    )
    packages.install(["foolbox"])
    assert not runs
    with pytest.raises(NeuronMergingError, match="pip could not install torchcrepe"):
        packages.install(["foolbox", "torchcrepe"])
    assert runs[0][-3:] == ["--target", str(tmp_path), "torchcrepe==0.0.24"] and "--no-deps" in runs[0]


def test_a_module_is_imported_without_its_package(monkeypatch, tmp_path):
    monkeypatch.setenv(packages.VARIABLE, str(tmp_path))
    monkeypatch.setitem(packages.PINNED, "made_up_package", "made-up==1")
    (tmp_path / "made_up_package").mkdir()
    (tmp_path / "made_up_package" / "__init__.py").write_text("import nowhere_to_be_found")
    (tmp_path / "made_up_package" / "other.py").write_text("ONE = 1")
    (tmp_path / "made_up_package" / "model.py").write_text(
        "import made_up_package\nfrom .other import ONE\nBOTH = made_up_package.BINS, ONE"
    )
    assert packages.module("made_up_package", "model", BINS=360).BOTH == (360, 1)


def test_lines_of_text():
    x, texts = real_inputs.lines(20, seed=1)
    assert x.shape == (20, 1, 32, 256) and x.amin() >= -1 and x.amax() <= 1
    assert all(text[0].isalnum() and text[-1] in ".,:;!?" for text in texts)
    assert torch.equal(real_inputs.lines(20, seed=1)[0], x)
    assert not {*texts} & {*real_inputs.lines(64, seed=2)[1]}
    assert (x[:, :, :, 40:80].amin((1, 2, 3)) < x[:, :, :, -4:].mean((1, 2, 3))).all()  # dark letters on the left


def test_tones_have_their_pitch():
    x, cents = real_inputs.tones(50, seed=1)
    assert x.shape == (50, 1024)
    assert torch.allclose(x.mean(1), torch.zeros(50), atol=1e-5) and torch.allclose(x.std(1), torch.ones(50), atol=1e-2)
    spectrum = np.abs(np.fft.rfft(x.numpy() * np.hanning(1024), 2**15))
    harmonic = spectrum.argmax(1) * 16_000 / 2**15 / (10 * 2 ** (cents / 1200))
    assert (np.abs(harmonic - harmonic.round()) < 0.1).mean() > 0.9 and (harmonic.round() >= 1).all()


def test_scores():
    outputs = torch.zeros(2, 360)
    outputs[0, 100] = outputs[1, 200] = 1
    heard = real_networks.cents(outputs)
    assert np.allclose(heard, [3997.3794, 5997.3794])
    assert real_networks.within_50_cents(heard, heard + np.array([49, -51])) == 50
    assert real_networks.share_equal(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])) == 75


@pytest.mark.parametrize("name", NETWORKS)
def test_trained_networks_have_their_score(name, request):
    network = NETWORKS[name]
    try:
        for package in network.needs:
            packages.path(package)
    except NeuronMergingError as error:
        pytest.skip(str(error))
    if name == "captum_cifar":
        request.getfixturevalue("data_folder")
    model = network.load()
    assert network.score(model, "all") == pytest.approx(SCORES[name], abs=0.5)
    images, (inputs, _) = network.images(8), network.scored("all")
    assert images.shape == (8, *network.shape) and inputs.shape[1:] == network.shape and not model.training
    assert not any((inputs == image).flatten(1).all(1).any() for image in images)
