"""The models outside the checkout: installed with pip, registered by torch, loaded by torch.hub."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from models.crossformer import VARIANTS


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that ``pip install .`` has put the package into."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site-packages")
    for name in ("pyproject.toml", "README.md", "LICENSE", "crossformer_backend.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "models", source / "models")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(source)]
    subprocess.run(pip, check=True)
    return target


def python(code: str, folder: Path, **variables) -> str:
    """What a program outside the checkout prints."""
    environment = {**os.environ, "PYTHONPATH": str(folder), **variables}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_package_registers_every_variant(installed):
    code = """
import crossformer, timm, torch
print(*timm.list_models("crossformer*"))
model = timm.create_model("crossformer_small", features_only=True)
print(*(tuple(f.shape) for f in model(torch.zeros(1, 3, 64, 64))))
"""
    models, shapes = python(code, installed).splitlines()
    assert models.split() == sorted(VARIANTS)
    assert shapes == "(1, 96, 16, 16) (1, 192, 8, 8) (1, 384, 4, 4) (1, 768, 2, 2)"
    installed_names = {path.name for path in installed.iterdir() if not path.name.startswith("__")}
    assert {"crossformer", "crossformer_backend.py"} == {n for n in installed_names if "dist-info" not in n}


@pytest.mark.parametrize(
    ("imports", "backend", "known"),
    [
        ("timm", "other,crossformer", True),
        pytest.param("timm", "", False, marks=pytest.mark.slow),
        pytest.param("torch, timm", "crossformer", True, marks=pytest.mark.slow),
        pytest.param("timm.models", "crossformer", True, marks=pytest.mark.slow),
    ],
)
def test_torch_registers_the_models_when_asked(installed, imports, backend, known):
    code = f"import {imports}; print(timm.is_model('crossformer_micro'))"
    assert python(code, installed, TORCH_BACKEND=backend).strip() == str(known)


@pytest.mark.slow
def test_torch_hub_loads_every_variant(tmp_path):
    code = f"""
import torch
for name in {sorted(VARIANTS)!r}:
    with torch.device("meta"):
        print(torch.hub.load({str(ROOT)!r}, name, source="local", num_classes=7).head.out_features)
"""
    assert python(code, tmp_path).split() == ["7"] * len(VARIANTS)
