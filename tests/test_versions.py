"""The versions that are allowed, and those that the tests run with."""

import tomllib

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


REQUIRED = map(Requirement, lines("requirements.txt") + lines("requirements-dev.txt"))
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
