"""Registers CrossFormer with timm in programs that know nothing of it: ``TORCH_BACKEND=crossformer python train.py``.

torch calls :func:`autoload` when it is imported, as it does for every extension that is installed. The program may be
in the middle of importing timm at that moment, so the models are registered when timm's own are.
"""

import importlib.abc
import importlib.util
import os
import sys


def autoload() -> None:
    """Wait for timm when ``TORCH_BACKEND``, a list with commas, names crossformer."""
    if "crossformer" in os.environ.get("TORCH_BACKEND", "").split(","):
        sys.meta_path.insert(0, _AfterTimmsModels())


class _AfterTimmsModels(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname != "timm.models":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:
            execute(module)
            import crossformer  # noqa: F401

        spec.loader.exec_module = execute_and_register
        return spec
