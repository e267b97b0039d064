"""Settings of how a network is trained: the sections TRAIN and AUG of :mod:`config`, which everybody else reads."""

from typing import Any

from utils.rules import CLASSES, OBJECTS, PIXELS
from utils.settings import CfgNode, Resume, Section, setting

FREE, RAISED, KEPT = Resume.FREE, Resume.RAISED, Resume.KEPT
DENSE = PIXELS, OBJECTS


def _full_or_none(value: Any) -> Any:
    """As in the YAML files of other trainers."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


# fmt: off
class Optimizer(Section):
    """What turns gradients into steps."""

    NAME: str = setting(
        "adamw", "Method of descent: adamw, sgd, any that timm.optim lists (as muon, lion, lamb, adan), "
        "schedule_free_adamw, _sgd or _radam, or NVIDIA apex's fused_adam and fused_lamb", on_resume=KEPT)
    BETAS: list[float] = setting(
        [], "Decays of its moving averages; [] takes its own, which are 0.9 and 0.999 for adamw", at_least=0, below=1,
        stands_for=[0.9, 0.999])
    EPS: float = setting(
        0.0, "What it adds to a denominator; 0 takes its own, which is 1e-8 for adamw", at_least=0, stands_for=1e-8)
    MOMENTUM: float = setting(
        -1.0, "Momentum, with Nesterov's correction where sgd has it; -1 takes its own, which is 0.9 for sgd",
        at_least=0, at_most=1, stands_for=0.9)
    KWARGS: CfgNode = setting(
        CfgNode(), "Other arguments of an optimizer of timm's, for example {ns_steps: 6} of muon's, or "
        "{fallback_list: [head.*]}, the parameters that muon leaves to AdamW")


class LrScheduler(Section):
    """The learning rate after the warm-up."""

    NAME: str = setting(
        "cosine", "Curve from BASE_LR down to MIN_LR; poly is what is left of the run to the power of POWER, which the "
        "warm-up multiplies; multistep multiplies by DECAY_RATE after each epoch of DECAY_AT, and so does the warm-up; "
        "constant stays and cools down at the end; one_cycle is a cosine up in the warm-up, and one down; restarts are "
        "cosines one after the other",
        choices=("cosine", "linear", "step", "poly", "multistep", "constant", "one_cycle", "restarts"))
    POWER: float = setting(1.0, "Power of poly", above=0)
    DECAY_EPOCHS: int = setting(30, "step multiplies by DECAY_RATE every so many epochs after the warm-up", at_least=1)
    DECAY_AT: list[int] = setting([], "Epochs after which multistep decays, for example [8, 11]", at_least=1)
    DECAY_RATE: float = setting(0.1, "What step and multistep multiply by", at_least=0, at_most=1)
    COOLDOWN_EPOCHS: int = setting(
        0, "Last epochs of constant, in which the rate falls to MIN_LR, fast at first", at_least=0, on_resume=FREE)
    COOLDOWN_STEPS: int = setting(
        0, "Their length in steps; 0 for COOLDOWN_EPOCHS", at_least=0, on_resume=FREE)
    CYCLE_EPOCHS: int = setting(10, "Epochs of the first cosine of restarts", at_least=1)
    CYCLE_GROWTH: float = setting(1.0, "How many times as long as the one before each of restarts is", at_least=1)
    CYCLE_DECAY: float = setting(
        1.0, "What the rate that each of restarts begins with is multiplied by, to that of the one before",
        above=0, at_most=1)


class Loss(Section):
    """What a classifier minimises."""

    NAME: str = setting(
        "cross_entropy", "Cross entropy over the classes, or bce: each class by itself, yes or no",
        choices=("cross_entropy", "bce"), task=CLASSES)
    SUM: bool = setting(False, "bce adds up the classes of an image; False averages them", task=CLASSES)
    THRESHOLD: float = setting(
        0.0, "bce takes targets above this for yes, others for no, as those of mixed images; 0 takes them as they are",
        at_least=0, below=1, task=CLASSES)


class Teacher(Section):
    """A trained classifier to learn from (distillation)."""

    FROM: str = setting(
        "", "A checkpoint, the results folder of a run, or as of MODEL.PRETRAINED timm/NAME or a URL; empty for none",
        path=True, task=CLASSES)
    NAME: str = setting("", "What timm calls its network, for weights that do not say it", task=CLASSES)
    KIND: str = setting(
        "soft", "What is learned of it: its probabilities, its first choice (hard), or how alike it sees the images of "
        "a batch (features)", choices=("soft", "hard", "features"), task=CLASSES)
    WEIGHT: float = setting(
        0.5, "Share of its part in the loss; the labels have the rest", above=0, at_most=1, task=CLASSES)
    TEMPERATURE: float = setting(1.0, "What soft divides both logits by before it compares them", above=0, task=CLASSES)
    AT_LEAST: float = setting(
        0.0, "Top-1 that it must have on the validation images; 0 is twice what guessing has", at_least=0, at_most=100,
        on_resume=FREE, task=CLASSES)


class Train(Section):
    """How the weights are trained, and when they are saved."""

    EPOCHS: int = setting(300, "Passes over the training images", at_least=1, on_resume=RAISED)
    STEPS: int = setting(0, "Length of the run in steps; 0 for EPOCHS", at_least=0, on_resume=RAISED)
    WARMUP_EPOCHS: int = setting(20, "Epochs of linear warm-up from WARMUP_LR to BASE_LR", at_least=0)
    WARMUP_STEPS: int = setting(0, "Length of the warm-up in steps; 0 for WARMUP_EPOCHS", at_least=0)
    BASE_LR: float = setting(5e-4, "Learning rate after the warm-up, for LR_REFERENCE_BATCH images a step", at_least=0)
    WARMUP_LR: float = setting(5e-7, "Learning rate at the start of the warm-up, scaled likewise", at_least=0)
    MIN_LR: float = setting(5e-6, "Learning rate at the end, scaled likewise", at_least=0)
    LR_REFERENCE_BATCH: int = setting(
        512, "Learning rates are for so many images a step and scale with the global batch; 0 takes them as they are",
        at_least=0)
    WEIGHT_DECAY: float = setting(0.05, "Weight decay, of all parameters but those of NO_WEIGHT_DECAY", at_least=0)
    NO_WEIGHT_DECAY: str = setting(
        "1d", "Parameters without weight decay: biases and others of one axis, those with norm in their name, or none",
        choices=("1d", "norm", "none"))
    CLASS_WEIGHTS: str = setting(
        "none", "Weights of the classes in the loss: balanced is in inverse proportion to their images, 1 on average",
        choices=("none", "balanced"), task=CLASSES)
    SYNC_BN: bool = setting(False, "Let BatchNorm normalise over the batches of all processes")
    SHARD: str = setting(
        "none", "Divide weights, gradients and optimizer state among all processes (full) or those of a host (hybrid)",
        choices=("none", "full", "hybrid"))
    COMPRESS_GRADIENTS: str = setting(
        "none", "Number format in which gradients are summed over processes: half the bytes, and rounded",
        choices=("none", "bf16", "fp16"))
    LAYER_DECAY: float = setting(
        1.0, "Each layer's learning rate is that of the layer above it times this (for fine-tuning, as 0.8)",
        at_least=0.01, at_most=1, on_resume=KEPT)
    FREEZE_TRUNK: bool = setting(False, "Train the head alone (linear probe); the trunk stays as it is", on_resume=KEPT)
    CURRICULUM: list[dict] = setting(
        [], "Settings that are otherwise in some epochs, for example [{UNTIL: 0.4, DATA.IMG_SIZE: 160}, "
        "{FROM: 280, AUG.MIXUP: 0}]: whole epochs, or shares of EPOCHS (docs/recipes.md)", task=CLASSES,
        wanted="a list of dicts, for example [{UNTIL: 0.4, DATA.IMG_SIZE: 160}]")
    CLIP_GRAD: float = setting(5.0, "Largest norm of the gradient; 0 does not clip", at_least=0)
    ACCUMULATION_STEPS: int = setting(1, "Micro-batches whose gradients make up one step", at_least=1, on_resume=FREE)
    AUTO_MICRO_BATCH: bool = setting(
        False, "Cut micro-batches that do not fit into the GPU's memory into parts; the gradient is that of the whole",
        on_resume=FREE)
    USE_CHECKPOINT: str = setting(
        "none", "Recompute in the backward pass instead of keeping: selective is all but most matrix products (for a "
        "CrossFormer: half of the memory, a tenth more time), full takes a fifth or less and a quarter more time",
        choices=("none", "selective", "full"), on_resume=FREE,
        reads=_full_or_none)
    COMPILE: str = setting(
        "none", "Mode of torch.compile; reduce-overhead is CUDA graphs",
        choices=("none", "default", "reduce-overhead", "max-autotune-no-cudagraphs"), on_resume=FREE)
    EMA_DECAY: float = setting(
        0.0, "Decay of the moving average of the weights, for example 0.9999; 0 keeps none", at_least=0, below=1)
    EMA_WARMUP: bool = setting(False, "Let the EMA decay grow from 0 over the first steps")
    AUTO_RESUME: bool = setting(
        True, "Carry on from checkpoints/last.pth of the results folder when it is there", on_resume=FREE)
    FORCE_RESUME: bool = setting(
        False, "Carry on from a checkpoint although it is of another data set, or of a run with other settings",
        on_resume=FREE)
    SAVE_EVERY_STEPS: int = setting(
        0, "Save last.pth every so many steps, besides the end of each epoch; 0 for never", at_least=0, on_resume=FREE)
    SAVE_EVERY_MINUTES: float = setting(
        15.0, "Save last.pth every so many minutes besides; 0 for never", at_least=0, on_resume=FREE)
    KEEP_LAST: int = setting(
        2, "How many saves of last.pth stay: the newest, those before it in previous.pth, previous_2.pth and so on",
        at_least=1, at_most=100, on_resume=FREE)
    KEEP_EVERY_EPOCHS: int = setting(
        0, "Keep epoch_0010.pth for good after every so many epochs; 0 for none", at_least=0, on_resume=FREE)
    HANG_MINUTES: float = setting(
        60.0, "End the run when nothing has happened for so long (an evaluation counts as one thing); 0 waits forever",
        at_least=0, on_resume=FREE)
    MAX_SKIPPED_STEPS: int = setting(
        20, "Stop after this many steps in a row whose gradient is not finite; each of them is skipped",
        at_least=1, on_resume=FREE)
    EVAL_EVERY_EPOCHS: int = setting(
        1, "Evaluate after every so many epochs, and after the last", at_least=1, on_resume=FREE)
    EVAL_EVERY_STEPS: int = setting(
        0, "Evaluate after every so many steps, and after the last, and not by epochs; 0 for EVAL_EVERY_EPOCHS",
        at_least=0, on_resume=FREE)
    PATIENCE: int = setting(
        0, "End the run when so many evaluations in a row have brought nothing better (early stopping); 0 for never",
        at_least=0, on_resume=FREE)
    OPTIMIZER: Optimizer
    LR_SCHEDULER: LrScheduler
    LOSS: Loss
    TEACHER: Teacher


class Aug(Section):
    """How training images are changed at random."""

    DEVICE: str = setting(
        "auto", "Where AUTO_AUGMENT or COLOR_JITTER run: cpu is the loader processes, auto the GPU where there is one",
        choices=("auto", "cpu", "cuda"), task=CLASSES)
    SCALE: list[float] = setting(
        [0.08, 1.0], "Area of the random crop, as a share of the image", length=2, task=CLASSES)
    RATIO: list[float] = setting([0.75, 1.3333333333333333], "Aspect ratio of the random crop", length=2, task=CLASSES)
    HFLIP: float = setting(0.5, "Probability of a horizontal flip", at_least=0, at_most=1)
    COLOR_JITTER: float = setting(
        0.4, "Strength of colour jitter; AUTO_AUGMENT takes its place unless that is none", at_least=0, at_most=1,
        task=CLASSES)
    AUTO_AUGMENT: str = setting("rand-m9-mstd0.5-inc1", "Random augmentation in timm's notation, or none", task=CLASSES)
    REPROB: float = setting(0.25, "Probability of random erasing", at_least=0, at_most=1, task=CLASSES)
    REMODE: str = setting(
        "pixel", "What is put in place of what is erased", choices=("pixel", "rand", "const"), task=CLASSES)
    RECOUNT: int = setting(1, "Number of patches that are erased", at_least=1, task=CLASSES)
    MIXUP: float = setting(0.8, "Alpha of mixup; 0 turns it off", at_least=0, task=CLASSES)
    CUTMIX: float = setting(1.0, "Alpha of cutmix; 0 turns it off", at_least=0, task=CLASSES)
    CUTMIX_MINMAX: list[float] = setting(
        [], "Smallest and largest share of a cutmix patch, in place of CUTMIX; [] for none", length=2, task=CLASSES)
    MIXUP_PROB: float = setting(1.0, "Probability that a batch is mixed at all", at_least=0, at_most=1, task=CLASSES)
    MIXUP_SWITCH_PROB: float = setting(
        0.5, "Probability that it is cutmix when both are on", at_least=0, at_most=1, task=CLASSES)
    REPEATS: int = setting(
        1, "How many times each image comes in a row, augmented anew each time; an epoch stays as long, and has fewer "
        "images (repeated augmentation)", at_least=1, task=CLASSES)
    MIXUP_MODE: str = setting(
        "batch", "What one draw of mixup and cutmix is for", choices=("batch", "pair", "elem"), task=CLASSES)
    RESIZE: list[int] = setting(
        [2048, 512], "Longest and shortest side that an image is brought within before the crop",
        length=2, at_least=1, task=DENSE)
    RESIZE_RATIO: list[float] = setting(
        [0.5, 2.0], "What RESIZE is multiplied by, from and to", length=2, task=DENSE)
    CROP: bool = setting(
        False, "Cut a random part of DATA.IMG_SIZE out of the resized image (large-scale jitter), its longer side "
        "along the image's", task=OBJECTS)
    MOST_OF_ONE_CLASS: float = setting(
        0.75, "A crop of which one class has a larger share is drawn again; 1 takes any",
        above=0, at_most=1, task=PIXELS)
    DISTORT: float = setting(
        0.5, "Probability of each change of brightness, contrast, saturation and hue",
        at_least=0, at_most=1, task=PIXELS)
# fmt: on
