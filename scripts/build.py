"""How the wheel gets neuron_merging/decompose.py, a link to ../decompose.py, from sources in which links are no links."""

from pathlib import Path

from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """setuptools' own, except that it copies the file that the link leads to: pip unpacks links in a zip as text."""

    def build_module(self, module: str, module_file: str, package: str) -> object:
        """Copy one module to where the wheel is put together."""
        if (package, module) == ("neuron_merging", "decompose"):
            module_file = str(Path(__file__).resolve().parents[1] / "decompose.py")
        return super().build_module(module, module_file, package)
