"""Settings: inheritance, overrides, and one clear line for each mistake."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from config import SETTINGS, build_config, default_config, differing_settings
from main import FLAGS, main, parse
from utils.errors import UserError
from utils.settings import Resume, Section, differences, flatten, get, setting

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ROOMS = [folder for folder in ROOT.iterdir() if folder.is_dir() and folder.name[0] != "." and folder.name != "tests"]
OF_OTHERS = ROOT / "utils" / "moving.py", ROOT / "docs" / "moving.md"
"""Where the settings of other trainers are named."""
MODULES = {*ROOT.glob("*.py"), *(f for room in ROOMS for f in room.rglob("*.py"))} - {*OF_OTHERS}
SOURCE = "".join(f.read_text() for f in sorted(MODULES))
PAGES = "".join(f.read_text() for f in (ROOT / "README.md", *{*(ROOT / "docs").glob("*.md")} - {*OF_OTHERS}, *CONFIGS))


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_defaults_are_the_published_recipe():
    c = default_config()
    assert (c.TRAIN.EPOCHS, c.TRAIN.WARMUP_EPOCHS, c.TRAIN.WEIGHT_DECAY, c.TRAIN.CLIP_GRAD) == (300, 20, 0.05, 5.0)
    assert (c.TRAIN.BASE_LR, c.TRAIN.WARMUP_LR, c.TRAIN.MIN_LR, c.TRAIN.LR_REFERENCE_BATCH) == (5e-4, 5e-7, 5e-6, 512)
    assert (c.TRAIN.OPTIMIZER.NAME, c.TRAIN.OPTIMIZER.BETAS, c.TRAIN.OPTIMIZER.EPS) == ("adamw", [], 0.0)
    assert (c.AUG.MIXUP, c.AUG.CUTMIX, c.AUG.MIXUP_PROB, c.AUG.MIXUP_SWITCH_PROB) == (0.8, 1.0, 1.0, 0.5)
    assert (c.AUG.AUTO_AUGMENT, c.AUG.REPROB, c.AUG.REMODE) == ("rand-m9-mstd0.5-inc1", 0.25, "pixel")
    assert (c.MODEL.LABEL_SMOOTHING, c.AUG.SCALE, c.DATA.INTERPOLATION) == (0.1, [0.08, 1.0], "bicubic")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_is_valid_and_survives_its_own_dump(path, tmp_path):
    resolved = build_config(str(path))
    assert build_config(write(tmp_path / "config.yaml", resolved.dump())) == resolved


def test_every_setting_is_read_somewhere():
    """A setting that nothing reads is a bug."""
    declarations, _ = (ROOT / "config.py").read_text().split("def output_dir")
    training, rules = ((ROOT / path).read_text() for path in ("config_training.py", "utils/rules.py"))
    readers = SOURCE.replace(declarations, "").replace(training, "").replace(rules, "")
    assert len(readers) < len(SOURCE)
    names = {key: key.rpartition(".")[2] for key in SETTINGS if key != "BASE"}
    assert [key for key, name in names.items() if not re.search(rf'[."]{name}\b', readers)] == []


def test_every_setting_that_is_named_is_there():
    """In the documents, in errors, and where one is read."""
    sections = {key.rpartition(".")[0] for key in SETTINGS} - {""}
    named = {found[0] for found in re.finditer(rf"\b({'|'.join(sections)})(\.[A-Z_]+)+\b", SOURCE + PAGES)}
    assert len(named) > 60
    assert named - SETTINGS.keys() - sections == set()


def test_a_setting_says_all_of_itself():
    """Its annotation is that of its default, its default is one of its values, its meaning more than its name."""
    for key, one in SETTINGS.items():
        assert one.kind is type(one.default) or isinstance(one.default, int | list), key
        assert one.coerce(key, one.default, "") == one.default, key
        assert one.problem(one.default) == "", key
        assert len(one.meaning.split()) > 2, key
        assert not one.meaning.endswith("."), key


def test_settings_are_listed(capsys):
    assert main(["--settings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" = ")[0] for line in lines if line[:1].strip()] == list(SETTINGS)
    assert max(map(len, lines)) <= 80
    assert main(["--settings", "epochs"]) == 0
    assert capsys.readouterr().out.startswith(
        "TRAIN.EPOCHS = 300\n    Passes over the training images\n    at least 1; may rise on resume\n\nTRAIN.STEPS = 0"
    )
    assert main(["--settings", "EPOCS"]) == 2
    assert "--settings EPOCS: no setting has it in its name or meaning; did you mean EPOCHS?" in capsys.readouterr().err


def test_settings_are_listed_at_once():
    """Without torch, which takes seconds to load."""
    code = "import sys, main; main.main(['--settings', 'five_crop']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("TEST.VIEWS = none\n")
    assert done.stdout.endswith("\nFalse\n")


def test_later_sources_win(tmp_path):
    write(tmp_path / "base.yaml", "TRAIN: {EPOCHS: 50, BASE_LR: 1e-4}\nDATA: {BATCH_SIZE: 2}\nSEED: 1")
    mine = write(tmp_path / "mine.yaml", "BASE: base.yaml\nTRAIN: {EPOCHS: 60}\nDATA: {BATCH_SIZE: 4}")
    c, _ = parse(["--cfg", mine, "--opts", "DATA.BATCH_SIZE", "6", "SEED", "2", "--batch-size", "8"])
    assert (c.TRAIN.EPOCHS, c.TRAIN.BASE_LR, c.DATA.BATCH_SIZE, c.SEED) == (60, 1e-4, 8, 2)


def test_a_flag_that_is_not_given_changes_nothing(tmp_path):
    """Fault 1: every setting that has a flag is set by the file to something else than its default."""
    given = {
        "DATA": {"BATCH_SIZE": 6, "DATA_PATH": "here", "FORMAT": "tar", "CACHE_MODE": "part"},
        "MODEL": {"RESUME": "a.pth"},
        "TRAIN": {"ACCUMULATION_STEPS": 3, "USE_CHECKPOINT": True, "FORCE_RESUME": True, "OPTIMIZER": {"NAME": "sgd"}},
        "TEST": {"REPORT": True}, "AMP": "fp16", "SEED": 5, "OUTPUT": "out", "TAG": "mine",
    }  # fmt: skip
    path = write(tmp_path / "mine.yaml", yaml.safe_dump(given))
    with_flags = {key for key, _ in FLAGS.values()}
    set_by_file = {k for k in SETTINGS if get(build_config(path), k) != get(default_config(), k)}
    assert with_flags - set_by_file == {"MODEL.PRETRAINED"}  # which excludes MODEL.RESUME
    assert parse(["--cfg", path])[0] == build_config(path)


def test_flags_of_the_swin_family():
    flags = "--batch-size 4 --data-path d --pretrained p --accumulation-steps 2 --use-checkpoint --disable_amp "
    c, mode = parse(f"{flags} --output o --tag t --optim sgd --seed 3 --eval".split())
    assert mode == "evaluate"
    assert (c.DATA.BATCH_SIZE, c.DATA.DATA_PATH, c.MODEL.PRETRAINED, c.TRAIN.ACCUMULATION_STEPS) == (4, "d", "p", 2)
    assert (c.TRAIN.USE_CHECKPOINT, c.AMP, c.OUTPUT, c.TAG, c.TRAIN.OPTIMIZER.NAME) == ("full", "none", "o", "t", "sgd")
    assert c.SEED == 3
    assert parse(["--resume", "r", "--throughput"])[1] == "throughput"
    assert parse(["--amp-opt-level", "O0"])[0].AMP == "none"
    assert [build_config("", ["TRAIN.USE_CHECKPOINT", t]).TRAIN.USE_CHECKPOINT for t in ("True", "False")] == [
        "full",
        "none",
    ]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ("TRAIN.EPOCS 3", r"unknown setting TRAIN.EPOCS \(--opts\); did you mean TRAIN.EPOCHS\?"),
        ("EPOCHS 3", r"unknown setting EPOCHS \(--opts\); did you mean TRAIN.EPOCHS\?"),
        ("TRAIN.EPOCHS.X 3", "unknown setting TRAIN.EPOCHS.X"),
        ("TRAIN 3", "TRAIN .* is a section"),
        ("TRAIN.EPOCHS many", "TRAIN.EPOCHS must be a whole number, for example 300, not 'many'"),
        ("TRAIN.EPOCHS 1.5", "TRAIN.EPOCHS must be a whole number"),
        ("TRAIN.EPOCHS True", "TRAIN.EPOCHS must be a whole number"),
        ("TRAIN.EPOCHS 0", "TRAIN.EPOCHS 0 .* at least 1"),
        ("TRAIN.BASE_LR nan", "TRAIN.BASE_LR must be a number"),
        ("TRAIN.BASE_LR .inf", "TRAIN.BASE_LR must be a number"),
        ("TRAIN.BASE_LR -1", "TRAIN.BASE_LR -1.0 .* at least 0"),
        ("TRAIN.AUTO_RESUME 1", "TRAIN.AUTO_RESUME must be True or False"),
        ("TRAIN.WARMUP_EPOCHS 300", "TRAIN.WARMUP_EPOCHS 300 .* below TRAIN.EPOCHS 300"),
        ("AMP off", r"AMP must be a text \(auto \| bf16 \| fp16 \| tf32 \| none\), not False"),
        ("AMP bf61", "AMP bf61 .* did you mean bf16"),
        ("TRAIN.USE_CHECKPOINT half", "TRAIN.USE_CHECKPOINT half .* choose one of none, selective, full"),
        ("TRAIN.COMPILE reduce-overhead TRAIN.ACCUMULATION_STEPS 2", "TRAIN.COMPILE .* set TRAIN.ACCUMULATION_STEPS 1"),
        ("TRAIN.COMPILE reduce-overhead TRAIN.AUTO_MICRO_BATCH True", "TRAIN.COMPILE .* TRAIN.AUTO_MICRO_BATCH False"),
        ("AUG.SCALE 0.5", "AUG.SCALE must be a list"),
        ("AUG.SCALE [0.9,0.5]", "AUG.SCALE .* a smallest value"),
        ("AUG.SCALE [a,b]", "AUG.SCALE .* 2 numbers"),
        ("AUG.SCALE [", "not a YAML value"),
        ("AUG.MIXUP_PROB 2", "AUG.MIXUP_PROB 2.0 .* between 0 and 1"),
        ("MODEL.CROSSFORMER.GROUP_SIZE [7,0,7,7]", "MODEL.CROSSFORMER.GROUP_SIZE .* at least 1"),
        ("MODEL.CROSSFORMER.GROUP_SIZE [7,[7,x],7,7]", "MODEL.CROSSFORMER.GROUP_SIZE .* at least 1"),
        ("MODEL.CROSSFORMER.DEPTHS [[1],2,2,2]", "MODEL.CROSSFORMER.DEPTHS"),
        ("TRAIN.EMA_DECAY 1.0", "TRAIN.EMA_DECAY"),
        ("DATA.STD [0,1,1]", "DATA.STD"),
        ("TRAIN.OPTIMIZER.BETAS [0.9,1.0]", "TRAIN.OPTIMIZER.BETAS"),
        ("TAG ../elsewhere", "TAG ../elsewhere .* a folder below OUTPUT"),
        ("TAG /elsewhere", "TAG /elsewhere .* a folder below OUTPUT"),
        ("BASE [x.yaml]", "BASE belongs in a YAML file"),
        ("AUG.CUTMIX_MINMAX [0.5,0.5]", "AUG.CUTMIX_MINMAX .* a larger one"),
        ("TAG", "--opts takes pairs of KEY VALUE; TAG has no partner"),
        ("MODEL.RESUME a MODEL.PRETRAINED b", "either --resume .* or --pretrained"),
        ("MODEL.HEAD retinanet", "MODEL.HEAD .* read by segmentation and detection only, and TASK is classification"),
        ("TASK segmentation MODEL.HEAD retinanet", "MODEL.HEAD .* is for detection; choose one of upernet, semantic"),
        ("TASK detection MODEL.HEAD upernet", "MODEL.HEAD .* is for segmentation; choose one of retinanet, mask_rcnn"),
        ("TASK detection DATA.ZERO_IS_VOID True", "DATA.ZERO_IS_VOID .* read by segmentation only"),
        ("TASK segmentation DATA.MASKS none", "DATA.MASKS .* read by detection only"),
        ("TASK detection AUG.RESIZE_RATIO [2,1]", "AUG.RESIZE_RATIO .* a smallest value"),
        ("TASK detection AUG.RESIZE [800,1333]", "AUG.RESIZE .* the longest side and then"),
        ("TASK detection TEST.VIEWS flip", "TEST.VIEWS flip .* not for detection"),
        ("TRAIN.LR_SCHEDULER.NAME multistep", "TRAIN.LR_SCHEDULER.DECAY_AT .* the epochs after which"),
        ("TRAIN.LR_SCHEDULER.DECAY_AT [11,8]", "TRAIN.LR_SCHEDULER.DECAY_AT .* the epochs after which"),
    ],
)
def test_a_mistake_is_named_with_the_remedy(opts, message):
    """Fault 2, and every other way to get a setting wrong."""
    with pytest.raises(UserError, match=message):
        build_config(opts=opts.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TRAIN:\n  EPOCS: 3", r"unknown setting TRAIN.EPOCS \(.*mine.yaml, line 2\); did you mean TRAIN.EPOCHS\?"),
        ("TRAIN:\n  EPOCHS: x", r"TRAIN.EPOCHS must be a whole number.*mine.yaml, line 2"),
        ("SEED: 1\nSEED: 2", r"setting SEED stands twice \(.*line 2\)"),
        ("TRAIN: 3", "line 1: expected settings as 'KEY: value'"),
        ("- 1", "line 1: expected settings"),
        ("SEED: [", "mine.yaml, line 1 is not YAML"),
        ("BASE: mine.yaml", "mine.yaml is its own BASE"),
        ("BASE: other.yaml", "other.yaml cannot be read: No such file"),
        ("BASE: 3", "BASE .* must be a file name"),
        ("BASE: [3]", "BASE .* must be a file name"),
        ("TAG: !!python/object/apply:os.system ['echo no']", "TAG .*mine.yaml, line 1"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build_config(write(tmp_path / "mine.yaml", text))


def test_the_head_of_detection_is_its_own_unless_one_is_named():
    assert build_config(opts=["TASK", "detection"]).MODEL.HEAD == "mask_rcnn"
    assert build_config(opts=["TASK", "segmentation"]).MODEL.HEAD == "upernet"
    assert build_config(opts=["TASK", "detection", "MODEL.HEAD", "retinanet"]).MODEL.HEAD == "retinanet"


def test_values_are_taken_as_meant():
    c = build_config(opts=["TRAIN.BASE_LR", "5e-4", "TAG", "010", "TRAIN.CLIP_GRAD", "3", "AUG.AUTO_AUGMENT", "none"])
    assert (c.TRAIN.BASE_LR, c.TAG, c.TRAIN.CLIP_GRAD, c.AUG.AUTO_AUGMENT) == (5e-4, "010", 3.0, "none")
    assert build_config(opts=["AUG.CUTMIX_MINMAX", "[0.2, 0.8]"]).AUG.CUTMIX_MINMAX == [0.2, 0.8]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epocs 3", "unknown flag --epocs"),
        ("--batchsize 3", "unknown flag --batchsize; did you mean --batch-size?"),
        ("--disable-amp", "unknown flag --disable-amp; did you mean --disable_amp?"),
        ("--batch-size many", "argument --batch-size: invalid int value: 'many'"),
        ("--eval --throughput", "not allowed with argument"),
        ("--amp-opt-level O1", "--amp-opt-level O1: apex.amp has been removed from NVIDIA apex; .* --opts AMP bf16"),
        ("--amp-opt-level O2", "apex.amp has been removed"),
        ("--amp-opt-level O7", "not one of O0, O1, O2"),
        ("extra", "unknown flag extra"),
    ],
)
def test_a_mistake_in_a_flag(flags, message):
    with pytest.raises(UserError, match=message):
        parse(flags.split())


def test_settings_that_differ_are_told_exactly():
    """One that an older checkpoint does not know counts as at its default."""
    base, other = build_config(), build_config(opts=["TAG", "x", "DATA.BATCH_SIZE", "1", "AUG.HFLIP", "0.1"])
    assert differing_settings(base.dump(), other) == [("AUG.HFLIP", 0.5, 0.1)]
    dumped = yaml.safe_load(base.dump())
    del dumped["AUG"]["HFLIP"], dumped["TAG"]
    assert differing_settings(yaml.dump(dumped), base) == []
    assert differing_settings(yaml.dump(dumped), other) == [("AUG.HFLIP", 0.5, 0.1)]
    begun = build_config(opts=["MODEL.PRETRAINED", "a.pth"])
    assert differing_settings(begun.dump(), base) == []
    assert [key for key, *_ in differing_settings(base.dump(), begun)] == ["MODEL.PRETRAINED"]
    open_rates = {"MODEL": {"NAME": "resnet18", "DROP_PATH_RATE": 0.2, "DROP_RATE": 0.0}}
    assert differing_settings(yaml.dump(open_rates), build_config(opts=["MODEL.NAME", "resnet18"])) == []


def test_a_setting_is_told_from_one_that_begins_like_it():
    class Part(Section):
        """Of a config."""

        RATE: float = setting(0.5, "A rate")
        RATES: list[float] = setting([], "Rates", on_resume=Resume.FREE)

    class Whole(Section):
        """A config."""

        PART: Part
        PARTS: int = setting(1, "Parts", on_resume=Resume.FREE)

    before, now = Whole(), Whole()
    now.PART.RATE, now.PART.RATES, now.PARTS = 0.1, [1.0], 2
    assert differences(flatten(before), now) == [("PART.RATE", 0.5, 0.1)]
    assert before == now.clone() or before.PART.RATES == [] == Part().RATES, "defaults are not shared"


def test_the_state_of_an_optimizer_depends_on_settings_that_stay():
    stay = {key for key, one in SETTINGS.items() if one.on_resume is Resume.KEPT}
    assert stay >= {"TRAIN.OPTIMIZER.NAME", "TRAIN.LAYER_DECAY", "TRAIN.FREEZE_TRUNK"}
    assert [key for key, one in SETTINGS.items() if one.on_resume is Resume.RAISED] == ["TRAIN.EPOCHS", "TRAIN.STEPS"]
