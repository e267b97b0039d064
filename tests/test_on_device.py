"""The augmentation that runs on the training device, against timm and Pillow, which it takes the place of."""

import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, NAME_TO_OP
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import ColorJitter

from config import build_config
from data.augmentation import DeviceStage, Plan, augments_on_device, build_train_stage, build_train_transform
from data.augmentation.on_device import OPERATIONS, apply, warp
from data.augmentation.policy import Operation, Recorder, build_policy, draw_patches, fill_colour
from data.decoding import pil_to_tensor
from utils.errors import UserError
from utils.randomness import seed_cpu

CPU = torch.device("cpu")
SIZE = 64
FILL = fill_colour((0.485, 0.456, 0.406))
ARGUMENTS = {
    "AutoContrast": [None],
    "Equalize": [None],
    "Invert": [None],
    "Rotate": [-30.0, -7.3, 0.0, 11.1, 29.9],
    "Shear": [-0.3, -0.123, 0.0, 0.25, 0.3],
    "Translate": [-0.45, -0.1, 0.0, 0.3, 0.45],
    "Posterize": [0, 1, 3, 4, 8],
    "Solarize": [0, 26, 128, 200, 256],
    "SolarizeAdd": [0, 37, 110],
    "Desaturate": [0.5, 0.77, 1.0],
    "Color": [0.1, 0.5, 1.0, 1.3, 1.9],
}
ARGUMENTS |= dict.fromkeys(("Contrast", "Brightness", "Sharpness"), ARGUMENTS["Color"])


def arguments_of(name: str) -> list:
    return ARGUMENTS[max((key for key in ARGUMENTS if name.startswith(key)), key=len)]


def pictures(count: int = 4) -> list[Image.Image]:
    """Smooth pictures, noise, and one colour (what histograms and contrast stumble over)."""
    rng = np.random.RandomState(0)
    coarse = [Image.fromarray(rng.randint(0, 256, (6, 6, 3), np.uint8)).resize((SIZE, SIZE), Image.BICUBIC)] * 2
    noise = Image.fromarray(rng.randint(90, 140, (SIZE, SIZE, 3), np.uint8))
    return [*coarse, noise, Image.new("RGB", (SIZE, SIZE), (7, 99, 200))][:count]


def as_batch(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([pil_to_tensor(image) for image in images])


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_each_operation_is_that_of_pillow(name):
    warps = OPERATIONS[name][0] is warp
    for interpolation in ("nearest", "bilinear", "bicubic") if warps else ("bicubic",):
        for argument in arguments_of(name):
            images = pictures()
            resample = getattr(Image, interpolation.upper())
            given = () if argument is None else (argument,)
            expected = as_batch([NAME_TO_OP[name](im, *given, fillcolor=FILL, resample=resample) for im in images])
            fill = torch.tensor(FILL, dtype=torch.uint8)[:, None, None]
            got = apply(as_batch(images), [(Operation(name, argument),)] * len(images), fill, interpolation)
            difference = (got.int() - expected.int()).abs()
            if interpolation == "nearest":  # a sample exactly between two pixels falls to either
                assert (difference > 0).float().mean() < 0.01, (name, argument)
            else:
                assert difference.max() <= 1, (name, argument, interpolation)
                assert (difference > 0).float().mean() < 0.05, (name, argument, interpolation)


def test_images_of_a_batch_get_what_is_planned_for_each():
    images = as_batch(pictures())
    plans = [
        (Operation("Invert", None), Operation("Rotate", 10.0)),
        (),
        (Operation("Rotate", -20.0),),
        (Operation("Rotate", 5.0), Operation("Invert", None), Operation("Solarize", 100)),
    ]
    fill = torch.tensor(FILL, dtype=torch.uint8)[:, None, None]
    together = apply(images.clone(), plans, fill, "bicubic")
    for i, plan in enumerate(plans):
        alone = apply(images[i : i + 1].clone(), [plan], fill, "bicubic") if plan else images[i : i + 1]
        assert torch.equal(together[i], alone[0])


def config_with(*opts):
    return build_config(opts=["DATA.IMG_SIZE", str(SIZE), *map(str, opts)])


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.8", "rand-m10-mstd101-inc1-tweights", "v0", "originalr-mstd0.5"]
)
def test_a_plan_is_what_timm_draws_on_an_image(policy):
    """The same seed gives the same operations with the same magnitudes: the distribution is timm's, draw by draw."""
    config = config_with("AUG.AUTO_AUGMENT", policy)
    (reference,) = build_policy(config)
    happened = []
    ops = reference.ops if hasattr(reference, "ops") else [op for pair in reference.policy for op in pair]
    for op in ops:

        def watch(image, *arguments, name=op.name, do=op.aug_fn, **kwargs):
            assert kwargs["fillcolor"] == FILL
            assert kwargs["resample"] == Image.BICUBIC
            happened.append(Operation(name, *(arguments or (None,))))
            return do(image, *arguments, **kwargs)

        op.aug_fn = watch
    recorder = Recorder(build_policy(config))
    seen = set()
    for seed in range(300):
        happened.clear()
        seed_cpu(seed)
        reference(pictures(1)[0])
        after = random.random(), np.random.random()
        seed_cpu(seed)
        plan = recorder.draw()
        assert (random.random(), np.random.random()) == after
        assert list(plan) == happened
        seen |= {operation.name for operation in plan}
    assert seen <= recorder.names <= set(OPERATIONS)


def test_the_published_policy():
    """rand-m9-mstd0.5-inc1: two of 15 operations, each with probability 0.5, magnitude 9 with deviation 0.5."""
    recorder = Recorder(build_policy(build_config()))
    assert recorder.names == set(_RAND_INCREASING_TRANSFORMS)
    seed_cpu(0)
    plans = [recorder.draw() for _ in range(20_000)]
    assert np.mean([len(plan) for plan in plans]) == pytest.approx(1.0, abs=0.02)
    drawn = [operation for plan in plans for operation in plan]
    for name in recorder.names:
        of_name = [operation.argument for operation in drawn if operation.name == name]
        assert len(of_name) == pytest.approx(20_000 / 15, rel=0.15)
        if name == "Rotate":
            assert np.mean(np.abs(of_name)) == pytest.approx(27.0, abs=0.2)
            assert max(np.abs(of_name)) <= 30
            assert np.mean(np.array(of_name) > 0) == pytest.approx(0.5, abs=0.06)


def test_colour_jitter_is_drawn_as_torchvision_does():
    config = config_with("AUG.AUTO_AUGMENT", "none")
    (jitter,) = build_policy(config)
    assert isinstance(jitter, ColorJitter)
    recorder = Recorder([deepcopy(jitter)])
    fill = torch.tensor(FILL, dtype=torch.uint8)[:, None, None]
    for seed in range(10):
        seed_cpu(seed)
        expected = pil_to_tensor(jitter(pictures(1)[0]))
        seed_cpu(seed)
        got = apply(as_batch(pictures(1)), [recorder.draw()], fill, "bicubic")[0]
        assert (got.int() - expected.int()).abs().max() <= 2  # each of three steps may round


def test_erased_patches_are_those_of_timm():
    for count in (1, 3):
        reference = RandomErasing(probability=0.5, mode="const", max_count=count, device="cpu")
        erased = 0
        for seed in range(200):
            random.seed(seed)
            expected = reference(torch.ones(3, SIZE, SIZE))
            random.seed(seed)
            patches = draw_patches(0.5, count, SIZE, SIZE)
            got = torch.ones(3, SIZE, SIZE)
            for top, left, height, width, _ in patches:
                got[:, top : top + height, left : left + width] = 0
            assert torch.equal(got, expected)
            erased += bool(patches)
        assert 70 < erased < 130


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_the_device_stage_normalises_and_erases(mode):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    stage = DeviceStage(CPU, mean, std, FILL, "bicubic", mode, (SIZE, SIZE), seed=5)
    images = as_batch(pictures())
    random.seed(1)
    patches = draw_patches(1.0, 1, SIZE, SIZE)
    out = stage(images, [Plan(), Plan((), patches), Plan(), Plan()])
    plain = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    top, left, height, width, _ = patches[0]
    inside = torch.zeros(4, 1, SIZE, SIZE, dtype=torch.bool)
    inside[1, :, top : top + height, left : left + width] = True
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(out[~inside.expand_as(out)], plain[~inside.expand_as(out)], atol=1e-5)
    patch = out[1, :, top : top + height, left : left + width]
    if mode == "pixel":
        assert abs(patch.mean()) < 0.1
        assert abs(patch.std() - 1) < 0.1
    else:
        assert (patch == patch[:, :1, :1]).all()
        assert (patch == 0).all() == (mode == "const")
    other = DeviceStage(CPU, mean, std, FILL, "bicubic", mode, (SIZE, SIZE), seed=6)(images, [Plan((), patches)] * 4)
    assert torch.equal(other[1], out[1]) == (mode == "const"), "the noise follows the seed"
    assert torch.equal(stage(images[1:2], [Plan((), patches)])[0], out[1]), "and nothing else"


def test_the_device_does_what_the_workers_would_have_done():
    """The same seed gives the same crop, operations and patches, wherever they are carried out."""
    config = config_with("AUG.REPROB", 0.5)
    stage = build_train_stage(config, CPU)
    by_workers, by_device = build_train_transform(config, False), build_train_transform(config, True)
    augmented = 0
    for seed in range(60):
        results = []
        for transform in (by_workers, by_device):
            seed_cpu(seed)
            image, plan = transform(pil_to_tensor(pictures(1)[0]))
            results.append(stage(image[None], [plan]))
        augmented += bool(plan.operations)
        # Posterizing and equalising may make one grey level into many
        assert (results[0] - results[1]).abs().median() < 0.03
        assert (results[0] - results[1]).abs().mean() < 0.1
    assert 30 < augmented < 55


def test_where_the_policy_runs():
    gpu = torch.device("cuda", 0)  # asked for, not used
    for opts, device, expected in (
        ((), CPU, False),
        ((), gpu, True),
        (("AUG.DEVICE", "cpu"), gpu, False),
        (("AUG.DEVICE", "cuda"), gpu, True),
        (("AUG.AUTO_AUGMENT", "none"), gpu, True),
        (("AUG.AUTO_AUGMENT", "v0"), gpu, True),
        (("AUG.AUTO_AUGMENT", "augmix-m5"), gpu, False),
        (("AUG.AUTO_AUGMENT", "rand-m9-t3a"), gpu, False),
    ):
        assert augments_on_device(config_with(*opts), device) == expected, opts
    for opts, device, message in (
        (("AUG.DEVICE", "cuda"), CPU, "there is no GPU"),
        (("AUG.DEVICE", "cuda", "AUG.AUTO_AUGMENT", "augmix-m5"), gpu, "augmix-m5 only runs on the CPU"),
        (("AUG.DEVICE", "cuda", "AUG.AUTO_AUGMENT", "rand-t3a"), gpu, "GaussianBlur only runs on the CPU"),
        (("AUG.AUTO_AUGMENT", "rend-m9"), gpu, "is not one that timm knows"),
    ):
        with pytest.raises(UserError, match=message):
            augments_on_device(config_with(*opts), device)
