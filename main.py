"""Train, evaluate or time a model: ``python main.py --cfg FILE [flags]``, or the same under ``torchrun``."""

import argparse
import importlib
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from typing import NoReturn

from config import build_config
from engine.stopping import Stopped, StopRequest, is_launched
from utils import distributed
from utils.command import Parser
from utils.compat import actions_of
from utils.errors import UserError, did_you_mean
from utils.names import printable
from utils.processes import CTRL_C_STATUS, end_with_parent
from utils.surroundings import settle

APEX_AMP = "--amp-opt-level {}: apex.amp has been removed from NVIDIA apex; use the native mixed precision instead: {}"


SECONDS_FOR_RANK_0_TO_SPEAK = 5
"""torchrun ends all processes as soon as one has failed, so the silent ones wait."""


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
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--eval", action="store_true", help="evaluate the checkpoint --resume FILE instead of training")
    mode.add_argument("--throughput", action="store_true", help="time the model on synthetic images; needs no data")

    def flag(name: str, key: str, **kwargs) -> None:
        p.add_argument(name, dest=key, **kwargs)

    flag("--data-path", "DATA.DATA_PATH", metavar="DIR", help="folder of the data set (docs/data.md)")
    flag("--zip", "DATA.FORMAT", action="store_const", const="zip", help="read train.zip with train_map.txt, and val")
    flag("--cache-mode", "DATA.CACHE_MODE", metavar="MODE", help="read the data into memory first: no, part or full")
    flag("--batch-size", "DATA.BATCH_SIZE", metavar="N", type=int, help="images of a process in a micro-batch")
    flag("--resume", "MODEL.RESUME", metavar="FILE", help="checkpoint to carry on from, or to evaluate")
    flag("--force-resume", "TRAIN.FORCE_RESUME", action="store_true", help="carry on with other data or settings")
    flag("--pretrained", "MODEL.PRETRAINED", metavar="FILE", help="checkpoint whose weights to start from")
    flag("--accumulation-steps", "TRAIN.ACCUMULATION_STEPS", metavar="N", type=int, help="micro-batches of a step")
    flag(
        "--use-checkpoint", "TRAIN.USE_CHECKPOINT", action="store_const", const="full", help="recompute to save memory"
    )
    flag("--disable_amp", "AMP", action="store_const", const="none", help="compute in single precision")
    p.add_argument(
        "--amp-opt-level", metavar="O0", help="of the removed apex.amp: O0 is --disable_amp; use AMP instead"
    )
    flag("--report", "TEST.REPORT", action="store_true", help="--eval writes tables and a picture of its result")
    flag("--optim", "TRAIN.OPTIMIZER.NAME", metavar="NAME", help="adamw, sgd, fused_adam or fused_lamb")
    flag("--seed", "SEED", metavar="N", type=int, help="what every random choice is derived from")
    flag("--output", "OUTPUT", metavar="DIR", help="results go to OUTPUT/MODEL.NAME/TAG")
    flag("--tag", "TAG", metavar="NAME", help="name of the run")
    return p


def parse(arguments: list[str]):
    """The config and the mode (``train``, ``evaluate`` or ``throughput``) that the command line asks for."""
    p = parser()
    known, unknown = p.parse_known_args(arguments)
    if unknown:
        flags = [option for action in actions_of(p) for option in action.option_strings]
        raise UserError(f"unknown flag {unknown[0]}{did_you_mean(unknown[0].split('=')[0], flags)}")
    given = vars(known)
    mode = "evaluate" if given.pop("eval", False) else "throughput" if given.pop("throughput", False) else "train"
    cfg_file, opts = given.pop("cfg", ""), given.pop("opts", [])
    level = given.pop("amp_opt_level", None)
    if level == "O0":
        given["AMP"] = "none"
    elif level is not None:
        native = {"O1": "--opts AMP bf16 (or fp16)", "O2": "--opts AMP bf16 (or fp16)"}.get(level)
        if native is None:
            raise UserError(f"--amp-opt-level {level} is not one of O0, O1, O2")
        raise UserError(APEX_AMP.format(level, native))
    dashes = {action.dest: action.option_strings[0] for action in actions_of(p) if action.option_strings}
    flags = [(key, value, dashes[key]) for key, value in given.items()]
    return build_config(cfg_file, opts, flags), mode


def run(arguments: list[str]) -> int:
    """Do what the command line asks for; returns the exit status."""
    settle()
    try:
        config, mode = parse(arguments)
    except UserError as error:
        raise distributed.AgreedError(str(error)) from error  # every rank reads the same command line
    # Each import takes seconds, so only once the command line is right
    if mode == "train":
        return train_until_stopped(config)
    engine = importlib.import_module(f"engine.{mode}")
    (engine.run_evaluation if mode == "evaluate" else engine.run_throughput)(config, distributed.start())
    return 0


def train_until_stopped(config) -> int:
    """Train; SIGTERM, SIGUSR1, SIGHUP and Ctrl-C save and end it, whatever it is at."""
    with StopRequest() as stop:
        if is_launched():
            end_with_parent(signal.SIGTERM)  # a launcher that was killed leaves no rank behind that trains on unseen
        try:
            from engine.train import train

            train(config, distributed.start(), stop)
        except Exception as error:
            if distributed.world_size() > 1 and not stop.rescue and not isinstance(error, distributed.AgreedError):
                stop.outlast(error)  # training itself has done so already
            raise
    return 0


def explain(error: BaseException) -> int:
    """Say why it has ended; returns the exit status."""
    match error:
        case distributed.AgreedError():
            if not distributed.is_main():
                time.sleep(SECONDS_FOR_RANK_0_TO_SPEAK)
                return 2
            text, status = f"error: {printable(str(error))}", 2
        case UserError():
            where = f" (rank {distributed.rank()})" if distributed.world_size() > 1 else ""
            text, status = f"error{where}: {printable(str(error))}", 2
        case Stopped():
            text = "" if error.request.answered or not distributed.is_main() else error.request.describe()
            error.request.answer()
            status = error.request.status
        case KeyboardInterrupt():
            text, status = "\nstopped", CTRL_C_STATUS
        case SystemExit():  # --help
            return error.code if isinstance(error.code, int) else 0
        case _:  # a bug of ours
            text, status = "".join(traceback.format_exception(error)).rstrip(), 1
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
    try:
        status = run(arguments)
        distributed.stop()
    except BaseException as error:
        # Here and not later: what its frames hold, as loader processes that are stuck, is not to be torn down
        leave(explain(error))
    leave(status)


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
