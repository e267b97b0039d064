"""Train, evaluate or time a model: ``python main.py --cfg FILE [flags]``, or the same under ``torchrun``."""

import argparse
import importlib
import os
import sys
import time
import traceback

from config import build_config, output_dir
from utils import distributed
from utils.errors import Parser, UserError, did_you_mean, say_error
from utils.surroundings import settle

APEX_AMP = "--amp-opt-level {}: apex.amp has been removed from NVIDIA apex; use the native mixed precision instead: {}"


SECONDS_FOR_RANK_0_TO_SPEAK = 5
"""torchrun ends all processes as soon as one has failed, so the silent ones wait."""

LAUNCH = {"train": "train", "evaluate": "run_evaluation", "throughput": "run_throughput"}


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
    flag("--force-resume", "TRAIN.FORCE_RESUME", action="store_true", help="carry on although the data is another")
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
        flags = [option for action in p._actions for option in action.option_strings]
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
    dashes = {action.dest: action.option_strings[0] for action in p._actions if action.option_strings}
    flags = [(key, value, dashes[key]) for key, value in given.items()]
    return build_config(cfg_file, opts, flags), mode


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    config = mode = None
    settle()
    try:
        try:
            config, mode = parse(arguments)
        except UserError as error:
            raise distributed.AgreedError(str(error)) from error  # every rank reads the same command line
        launch = importlib.import_module(f"engine.{mode}")  # takes seconds, so only once the command line is right
        device = distributed.start()
        getattr(launch, LAUNCH[mode])(config, device)
        return 0
    except distributed.AgreedError as error:
        if distributed.is_main():
            say_error(error)
        else:
            time.sleep(SECONDS_FOR_RANK_0_TO_SPEAK)
        return 2
    except UserError as error:
        where = f" (rank {distributed.rank()})" if distributed.world_size() > 1 else ""
        say_error(error, where)
        return 2
    except KeyboardInterrupt:
        if distributed.is_main():
            saved = mode == "train" and (output_dir(config) / "checkpoints" / "last.pth").exists()
            carry_on = "; the same command carries on from the last save" if saved and config.TRAIN.AUTO_RESUME else ""
            print(f"\nstopped{carry_on}", file=sys.stderr, flush=True)
        return 130
    except Exception:  # a bug of ours: let main end the process even where other ranks wait for it
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    if status and distributed.world_size() > 1:
        os._exit(status)  # other ranks may be waiting in a collective: torchrun ends them when this one is gone
    distributed.stop()
    sys.exit(status)
