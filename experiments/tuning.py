"""Measures the settings of restoration and of the choice of widths, to choose the defaults (results/tuning/).

It uses training images, never the test set. The networks are a small ResNet-20, which was trained without the images used here,
and the shipped LeNet-300-100. `make tuning` measures what rows.jsonl does not hold yet and rebuilds the tables.
"""

import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data import Images, load
from experiments import command, rows, settings
from experiments.beyond import cell
from experiments.evaluate import accuracy
from experiments.experiment import Experiment, calibration, planned, shrink
from experiments.experiment import load as load_network
from experiments.grid import GRIDS, PRETRAINED, check_same
from experiments.manifest import workbench
from experiments.rows import RESULTS, Row
from experiments.tables import markdown, replaced
from neuron_merging import synthetic
from neuron_merging.checkpoint import sha256
from neuron_merging.commandline import Parser
from neuron_merging.files import write_text
from neuron_merging.restore import Options, restore
from neuron_merging.restore.batches import parts
from neuron_merging.widths.cost import Cost

FOLDER = RESULTS / "tuning"
DOCS = RESULTS.parent / "docs" / "restore.md"
BEGIN, END = "<!-- ablation: made by `make tuning` -->", "<!-- end of ablation -->"
SEEDS = (1, 2)
IMAGES = 2000  # of the val split


@dataclass(frozen=True)
class Bench:
    """A network to choose settings on, with the criterion and ratios that are measured."""

    arch: str
    depth_wide: tuple[int, ...]
    dataset: str
    file: str
    criterion: str
    ratios: tuple[float, ...]

    @property
    def checkpoint(self) -> Path:
        """The file of the network."""
        return PRETRAINED / self.file


BENCHES = {
    "ResNet-20": Bench("ResNet", (20,), "cifar10", workbench().pretrained.name, "l2-norm", (0.3, 0.5, 0.7)),
    "LeNet-300-100": Bench(
        "LeNet_300_100", (), "FashionMNIST", GRIDS["lenet"].checkpoint.name, "l1-norm", (0.5, 0.6, 0.7, 0.8)
    ),
}  # fmt: skip


ROW_NAMES = {"compensation": "model_type"}  # options that have another name in rows


@dataclass(frozen=True)
class Variant:
    """Restoration with something changed: keyword arguments of `Options` and of `synthetic.make`, or of `Experiment`."""

    options: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)
    experiment: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """All settings, changed or not. They are part of the key of a row."""
        parameters = inspect.signature(synthetic.make).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY and p.name != "seed"}
        probe = defaults | self.probe
        return {
            "options": {name: _as_json(value) for name, value in asdict(Options(**self.options)).items()},
            "probe": probe | {"kind": synthetic.rule(probe["kind"])},
            "experiment": {ROW_NAMES.get(name, name): value for name, value in self.experiment.items()},
        }


def _as_json(value: Any) -> Any:
    """A value that is the same after it was written and read: JSON has neither tuples nor ∞."""
    return list(map(_as_json, value)) if isinstance(value, tuple) else "inf" if value == inf else value


AS_IT_IS = "restore, as it is"
ABLATIONS = {
    AS_IT_IS: Variant(),
    "no inputs held out, one λ": Variant({"held": 0.0, "grid": (1.0,)}),
    "no other basis": Variant({"mixing": False}),
    "running statistics in BatchNorm": Variant({"probe_statistics": False}),
    "no repair of the stream": Variant({"repair": False}),
    "pruned layers not refitted": Variant({"refit": False}),
    "pruned layers not adapted": Variant({"adaptations": 0}),
    "no activation-aware target": Variant({"aware_steps": 0}),
    "no class step": Variant(probe={"step": 0.0}),
}
SWEEP = {
    "λ = 0.003": Variant({"ridge": 3e-3}),
    "λ = 0.01": Variant({"ridge": 1e-2}),
    "λ = 0.1": Variant({"ridge": 1e-1}),
    "class step 0.2": Variant(probe={"step": 0.2}),
    "class step 0.6": Variant(probe={"step": 0.6}),
    "class step 1.0": Variant(probe={"step": 1.0}),
    "dead leaves": Variant(probe={"kind": "leaves"}),
    "white noise": Variant(probe={"kind": "white"}),
    "pink noise": Variant(probe={"kind": "pink"}),
    "one step of adaptation": Variant({"adaptations": 1}),
    "four steps of adaptation": Variant({"adaptations": 4}),
    "activation-aware target once": Variant({"aware_steps": 1}),
    "activation-aware target four times": Variant({"aware_steps": 4}),
    "32 positions a feature": Variant({"positions": 32}),
    "all positions": Variant({"positions": 10**9}),
    "twice the samples": Variant(probe={"samples": 2}),  # as a multiple of the default
    "512 real images (not data-free)": Variant(experiment={"calibrate": "{dataset}:512"}),
}
WIDTHS = {
    f"{kind}, {rule}": Variant(experiment={"compensation": kind, "widths": widths} | change)
    for kind in ("prune", "merge", "restore")
    for rule, widths, change in (
        ("uniform", "uniform", {}),
        ("auto", "auto", {}),
        ("quick", "quick", {}),
        ("uniform, neurons that explain most", "uniform", {"criterion": "auto"}),
        ("auto, neurons that explain most", "auto", {"criterion": "auto"}),
        ("auto, blocks may be left out", "auto", {"drop_blocks": True}),
    )
    if (kind == "restore" or not change) and (kind, rule) != ("restore", "uniform")  # that one is AS_IT_IS
}
VARIANTS = ABLATIONS | SWEEP | WIDTHS


def measure(
    bench: Bench, variant: Variant, ratio: float, seed: int, images: Images, searches: dict
) -> tuple[float, str]:
    """Accuracy in % on training images, and the SHA-256 of the checkpoint. `searches`: as in `experiment.shrink`."""
    changes = {"compensation": "restore", "criterion": bench.criterion} | variant.experiment
    changes |= {name: value.format(dataset=bench.dataset) for name, value in changes.items() if name == "calibrate"}
    experiment = Experiment(
        arch=bench.arch, dataset=bench.dataset, pretrained=bench.checkpoint, depth_wide=bench.depth_wide, ratio=ratio,
        seed=seed, **changes,
    )  # fmt: skip
    model, checkpoint = load_network(experiment)
    model.eval()
    if variant.options or variant.probe:  # these have no flags, so `restore` is called itself
        made, probe = planned(model, experiment), dict(variant.probe)
        if "samples" in probe:
            probe["samples"] *= synthetic.default_samples(model, images.dataset.shape)
        x = synthetic.make(model, images.dataset.shape, seed=seed, **probe)
        macs = Cost(made.survey, []).whole[1] * len(x)
        small = restore(
            made.survey, made.keep, [[part] for part in parts(x)], Options(**variant.options), macs
        ).small.model
    else:
        small = shrink(model, experiment, calibration(experiment), searches).model
    correct, total = accuracy(small, images)
    return round(100 * correct / total, 2), checkpoint.sha256


def key(row: Row) -> tuple:
    """The key of a measurement, which two rows share if they measure the same."""
    settings_text = json.dumps(row["settings"], sort_keys=True)
    return row["network"], row["variant"], row["ratio"], row["seed"], row["checkpoint_sha256"], settings_text


def wanted() -> list[Row]:
    """All rows that there should be, without their accuracies."""
    return [
        {"network": name, "variant": variant, "ratio": ratio, "seed": seed, "checkpoint_sha256": checkpoint,
         "settings": VARIANTS[variant].settings()}
        for name, bench in BENCHES.items()
        for checkpoint in [sha256(bench.checkpoint)]
        for variant in VARIANTS
        for ratio in bench.ratios
        for seed in SEEDS
    ]  # fmt: skip


def run(path: Path) -> list[Row]:
    """Measure every variant on every bench, if `path` does not hold its row yet. Returns all rows."""
    done = rows.keys(rows.load(path), path, key)
    todo = [row for row in wanted() if key(row) not in done]
    loaded: dict[str, Images] = {}
    searches: dict = {}
    for row in tqdm(todo, "tuning", unit="row", leave=False, disable=None):
        bench, variant = BENCHES[row["network"]], VARIANTS[row["variant"]]
        if bench.dataset not in loaded:
            loaded[bench.dataset] = load(bench.dataset, "val", settings.data_folder())[:IMAGES]
        value, checkpoint = measure(bench, variant, row["ratio"], row["seed"], loaded[bench.dataset], searches)
        check_same(bench.checkpoint, row["checkpoint_sha256"], checkpoint)
        rows.append(row | {"accuracy": value}, path, key)
    return rows.load(path)


def table(measured: Sequence[Row], variants: Sequence[str]) -> str:
    """A table of accuracies (mean over seeds ± half the range). Lines: variants. Columns: networks and ratios."""
    columns = [(name, ratio) for name, bench in BENCHES.items() for ratio in bench.ratios]
    cells = {(n, v, r): [row for row in measured if key(row)[:3] == (n, v, r)] for v in variants for n, r in columns}
    lines = [[v, *(cell(cells[n, v, r], len(SEEDS)) for n, r in columns)] for v in variants]
    return markdown(["", *(f"{name} {rows.percent(ratio)}" for name, ratio in columns)], lines)


def documents(measured: Sequence[Row]) -> dict[Path, str]:
    """The texts of results/tuning/TABLES.md, and of docs/restore.md with its ablation table rebuilt."""
    current = {key(row) for row in wanted()}  # other rows have another checkpoint, or settings that no longer exist
    measured = [row for row in measured if key(row) in current]
    ablation = table(measured, list(ABLATIONS))
    tables = f"""# How settings were chosen

Made by `make tuning` from `rows.jsonl`, for restoration and the choice of widths. Accuracy in % on {IMAGES:,} *training*
images: the mean of {len(SEEDS)} seeds ± half of their range. ResNet-20 (l2-norm) never saw these images; LeNet-300-100
(l1-norm) was trained on them. Every line changes one thing of the first line of the first table.
[docs/restore.md](../../docs/restore.md) and [docs/widths.md](../../docs/widths.md) explain what the lines change.

## One part left out

{ablation}

## Other settings

ResNet-20 sees dead leaves in the first line too, LeNet-300-100 white noise: their lines here differ from it by rounding on
another machine only.

{table(measured, list(SWEEP))}

## Widths

Chosen widths have at most the parameters and MACs of uniform ones.

{table(measured, [AS_IT_IS, *WIDTHS])}
"""
    docs = replaced(DOCS.read_text(encoding="utf-8"), DOCS, BEGIN, END, f"{ablation}\n")
    return {FOLDER / "TABLES.md": tables, DOCS: docs}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure missing rows and rebuild the tables."""
    Parser(prog="python -m experiments.tuning", description=main.__doc__).parse_args(argv)
    torch.manual_seed(0)
    for path, text in documents(run(FOLDER / "rows.jsonl")).items():
        write_text(path, text)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
