"""From files to batches: the index, decoding, sampling, augmentation and mixing."""

import os
import random
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_digits
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment, rand_augment_ops
from timm.data.transforms import RandomResizedCropAndInterpolation

from config import build_config
from data import Sample, build_eval_loader, build_train_loader
from data.augmentation import DeviceStage, build_eval_transform, build_mixing, build_train_transform
from data.dataset import DecodeAndTransform, ImageDataset, collate
from data.decoding import decode, decode_fast, open_picture, pil_to_tensor, to_rgb
from data.folder import FileIndex, FolderLayout
from data.index import open_index
from data.sampling import EvalBatches, TrainBatches, epoch_order
from tasks.classification import Classification
from utils.errors import UserError
from utils.randomness import derive_seed, seed_cpu

CPU = torch.device("cpu")


def index_of(folder: Path) -> FileIndex:
    return open_index(FolderLayout(folder.parent, folder.name), "")


def train_transform(*opts, on_device: bool = False):
    return build_train_transform(build_config(opts=opts), on_device)


def test_index_lists_every_image_once_in_order(tmp_path):
    hidden = ("a/notes.txt", "a/.hidden.jpg", "a/.ipynb_checkpoints/1.png", ".git/1.png")
    data = tmp_path / "data"
    for name in ("b/2.png", "b/1.JPEG", "a/x/3.jpg", "ü/ö.png", os.fsdecode(b"\xff/\xfe.jpg"), *hidden):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch()
    index = index_of(data)
    paths = [str(index.path(i).relative_to(data)) for i in range(len(index))]
    assert paths == ["a/x/3.jpg", "b/1.JPEG", "b/2.png", "ü/ö.png", os.fsdecode(b"\xff/\xfe.jpg")]
    assert index.labels.tolist() == [0, 1, 1, 2, 3]
    assert all(index.path(i).exists() for i in range(len(index)))


def test_index_holds_no_python_object_for_an_image(tmp_path):
    """Fault 13: a worker that reads a list of tuples copies it page by page; flat arrays stay shared."""
    index = index_of(write_digits(tmp_path / "many", 200))
    few = index_of(write_digits(tmp_path / "few", 20))

    def objects(value) -> int:
        if isinstance(value, list | tuple | dict):
            return len(value) + sum(map(objects, value.values() if isinstance(value, dict) else value))
        assert isinstance(value, np.ndarray | Path | str), type(value)
        return 1

    assert objects(vars(index)) == objects(vars(few))


def save_odd_images(folder: Path) -> dict[str, str]:
    """What ImageNet holds: a PNG named .JPEG, CMYK JPEGs; and what other data hold."""
    folder.mkdir(parents=True)
    pixels = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 50, 3), dtype=np.uint8))
    pixels.save(folder / "png_named.JPEG", format="PNG")
    pixels.convert("CMYK").save(folder / "cmyk.JPEG")
    pixels.convert("L").save(folder / "grey.JPEG")
    pixels.convert("P").save(folder / "palette.png")
    pixels.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50)).save(folder / "sixteen_bit.png")
    return {path.name: path for path in folder.iterdir()}


def decode_with_pillow(data: bytes) -> torch.Tensor:
    with open_picture(data) as picture:
        return pil_to_tensor(to_rgb(picture))


def test_odd_images_are_decoded(tmp_path):
    """Fault 12; and what the fast decoder reads has the pixels that Pillow gives."""
    for name, path in save_odd_images(tmp_path / "train" / "odd").items():
        image = decode(path.read_bytes())
        assert (image.shape, image.dtype) == ((3, 40, 50), torch.uint8), name
        assert torch.equal(image, decode_with_pillow(path.read_bytes())), name
    sample = DecodeAndTransform(train_transform())
    dataset = ImageDataset(index_of(tmp_path / "train"), sample, seed=0, replace_bad=False)
    assert collate([dataset[0, i] for i in range(len(dataset))]).images.shape == (6, 3, 224, 224)


def read_with_torchvision(data: bytes) -> torch.Tensor:
    """What :func:`decode_fast` falls back to where simplejpeg is missing."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
@pytest.mark.parametrize("options", ["", "progressive", "subsampling=0", "subsampling=1", "quality=20"])
def test_all_decoders_give_the_same_pixels(tmp_path, options):
    name, _, value = options.partition("=")
    options = {name: int(value or 1)} if name else {}
    rng = np.random.RandomState(1)
    for mode in ("RGB", "L"):
        picture = Image.fromarray(rng.randint(0, 256, (9, 11, 3), np.uint8)).resize((203, 157)).convert(mode)
        picture.save(tmp_path / "a.jpg", **options)
        data = (tmp_path / "a.jpg").read_bytes()
        expected = decode_with_pillow(data)
        assert torch.equal(decode_fast(data), expected)
        assert torch.equal(read_with_torchvision(data), expected)


def test_rand_augment_survives_every_magnitude():
    """Fault 11: with Pillow 13, posterize raises at magnitude 10 and above."""
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8))
    for magnitude in range(11):
        for op in rand_augment_ops(magnitude=magnitude, transforms=None, hparams={"magnitude_std": 0.0}):
            op.prob = 1.0
            for seed in range(3):
                random.seed(seed)
                op(image)
    augment = RandAugment(rand_augment_ops(magnitude=10, hparams={"magnitude_std": 5.0}), num_layers=4)
    np.random.seed(0)
    for _ in range(200):
        augment(image)


def published_recipe(tmp_path: Path, **opts) -> ImageDataset:
    write_digits(tmp_path / "train", 20)
    sample = DecodeAndTransform(train_transform("DATA.IMG_SIZE", "64"))
    return ImageDataset(index_of(tmp_path / "train"), sample, seed=3, **{"replace_bad": False, **opts})


def test_pixels_depend_on_seed_epoch_and_index_alone(tmp_path):
    dataset = published_recipe(tmp_path)
    once = {key: dataset[key].sample.image for key in [(0, 0), (0, 1), (1, 0)]}
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    for key in reversed(once):
        assert torch.equal(dataset[key].sample.image, once[key])
    assert not torch.equal(once[0, 0], once[1, 0])
    dataset.seed = 4
    assert not torch.equal(dataset[0, 0].sample.image, once[0, 0])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_the_workers(digits, workers):
    def batches(workers):
        opts = f"DATA.DATA_PATH {digits} DATA.IMG_SIZE 32 DATA.BATCH_SIZE 8 DATA.NUM_WORKERS {workers}"
        config = build_config(opts=opts.split())
        return list(
            Classification(config, CPU).train_loaders().train.micro_batches(5, 20)
        )  # from the middle of an epoch to the next

    for a, b in zip(batches(0), batches(workers), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_no_shared_memory_or_open_file_for_a_batch(digits):
    """What the workers send is small and holds no tensor: a small /dev/shm or few open files are no limit."""
    import pickle

    from data.dataset import BatchDataset
    from data.ring import Ring

    sample = DecodeAndTransform(train_transform("DATA.IMG_SIZE", "32"))
    dataset = ImageDataset(index_of(digits / "train"), sample, 0, False)
    batches = BatchDataset(dataset, Ring(2, (8, 32, 32, 3)))
    batch = batches[1, [(0, i) for i in range(8)]]
    assert type(batch.targets) is np.ndarray
    assert len(pickle.dumps(batch)) < 4000
    assert torch.equal(batch.images.images(), collate([dataset[0, i] for i in range(8)]).images)


class WithMeanColour:
    """A task whose target is a tensor: the mean colour of an image."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, raw, look) -> Sample:
        image, plan = self.transform(decode(raw[0]))
        return Sample(image, image.float().mean((1, 2)), plan)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_targets_may_be_tensors(digits, workers):
    """A task says what a target is; the loaders know no classes."""
    config = build_config(opts=["DATA.BATCH_SIZE", "8", "DATA.NUM_WORKERS", workers])
    index, sample = index_of(digits / "val"), WithMeanColour(build_eval_transform(config))
    stage = DeviceStage(CPU, (0.0, 0.0, 0.0), (1 / 255,) * 3)  # levels of 0 to 255 stay what they are
    train = build_train_loader(config, index, sample, (224, 224), stage)
    val = build_eval_loader(config, index, sample, (224, 224), stage)
    seen = []
    for batch in (*train.micro_batches(0, 4), *val):
        assert torch.allclose(batch.images.mean((2, 3)), batch.targets, atol=1e-3)
        assert batch.numbers.dtype == torch.int64
        seen += batch.numbers.tolist()
    assert seen == [*epoch_order(0, 0, 37)[:32], *range(37)]


def test_one_permutation_an_epoch():
    orders = [epoch_order(0, 0, 1000), epoch_order(0, 1, 1000), epoch_order(1, 0, 1000)]
    for i, order in enumerate(orders):
        assert sorted(order) == list(range(1000))
        assert not any(np.array_equal(order, other) for other in orders[:i])
    assert epoch_order(0, 0, 8).tolist() == epoch_order(0, 0, 8).tolist()


def test_derived_seeds_stay_what_they_are():
    """A run that was begun must go on the same after an update of the project: these values never change."""
    assert derive_seed(0, "sample", 1, 2) == 7178513459028031028
    assert epoch_order(0, 0, 8).tolist() == [7, 4, 6, 1, 5, 3, 0, 2]


@pytest.mark.parametrize(("world_size", "batch_size", "accumulation"), [(1, 12, 1), (2, 6, 1), (3, 2, 2), (1, 3, 4)])
def test_global_batches_do_not_depend_on_how_they_are_shared(world_size, batch_size, accumulation):
    """Fault 4, the tail: each step has all its micro-batches; and fault 5: a later start gives the same steps."""

    def steps(first, last):
        of_rank = []
        for rank in range(world_size):
            batches = TrainBatches(41, batch_size, accumulation, rank, world_size, seed=0)
            assert batches.steps_per_epoch == 3
            batches.first_step, batches.last_step = first, last
            mine = list(batches)
            assert len(mine) == len(batches) == (last - first) * accumulation
            of_rank.append([list(chain(*mine[i : i + accumulation])) for i in range(0, len(mine), accumulation)])
        return [list(chain(*parts)) for parts in zip(*of_rank, strict=True)]

    expected = [
        [(epoch, i) for i in epoch_order(0, epoch, 41)[12 * k : 12 * k + 12]] for epoch in range(3) for k in range(3)
    ]
    assert steps(0, 9) == expected
    assert steps(4, 9) == expected[4:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 50])
def test_evaluation_takes_every_image_once(world_size):
    batches = [EvalBatches(37, 8, rank, world_size) for rank in range(world_size)]
    keys = [key for rank in batches for batch in rank for key in batch]
    assert sorted(keys) == [(0, i) for i in range(37)]
    assert all(len(list(rank)) == len(rank) for rank in batches)


def photograph() -> Image.Image:
    coarse = Image.fromarray(np.random.RandomState(2).randint(0, 256, (30, 40, 3), np.uint8))
    return coarse.resize((500, 375), Image.BICUBIC)


def test_eval_transform_is_the_published_one():
    """Short side to 256, centre crop of 224, bicubic: the pixels of torchvision on a PIL image, to one grey level."""
    from torchvision import transforms

    image = photograph()
    for opts, geometry in (
        ([], [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]),
        (["TEST.CROP", "False"], [transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC)]),
    ):
        expected = pil_to_tensor(transforms.Compose(geometry)(image))
        got, plan = build_eval_transform(build_config(opts=opts))(pil_to_tensor(image))
        assert (got.int() - expected.int()).abs().max() <= 1
        assert not plan.operations
        assert not plan.patches


def test_train_transform_is_the_published_one():
    """Seed by seed the crop, the flip and (in the workers) the policy are those of timm's transform, to rounding."""
    image = photograph()
    for opts in ({}, {"auto_augment": None, "color_jitter": None}):
        names = ("AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", "0") if opts else ()
        ours = train_transform(*names)
        timms = create_transform(
            224, is_training=True, interpolation="bicubic", hflip=0.5, re_prob=0.0, use_prefetcher=True,
            **{"auto_augment": "rand-m9-mstd0.5-inc1", **opts},
        )  # fmt: skip
        flips = 0
        for seed in range(40):
            seed_cpu(seed)
            expected = torch.from_numpy(np.array(timms(image)))
            seed_cpu(seed)
            got, plan = ours(pil_to_tensor(image))
            assert not plan.operations
            difference = (got.float() - expected.float()).abs()
            # Posterizing and equalising make one grey level into many
            assert difference.mean() < (0.5 if opts else 5), seed
            assert difference.median() <= 1
            seed_cpu(seed)
            crop = RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
            flips += bool(torch.rand(1) < 0.5)
            assert crop[2] * crop[3] > 0.07 * 500 * 375
        assert 10 < flips < 30
    assert (ours.erase_probability, ours.erase_count) == (0.25, 1)


def test_a_bad_image_stops_the_run_by_default_or_is_replaced(tmp_path):
    write_digits(tmp_path / "train", 20)
    write_digits(tmp_path / "val", 20)
    bad = index_of(tmp_path / "train").path(7)
    bad.write_bytes(bad.read_bytes()[:40])
    (tmp_path / "val" / "3" / "empty.png").touch()

    def loaders(on_bad_image, workers):
        opts = f"DATA.DATA_PATH {tmp_path} DATA.IMG_SIZE 32 DATA.BATCH_SIZE 10 DATA.ON_BAD_IMAGE {on_bad_image}"
        config = build_config(opts=[*opts.split(), "DATA.NUM_WORKERS", workers])
        return Classification(config, CPU).train_loaders()

    for workers in ("0", "1"):
        with pytest.raises(UserError, match=rf"image {bad}: .*DATA.ON_BAD_IMAGE skip"):
            list(loaders("error", workers).train.micro_batches(0, 2))
        skipping, lines = loaders("skip", workers), []
        skipping.train.on_bad_image = skipping.val.on_bad_image = lines.append
        batches = list(skipping.train.micro_batches(0, 2))
        assert [len(images) for images, *_ in batches] == [10, 10]
        assert skipping.train.skipped == 1
        assert sum(len(images) for images, *_ in skipping.val) == 20
        assert [line.split(":")[0] for line in lines] == [str(bad), str(tmp_path / "val" / "3" / "empty.png")]


def test_a_file_that_cannot_be_opened_is_no_bad_image(digits, tmp_path):
    """A mount that is gone must stop the run, not replace every image by another."""
    import shutil

    data = shutil.copytree(digits, tmp_path / "data")
    opts = f"DATA.DATA_PATH {data} DATA.IMG_SIZE 32 DATA.BATCH_SIZE 8 DATA.ON_BAD_IMAGE skip DATA.NUM_WORKERS 0"
    loaders = Classification(build_config(opts=opts.split()), CPU).train_loaders()
    loaders.train.on_bad_image = loaders.val.on_bad_image = pytest.fail
    shutil.rmtree(data)
    for batches in (loaders.train.micro_batches(0, 1), iter(loaders.val)):
        with pytest.raises(UserError, match="png: No such file or directory"):
            next(batches)


def test_a_bug_in_a_sample_is_no_bad_image(digits):
    """It must not be reported as a file to remove, nor every image be replaced for it."""

    def sample(raw, look):
        raise KeyError("a bug")

    dataset = ImageDataset(index_of(digits / "train"), sample, seed=0, replace_bad=True)
    with pytest.raises(KeyError, match="a bug"):
        dataset[0, 0]


def test_nothing_but_bad_images_ends_the_run(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for i in range(8):
            (tmp_path / split / "a" / f"{i}.png").write_bytes(b"bad")
    opts = f"DATA.DATA_PATH {tmp_path} DATA.BATCH_SIZE 8 DATA.ON_BAD_IMAGE skip DATA.NUM_WORKERS 0"
    loaders = Classification(build_config(opts=opts.split()), CPU).train_loaders()
    loaders.train.on_bad_image = loaders.val.on_bad_image = lambda line: None
    with pytest.raises(UserError, match="the 100th in a row"):
        next(loaders.train.micro_batches(0, 1))
    assert list(loaders.val) == []


def test_mixing_follows_the_seed_and_the_recipe():
    mix = build_mixing(build_config(opts=["DATA.BATCH_SIZE", "4"]), num_classes=5)
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.mix_prob, mix.switch_prob, mix.mode) == (0.8, 1.0, 1.0, 0.5, "batch")
    assert mix.label_smoothing == 0.1
    draws = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        draws.append(mix(torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).clone(), torch.arange(4)))
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not torch.equal(draws[0][1], draws[2][1])
    assert torch.allclose(draws[0][1].sum(1), torch.ones(4))
    assert build_mixing(build_config(opts=["AUG.MIXUP", "0", "AUG.CUTMIX", "0"]), 5) is None
