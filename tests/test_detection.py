"""Detection by the command line: trained, evaluated alike on any number of processes, carried on bit-identically."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import start
from conftest import ROOT, Result, quick
from make_coco import CLASSES
from PIL import Image
from pycocotools.coco import COCO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.build import fingerprint
from data.coco import Objects, find_coco_layout
from data.index import open_index
from engine import detect, throughput
from main import main
from tasks.average_precision import evaluate_results, of_each_class, read_truth, to_results, twelve
from tasks.object_album import count_errors
from tasks.object_report import confusion
from tasks.objects import Found, find_objects, pad_together, unpack_masks
from tasks.trained import load_trained

RUN = (
    "--cfg", "configs/detection/mask_rcnn_micro.yaml", "--tag", "run", "--batch-size", "4", "--opts",
    "DATA.NUM_WORKERS", "0", "DATA.IMG_SIZE", "64", "AUG.RESIZE", "[96, 64]", "TEST.RESIZE", "[96, 64]",
    "MODEL.CROSSFORMER.EMBED_DIM", "16", "MODEL.CROSSFORMER.DEPTHS", "[1, 1, 1, 1]", "MODEL.HEAD_CHANNELS", "16",
    "TRAIN.STEPS", "6", "TRAIN.WARMUP_STEPS", "1", "TRAIN.EVAL_EVERY_STEPS", "3", "TRAIN.SAVE_EVERY_STEPS", "1",
    "PRINT_FREQ", "1", "TRAIN.BASE_LR", "1e-5", "TRAIN.WARMUP_LR", "0", "MODEL.ANCHOR_SCALE", "4.0",
)  # fmt: skip
"""So low a learning rate leaves the scores where they are, and much is found."""
REFERENCE = ROOT / "tests/data/dense_heads"


def run(folder: Path, *arguments, ok: bool = True, script: str = "main.py", **how) -> Result:
    done = start(script, *arguments, "--output", folder, **how)
    result = Result(done.returncode, done.stdout, done.stderr, folder / "mask_rcnn_crossformer_micro/run")
    assert not ok or result.status == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="session")
def trained(objects, tmp_path_factory) -> Result:
    return run(tmp_path_factory.mktemp("trained"), *RUN, "--data-path", objects)


def test_training(trained):
    assert [event["step"] for event in trained.events("train")] == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in trained.events("eval")] == [3, 6]
    assert "of 2 classes" in trained.stdout
    for term in ("rpn_cls", "rpn_box", "cls", "box", "mask"):
        assert all(event[term] > 0 for event in trained.events("train")), term
    last = trained.events("eval")[-1]
    assert {"box_ap", "box_ap50", "box_ar100", "mask_ap", "mask_ap75", "images"} <= last.keys()
    assert last["images"] == 7
    best = torch.load(trained.results / "checkpoints/best.pth", weights_only=True)
    assert best["classes"] == CLASSES
    assert best["box_ap"] == max(event["box_ap"] for event in trained.events("eval"))


def evaluated(trained, objects, folder: Path, batch: int, nproc: int) -> tuple[list, dict]:
    words = [batch if word == "4" else word for word in RUN]
    path = trained.results / "checkpoints/last.pth"
    result = run(folder, *words, "--data-path", objects, "--eval", "--resume", path, "--report", nproc=nproc)
    return json.loads((result.results / "report_model/results.json").read_text()), result.events("eval")[0]


@pytest.fixture(scope="session")
def reported(trained, objects, tmp_path_factory) -> tuple[list, dict, Path]:
    folder = tmp_path_factory.mktemp("reported")
    results, event = evaluated(trained, objects, folder, 4, 1)
    return results, event, folder / "mask_rcnn_crossformer_micro/run/report_model"


@pytest.mark.parametrize(("nproc", "batch"), [(1, 1), (2, 4), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_same_result_on_any_number_of_processes(trained, reported, objects, tmp_path, nproc, batch):
    """Images of mixed sizes: every object that is found, its box, score and mask, to the last digit."""
    results, event = evaluated(trained, objects, tmp_path, batch, nproc)
    assert results == reported[0]
    assert results
    alike = ("box_ap", "mask_ap", "box_ar100", "images")
    assert {k: event[k] for k in alike} == {k: reported[1][k] for k in alike}
    assert {k: event[k] for k in alike} == {k: trained.events("eval")[-1][k] for k in alike}


def test_report(reported, objects):
    """AP of each class as pycocotools has it, the confusion of all objects, and pictures."""
    results, event, folder = reported
    rows = list(csv.DictReader((folder / "per_class.csv").open()))
    assert [row["class"] for row in rows] == CLASSES
    truth = read_truth(next((objects / "annotations").glob("*val*.json")))
    there = [one for one in truth.dataset["annotations"] if not one["iscrowd"]]
    assert sum(int(row["objects"]) for row in rows) == len(there)
    mean = np.mean([float(row["box_ap"]) for row in rows if row["box_ap"]])
    assert 100 * mean == pytest.approx(event["box_ap"], abs=1e-6)
    matrix = np.array(
        [[int(x) for x in row[1:]] for row in list(csv.reader((folder / "confusion_matrix.csv").open()))[1:]]
    )
    assert matrix[:-1].sum() == len(there)
    assert matrix[:, :-1].sum() <= sum(one["score"] >= 0.5 for one in results)  # what is on a crowd does not count
    assert Image.open(folder / "worst.png").height > 7 * 200
    assert (folder / "report.png").stat().st_size > 10_000


def test_pictures_in_tensorboard(trained):
    events = EventAccumulator(str(trained.results / "tensorboard")).Reload()
    assert [event.step for event in events.Images("model/images")] == [3, 6]


@pytest.mark.slow  # test_segmentation.py has another
def test_two_processes_train_as_one(objects, tmp_path):
    """2 x 2 images make the step of 1 x 4, all padded to one size; the heads take every proposal, nothing is drawn."""
    terms = []
    for nproc, batch in ((1, 4), (2, 2)):
        words = [batch if word == "4" else word for word in RUN]
        words += ["TRAIN.STEPS", "3", "DATA.BY_ORIENTATION", "False", "TEST.MULTIPLE", "96", "--data-path", objects]
        result = run(tmp_path / str(nproc), *words, nproc=nproc, script="tests/main_without_draws.py")
        terms.append(
            [[event[name] for name in ("rpn_cls", "rpn_box", "cls", "box", "mask")] for event in result.events("train")]
        )
    np.testing.assert_allclose(*terms, atol=1e-5)


def test_prediction(trained, reported, objects, tmp_path):
    """What evaluation has found, as a table, as COCO's json, and drawn."""
    words = ("--checkpoint", trained.results / "checkpoints/last.pth", objects / "images/val", "--weights", "model")
    done = start("predict.py", *words, "--format", "json", "--score", "0", "--overlay", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    assert sum(len(record["predictions"]) for record in records) == len(reported[0])
    content = json.loads((tmp_path / "out/results.json").read_text())
    assert [one["name"] for one in content["categories"]] == CLASSES
    names = {one["id"]: one["file_name"] for one in content["images"]}
    truth = read_truth(next((objects / "annotations").glob("*val*.json")))
    numbers = {Path(image["file_name"]).name: image["id"] for image in truth.dataset["images"]}
    here = sorted((numbers[names[one["image_id"]]], one["score"], one["bbox"]) for one in content["annotations"])
    assert here == sorted((one["image_id"], one["score"], one["bbox"]) for one in reported[0])
    for record in records:
        drawn = Image.open(tmp_path / "out/overlays" / f"{Path(record['file']).stem}.png")
        assert max(drawn.size) >= 600
    loaded = COCO(tmp_path / "out/results.json")
    assert sorted(loaded.getAnnIds()) == [*range(1, len(reported[0]) + 1)]
    for one in loaded.loadAnns(loaded.getAnnIds()):
        assert (one["area"], one["iscrowd"]) == (loaded.annToMask(one).sum(), 0)
    done = start("predict.py", *words, "--score", "1", "--sheet", tmp_path / "sheet.png")
    assert done.stdout.count("nothing") == 7
    assert Image.open(tmp_path / "sheet.png").width > 224
    done = start("predict.py", *words, "--score", "1", "--format", "csv")
    assert done.stdout == "file,rank,class_index,class,score,left,top,right,bottom\n"


def test_two_images_that_would_be_drawn_as_one_file(trained, objects, tmp_path):
    for name in ("a.png", "a.PNG", "b.png"):
        shutil.copy(objects / "images/val/1000.png", tmp_path / name)
    words = ("--checkpoint", trained.results / "checkpoints/last.pth", tmp_path)
    done = start("predict.py", *words, "--overlay", tmp_path / "out")
    assert (done.returncode, done.stdout, (tmp_path / "out").exists()) == (2, "", False)
    assert f"error: {tmp_path / 'a.PNG'} and {tmp_path / 'a.png'} would both be drawn as a.png; rename" in done.stderr
    assert start("predict.py", *words, tmp_path / "b.png").returncode == 0


@pytest.mark.parametrize(("category_ids", "expected"), [([3, 7], {3, 7}), (None, {1, 2})])
def test_the_categories_of_prediction_and_which_images_are_drawn(
    trained, objects, tmp_path, monkeypatch, category_ids, expected
):
    device, drawn = torch.device("cpu"), []
    monkeypatch.setattr(detect, "draw", lambda *_: drawn.append(1) or Image.new("RGB", (2, 2)))
    model = load_trained(str(trained.results / "checkpoints/last.pth"), device)
    model.facts["category_ids"] = category_ids
    paths = sorted((objects / "images/val").iterdir())[:2]
    for folder, pictures, count in ((tmp_path, 0, 2), (None, 1, 1), (None, 0, 0)):
        drawn.clear()
        pairs = [*detect.detect(model, paths, device, 0.0, folder, pictures)]
        assert [image is not None for _, image in pairs] == [i < count for i in range(2)]
        assert len(drawn) == count
    content = json.loads((tmp_path / "results.json").read_text())
    assert {one["id"] for one in content["categories"]} == expected
    assert {one["category_id"] for one in content["annotations"]} <= expected


def test_what_is_found_on_a_crowd_is_no_false_alarm():
    """Of the first class: an object, what is on a crowd of it, what is nowhere; and what is on a crowd of the other."""
    boxes = np.array([[0, 0, 10, 10], [20, 0, 40, 20], [50, 0, 70, 20]], np.float32)
    objects = Objects(
        boxes,
        np.array([0, 0, 1], np.int32),
        np.array([False, True, True]),
        np.zeros(0, np.uint8),
        np.zeros(4),
        (80, 80),
        5,
    )
    corners = torch.tensor([[0.0, 0, 10, 10], [21, 1, 30, 9], [0, 60, 9, 70], [51, 1, 60, 9]])
    found = Found(corners, torch.zeros(4, dtype=torch.long), torch.full((4,), 0.9), None)
    assert count_errors(objects, found) == (0, 2)
    index = type("One", (list,), {"objects": list.__getitem__})([objects])
    assert confusion(index, to_results(5, found._asdict(), [3, 7], None), {5}, [3, 7]).tolist() == [
        [1, 0, 0],
        [0, 0, 0],
        [2, 0, 0],
    ]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_is_pycocotools(kind):
    truth = read_truth(REFERENCE / "ap_ground_truth.json")
    results = json.loads((REFERENCE / "ap_detections.json").read_text())
    told = json.loads((REFERENCE / "ap.json").read_text())[kind]
    done = evaluate_results(truth, results, [image["id"] for image in truth.dataset["images"]], kind)
    assert done.stats.tolist() == told["stats"]
    for category, ap in of_each_class(done).items():
        expected = told["AP_of_category"][str(category)]
        assert np.isnan(ap) if expected is None else ap == pytest.approx(expected, abs=1e-12)


def test_nothing_found():
    truth = read_truth(REFERENCE / "ap_ground_truth.json")
    done = evaluate_results(truth, [], [image["id"] for image in truth.dataset["images"]], "bbox")
    assert set(twelve(done, "bbox").values()) == {0.0}


def test_results_as_coco_has_them():
    found = {"boxes": torch.tensor([[1.0, 2.0, 4.0, 8.0]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.5])}
    masks = torch.zeros(1, 10, 9, dtype=torch.bool)
    masks[0, 2:8, 1:4] = True
    (one,) = to_results(42, found, [3, 7], masks)
    assert (one["image_id"], one["category_id"], one["bbox"], one["score"]) == (42, 7, [1, 2, 3, 6], 0.5)
    assert one["segmentation"]["size"] == [10, 9]
    json.dumps(one)


def test_what_is_found_is_told_in_pixels_of_the_image():
    """Width and height are not scaled alike; sides are padded for the model, and low scores left out before masks."""
    seen = {}

    def ask(images, sizes):
        seen["size"], seen["sizes"] = tuple(images.shape), sizes
        boxes = torch.tensor([[10.0, 20, 30, 40], [0, 0, 9, 9]])
        return [{"boxes": boxes, "labels": torch.tensor([1, 0]), "scores": torch.tensor([0.9, 0.2])}
                | {"masks": torch.ones(2, 28, 28)}]  # fmt: skip

    found = find_objects(ask, torch.zeros(3, 50, 100), (200, 300), 32, score=0.5)
    assert seen == {"size": (1, 3, 64, 128), "sizes": [(50, 100)]}
    assert (found.boxes.tolist(), found.labels.tolist()) == ([[30, 80, 90, 160]], [1])
    assert found.masks.shape == (1, 200, 300)
    rows, columns = torch.where(found.masks[0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (80, 159, 30, 89)
    assert find_objects(ask, torch.zeros(3, 50, 100), (200, 300), 32, masks=False).masks is None


def test_a_batch_is_padded_and_masks_with_it():
    images = [torch.ones(3, 33, 20), torch.ones(3, 10, 40)]
    batch = pad_together(images, 32)
    assert batch.shape == (2, 3, 64, 64)
    assert batch.sum((1, 2, 3)).tolist() == [3 * 33 * 20, 3 * 10 * 40]
    masks = np.random.RandomState(0).randint(0, 2, (2, 33, 20)).astype(np.uint8)
    unpacked = unpack_masks(torch.from_numpy(np.packbits(masks, axis=-1)), 20, 64, 64)
    assert torch.equal(unpacked[:, :33, :20], torch.from_numpy(masks))
    assert unpacked.sum() == masks.sum()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL.HEAD", "upernet"], "MODEL.HEAD upernet (--opts): is for segmentation"),
        (["TRAIN.COMPILE", "default"], "TRAIN.COMPILE default (--opts): is not for detection"),
        (["AUG.MIXUP", "0.5"], "AUG.MIXUP 0.5 (--opts): is read by classification only"),
        (["TEST.VIEWS", "flip"], "TEST.VIEWS flip (--opts): is not for detection"),
        (
            ["TRAIN.AUTO_MICRO_BATCH", "True"],
            "TRAIN.AUTO_MICRO_BATCH True (--opts): is not for detection; its losses are of a whole batch",
        ),
        (["MODEL.HEAD", "cascade_mask_rcnn", "MODEL.STYLE", "torchvision"], "style 'torchvision' is not one of"),
        (["MODEL.NAME", "levit_128"], "MODEL.CROSSFORMER.EMBED_DIM is set, but MODEL.NAME levit_128 is no CrossFormer"),
    ],
)
def test_wrong_settings_are_named(objects, tmp_path, words, message):
    result = run(tmp_path, *RUN, *words, "--data-path", objects, ok=False)
    assert result.status == 2
    assert message in result.error


def changed(root: Path, folder: Path, change) -> Path:
    """A copy of a data set with other annotations to evaluate on."""
    shutil.copytree(root, folder)
    file = folder / "annotations/val.json"
    content = json.loads(file.read_text())
    change(content["annotations"])
    file.write_text(json.dumps(content))
    return folder


ODD = {
    "no area": lambda objects: objects[0].update(area=None),
    "a crowd without a mask": lambda objects: objects[0].update(iscrowd=1, segmentation=None),
    "a crowd with an empty mask": lambda objects: objects[0].update(iscrowd=1, segmentation=[]),
    "a box of no width": lambda objects: objects[0].update(bbox=[1, 1, 0, 5], segmentation=None),
    "fractions for truth": lambda objects: [one.update(iscrowd=bool(one["iscrowd"])) for one in objects],
}


@pytest.mark.parametrize("what", ODD)
def test_odd_annotations_are_evaluated(objects, tmp_path, what):
    """What an index takes, the truth takes: found out after an epoch, an error would cost that epoch."""
    data = changed(objects, tmp_path / "data", ODD[what])
    index = open_index(find_coco_layout(data, "val"), "")
    truth = read_truth(index.annotation_file)
    results = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": 0.5}
        | {"segmentation": truth.annToRLE(one)}
        for one in truth.dataset["annotations"]
        if not one["iscrowd"]
    ]
    for kind in ("bbox", "segm"):
        done = evaluate_results(truth, results, index.image_ids.tolist(), kind)
        assert twelve(done, kind)[f"{'box' if kind == 'bbox' else 'mask'}_ap"] == pytest.approx(100)


def test_masks_for_some_objects_only_are_refused(trained, objects, tmp_path):
    data = changed(objects, tmp_path / "data", lambda found: found[0].update(segmentation=None))
    path = trained.results / "checkpoints/last.pth"
    for words in ((), ("--eval", "--resume", path)):
        result = run(tmp_path / "out", *RUN, "--data-path", data, *words, ok=False)
        assert result.status == 2
        assert "1 objects without a segmentation among" in result.error
    none = changed(objects, tmp_path / "none", lambda found: [one.update(segmentation=None) for one in found])
    result = run(tmp_path / "boxes", *RUN, "--data-path", none, "--eval", "--resume", path)
    assert "val.json has no masks, so their average precision is not told" in result.stdout
    assert "mask AP" not in result.stdout


def test_data_that_differs_is_told_apart(objects, tmp_path):
    """Ranks with other labels or masks of the same boxes must not train together."""
    swap = {3: 7, 7: 3}
    changes = [
        lambda found: [one.update(category_id=swap[one["category_id"]]) for one in found],
        lambda found: found[0].update(segmentation=[[1, 1, 9, 1, 9, 9]]),
        lambda found: found[0].update(iscrowd=1),
        lambda found: None,
    ]
    prints = []
    for number, change in enumerate(changes):
        data = changed(objects, tmp_path / str(number), change)
        prints.append(fingerprint(open_index(find_coco_layout(data, "val"), "")))
    assert len({*prints}) == len(changes)


def test_an_export_of_weights_says_how_they_are_to_be_used(trained, objects, tmp_path):
    """Anchors and sizes of images are in no weight; what is found must be the same all the same."""
    path, exported = trained.results / "checkpoints/last.pth", tmp_path / "x.safetensors"
    done = start("scripts/export.py", "--checkpoint", path, "--format", "safetensors", "--to", exported)
    assert done.returncode == 0, done.stderr
    found = []
    for file in (path, exported):
        words = ("predict.py", "--checkpoint", file, objects / "images/val", "--score", "0", "--format", "json")
        done = start(*words, "--weights", "model")
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert any(record["predictions"] for record in found[0])


@pytest.mark.parametrize(
    "form",
    ["safetensors", pytest.param("onnx", marks=pytest.mark.slow), pytest.param("torch_export", marks=pytest.mark.slow)],
)
def test_export(trained, tmp_path, form):
    """Written, loaded again and compared on five images, non-maximum suppression included."""
    checkpoint = trained.results / "checkpoints/last.pth"
    words = ("--checkpoint", checkpoint, "--format", form, "--to", tmp_path / "out", "--image-size", "64", "96")
    done = start("scripts/export.py", *words, fresh=form == "torch_export")
    assert (done.returncode, done.stderr) == (0, "")
    for what in ("score", "box"):
        assert f"largest difference of a {what} to the model's own: " in done.stdout
    assert "it takes one image of one size: evaluation brings images within 96 x 64 pixels" in done.stdout


@pytest.mark.parametrize("head", quick(["retinanet", "mask_rcnn", "cascade_mask_rcnn"], ["retinanet"]))
def test_throughput(tmp_path, monkeypatch, capsys, head):
    """Of images that are no squares; how many products a detector takes depends on what it finds, and is unknown."""
    monkeypatch.setattr(throughput, "SECONDS_PER_REPEAT", 0.01)
    words = [2 if word == "4" else word for word in RUN] + ["MODEL.HEAD", head, "DATA.IMG_SIZE", "[64, 96]"]
    assert main([*map(str, words), "--throughput", "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*/run/throughput.json")
    values = json.loads(file.read_text())
    assert (values["gmac"], values["image_size"]) == (None, [64, 96])
    assert values["forward"]["images_per_second"] > values["training_step"]["images_per_second"] > 0
    assert "unknown GMAC at 64 x 96" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn", "cascade_mask_rcnn"])
@pytest.mark.parametrize("backbone", ["resnet50", "convnext_tiny", "swin_tiny_patch4_window7_224"])
def test_other_backbones_train_two_steps(objects, tmp_path, backbone, head):
    flags = ["--batch-size", "2", "--opts", "MODEL.NAME", backbone, "MODEL.DROP_PATH_RATE", "0", "MODEL.HEAD", head]
    if backbone.startswith("swin"):
        flags += ["MODEL.KWARGS", "{strict_img_size: False}"]
    flags += ["DATA.NUM_WORKERS", "0", "AUG.RESIZE", "[96, 64]", "TEST.RESIZE", "[96, 64]", "TRAIN.STEPS", "2"]
    flags += ["TRAIN.WARMUP_STEPS", "1", "TRAIN.EVAL_EVERY_STEPS", "2", "PRINT_FREQ", "1", "--data-path", objects]
    done = start("main.py", *RUN[:4], *flags, "--output", tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*/run/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2]
