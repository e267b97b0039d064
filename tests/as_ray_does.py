"""Runs the wrapper for Ray Train that docs/clusters.md has, where Ray is not installed: ``... FLAGS OF MAIN.PY``.

Each process is a worker of Ray's: the process group is there before the wrapper is called, in a thread that is not the
main one, and it is used afterwards.
"""

import gc
import os
import signal
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
SECONDS_TO_END = 3
"""For threads that look once in a second whether the run is over."""


def wrapper() -> str:
    """Take the wrapper out of the document, its checkout being this one."""
    section = (ROOT / "docs" / "clusters.md").read_text().partition("\n## Ray Train\n")[2].partition("\n## ")[0]
    code = [line[4:] for line in section.splitlines() if not line or line.startswith("    ")]
    return "\n".join(code).replace("/shared/crossformer", str(ROOT))


class TorchTrainer:
    """What stands in for Ray's."""

    def __init__(self, train, *, train_loop_config, torch_config, scaling_config, run_config):
        self.train, self.documented = train, train_loop_config

    def fit(self) -> None:
        """Do as Ray does in each worker, with the flags of this process."""
        dist.init_process_group("gloo")
        handlers = [signal.getsignal(number) for number in signal.valid_signals()]
        self.call({"arguments": sys.argv[1:]})
        self.check_errors()
        assert handlers == [signal.getsignal(number) for number in signal.valid_signals()]
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == int(os.environ["WORLD_SIZE"])
        gc.collect()  # a thread that writes checkpoints ends with what they are of
        deadline = time.monotonic() + SECONDS_TO_END
        while threading.active_count() > 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        print(f"threads: {[thread.name for thread in threading.enumerate()]}")
        import main

        main.parse(self.documented["arguments"])
        dist.destroy_process_group()
        main.leave(0)  # to tear all down would take longer than the rest

    def call(self, config: dict) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.train, config).result()

    def check_errors(self) -> None:
        """See that a mistake leaves the wrapper as the error that it is."""
        from utils.errors import UserError

        try:
            self.call({"arguments": ["--nonsense"]})
        except UserError as error:
            print(f"error: {error}")


if __name__ == "__main__":
    del os.environ["TORCHELASTIC_RUN_ID"]  # of what has started this process
    for name in ("ray", "ray.train", "ray.train.torch"):
        sys.modules[name] = types.ModuleType(name)
    for name in ("FailureConfig", "RunConfig", "ScalingConfig", "TorchConfig"):
        home = sys.modules["ray.train.torch" if name == "TorchConfig" else "ray.train"]
        setattr(home, name, types.SimpleNamespace)
    sys.modules["ray.train.torch"].TorchTrainer = TorchTrainer
    sys.path[0] = str(ROOT)  # where the script with the wrapper is
    exec(wrapper(), {})
