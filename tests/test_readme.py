"""The README's own words: its Python example runs as written, and its commands are spelled as the program takes them."""

import re
import shlex

import main
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


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
    commands = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines() if line]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands:
        if command[0] == "make":
            assert set(command[1:]) <= targets
        elif command[0] == "bash":
            assert (ROOT / command[1]).is_file()
        elif command[:2] == ["python", "main.py"]:
            main.check(main.parser().parse_args(command[2:]))
        else:
            raise AssertionError(command)
