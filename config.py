"""Every setting once: default, meaning, range, what a resumed run may do with it; and the config that they make.

Later sources win: the defaults below, the files named by ``BASE``, the file itself, ``--opts``, the flags.
``python main.py --settings`` lists them.
"""

from collections.abc import Iterable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from config_training import Aug, Train
from utils import rules, settings
from utils.config_file import read_yaml
from utils.errors import UserError, did_you_mean
from utils.rules import CLASSES, OBJECTS, PIXELS
from utils.settings import CfgNode, Given, Resume, Section, flatten, setting
from utils.surroundings import expanded

FREE, RAISED, OMITTED, KEPT = Resume.FREE, Resume.RAISED, Resume.OMITTED, Resume.KEPT
DENSE = PIXELS, OBJECTS


def _side_of_a_square(size: Any) -> Any:
    return size[0] if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1] else size


def _as_names(value: Any) -> Any:
    """Classes may be called 7, which YAML takes for a number."""
    return [str(one) if type(one) is int else one for one in value] if isinstance(value, list) else value


# fmt: off
class Data(Section):
    """Images on disk, and as the model sees them."""

    DATA_PATH: str = setting("", "Folder of the data set, in any layout (docs/data.md)", path=True, on_resume=FREE)
    FORMAT: str = setting(
        "auto", "Layout of the data set: imagenet is the official archives, others are timm's, as hfds/NAME",
        choices=("auto", "folder", "tar", "zip", "imagenet"), or_with="/", on_resume=FREE, task=CLASSES)
    MORE_PATHS: list[str] = setting(
        [], "Further folders in any layout, whose images are added to those of DATA_PATH", on_resume=FREE, task=CLASSES,
        wanted="a list of folders")
    VAL_SHARE: float = setting(
        0.0, "Share of each class that is set apart to evaluate on, where the data has no val, as a folder CLASS/*.jpg "
        "has none; which images, their names and SEED decide", at_least=0, below=1, task=CLASSES)
    SUBSET: float = setting(
        1.0, "Share of the images of each class to train on, for short trials; SEED decides which, and a larger share "
        "has those of a smaller one", above=0, at_most=1, task=CLASSES)
    ONLY_CLASSES: list[str] = setting(
        [], "Names of the classes to learn, of those in the data; [] for all", task=CLASSES, reads=_as_names,
        wanted="a list of names")
    SAMPLER: str = setting(
        "shuffle", "Order of training images: shuffle takes each once an epoch, balanced each class equally often",
        choices=("shuffle", "balanced"), task=CLASSES)
    LABELS: str = setting(
        "", "CSV file with the class of each image below DATA_PATH, and perhaps its split (docs/data.md)", path=True,
        on_resume=FREE, task=CLASSES)
    VAL_LABELS: str = setting(
        "", "Another one, of the validation images; LABELS has the training images then", path=True, on_resume=FREE,
        task=CLASSES)
    LABEL_COLUMNS: list[str] = setting(
        [], "Columns of the file and the class in LABELS; [] finds them by their usual names", length=2,
        wanted="the names of two columns, for example [filename, label]", on_resume=FREE, task=CLASSES)
    CACHE_DIR: str = setting(
        "", "Where the index of a data set that cannot be written to is kept, and images of object storage; "
        "the user's cache folder when empty", path=True, on_resume=FREE)
    CACHE_GB: float = setting(
        0.0, "Gigabytes of images of object storage (s3://...) that a host keeps in DATA.CACHE_DIR", at_least=0,
        on_resume=FREE)
    CACHE_MODE: str = setting(
        "no", "Read the data into memory first: part is each process of a host its share, full is each everything",
        choices=("no", "part", "full"), on_resume=FREE)
    BATCH_SIZE: int = setting(128, "Images of one process in one micro-batch", at_least=1, on_resume=FREE)
    IMG_SIZE: int | list[int] = setting(
        224, "Height and width of the images that the model sees: one number for squares, or [height, width]",
        at_least=1, length=2, reads=_side_of_a_square,
        wanted="a whole number, or a height and a width, for example 224 or [192, 640]")
    INTERPOLATION: str = setting(
        "bicubic", "How images are resized", choices=("bicubic", "bilinear", "nearest"), task=CLASSES)
    NUM_WORKERS: int = setting(
        8, "Loader processes of each training process; 0 loads in the training process itself",
        at_least=0, on_resume=FREE)
    ON_BAD_IMAGE: str = setting(
        "error", "An image that cannot be decoded: error stops the run, skip takes another one and logs the path",
        choices=("error", "skip"), on_resume=FREE)
    UPRIGHT: bool = setting(
        False, "Turn and mirror images as their EXIF orientation asks for; False leaves them as they are, as published",
        task=(CLASSES, OBJECTS))
    MAX_PIXELS: int = setting(
        178_956_970, "An image with more pixels than this counts as bad, lest one file take all of the memory",
        at_least=1, on_resume=FREE)
    WHITE: float = setting(
        0.0, "Value that is white in grey images of more than 8 bits; 0 takes that of 16 bits, and refuses floats and "
        "32 bits", at_least=0)
    MEAN: list[float] = setting([0.485, 0.456, 0.406], "Mean of red, green and blue, to normalise with", length=3)
    STD: list[float] = setting(
        [0.229, 0.224, 0.225], "Standard deviation of red, green and blue, to normalise with", length=3, above=0)
    IGNORE_LABEL: int = setting(
        255, "Number in label maps that is void: no class, neither trained on nor counted", at_least=0, at_most=255,
        task=PIXELS)
    ZERO_IS_VOID: bool = setting(
        False, "The number 0 in label maps is void too, and 1 the first class, as in ADE20K", task=PIXELS)
    MASKS: str = setting(
        "auto", "Train masks: auto does where MODEL.HEAD has them and the data too, none trains boxes alone",
        choices=("auto", "none"), task=OBJECTS)
    EMPTY_IMAGES: bool = setting(False, "Train on images without objects too", task=OBJECTS)
    BY_ORIENTATION: bool = setting(
        True, "A micro-batch of one process is all wide or all tall images, so that there is less padding in it",
        task=OBJECTS)


class Crossformer(Section):
    """What differs from the variant MODEL.NAME."""

    EMBED_DIM: int = setting(0, "Channels of the first stage; 0 keeps the variant's", at_least=0)
    DEPTHS: list[int] = setting([], "Blocks of each stage; [] keeps the variant's", at_least=1)
    NUM_HEADS: list[int] = setting([], "Attention heads of each stage; [] keeps the variant's", at_least=1)
    GROUP_SIZE: list[int | list[int]] = setting(
        [], "Group size of each stage, or a nested list with one for each block; [] keeps the variant's", at_least=1)
    INTERVAL: list[int | list[int]] = setting(
        [], "Interval of long-distance attention of each stage, or a nested list; [] keeps the variant's", at_least=1)


class Model(Section):
    """The network, and the weights that it starts from."""

    NAME: str = setting("crossformer_small", "Any model that timm knows; CrossFormer's are listed in the README")
    HEAD: str = setting(
        "upernet", "What is put on the model: the first two are for segmentation, the others for detection, whose "
        "default is mask_rcnn", choices=tuple(rules.TASK_OF_HEAD), task=DENSE)
    STYLE: str = setting(
        "published", "Whose anchors, assignment and losses a detector has: those that CrossFormer was published with, "
        "or torchvision's", choices=("published", "torchvision"), task=OBJECTS)
    ANCHOR_SCALE: float = setting(
        0.0, "Side of a detector's smallest square anchors in strides of the map, less for smaller objects; 0 is as "
        "published, 4 for retinanet, 8 for others", at_least=0, task=OBJECTS)
    HEAD_CHANNELS: int = setting(
        0, "Channels inside of HEAD; 0 is as published, 512 for upernet, 256 for others", at_least=0, task=DENSE)
    AUX_WEIGHT: float = setting(0.4, "Weight of the loss of UPerNet's auxiliary head", at_least=0, task=PIXELS)
    NUM_CLASSES: int = setting(0, "Number of classes; 0 takes that of the data", at_least=0, on_resume=FREE)
    RESUME: str = setting("", "Checkpoint to carry on from, or to evaluate", path=True, on_resume=OMITTED)
    PRETRAINED: str = setting(
        "", "Weights to start from: a file, a folder, timm/NAME, hf-hub:OWNER/NAME, a URL, or default for what timm "
        "has for NAME; the head is new when the number of classes differs", path=True, on_resume=OMITTED)
    WEIGHTS: str = setting(
        "auto", "Which weights of PRETRAINED: auto is the moving average where there is one, with --eval both",
        choices=("auto", "model", "ema"), on_resume=FREE)
    DROP_RATE: float = setting(
        -1.0, "Dropout before the last layer; -1 takes the model's own, which is 0 for a CrossFormer, or 0.1 of "
        "segmentation's heads",
        at_least=0, at_most=0.999, stands_for=0.0)
    DROP_PATH_RATE: float = setting(
        -1.0, "Stochastic depth of the last block; it grows linearly from 0 at the first. -1 takes what was published "
        "with a CrossFormer, and for other models 0.2 where they have it", at_least=0, at_most=0.999, stands_for=0.2)
    LABEL_SMOOTHING: float = setting(
        0.1, "Share of the target spread over all classes", at_least=0, at_most=0.999, task=CLASSES)
    KWARGS: CfgNode = setting(
        CfgNode(), "Other arguments of the model as timm.create_model takes them, for example {img_size: 256}")
    CROSSFORMER: Crossformer


class Test(Section):
    """How the model is evaluated."""

    CROP: bool = setting(True, "Crop the centre; False resizes to IMG_SIZE x IMG_SIZE", task=CLASSES)
    CROP_PCT: float = setting(
        0.875, "Share of the resized short side that the crop takes: 0.875 resizes to 256 for 224",
        at_least=0.01, at_most=1, task=CLASSES)
    VIEWS: str = setting(
        "none", "Average over views of each image: five_crop is corners and centre of the square that CROP_PCT leaves",
        choices=("none", "flip", "five_crop"))
    RESIZE: list[int] = setting(
        [2048, 512], "Longest and shortest side that an image is brought within", length=2, at_least=1, task=DENSE)
    MULTIPLE: int = setting(
        32, "Sides are then resized up to a multiple of this, in detection padded", at_least=1, task=DENSE)
    SCALES: list[float] = setting(
        [1.0], "Scales of RESIZE to average over, for example [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]", above=0, task=PIXELS)
    WINDOW: int = setting(
        0, "Compute square windows with this side and average where they overlap; 0 the image at once",
        at_least=0, task=PIXELS)
    STRIDE: int = setting(0, "Steps from one window to the next; 0 is two thirds of WINDOW", at_least=0, task=PIXELS)
    REPORT: bool = setting(
        False, "--eval writes tables and a picture: each class, the confusion matrix, the calibration", on_resume=FREE)
    REAL_LABELS: bool = setting(
        False, "--eval of ImageNet's own validation images with all labels that fit each besides (ImageNet-ReaL)",
        on_resume=FREE, task=CLASSES)


class Log(Section):
    """Where the curves go."""

    WANDB: str = setting("", "Project of Weights & Biases to send curves to as well; empty for none", on_resume=FREE)


class Config(Section):
    """All settings.

    Attributes:
        notes: what :func:`build_config` has left out and why, a line each.
        given: the settings that a file or the command line has set, whatever to.
    """

    TASK: str = setting(CLASSES, "What is learned", choices=(CLASSES, PIXELS, OBJECTS), on_resume=KEPT)
    BASE: list[str] = setting([], "YAML files to read first (paths relative to this file)", on_resume=FREE)
    DATA: Data
    MODEL: Model
    TRAIN: Train
    AUG: Aug
    TEST: Test
    LOG: Log
    AMP: str = setting(
        "auto", "Precision of the model; auto is bf16 on a GPU that has it, else fp16, and none on a CPU",
        choices=("auto", "bf16", "fp16", "tf32", "none"))
    SEED: int = setting(0, "What every random choice is derived from", at_least=0)
    OUTPUT: str = setting(
        "output", "Results go to OUTPUT/MODEL.NAME/TAG, with a HEAD to OUTPUT/HEAD_NAME/TAG", path=True,
        on_resume=FREE)
    TAG: str = setting("default", "Name of the run", on_resume=FREE)
    PRINT_FREQ: int = setting(10, "Steps between two lines of the log", at_least=1, on_resume=FREE)

    notes: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()
# fmt: on


SETTINGS = Config.settings()
"""Every setting as ``SECTION.KEY``."""


WHERE_DATA_LIES = {key for key, one in SETTINGS.items() if one.path} | {"DATA.MORE_PATHS", "DATA.LABEL_COLUMNS"}
"""Settings that say where things are on a machine, and nothing of what is learned."""


def default_config() -> Config:
    """Every setting at its default."""
    return Config()


def build_config(
    cfg_file: str = "", opts: Iterable[str] = (), flags: Iterable[Given] = (), followed: Iterable[Given] = ()
) -> Config:
    """The frozen config that a file, ``--opts`` (KEY VALUE ...) and flags make together.

    What none of them sets is as in ``followed``, else the default.

    ``notes`` of it say what was set for another model than the one that it names in the end, and so is left out.

    Raises:
        UserError: a key is unknown, or a value is of the wrong type or out of range.
    """
    config = Config()
    origin: dict[str, str] = {}
    notes: list[str] = []
    from_file = read_yaml(Config, Path(expanded(cfg_file)), notes) if cfg_file else ()
    asked = [*from_file, *settings.pairs(Config, list(opts)), *flags]
    vars(config)["given"], vars(config)["notes"] = frozenset(key for key, *_ in asked), tuple(notes)
    for key, value, source in (*followed, *asked):
        settings.assign(config, key, value, source)
        origin.pop(key, None)  # its order is that in which the values were given
        origin[key] = source
    config.BASE = []  # what the files say is in the config now
    settings.check_values(config, origin)
    refuse = partial(settings.refuse, config, origin)
    rules.check_task(config, refuse, origin)
    rules.check_together(config, refuse)
    rules.leave_to_the_model(config, origin)
    config.freeze()
    phases(config)  # raises what is wrong with them
    return config


CHANGEABLE = (
    "DATA.IMG_SIZE", "DATA.BATCH_SIZE", "DATA.INTERPOLATION", "MODEL.DROP_PATH_RATE", "MODEL.LABEL_SMOOTHING",
    "TRAIN.EMA_DECAY", *(f"AUG.{key}" for key, one in Aug.settings().items() if CLASSES in (one.tasks or [CLASSES])),
)  # fmt: skip
"""The settings that TRAIN.CURRICULUM may change on the way."""


def phases(config: Config) -> list[tuple[int, Config]]:
    """The configs of a run, each with the epoch from which on it holds; one alone without TRAIN.CURRICULUM.

    Raises:
        UserError: an entry of the curriculum is wrong.
    """
    epochs, entries = config.TRAIN.EPOCHS, [_read_entry(config, i) for i in range(len(config.TRAIN.CURRICULUM))]
    borders = sorted({0, *(border for first, last, _ in entries for border in (first, last) if border < epochs)})
    found: list[tuple[int, Config]] = []
    for epoch in borders:
        phase = deepcopy(config)
        phase.defrost()
        for first, last, changes in entries:
            for key, value in changes.items() if first <= epoch < last else ():
                settings.assign(phase, key, value, "TRAIN.CURRICULUM")
        origin = dict.fromkeys(CHANGEABLE, "TRAIN.CURRICULUM")
        settings.check_values(phase, origin)
        if config.TRAIN.EMA_DECAY and not phase.TRAIN.EMA_DECAY:
            raise UserError("TRAIN.EMA_DECAY 0.0 (TRAIN.CURRICULUM): an average that is kept needs a decay above 0")
        if entries:
            rules.check_together(phase, partial(settings.refuse, phase, origin))
        phase.freeze()
        if not found or flatten(found[-1][1]) != flatten(phase):
            found.append((epoch, phase))
    return found


def _read_entry(config: Config, number: int) -> tuple[int, int, dict[str, Any]]:
    """The first epoch of an entry of the curriculum, the one after its last, and what it changes."""
    entry, epochs = config.TRAIN.CURRICULUM[number], config.TRAIN.EPOCHS
    name = f"TRAIN.CURRICULUM: its entry {entry}"
    borders = []
    for key, default in (("FROM", 0), ("UNTIL", epochs)):
        value = entry.get(key, default)
        is_share = isinstance(value, float) and 0 < value < 1
        if not is_share and (type(value) is not int or not 0 <= value <= epochs):
            raise UserError(
                f"{name} has {key} {value}, which must be an epoch, at most TRAIN.EPOCHS {epochs}, or a share of them, "
                "for example 0.4"
            )
        borders.append(round(value * epochs) if is_share else value)
    changes = {key: value for key, value in entry.items() if key not in ("FROM", "UNTIL")}
    for key in changes:
        if key not in CHANGEABLE:
            raise UserError(f"{name} has {key}, which cannot change on the way{did_you_mean(str(key), CHANGEABLE)}")
    if not changes or len(changes) == len(entry):
        raise UserError(
            f"{name} must have FROM or UNTIL, and a setting, for example {{UNTIL: 0.4, DATA.IMG_SIZE: 160}}"
        )
    if borders[0] > borders[1]:
        raise UserError(f"{name} has FROM after UNTIL")
    return borders[0], borders[1], changes


settings_in = partial(settings.settings_in, Config)
"""The settings in a config that was dumped into a file: of the text and, for errors, its source."""


def differing_settings(dumped: str, config: Config) -> list[tuple[str, Any, Any]]:
    """The settings that may change what a run computes and differ from a dumped config: key, value there, here.

    A setting that the dump does not know is at its default there.
    """
    return settings.differences(flatten(Config()) | settings_in(dumped, "the checkpoint"), config)


def must_stay(key: str) -> bool:
    """Whether a run that is carried on may not change this setting even where it is forced to."""
    return SETTINGS[key].on_resume is KEPT


def may_change(key: str, before: Any, now: Any) -> bool:
    """Whether a run that is carried on may change this setting without being forced to."""
    return SETTINGS[key].on_resume is RAISED and now > before


def output_dir(config: Config) -> Path:
    """Where the results of a run go."""
    return Path(config.OUTPUT) / network_of(config) / config.TAG


def network_of(config: Config) -> str:
    """What a run's network is called: the model's name, with its head's before it."""
    is_classifier = config.TASK == CLASSES
    return config.MODEL.NAME if is_classifier else f"{config.MODEL.HEAD}_{config.MODEL.NAME}"
