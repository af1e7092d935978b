"""Makes every classification network of torchvision smaller: results/zoo.md.

Weights are random and BatchNorm statistics made up, so nothing here says how accurate a network would be. It checks:

- what can be pruned in it,
- that the result runs and is smaller,
- that dropping nothing changes nothing,
- that planted twins, which are channels made equal wherever they are written, are merged without loss.

Weights that start as constants, such as the scale of ConvNeXt's branches (1e-6) or ViT's head (0), get random values too: else
they would hide all that happens before them. Networks of other libraries are in families.py.
"""

import copy
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_builder, list_models

from experiments import command, rows
from experiments.families import error_of, measure, randomise, whole
from experiments.rows import RESULTS, Row
from experiments.tables import markdown
from neuron_merging.commandline import Parser
from neuron_merging.config import ShrinkConfig
from neuron_merging.counting import count_parameters
from neuron_merging.errors import NeuronMergingError
from neuron_merging.files import write_text
from neuron_merging.graph.spaces import Space, find_spaces
from neuron_merging.shrink import shrink

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
    """A network with random weights and made-up statistics, and the shape of an input."""
    torch.manual_seed(0)
    model = get_model_builder(name)(weights=None)
    randomise(model)
    side = next((side for start, side in SIDES.items() if name.startswith(start)), 64)
    return model.eval(), (3, side, side)


@torch.no_grad()
def plant(model: nn.Module, spaces: Sequence[Space], share: float = 0.5) -> list[Tensor]:
    """Make indices of spaces copies (twins) of others wherever they are written or followed. Changes `model`.

    Returns for each space the indices [P] that are no copies.
    """
    random, keep = torch.Generator().manual_seed(5), []
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for space in spaces:
        order = torch.randperm(space.size, generator=random)
        P = max(1, round(space.size * share))
        leaders, twins = order[:P], order[P:]
        of_twins = leaders[torch.arange(len(twins)) % P]
        for place in space.writers + space.followers:
            rows_of, at = held[place.name].movedim(place.axis, 0), place.positions(space.leaf)
            rows_of[at[twins]] = rows_of[at[of_twins]]
        keep.append(leaders.sort().values)
    return keep


@torch.no_grad()
def tried(name: str, largest: float = LARGEST) -> Row:
    """The row of one network: the results of all checks. It is not tried if it has more than `largest` parameters."""
    model, shape = made(name)
    row: dict[str, Any] = {"network": name, "parameters": count_parameters(model), "input": list(shape)}
    if row["parameters"] > largest:
        return row | {"not_tried": f"more than {largest / 1e6:.0f} M parameters (`--largest`)"}
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    try:
        survey = find_spaces(model, x)
    except NeuronMergingError as error:
        return row | {"why_not": str(error)}
    units = sum(space.unit is not None for space in survey.spaces)
    row |= {"units": units, "streams": len(survey.spaces) - units, "left_out": survey.left_out}
    if not survey.spaces:
        return row | {"why_not": "nothing can be pruned"}
    before, wanted = copy.deepcopy(model.state_dict()), model(x)
    config = ShrinkConfig(coupled=True, probe_samples=SAMPLES, threshold=TWINS)
    for kind in KINDS:
        start = time.perf_counter()
        try:
            small, report = shrink(
                model, RATIO, compensation=kind, example_input=shape, coupled=True, probe_samples=SAMPLES
            )
        except NeuronMergingError as error:
            row[kind] = {"why_not": str(error)}
            continue
        seconds, y = round(time.perf_counter() - start, 1), small(x)
        fine = y.shape == wanted.shape and bool(y.isfinite().all()) and report.params[1] < report.params[0]
        untouched = all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
        row[kind] = {
            "ok": fine and untouched, "parameters": report.params[1], "seconds": seconds,
            "error_at_0": error_of(survey, whole(survey), kind, config),
        }  # fmt: skip
        del small
    passing = [i for i, space in enumerate(survey.spaces) if space.obstacle is None]
    leaders = plant(model, [survey.spaces[i] for i in passing])
    survey = find_spaces(model, x)
    keep = {survey.spaces[i]: kept for i, kept in zip(passing, leaders)}
    for kind in KINDS[1:]:
        if "ok" in row[kind]:
            row[kind]["error_of_twins"] = error_of(survey, keep, kind, config)
    return row


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
    measure(args.names or known, partial(tried, largest=args.largest), path)
    write_text(TABLE, table(rows.load(path)))
    print(f"wrote {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
