"""What torch.export sees in networks of other libraries, and what is left of them after pruning: results/families.md.

Random weights: nothing here says how accurate a network would be. It says what can be dropped, that the result runs, that
dropping nothing changes nothing, and whether the result is of the network's own class. Networks are named by library:
`timm:resnet18`, `transformers:BertModel` (small random configurations, listed below), `torchvision:swin3d_t`.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from experiments import command, rows
from experiments.rows import RESULTS, Row
from experiments.tables import markdown
from neuron_merging.commandline import Parser
from neuron_merging.config import ShrinkConfig
from neuron_merging.counting import count_parameters
from neuron_merging.errors import NeuronMergingError, missing
from neuron_merging.files import write_text
from neuron_merging.graph.spaces import Space, Survey, find_spaces
from neuron_merging.graph.surgery import largest_error, run
from neuron_merging.methods import METHODS
from neuron_merging.restore.batches import Source
from neuron_merging.shrink import shrink

PATH, TABLE = RESULTS / "zoo" / "families.jsonl", RESULTS / "families.md"
RATIO = 0.3
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 128}
TEXT = {"vocab_size": 99, **SMALL}
TRANSFORMERS: dict[str, dict[str, Any]] = {  # by class of model: its configuration
    "BertModel": TEXT,
    "BertForSequenceClassification": TEXT,
    "RobertaModel": TEXT,
    "DistilBertModel": {"vocab_size": 99, "dim": 64, "n_layers": 2, "n_heads": 8, "hidden_dim": 128},
    "GPT2LMHeadModel": {
        "vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 8, "bos_token_id": 1, "eos_token_id": 1,
    },
    "LlamaForCausalLM": {"num_key_value_heads": 4, **TEXT},
    "T5ForConditionalGeneration": {
        "vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 8,
    },
    "ViTForImageClassification": {"image_size": 64, "patch_size": 16, **SMALL},
    "SwinForImageClassification": {
        "image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    },
    "ResNetForImageClassification": {
        "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic",
    },
    "SegformerForSemanticSegmentation": {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64]},
    "Wav2Vec2Model": {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, **SMALL},
}  # fmt: skip
VIDEO = ("r3d_18", "swin3d_t", "mc3_18", "mvit_v1_b", "s3d")  # of torchvision: inputs of eight frames


def of_timm(name: str) -> tuple[nn.Module, Any]:
    """A network of timm, and two images of the size that it is made for."""
    import timm

    model = timm.create_model(name)
    return model, torch.randn(2, *model.default_cfg["input_size"])


def of_transformers(name: str) -> tuple[nn.Module, Any]:
    """A small random network of transformers, and its inputs by keyword."""
    import transformers

    kind = getattr(transformers, name)
    ids, image = torch.randint(0, 99, (2, 12)), torch.randn(2, 3, 64, 64)
    by_family = (
        {"pixel_values": image} if ("For" in name and "Image" in name) or "Segformer" in name else {"input_ids": ids}
    )
    if name.startswith("T5"):
        by_family["decoder_input_ids"] = ids
    if name.startswith("Wav2Vec2"):
        by_family = {"input_values": torch.randn(2, 8000)}
    return kind(kind.config_class(**TRANSFORMERS[name])), by_family


def of_torchvision(name: str) -> tuple[nn.Module, Any]:
    """A network of torchvision, of any task but detection, and two small inputs."""
    import torchvision.models as models

    options = {"weights_backbone": None} if "_resnet" in name or "_mobilenet_v3" in name else {}
    side = 299 if name == "inception_v3" else 224 if name.startswith(("vit", "swin", "maxvit")) else 64
    frames = (8,) if name in VIDEO else ()
    return models.get_model(name, weights=None, **options), torch.randn(2, 3, *frames, side, side)


LIBRARIES: dict[str, Callable[[str], tuple[nn.Module, Any]]] = {
    "timm": of_timm, "transformers": of_transformers, "torchvision": of_torchvision,
}  # fmt: skip


def randomise(model: nn.Module) -> None:
    """Make statistics, and weights that begin as constants (such as layer scale), matter."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean += 0.1 * torch.randn_like(module.running_mean)
                module.running_var *= 0.5 + torch.rand_like(module.running_var)
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter.numel() < 2 or parameter.std() == 0):
                parameter += 0.2 * torch.randn_like(parameter)


def tried(network: str) -> Row:
    """A row of what became of a network, "library:name", or why nothing did."""
    library, _, name = network.partition(":")
    torch.manual_seed(0)
    try:
        model, inputs = LIBRARIES[library](name)
    except ModuleNotFoundError as error:
        raise NeuronMergingError(missing(error.name)) from error
    model.eval()
    randomise(model)
    row: Row = {"network": network, "ratio": RATIO, "parameters": count_parameters(model)}
    config = ShrinkConfig(ratio=RATIO, compensation="prune", coupled=True)
    start = time.perf_counter()
    try:
        small, report = shrink(model, example_input=inputs, config=config)
    except NeuronMergingError as error:
        return row | {"why_not": str(error)}
    seconds = round(time.perf_counter() - start, 1)
    survey = find_spaces(model, inputs)
    reasons = [why for why in report.left_out.values() if why != "it is an output of the network"]
    return row | {
        "left": report.params[1], "spaces": len(report.units), "own_class": not isinstance(small, fx.GraphModule),
        "error_at_0": error_of(survey, whole(survey), "prune", config), "seconds": seconds,
        "whole": sorted(set(reasons)),
    }  # fmt: skip


def whole(survey: Survey) -> dict[Space, Tensor]:
    """All indices of all spaces."""
    return {space: torch.arange(space.size) for space in survey.spaces}


def error_of(survey: Survey, keep: Mapping[Space, Tensor], kind: str, config: ShrinkConfig) -> float:
    """The largest change of an output, as a share of the largest one, when a method keeps these indices [P] of spaces."""
    small, _ = METHODS[kind].run(survey, keep, config, Source(survey.network, config))
    error = largest_error(run(small.model, survey.network), run(survey.network.model, survey.network))
    return float(f"{error:.1e}")


def table(measured: Sequence[Row]) -> str:
    """results/families.md."""
    measured = sorted({row["network"]: row for row in measured}.values(), key=lambda row: row["network"])
    lines = [
        [row["network"], f"{row['parameters']:,}", f"{100 * row['left'] / row['parameters']:.1f} %", str(row["spaces"]),
         "yes" if row["own_class"] else "no", f"{row['error_at_0']:.0e}", f"{row['seconds']:.1f}"]
        for row in measured if "left" in row
    ]  # fmt: skip
    refused = [f"- {row['network']}: {row['why_not']}" for row in measured if "why_not" in row]
    smaller = sum(row["left"] < row["parameters"] for row in measured if "left" in row)
    return "\n".join(
        [
            "# Networks of other libraries, pruned as torch.export sees them", "",
            "Made by `python -m experiments.families` from `zoo/families.jsonl`. Random weights. Of every space",
            f"{RATIO:.0%} are dropped: neurons, channels that layers share, attention heads, feed-forward widths. *Own class*:",
            "the result is of the network's own class; otherwise it is a `torch.fx.GraphModule`. *Error at 0 %*: largest",
            "change of an output, as a share of the largest one, when nothing is dropped. *Seconds*: of all of it.",
            "",
            f"{smaller} of {len(measured)} networks get smaller.", "",
            markdown(["network", "parameters", "left", "spaces", "own class", "error at 0 %", "seconds"], lines), "",
            *refused,
        ]
    ).rstrip() + "\n"  # fmt: skip


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Try the networks that no row is there of, rebuild the table."""
    parser = Parser(prog="python -m experiments.families", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="LIBRARY:NAME", help="[all of transformers that are listed here]")
    args = parser.parse_args(argv)
    names = args.names or [f"transformers:{name}" for name in TRANSFORMERS]
    unknown = next((name for name in names if name.partition(":")[0] not in LIBRARIES), None)
    if unknown is not None:
        raise NeuronMergingError(f"{unknown}: give LIBRARY:NAME, with a library of {', '.join(LIBRARIES)}")
    measure(names, tried, PATH)
    write_text(TABLE, table(rows.load(PATH)))
    print(f"wrote {TABLE}")
    return 0


def measure(names: Sequence[str], tried: Callable[[str], Row], path: Path) -> None:
    """Try the networks that the rows in `path` do not have yet, and add theirs; one that was not tried is tried again."""
    known = (row for row in rows.load(path) if "not_tried" not in row)
    done = rows.keys(known, path, lambda row: row["network"])
    for name in tqdm([name for name in names if name not in done], path.parent.name, leave=False, disable=None):
        rows.append(tried(name), path, key=lambda row: (row["network"], row.get("not_tried")))


if __name__ == "__main__":
    sys.exit(main())
