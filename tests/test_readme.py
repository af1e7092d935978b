"""The documents hold to the code: the README's Python examples run as written, commands, flags, files and links exist."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import main
from neuron_merging import cli
from neuron_merging.methods import METHODS
from tests.conftest import ROOT, SCRIPTS

DOCUMENTS = [
    *sorted(ROOT.glob("*.md")), ROOT / "pretrained" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").rglob("*.md")),
]  # fmt: skip
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_python_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example, reload, pieces = blocks("python")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    printed, shown = capsys.readouterr().out, blocks("text")[0]

    def lasting(text: str) -> list[str]:  # not the seconds, the memory, and the cosines of random weights
        return [re.sub(r" 0\.\d{3}$", "", line) for line in text.splitlines()[:-1]]

    assert lasting(printed) == lasting(shown)
    seconds = r"[\d.]+ s, peak memory of the whole process [\d,]+ MB"
    assert re.fullmatch(seconds, printed.splitlines()[-1]) and re.fullmatch(seconds, shown.splitlines()[-1])
    for code in (reload, pieces):
        exec(compile(code, "README.md", "exec"), names)
    shapes = [w.shape for w in names["small"].parameters()]
    assert [w.shape for w in names["loaded"].parameters()] == shapes
    assert [w.shape for w in names["merged"].parameters()] == shapes


def commands() -> list[list[str]]:
    found = [block for path in DOCUMENTS for block in blocks("sh", path.read_text(encoding="utf-8"))]
    lines = [shlex.split(line, comments=True) for block in found for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_commands_are_those_the_program_has():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands():
        while re.fullmatch(r"\w+=.*", command[0]):  # variables of the environment
            command = command[1:]
        if command[0] == "make":
            assert set(command[1:]) <= targets
        elif command[0] == "bash":
            ours = command[: command.index("--")] if "--" in command else command
            flags = {part for part in ours[2:] if part.startswith("-")}
            assert flags <= {*SCRIPTS[Path(command[1]).stem].split()}
        elif command[:2] == ["python", "main.py"]:
            main.check(main.parser().parse_args(command[2:]))
        elif command[0] == "neuron-merging":
            cli.check(cli.parser().parse_args(command[1:]))
        elif command[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(command[2])
        else:
            assert command in (["pip", "install", "."], ["pip", "install", "-e", ".[dev]"]), command


def test_the_flags_and_methods_in_the_readme_are_there():
    flags = {
        flag for parser in (main.parser(), cli.parser()) for action in parser._actions for flag in action.option_strings
    }
    assert set(re.findall(r"`(--[a-z-]+)", README)) <= flags
    for name in re.findall(r"^\| `\"([a-z-]+)\"`", README, re.MULTILINE):
        assert name in METHODS


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_files_in_the_text_are_there(path):
    """Of Python files and folders in the text; a bare name may be anywhere."""
    named = re.findall(r"`((?:[\w.]+/)*\w+(?:\.py|/))`", path.read_text(encoding="utf-8"))
    made = {"saves/", ".venv/", "saved_models/"}  # by commands
    gone = [n for n in named if not (ROOT / n).exists() and not any(ROOT.glob(f"*/**/{n}")) and n not in made]
    assert not gone


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_is_linked_is_there(path):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    gone = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not gone
