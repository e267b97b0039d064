"""The house as CONTRIBUTING.md describes it: which room may import which, and what exists once."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

BELOW = {
    "main": {"config", "engine", "tasks", "utils"},
    "benchmarks": {"config", "engine", "tasks", "models", "data", "optimizer", "lr_scheduler", "utils"},
    "engine": {"config", "tasks", "models", "data", "optimizer", "lr_scheduler", "utils"},
    "tasks": {"config", "models", "data", "utils"},
    "optimizer": {"utils"},
    "lr_scheduler": {"utils"},
    "models": {"utils"},
    "data": {"utils"},
    "config": {"config_training", "utils"},
    "config_training": {"utils"},
    "reports": {"utils"},
    "trials": {"config", "reports", "utils"},
    "utils": set(),
}
"""The rooms, and what each may import besides itself. Commands may import all of them, and nobody imports commands."""
COMMANDS = {"main", "predict", "scripts", "hubconf", "crossformer_backend"}
MOST_LINES = 450


def sources() -> list[Path]:
    rooms = [folder for folder in ROOT.iterdir() if folder.name in {*BELOW, *COMMANDS}]
    paths = [*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))]
    return sorted(path.relative_to(ROOT) for path in paths)


def room_of(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else path.stem


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_point_one_way(path):
    room = room_of(path)
    rooms = {*BELOW, *COMMANDS, "tests", "examples"} - {room}
    allowed = BELOW.get(room, {*BELOW} - {"main"})
    assert imported(path) & rooms <= allowed


def test_no_file_is_long():
    long = {
        str(path): lines for path in sources() if (lines := len((ROOT / path).read_text().splitlines())) > MOST_LINES
    }
    assert not long


def test_the_step_exists_once():
    calls = [str(path) for path in sources() if ".backward(" in (ROOT / path).read_text()]
    assert calls == ["engine/step.py"]


def test_the_loop_fits_on_a_screen():
    (loop,) = [
        node
        for node in ast.parse((ROOT / "engine/train.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "take_steps"
    ]
    assert loop.end_lineno - loop.lineno < 60
    assert len(loop.args.args) <= 5
