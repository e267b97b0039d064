"""The versions that are allowed, and those that the tests run with."""

import ast
import tomllib
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def lines(name: str) -> list[str]:
    stripped = (line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in stripped if line and not line.startswith(("#", "-r "))]


def pins(name: str) -> dict[str, Version]:
    """The version of each package of a file with exact ones."""
    pairs = (line.split("==") for line in lines(name))
    return {canonicalize_name(package): Version(version) for package, version in pairs}


FILES = ("requirements.txt", "requirements-quickstart.txt", "requirements-dev.txt", "requirements-tools.txt")
REQUIRED = [Requirement(line) for name in FILES for line in lines(name)]
ALLOWED = {canonicalize_name(requirement.name): requirement for requirement in REQUIRED}


def least(requirement: Requirement) -> Version:
    return next(Version(s.version) for s in requirement.specifier if s.operator == ">=")


@pytest.mark.parametrize("package", ALLOWED)
def test_the_oldest_are_the_least_that_are_allowed(package):
    """A bound that is lowered without being tried, or raised while the old version is still what is tried."""
    assert pins("constraints-oldest.txt")[package] == least(ALLOWED[package])
    assert pins("constraints.txt")[package] in ALLOWED[package].specifier


def test_the_package_allows_what_the_trainer_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier == ALLOWED[canonicalize_name(requirement.name)].specifier, requirement.name


EXTRAS = {"onnx", "onnxruntime", "optuna", "schedulefree", "wandb", "nvidia", "triton"}
"""What is imported only where somebody asks for it, with an error of our own where it is missing; and Triton, which
comes with torch's builds for GPUs."""


def test_running_needs_no_package_of_the_tests():
    """What the rooms and the scripts import is in requirements.txt; only the quick start's digits need scikit-learn."""
    ours, installed = {path.stem for path in ROOT.iterdir()}, packages_distributions()
    rooms = [path for path in ROOT.iterdir() if (path / "__init__.py").exists()] + [ROOT / "scripts"]
    for path in [*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))]:
        files = ["requirements.txt", *(["requirements-quickstart.txt"] if path.name == "make_digits.py" else [])]
        allowed = {canonicalize_name(Requirement(line).name) for file in files for line in lines(file)}
        modules = imported(ast.parse(path.read_text(encoding="utf-8"))) & installed.keys()
        for module in modules - ours - EXTRAS:
            assert allowed & set(map(canonicalize_name, installed[module])), f"{path} imports {module}"


def imported(tree: ast.AST) -> set[str]:
    """The packages that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names
