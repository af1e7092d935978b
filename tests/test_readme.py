"""The README's own words: its Python example runs as written, and the commands and links of all documents are right."""

import re
import shlex
from pathlib import Path

import pytest

import main
from tests.conftest import ROOT, SCRIPTS

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").rglob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_python_examples_run(capsys):
    example, pieces = blocks("python")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert "0 -> 4" in out and "16 of 32" in out and "4 -> 9" in out
    assert "9 stays whole: its output is an output of the network" in out
    assert out.endswith("torch.Size([1, 10])\n")
    exec(compile(pieces, "README.md", "exec"), names)
    assert [w.shape for w in names["small"].parameters()] == [w.shape for w in names["merged"].parameters()]


def test_the_commands_are_those_the_program_has():
    found = [block for path in DOCUMENTS for block in blocks("sh", path.read_text(encoding="utf-8"))]
    commands = [shlex.split(line, comments=True) for block in found for line in block.splitlines() if line]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands:
        if command[0] == "make":
            assert set(command[1:]) <= targets
        elif command[0] == "bash":
            ours = command[: command.index("--")] if "--" in command else command
            flags = {part for part in ours[2:] if part.startswith("-")}
            assert flags <= {*SCRIPTS[Path(command[1]).stem].split()}
        elif command[:2] == ["python", "main.py"]:
            main.check(main.parser().parse_args(command[2:]))
        else:
            raise AssertionError(command)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_linked_is_there(path):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    gone = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not gone
