"""Bad input: exit status 2, one line that names the thing, no traceback, nothing lost.

One mistake of each kind goes through the real command line; the many variations call the same ``main`` in this process.
"""

import os
import re

import pytest
import torch
from conftest import TINY_RUN, write_digits

from main import main


@pytest.fixture
def error_of(capsys, tmp_path):
    """The error line of a command that must fail with status 2."""

    def run(*arguments) -> str:
        status = main([*map(str, arguments), "--output", str(tmp_path / "output")])
        lines = capsys.readouterr().err.splitlines()
        assert status == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


def test_help_names_every_flag(run_main):
    result = run_main("--help")
    flags = "--cfg --opts --batch-size --data-path --resume --pretrained --accumulation-steps --use-checkpoint --eval"
    for flag in flags.split():
        assert flag in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epocs", "3"], "error: unknown flag --epocs"),
        (["--cfg", "configs/smal.yaml"], "config file configs/smal.yaml cannot be read: No such file"),
        (["--opts", "TRAIN.EPOCS", "3"], "error: unknown setting TRAIN.EPOCS (--opts); did you mean TRAIN.EPOCHS?"),
        (["--cfg", "configs/micro.yaml"], "DATA.DATA_PATH is not set: give --data-path DIR"),
        (["--data-path", "/nowhere"], "DATA.DATA_PATH /nowhere is not a folder"),
        (["--throughput", "--opts", "MODEL.NAME", "crossformer_smal"], "did you mean crossformer_small?"),
        (
            ["--throughput", "--opts", "MODEL.CROSSFORMER.NUM_HEADS", "[5,6,12,24]"],
            "MODEL.CROSSFORMER.NUM_HEADS [5, 6, 12, 24]: 5 heads do not divide the width 96 of stage 1",
        ),
        (["--throughput", "--opts", "DATA.IMG_SIZE", "16"], "DATA.IMG_SIZE 16: the model does not take it"),
        (
            ["--throughput", "--opts", "TRAIN.OPTIMIZER.NAME", "fused_lamb", "MODEL.NAME", "crossformer_micro"],
            "fused_adam and fused_lamb: needs NVIDIA apex",
        ),
        pytest.param(
            ["--throughput", "--opts", "AMP", "tf32"],
            "AMP tf32: the device is cpu, which does not have it; use AMP bf16",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has it"),
        ),
        (
            ["--throughput", "--opts", "MODEL.NAME", "resnet18", "MODEL.DROP_PATH_RATE", "0"]
            + ["TRAIN.USE_CHECKPOINT", "selective"],
            "TRAIN.USE_CHECKPOINT selective: MODEL.NAME resnet18 is no CrossFormer; use full or none",
        ),
        (["--eval"], "--eval evaluates a checkpoint: give --resume FILE"),
    ],
)
def test_bad_command_line(error_of, arguments, message):
    assert message in error_of(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--opts", "TRAIN.EPOCS", "3"], "error: unknown setting TRAIN.EPOCS (--opts); did you mean TRAIN.EPOCHS?"),
        (["--data-path", "/nowhere"], "error: DATA.DATA_PATH /nowhere is not a folder"),
    ],
)
def test_a_user_sees_one_line(run_main, arguments, message):
    result = run_main(*arguments, ok=False)
    assert result.status == 2
    assert result.error.startswith(message)


def test_bad_data_folders(error_of, tmp_path, digits):
    def error(*arguments):
        return error_of(*TINY_RUN, "--data-path", tmp_path / "data", *arguments)

    (tmp_path / "data").mkdir()
    assert "has no folder 'train'; expected train/CLASS/*.jpg, train.zip with train_map.txt, ILSVRC2012" in error()
    write_digits(tmp_path / "data" / "train", 40)
    assert "has no folder 'val'" in error()
    (tmp_path / "data" / "validation").mkdir()
    assert "has no class folders" in error()
    write_digits(tmp_path / "data" / "validation", 10)
    (tmp_path / "data" / "train" / "empty").mkdir()
    assert f"class folder {tmp_path / 'data' / 'train' / 'empty'} holds no image" in error()
    (tmp_path / "data" / "train" / "empty").rmdir()
    unknown = (tmp_path / "data" / "validation" / "0").rename(tmp_path / "data" / "validation" / "unknown")
    assert re.search("class 'unknown' of .*unknown/0000.png is not one of the 10 classes of the training", error())
    unknown.rename(tmp_path / "data" / "validation" / "0")
    assert "40 training images, fewer than one step takes" in error("--batch-size", "64")
    assert "MODEL.NUM_CLASSES 7, but" in error("--opts", "MODEL.NUM_CLASSES", "7")
    assert "DATA.BATCH_SIZE 5 is odd" in error("--batch-size", "5", "--opts", "AUG.MIXUP", "0.8")
    assert "AUG.AUTO_AUGMENT wrong is not one that timm knows" in error("--opts", "AUG.AUTO_AUGMENT", "wrong")


def test_bad_checkpoints(error_of, tmp_path, digits):
    data = ("--cfg", "configs/micro.yaml", "--data-path", digits)

    def error(content):
        path = tmp_path / "given.pth"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        line = error_of(*data, "--eval", "--resume", path)
        assert str(path) in line
        return line

    import timm

    weights = timm.create_model("crossformer_micro", num_classes=10).state_dict()
    assert "is damaged or not a checkpoint" in error(b"not a checkpoint")
    assert "holds a list, not a checkpoint" in error([1])
    assert "holds no weights" in error({})
    assert "holds things that are not tensors" in error({"model": {"a": 1}})
    tiny = error(timm.create_model("crossformer_tiny", num_classes=10).state_dict())
    assert "it holds crossformer_tiny (embed_dim 64): set MODEL.NAME crossformer_tiny" in tiny
    missing = {key: value for key, value in weights.items() if "qkv" not in key}
    assert "lacks layers.0.blocks.0.attn.qkv.bias (16 weights missing, 0 left over)" in error(missing)
    a_thousand = timm.create_model("crossformer_micro", num_classes=1000).state_dict()
    assert "1000 classes in" in error(a_thousand)
    assert "start with --pretrained" in error(a_thousand)
    other = {"model": weights, "classes": [f"c{i}" for i in range(10)]}
    assert "was trained on other classes: its class 0 is 'c0', the data's '0'" in error(other)
    assert "is not a file" in error_of(*data, "--eval", "--resume", "/nowhere")
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    assert "holds no model, so a run cannot carry on from it" in error_of(*TINY_RUN, *data, "--resume", path)


def test_an_output_that_cannot_be_written(error_of, tmp_path, digits):
    (tmp_path / "output").write_text("a file is in the way")
    assert "cannot be written" in error_of(*TINY_RUN, "--data-path", digits)


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("flags", [["--eval", "--resume"], ["--pretrained"], ["--resume"]], ids=lambda f: f[0])
def test_a_malicious_checkpoint_is_refused_and_nothing_of_it_runs(run_main, tmp_path, digits, flags):
    """Fault 7."""
    path, proof = tmp_path / "bad.pth", tmp_path / "it_ran"
    torch.save({"model": {}, "config": Malicious(proof)}, path)
    result = run_main("--cfg", "configs/micro.yaml", "--data-path", digits, *flags, path, ok=False)
    assert result.status == 2
    assert "is refused: it asks to run code (posix.mkdir)" in result.error
    assert not proof.exists()


def test_all_ranks_agree_on_an_error(run_main):
    """One line, not one a process; torchrun itself ends with status 1."""
    result = run_main("--cfg", "configs/micro.yaml", "--data-path", "/nowhere", nproc=2, ok=False)
    assert result.status == 1
    assert result.stderr.count("error: DATA.DATA_PATH /nowhere is not a folder") == 1


def test_import_needs_no_gpu():
    """Fault 10: nothing here touches CUDA at import (the other tests start main.py without torchrun)."""
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import torch; torch.cuda.init = torch.cuda._lazy_init = lambda: 1 / 0\n"
        "import models, data, optimizer, lr_scheduler, engine.train, engine.evaluate, engine.throughput, main"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)
