"""Makes every classification network of torchvision smaller that torch.fx can trace: results/zoo.md.

Weights are random and BatchNorm statistics made up, so nothing here says how accurate a network would be. It checks:

- what can be pruned in it,
- that the result runs and is smaller,
- that dropping nothing changes nothing,
- that planted twins, which are channels made equal wherever they are written, are merged without loss.

Weights that start at nearly 0, such as the scale of ConvNeXt's branches (1e-6) or ViT's head (0), get random values too: else
they would hide all that happens before them.
"""

import copy
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_builder, list_models
from tqdm import tqdm

from experiments import command, rows
from experiments.rows import RESULTS, Row
from experiments.tables import markdown
from neuron_merging.commandline import Parser
from neuron_merging.config import ShrinkConfig
from neuron_merging.counting import count_parameters
from neuron_merging.errors import NeuronMergingError
from neuron_merging.files import write_text
from neuron_merging.graph.streams import Stream
from neuron_merging.graph.tracing import NORMS, Unit
from neuron_merging.methods import METHODS
from neuron_merging.shrink import prunable, shrink, width
from neuron_merging.synthetic import inputs

FOLDER = RESULTS / "zoo"
TABLE = RESULTS / "zoo.md"
KINDS = ("prune", "merge", "restore")
RATIO = 0.3  # share of the neurons that is dropped
SAMPLES = 8  # inputs in the probe
TWINS = 0.99  # least cosine for a merge in the test with twins
SIDES = {"inception_v3": 96, "alexnet": 80, "maxvit_t": 224, "vit": 224}  # of inputs, by how a name begins; else 64
LARGEST = 1e9  # most parameters of a network that is tried; torchvision's largest, 645 M, takes 16 GB of memory


INTRODUCTION = f"""# torchvision's networks, made smaller

Made by `make zoo` from `zoo/rows.jsonl`. It shows what can be dropped in networks that this project was not written for. The
weights are random, so there are no accuracies. Inputs are small.

- {RATIO:.0%} of the neurons of every *unit* and of the channels of every *stream* are dropped (`coupled=True`). A unit is a
  layer with the one layer that reads its neurons. A stream is channels that several layers write or read.
- *Left out*: layers that stay whole; the reasons are counted at the end.
- *prune, merge, restore*: the share of the parameters that is left, and the seconds. **Wrong** would mean: outputs of another
  shape or not finite, no fewer parameters, or an original that was changed. *No*: merging cannot pass an operation in
  between (the rows have the reason).
- *Error at 0 %*: the largest change of an output when nothing is dropped, of the three methods. Errors are shares of the
  largest output.
- *Error of twins*: half of all channels are made copies of others, and merging or restoration drops the copies. Nothing should
  change."""


def networks() -> list[str]:
    """The names of torchvision's classification networks."""
    import torchvision

    return sorted(list_models(module=torchvision.models))


def made(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network with random weights and made-up statistics, none of them nearly 0, and the shape of an input."""
    torch.manual_seed(0)
    model = get_model_builder(name)(weights=None)
    for module in model.modules():
        if isinstance(module, NORMS) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.abs().max() < 1e-3:  # neither norms nor biases
            nn.init.normal_(parameter)
    side = next((side for start, side in SIDES.items() if name.startswith(start)), 64)
    return model.eval(), (3, side, side)


def places(unit: Unit | Stream) -> Iterator[tuple[str, int]]:
    """The modules with an entry for every neuron of a unit or channel of a stream, each with the offset of the first one."""
    if isinstance(unit, Unit):
        yield from ((name, 0) for name in (unit.layer, unit.bn) if name)
    else:
        yield from ((name, 0) for name in unit.writers)
        yield from ((place.module, place.offset) for place in unit.followers)


@torch.no_grad()
def plant(model: nn.Module, units: Sequence[Unit | Stream], share: float = 0.5) -> list[Tensor]:
    """Make channels copies (twins) of others wherever they are written or followed. Changes `model`.

    Returns for each unit the indices [P] of the channels that are no copies.
    """
    random, keep = torch.Generator().manual_seed(5), []
    for unit in units:
        N = width(model, unit)
        order = torch.randperm(N, generator=random)
        P = max(1, round(N * share))
        leaders, twins = order[:P], order[P:]
        of_twins = leaders[torch.arange(len(twins)) % P]
        for name, offset in places(unit):
            module = model.get_submodule(name)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and tensor.ndim:
                    tensor[offset + twins] = tensor[offset + of_twins]
        keep.append(leaders.sort().values)
    return keep


@torch.no_grad()
def tried(name: str, largest: float = LARGEST) -> Row:
    """The row of one network: the results of all checks. It is not tried if it has more than `largest` parameters."""
    model, shape = made(name)
    row: dict[str, Any] = {"network": name, "parameters": count_parameters(model), "input": list(shape)}
    if row["parameters"] > largest:
        return row | {"not_tried": f"more than {largest / 1e6:.0f} M parameters (`--largest`)"}
    try:
        units, left_out = prunable(model, coupled=True)
    except NeuronMergingError as error:
        return row | {"why_not": str(error)}
    kinds = [sum(isinstance(unit, kind) for unit in units) for kind in (Unit, Stream)]
    row |= {"units": kinds[0], "streams": kinds[1], "left_out": left_out}
    if not units:
        return row | {"why_not": "nothing can be pruned"}
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    before, wanted = copy.deepcopy(model.state_dict()), model(x)
    options = {"example_input": shape, "coupled": True, "probe_samples": SAMPLES}
    for kind in KINDS:
        start = time.perf_counter()
        try:
            small, report = shrink(model, RATIO, compensation=kind, **options)
        except NeuronMergingError as error:
            row[kind] = {"why_not": str(error)}
            continue
        seconds, y = round(time.perf_counter() - start, 1), small(x)
        whole, _ = shrink(model, 0.0, compensation=kind, **options)
        fine = y.shape == wanted.shape and bool(y.isfinite().all()) and report.params[1] < report.params[0]
        untouched = all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
        row[kind] = {
            "ok": fine and untouched, "parameters": report.params[1], "seconds": seconds,
            "error_at_0": _off(whole(x), wanted),
        }  # fmt: skip
        del small, whole
    keep = plant(model, units)
    config = ShrinkConfig(threshold=TWINS, probe_samples=SAMPLES)
    wanted = model(x)
    for kind in KINDS[1:]:
        if "ok" in row[kind]:
            folded = METHODS[kind].run(model, units, keep, config, partial(inputs, model, shape, config))
            row[kind]["error_of_twins"] = _off(folded(x), wanted)
    return row


def _off(y: Tensor, wanted: Tensor) -> float:
    """The largest error, relative to the largest output."""
    return float(f"{float((y - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)):.1e}")


def table(measured: Sequence[Row]) -> str:
    """The text of results/zoo.md."""
    header = ["network", "parameters", "units", "streams", "left out", *KINDS, "error at 0 %"]
    header += [f"error of twins, {kind}" for kind in KINDS[1:]]
    lines, refused, waiting = [], [], {}
    measured = list({row["network"]: row for row in measured}.values())  # the last row of a network counts
    for row in sorted(measured, key=lambda row: row["network"]):
        if "not_tried" in row:
            waiting.setdefault(row["not_tried"], []).append(row["network"])
            continue
        if "why_not" in row:
            refused.append(f"- {row['network']}: {row['why_not']}")
            continue
        cells = [_cell(row, kind) for kind in KINDS]
        errors = [f"{max(row[kind].get('error_at_0', 0) for kind in KINDS):.0e}"]
        errors += [f"{row[kind]['error_of_twins']:.0e}" if "ok" in row[kind] else "no" for kind in KINDS[1:]]
        counts = (str(row[key]) for key in ("units", "streams"))
        lines.append([row["network"], f"{row['parameters']:,}", *counts, str(len(row["left_out"])), *cells, *errors])
    reasons: dict[str, int] = {}
    for row in measured:
        for layer, reason in row.get("left_out", {}).items():
            general = "a grouped convolution" if "grouped" in reason else reason.replace(layer, "it").split(" (")[0]
            reasons[general] = reasons.get(general, 0) + 1
    counted = sorted(reasons.items(), key=lambda item: -item[1])
    return "\n".join(
        [
            INTRODUCTION, "",
            markdown(header, lines), "", *refused,
            *(f"Not tried, {why}: {', '.join(names)}." for why, names in waiting.items()), "", "Why layers stay whole:", "",
            *(f"- {count} × {reason}" for reason, count in counted), "",
        ]
    )  # fmt: skip


def _cell(row: Row, kind: str) -> str:
    result = row[kind]
    if "why_not" in result:
        return "no"
    share = f"{100 * result['parameters'] / row['parameters']:.0f} %, {result['seconds']:.1f} s"
    return share if result["ok"] else f"**wrong**: {share}"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Try the networks that have no row yet, and rebuild the table."""
    parser = Parser(prog="python -m experiments.zoo", description=main.__doc__)
    parser.add_argument("names", nargs="*", help="[all]")
    parser.add_argument(
        "--largest", type=float, default=LARGEST, help="parameters of the largest to try [%(default).0f]"
    )
    args = parser.parse_args(argv)
    known = networks()
    unknown = next((name for name in args.names if name not in known), None)
    if unknown is not None:
        raise NeuronMergingError(f"torchvision has no classification network {unknown}")
    path = FOLDER / "rows.jsonl"
    tried_already = (row for row in rows.load(path) if "not_tried" not in row)
    done = rows.keys(tried_already, path, lambda row: row["network"])
    for name in tqdm([n for n in args.names or known if n not in done], "zoo", leave=False, disable=None):
        rows.append(tried(name, args.largest), path, key=lambda row: (row["network"], row.get("not_tried")))
    text = table(rows.load(path))
    write_text(TABLE, text)
    print(f"wrote {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
