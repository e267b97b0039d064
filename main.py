"""Train, evaluate or time a model: ``python main.py --cfg FILE [flags]``, or the same under ``torchrun``.

What loads torch takes seconds, so it is imported where it is used: after the command line has been read.
"""

import argparse
import importlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from config import Config, build_config
from utils.bar import bar
from utils.command import Parser
from utils.errors import UserError, did_you_mean
from utils.launchers import is_torchrun, understand_launcher
from utils.names import printable
from utils.processes import CTRL_C_STATUS, PEER_LOST_STATUS, end_with_parent
from utils.settings import Given, listing
from utils.surroundings import settle

APEX_AMP = "--amp-opt-level {}: apex.amp has been removed from NVIDIA apex; use the native mixed precision instead: {}"

FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "--data-path": ("DATA.DATA_PATH", dict(metavar="DIR", help="folder of the data set (docs/data.md)")),
    "--zip": ("DATA.FORMAT", dict(action="store_const", const="zip", help="read train.zip, train_map.txt, and val")),
    "--cache-mode": ("DATA.CACHE_MODE", dict(metavar="MODE", help="read the data into memory first: no, part or full")),
    "--batch-size": ("DATA.BATCH_SIZE", dict(metavar="N", type=int, help="images of a process in a micro-batch")),
    "--resume": ("MODEL.RESUME", dict(metavar="FILE", help="checkpoint to carry on from, or to evaluate")),
    "--force-resume": ("TRAIN.FORCE_RESUME", dict(action="store_true", help="carry on with other data or settings")),
    "--pretrained": (
        "MODEL.PRETRAINED",
        dict(metavar="WEIGHTS", help="where to start from: a file, a folder, timm/NAME, a URL ..."),
    ),
    "--accumulation-steps": ("TRAIN.ACCUMULATION_STEPS", dict(metavar="N", type=int, help="micro-batches of a step")),
    "--use-checkpoint": ("TRAIN.USE_CHECKPOINT", dict(action="store_true", help="recompute to save memory")),
    "--disable_amp": ("AMP", dict(action="store_const", const="none", help="compute in single precision")),
    "--report": ("TEST.REPORT", dict(action="store_true", help="--eval writes tables and a picture of its result")),
    "--optim": ("TRAIN.OPTIMIZER.NAME", dict(metavar="NAME", help="adamw, sgd, muon, lion, or another of timm's")),
    "--seed": ("SEED", dict(metavar="N", type=int, help="what every random choice is derived from")),
    "--output": ("OUTPUT", dict(metavar="DIR", help="results go to OUTPUT/MODEL.NAME/TAG")),
    "--tag": ("TAG", dict(metavar="NAME", help="name of the run")),
}
"""Flags that stand for a setting each, and how they are read."""

MODES = {"eval": "evaluate", "throughput": "throughput", "find_lr": "find_lr"}
"""Flags that ask for something else than training, and the module of ``engine`` that does it."""

SECONDS_FOR_RANK_0_TO_SPEAK = 5
"""torchrun ends all processes as soon as one has failed, so the silent ones wait."""


class Settings(argparse.Action):
    """Print the settings that have a word in them, and end; as ``--help`` does, whatever else is given."""

    def __call__(self, parser: argparse.ArgumentParser, namespace, word, option_string=None) -> NoReturn:
        with suppress(BrokenPipeError):  # whoever reads has seen enough
            print(listing(Config, word), end="", flush=True)
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The flags. One that is not given changes nothing, so none has a default."""
    p = Parser(
        prog="main.py",
        description="Train, evaluate or time CrossFormer, or any other model that timm knows.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog="ImageNet on 8 GPUs: torchrun --nproc_per_node 8 main.py --cfg configs/small.yaml --data-path /imagenet",
    )
    p.add_argument("--cfg", metavar="FILE", help="settings as YAML, for example configs/small.yaml")
    p.add_argument("--opts", metavar="KEY VALUE", nargs="+", action="extend", help="settings, for example AUG.MIXUP 0")
    p.add_argument("--settings", metavar="WORD", nargs="?", const="", action=Settings, help="print what can be set")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--eval", action="store_true", help="evaluate the checkpoint --resume FILE instead of training")
    mode.add_argument("--find-lr", action="store_true", help="try learning rates for a few steps and suggest one")
    mode.add_argument("--throughput", action="store_true", help="time the model on synthetic images; needs no data")

    p.add_argument(
        "--amp-opt-level", metavar="O0", help="of the removed apex.amp: O0 is --disable_amp; use AMP instead"
    )
    for name, (_, how) in FLAGS.items():
        p.add_argument(name, dest=name, **how)
    return p


def parse(arguments: list[str], followed: Sequence[Given] = ()) -> tuple[Config, str]:
    """The config and the mode (``train``, or one of MODES) that the command line asks for.

    What it leaves open is as in ``followed``.
    """
    p = parser()
    known, unknown = p.parse_known_args(arguments)
    if unknown:
        flags = re.findall(r"--[a-z][\w-]*", p.format_help())
        raise UserError(f"unknown flag {unknown[0]}{did_you_mean(unknown[0].split('=')[0], flags)}")
    given = vars(known)
    mode = next((mode for name, mode in MODES.items() if given.pop(name, False)), "train")
    cfg_file, opts = given.pop("cfg", ""), given.pop("opts", [])
    level = given.pop("amp_opt_level", None)
    if level == "O0":
        given["--disable_amp"] = "none"
    elif level is not None:
        native = {"O1": "--opts AMP bf16 (or fp16)", "O2": "--opts AMP bf16 (or fp16)"}.get(level)
        if native is None:
            raise UserError(f"--amp-opt-level {level} is not one of O0, O1, O2")
        raise UserError(APEX_AMP.format(level, native))
    flags = [(FLAGS[name][0], value, name) for name, value in given.items()]
    config = build_config(cfg_file, opts, flags, followed)
    if mode == "find_lr":
        check_find_lr(config)
    return config, mode


def check_find_lr(config: Config) -> None:
    """Refuse settings from which no search for a learning rate can begin."""
    if config.MODEL.RESUME:
        raise UserError("--find-lr begins as a new run does: leave out --resume, or name weights with --pretrained")
    if not config.TRAIN.BASE_LR:
        raise UserError("--find-lr begins at TRAIN.BASE_LR 0: give another")


def run(arguments: list[str]) -> int:
    """Do what the command line asks for; returns the exit status."""
    settle()
    understand_launcher()
    try:
        config, mode = parse(arguments)
        if int(os.environ.get("RANK", 0)) == 0:
            bar.start("loading PyTorch")
    except UserError as error:
        from utils import distributed

        raise distributed.AgreedError(str(error)) from error  # every rank reads the same command line
    from utils import distributed

    def rebuild(followed: list[Given]) -> Config:
        return parse(arguments, followed)[0]

    if mode == "train":
        train_until_stopped(config, rebuild)
    else:
        from utils.bulletin import Bulletin

        let_through(signal.SIGUSR1)
        engine = importlib.import_module(f"engine.{mode}")
        device = distributed.start(config.TRAIN.HANG_MINUTES)
        with Bulletin():
            if mode == "throughput":
                engine.run_throughput(config, device)
            else:
                from engine.following import follow_weights

                config = follow_weights(config, rebuild)
                if mode == "evaluate":
                    engine.run_evaluation(config, device)
                else:
                    engine.run_find_lr(config, device, arguments)
    distributed.stop()
    return 0


def train_until_stopped(config: Config, rebuild: Callable[[list[Given]], Config]) -> None:
    """Train; SIGTERM, SIGUSR1, SIGHUP and Ctrl-C save and end it, whatever it is at.

    Args:
        rebuild: see :func:`engine.following.follow_weights`.
    """
    from engine.stopping import StopRequest
    from utils import distributed

    with StopRequest() as stop:
        let_through(signal.SIGUSR1)
        if is_torchrun():
            end_with_parent(signal.SIGTERM)  # a launcher that was killed leaves no rank behind that trains on unseen
        try:
            from engine.following import follow_weights
            from engine.train import train

            device = distributed.start(config.TRAIN.HANG_MINUTES)
            train(follow_weights(config, rebuild), device, stop)
        except Exception as error:
            if distributed.world_size() > 1 and not stop.rescue and not isinstance(error, distributed.AgreedError):
                stop.outlast(error)  # training itself has done so already
            raise


def describe(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the exit status."""
    from engine.stopping import Stopped
    from utils import distributed

    match error:
        case distributed.AgreedError():
            # srun shows what all hosts say in one place, torchrun shows each host its own
            speaks = distributed.local_rank() == 0 if is_torchrun() else distributed.is_main()
            if not speaks:
                time.sleep(SECONDS_FOR_RANK_0_TO_SPEAK)
                return "", 2
            return f"error: {printable(str(error))}", 2
        case UserError():
            where = f" (rank {distributed.rank()})" if distributed.world_size() > 1 else ""
            return f"error{where}: {printable(str(error))}", 2
        case Stopped():
            text = "" if error.request.answered or not distributed.is_main() else error.request.describe()
            error.request.answer()
            return text, error.request.status
        case distributed.PeerLostError():
            return f"error (rank {distributed.rank()}): {printable(str(error))}", PEER_LOST_STATUS
    return "".join(traceback.format_exception(error)).rstrip(), 1  # a bug of ours


def explain(error: BaseException) -> int:
    """Say why it has ended; returns the exit status."""
    bar.stop()
    match error:
        case SystemExit():  # --help, --settings
            return error.code if isinstance(error.code, int) else 0
        case KeyboardInterrupt():
            text, status = "\nstopped", CTRL_C_STATUS
        case _:
            text, status = describe(error)
    with suppress(OSError):  # as when a terminal is closed: what is said there is in the log as well
        print(text, end="\n" if text else "", file=sys.stderr, flush=True)
    return status


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    try:
        return run(arguments)
    except BaseException as error:
        return explain(error)


def main_of_a_process(arguments: list[str]) -> NoReturn:
    """Run the command line and end the process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # Slurm may send it before anybody can answer
    try:
        status = run(arguments)
    except BaseException as error:
        # Here and not later: what its frames hold, as loader processes that are stuck, is not to be torn down
        leave(explain(error))
    leave(status)


def let_through(number: signal.Signals) -> None:
    """Let a signal come that was held back while the process began, at once if it is there already."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])


def leave(status: int) -> NoReturn:
    """End the process, with nothing torn down that could crash or wait: loader processes end with this one.

    Where other ranks wait for this one in a collective, torchrun ends them when it is gone.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # whoever was to read it is gone
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main_of_a_process(sys.argv[1:])
