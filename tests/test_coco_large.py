"""An index as large as COCO's: what it takes to read, to open and to share with loader processes."""

import json
import multiprocessing
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from data.coco import find_coco_layout
from data.index import open_index

IMAGES, OBJECTS, WORKERS = 118_000, 860_000, 8
MIB = 2**20


def write(root: Path) -> None:
    """Images without bytes, and objects with outlines of 20 points."""
    random = np.random.RandomState(0)
    (root / "annotations").mkdir()
    (root / "train2017").mkdir()
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640} for i in range(IMAGES)]
    for image in images:
        (root / "train2017" / image["file_name"]).touch()
    angles = np.linspace(0, 6, 20)
    with open(root / "annotations/instances_train2017.json", "w") as file:
        names = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
        file.write(f'{{"images": {json.dumps(images)}, "categories": {json.dumps(names)}, "annotations": [\n')
        for i in range(OBJECTS):
            x, y, r = random.uniform(60, 400), random.uniform(60, 400), random.uniform(5, 60)
            outline = np.stack([x + r * np.cos(angles), y + r * np.sin(angles)], axis=1).round(2).ravel().tolist()
            one = {"id": i + 1, "image_id": int(random.randint(IMAGES)), "category_id": i % 80 + 1, "iscrowd": 0,
                   "bbox": [x - r, y - r, 2 * r, 2 * r], "area": 3 * r * r, "segmentation": [outline]}  # fmt: skip
            file.write(json.dumps(one) + (",\n" if i + 1 < OBJECTS else "]}"))
    for path in (root / "annotations/instances_train2017.json", root / "train2017"):
        os.utime(path, (time.time() - 3600,) * 2)  # what has just been written is read again in any case


def memory(kind: str) -> float:
    """This process's memory of a kind that /proc/self/smaps_rollup tells of, in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) * 1024 / MIB


def scan(root: Path, out) -> None:
    began = time.monotonic()
    layout = find_coco_layout(root, "train")
    assert layout is not None
    open_index(layout, "")
    out.put((time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def visit(index, barrier, out) -> None:
    """What a worker does with an index; by the end all of them hold what they have copied."""
    before, seen = memory("Private_Dirty"), 0
    for i in range(len(index)):
        objects = index.objects(i)
        seen += len(objects.boxes) + int(objects.segments[:1].sum() > 1e9)
    barrier.wait()
    out.put((seen, memory("Private_Dirty") - before))
    barrier.wait()


@pytest.mark.slow
def test_memory_and_time_of_an_index_as_large_as_coco(tmp_path, capsys):
    write(tmp_path)
    fork = multiprocessing.get_context("fork")
    out = fork.SimpleQueue()
    process = fork.Process(target=scan, args=(tmp_path, out))
    process.start()
    seconds_to_scan, peak = out.get()
    process.join()
    before, began = memory("Anonymous"), time.monotonic()  # what is mapped is none
    index = open_index(find_coco_layout(tmp_path, "train"), "")
    seconds_to_open, grown = time.monotonic() - began, memory("Anonymous") - before
    barrier = fork.Barrier(WORKERS)
    workers = [fork.Process(target=visit, args=(index, barrier, out)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    found = [out.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert [seen for seen, _ in found] == [OBJECTS] * WORKERS
    size, largest = index.file.stat().st_size / MIB, max(own for _, own in found)
    with capsys.disabled():
        print(
            f"\nread in {seconds_to_scan:.1f} s ({peak:,.0f} MiB at most), opened in {seconds_to_open:.2f} s; file "
            f"{size:.0f} MiB; grown by: parent {grown:.1f} MiB, workers {largest:.1f} MiB each"
        )
    assert grown < 10
    assert largest < 10
    assert seconds_to_open < 5
