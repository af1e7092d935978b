"""Who may import whom, read off the import statements: downwards only, and nothing in a circle."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from tests.conftest import ROOT

LAYERS = (  # of what stands in one layer, nothing imports another
    "errors decompose memory",
    "files config running",
    "graph linalg synthetic",
    "counting alike",
    "compensation checks",
    "baselines ratios restore",
    "widths",
    "methods report",
    "plan",
    "shrink",
    "checkpoint accuracy export",
    "benchmark loading",
    "images commandline",
    "cli neuron_merging",  # the package's own __init__.py: its public names
    "models data",
    "experiments",
    "main",
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer.split()}
OURS = ("neuron_merging", "models", "data", "experiments")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for folder in OURS for path in sorted((ROOT / folder).rglob("*.py"))}
FILES["main"] = ROOT / "main.py"


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import statement, wherever that stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not read here"
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= within & FILES.keys()
            names |= {node.module} if within - FILES.keys() else set()
    return names


def part(module: str) -> str:
    """What has a place in `LAYERS`: a module or folder of the package, or all of models, data or experiments."""
    first, *rest = module.split(".")
    return rest[0] if first == "neuron_merging" and rest else first


IMPORTS = {module: imported(path) & FILES.keys() for module, path in FILES.items()}


def test_every_module_has_its_layer():
    assert {part(module) for module in FILES} == RANK.keys()


def test_imports_go_downwards():
    upwards = [
        f"{module} imports {other}"
        for module in FILES
        for other in IMPORTS[module]
        if part(other) != part(module) and RANK[part(other)] >= RANK[part(module)]
    ]
    assert not upwards


def test_no_circles():
    tuple(TopologicalSorter(IMPORTS).static_order())  # raises CycleError, which names one


def test_the_papers_method_needs_pytorch_only():
    assert {name.split(".")[0] for name in imported(ROOT / "decompose.py")} - sys.stdlib_module_names == {"torch"}


def test_networks_say_nothing_of_pruning():
    for path in (ROOT / "models").glob("*.py"):
        text = re.sub("neuron_?merging", "", path.read_text(encoding="utf-8").lower())
        assert "prun" not in text and "merg" not in text
        assert {name for name in imported(path) if name.startswith("neuron_merging")} <= {"neuron_merging.errors"}


def test_the_top_level_holds_two_files_of_python():
    assert {path.name for path in ROOT.glob("*.py")} == {"main.py", "decompose.py"}
