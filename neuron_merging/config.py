"""All options for making a network smaller, each written once: `ShrinkConfig`.

A field is a keyword argument of `shrink`, a flag of both command lines and a key of a result row. Its metadata says what the
flags are called, what their help is and how their text is parsed. `add_flags` and `from_flags` make a config of a command line.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, TypeVar

from neuron_merging.errors import NeuronMergingError

Ratio = float | Mapping[str, float] | Sequence[int]  # for all units, by layer name or glob, or the kept widths
RIDGE = 3e-2  # λ of restoration (ours), for all networks and ratios
CHOSEN_WIDTHS = ("auto", "quick")  # rules that choose the widths (ours, widths/)

Config = TypeVar("Config", bound="ShrinkConfig")


def option(default: Any, *flags: str, help: str, row: str | None = None, **how: Any) -> Any:
    """A field with its flags. row: its key in a result row, if not its name. how: arguments for `add_argument`."""
    return field(default=default, metadata={"flags": flags, "help": help, "row": row, "how": how})


def changed(config: type, name: str, default: Any) -> Any:
    """A copy of the field `name` of `config`, with another default."""
    original = next(f for f in fields(config) if f.name == name)
    return field(default=default, metadata=original.metadata)


def layer_names(text: str) -> tuple[str, ...]:
    """conv1,layer1.* → a tuple of names, for an `argparse` type."""
    return tuple(text.split(","))


def numbers_by_name(text: str) -> dict[str, float]:
    """NAME=NUMBER,… → a dict, for an `argparse` type."""
    try:
        parts = [part.partition("=") for part in text.split(",")]
        return {name.strip(): float(value) for name, _, value in parts}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=NUMBER, with commas between several") from None


def numbers(text: str) -> tuple[float, ...]:
    """0.49,0.48,0.45 → a tuple, for an `argparse` type."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number for every channel, such as 0.49,0.48,0.45") from None


def shares_text(budget: Mapping[str, float] | None) -> str | None:
    """{"params": 0.5} → params=0.5, as the command line has it."""
    return budget and ",".join(f"{name}={share:g}" for name, share in budget.items())


def kept_widths(text: str) -> str | tuple[int, ...]:
    """N,N,… → a tuple of kept widths; the name of a rule stays as it is. For an `argparse` type."""
    if text in ("published", "uniform", *CHOSEN_WIDTHS):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither published, uniform, auto, quick nor numbers with commas between"
        ) from None


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig:
    """How a network is made smaller. Raises NeuronMergingError for values that make no sense.

    ratio: the share of neurons to drop in every unit; or a dict of shares by layer name or glob, where other layers stay
    whole; or a list of the kept widths.
    compensation: a name in methods.METHODS. criterion: a name in decompose.CRITERIA, or "auto" (widths/).
    widths: "uniform" does what `ratio` says. "auto" and "quick" choose widths with at most the parameters and MACs that the
    ratio would leave, or within `budget`.
    budget: the shares to keep, such as {"params": 0.5, "macs": 0.4}.
    multiple: every width is a multiple of it, or the full width. drop_blocks: the choice may leave residual blocks out.
    coupled: also drop what several layers share; False: the paper's units only; None: if the method has a form for it.
    ignore: layer names or globs that stay whole.
    threshold, lamda: t and λ of merging.
    probe, probe_samples, seed: kind, number and seed of the made-up inputs of restoration and of the choice (synthetic.make).
    ridge: λ of their regressions.
    """

    ratio: Ratio = option(
        0.5, "--pruning-ratio", type=float, metavar="R", help="share of neurons to drop, in [0, 1) [0.5]"
    )
    compensation: str = option(
        "restore", "--model-type", row="type", metavar="TYPE",
        help="original (nothing is dropped); prune, merge (the published form), merge-derived; restore (ours); lbyl, fold (of"
        " other papers); auto (ours: the one of all these whose outputs are nearest to the original's); prune-bn, merge-bn"
        " (BatchNorm measured again on real images) [original]",
    )  # fmt: skip
    criterion: str = option(
        "l2-norm", "--criterion",
        help="which neurons stay: l1-norm, l2-norm, l2-GM, or auto (ours: those that explain most) [%(default)s]",
    )  # fmt: skip
    widths: str | tuple[int, ...] = option(
        "uniform", "--widths", row="widths_rule", type=kept_widths, metavar="W",
        help="uniform (the ratio in every unit), N,N,… (a width for each unit), published (the paper's list for VGG-16, else"
        " uniform), auto (ours: chosen at the same number of parameters and MACs), quick (a cheaper choice) [%(default)s]",
    )  # fmt: skip
    budget: Mapping[str, float] | None = option(
        None, "--budget", type=numbers_by_name, metavar="B",
        help="with --widths auto or quick: shares to keep, params=0.5 or macs=0.4 or both with a comma between"
        " [what the ratio leaves]",
    )  # fmt: skip
    multiple: int = option(
        1, "--multiple", type=int, metavar="N", help="make widths multiples of N, such as 8 [%(default)s]"
    )
    drop_blocks: bool = option(
        False, "--drop-blocks", action="store_true",
        help="with --widths auto or quick: whole residual blocks may be left out (ours)",
    )  # fmt: skip
    coupled: bool | None = option(
        None, "--coupled", action=argparse.BooleanOptionalAction,
        help="also drop what several layers share, such as residual streams and attention heads (ours) [yes, except by lbyl"
        " and fold, which have no form for it]",
    )  # fmt: skip
    ignore: Sequence[str] = option(
        (), "--ignore", type=layer_names, metavar="NAME,…", help="layer names or globs that stay whole"
    )
    threshold: float = option(
        0.1, "--threshold", type=float, metavar="T", help="least cosine similarity to merge [%(default)s]"
    )
    lamda: float = option(
        0.85, "--lamda", "--lambda", type=float, metavar="L",
        help="weight of the cosine against the distance of the biases [%(default)s]",
    )  # fmt: skip
    probe: str = option(
        "auto", "--probe",
        help="made-up inputs for restore and the choice of widths or neurons: leaves (images), pink or white (noise), or auto: "
        "leaves for convolutions with BatchNorm, else white [%(default)s]",
    )  # fmt: skip
    probe_samples: int | None = option(
        None, "--probe-samples", type=int, metavar="N",
        help="how many made-up inputs [256; if the first layer is linear, enough to give it 4096 rows]",
    )  # fmt: skip
    ridge: float = option(
        RIDGE, "--ridge", type=float, metavar="L", help="ridge λ of restore and of the choice [%(default)s]"
    )
    seed: int = option(1, "--seed", type=int, help="random seed of training, made-up inputs and fold [%(default)s]")

    def __post_init__(self) -> None:
        for name, value in (("threshold", self.threshold), ("lamda", self.lamda), ("ridge", self.ridge)):
            if not (isinstance(value, Real) or hasattr(value, "item")):
                raise NeuronMergingError(f"--{name} {value!r} is no number")
        samples = 256 if self.probe_samples is None else self.probe_samples
        for name, value in (("probe-samples", samples), ("seed", self.seed)):
            if not isinstance(value, Integral):
                raise NeuronMergingError(f"--{name} {value!r} is no whole number")
        if not -1 <= self.threshold <= 1:
            raise NeuronMergingError(f"--threshold {self.threshold} is no cosine: choose one in [-1, 1]")
        if not 0 <= self.lamda <= 1:
            raise NeuronMergingError(f"--lamda {self.lamda} is outside [0, 1]")
        if not 0 <= self.ridge < math.inf:
            raise NeuronMergingError(f"--ridge {self.ridge} has to be a number that is not negative")
        if samples < 2:
            raise NeuronMergingError(f"--probe-samples {samples} has to be at least 2")
        if not isinstance(self.multiple, Integral) or self.multiple < 1:
            raise NeuronMergingError(f"--multiple {self.multiple} has to be at least 1, and whole")
        if (self.budget is not None or self.drop_blocks) and self.widths not in CHOSEN_WIDTHS:
            raise NeuronMergingError("--budget and --drop-blocks are for --widths auto (or quick)")
        if self.budget is not None and not _are_shares(self.budget):
            raise NeuronMergingError(
                f"budget {self.budget}: say the shares to keep, such as params=0.5,macs=0.4 ({{'params': 0.5}} in Python)"
            )

    @property
    def chooses(self) -> bool:
        """Whether widths or neurons are chosen with the help of inputs."""
        return self.widths in CHOSEN_WIDTHS or self.criterion == "auto"

    @classmethod
    def from_flags(cls: type[Config], args: argparse.Namespace, **others: Any) -> Config:
        """The config of a parsed command line. `others` replace values that the command line has in another form."""
        values = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        return cls(**values | others)


def add_flags(
    group: argparse._ActionsContainer, config: type, names: Sequence[str] = (), default: Any = MISSING
) -> None:
    """Add the flags of a config's fields to a group of a parser.

    names: of the fields; all that have flags, if empty. default: for all of them, instead of each field's own.
    """
    for f in fields(config):
        if f.metadata.get("flags") and (not names or f.name in names):
            how = {
                "dest": f.name,
                "default": f.default if default is MISSING else default,
                "help": f.metadata["help"],
                **f.metadata["how"],
            }
            group.add_argument(*f.metadata["flags"], **how)


def row_key(f: Field) -> str:
    """What a field is called in a result row."""
    return f.metadata.get("row") or f.name


def _are_shares(budget: Any) -> bool:
    return (
        isinstance(budget, Mapping)
        and len(budget) > 0
        and set(budget) <= {"params", "macs"}
        and all(isinstance(share, Real) and 0 < share <= 1 for share in budget.values())
    )
