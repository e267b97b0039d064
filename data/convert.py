"""Boxes in Pascal VOC's and YOLO's formats, made into COCO's."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

import yaml

from data.coco_json import shown
from data.decoding import open_picture, orientation_of, read_file
from data.files import find_images
from data.parts import falls_to_val
from utils.errors import UserError
from utils.files import reason_of

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation")}
"""What YOLO's folders of the parts may be called."""
SHARE = 0.2
SIDEWAYS = 5
"""From this orientation of EXIF's on, height and width change places."""
EXPECTED = (
    "Annotations/*.xml with JPEGImages and perhaps ImageSets/Main/{train,val}.txt (Pascal VOC), images beside xml "
    "files of the same names, or labels/{train,val}/*.txt with images/{train,val}, or {train,val}/labels/*.txt with "
    "{train,val}/images, and data.yaml or classes.txt (YOLO)"
)


class Thing(NamedTuple):
    """An object: its class, its corners x1 y1 x2 y2 in pixels, whether it is not to count, and its outline if known."""

    name: str
    box: tuple[float, float, float, float]
    crowd: bool = False
    polygon: tuple[float, ...] = ()


class Labelled(NamedTuple):
    """An image with objects.

    Attributes:
        name: of its file, relative to the source.
        height, width: of the image as its labels see it.
        things: the objects.
        turned: whether EXIF turns it, and the labels are of the upright image.
    """

    name: str
    height: int
    width: int
    things: list[Thing]
    turned: bool


class Source(NamedTuple):
    """What was found.

    Attributes:
        splits: the images of each part.
        classes: in the order of their numbers.
        left_out: images without labels and labels without an image, by what they are.
    """

    splits: dict[str, list[Labelled]]
    classes: list[str]
    left_out: Counter[str]

    @property
    def turned(self) -> int:
        """How many images' labels are right only where EXIF turns the image."""
        return sum(image.turned for images in self.splits.values() for image in images)


def read_source(root: Path, val_share: float | None = None) -> Source:
    """Read a data set in Pascal VOC's or YOLO's format.

    Args:
        root: its folder.
        val_share: of the images to take for val where the data set has no parts of its own; None for SHARE.

    Raises:
        UserError: it is neither, a file is damaged, or there is nothing in a part.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the one with {EXPECTED}")
    read = next((read for is_there, read in FORMATS if is_there(root)), None)
    if read is None:
        raise UserError(f"{root} has no labels that are known; expected {EXPECTED}")
    source = read(root, val_share)
    for split, images in source.splits.items():
        if not any(image.things for image in images):
            raise UserError(f"{root} has no objects for {split}; label some, or give another --val-share")
    return source


def as_coco(images: list[Labelled], classes: list[str]) -> dict[str, Any]:
    """Make the content of a json of one part; ids count from 1."""
    ids = {name: number for number, name in enumerate(classes, start=1)}
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }
    for number, image in enumerate(images, start=1):
        content["images"].append({"id": number, "file_name": image.name, "height": image.height, "width": image.width})
        for thing in image.things:
            x1, y1, x2, y2 = thing.box
            entry = {
                "id": len(content["annotations"]) + 1,
                "image_id": number,
                "category_id": ids[thing.name],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": area_of(thing.polygon or (x1, y1, x2, y1, x2, y2, x1, y2)),
                "iscrowd": int(thing.crowd),
            }
            content["annotations"].append(entry | ({"segmentation": [[*thing.polygon]]} if thing.polygon else {}))
    return content


def area_of(polygon: tuple[float, ...]) -> float:
    """Compute the area of a polygon x1 y1 x2 y2 ..., by the shoelace formula."""
    xs, ys = polygon[::2], polygon[1::2]
    after = zip(xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
    return abs(sum(x * next_y - next_x * y for x, y, (next_x, next_y) in zip(xs, ys, after, strict=True))) / 2


def divided(images: list[Labelled], val_share: float | None) -> dict[str, list[Labelled]]:
    """Share images out to train and val, each by the name of its file alone, so that more images move none."""
    parts: dict[str, list[Labelled]] = {"train": [], "val": []}
    share = SHARE if val_share is None else val_share
    for image in images:
        key = PurePosixPath(image.name).stem.encode("utf-8", "surrogateescape")
        parts["val" if falls_to_val(share, key) else "train"].append(image)
    return parts


def refuse_share(val_share: float | None, where: Path) -> None:
    """Refuse a share for val where the data set says itself what val is."""
    if val_share is not None:
        raise UserError(f"--val-share is for data without parts, and {where} has some; leave it out")


def upright_size(path: Path) -> tuple[int, int, int]:
    """Read height and width of an image as people see it, and the orientation of EXIF that makes it so, 1 to 8.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open_picture(read_file(path)) as picture:
            if picture.format != "JPEG":
                picture.load()  # a PNG's orientation may stand behind the pixels, and a TIFF has turned itself then
            orientation = orientation_of(picture)
            sides = picture.height, picture.width
            return *(sides if orientation < SIDEWAYS else sides[::-1]), orientation
    except Exception as error:  # decoders fail in arbitrary ways on arbitrary bytes
        raise UserError(f"image {path} cannot be read: {reason_of(error)}; mend or remove it") from error


def by_stem(folder: Path, root: Path) -> dict[str, str]:
    """Give the images below a folder by their names without the type, as paths relative to the root.

    Raises:
        UserError: two have one name.
    """
    found: dict[str, str] = {}
    for name in sorted(find_images(folder).images):
        stem = str(PurePosixPath(name).with_suffix(""))
        if stem in found:
            raise UserError(f"{folder / name} and {root / found[stem]} have one name, so their labels are not clear")
        found[stem] = (folder / name).relative_to(root).as_posix()
    return found


# ---- Pascal VOC


def is_voc(root: Path) -> bool:
    return (root / "Annotations").is_dir() or next(root.rglob("*.xml"), None) is not None


def read_voc(root: Path, val_share: float | None) -> Source:
    """Read Pascal VOC's xml files, in Annotations or beside the images."""
    apart = (root / "Annotations").is_dir()
    folder, labels = (root / "JPEGImages", root / "Annotations") if apart else (root, root)
    if not folder.is_dir():
        raise UserError(f"{root} has Annotations, but no JPEGImages; put the images there")
    images = by_stem(folder, root)
    files = {str(path.relative_to(labels).with_suffix("")): path for path in sorted(labels.rglob("*.xml"))}
    left_out = Counter(
        {"images without xml": len(images.keys() - files), "xml without image": len(files.keys() - images)}
    )
    found = {stem: read_xml(files[stem], root, images[stem]) for stem in sorted(images.keys() & files)}
    classes = sorted({thing.name for image in found.values() for thing in image.things})
    lists = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in SPLITS}
    if not any(path.is_file() for path in lists.values()):
        return Source(divided([*found.values()], val_share), classes, +left_out)
    refuse_share(val_share, root / "ImageSets")
    return Source({split: listed(path, found) for split, path in lists.items()}, classes, +left_out)


def listed(path: Path, found: dict[str, Labelled]) -> list[Labelled]:
    """Give the images that a file lists by their names without the type, one a line."""
    stems = [line.split()[0] for line in text_of(path).splitlines() if line.strip()]
    for stem in stems:
        if stem not in found:
            raise UserError(f"{path} lists {shown(stem)}, of which there is no image with xml; add it or take it out")
    return [found[stem] for stem in stems]


def read_xml(path: Path, root: Path, image: str) -> Labelled:
    """Read the objects of an image, whose size is the upright or the unturned one, as the file says.

    Those that are called difficult do not count. VOC's corners are the numbers of the first and last pixels, from 1
    on: (1, 1, w, h) is the whole image.

    Raises:
        UserError: the file is damaged, or of an image of another size.
    """
    try:
        tree = ElementTree.fromstring(path.read_bytes())
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{path} cannot be read as xml: {reason_of(error)}; export it again") from error
    height, width, orientation = upright_size(root / image)
    said = [number_in(tree, f"size/{side}", path) if tree.find(f"size/{side}") is not None else 0 for side in SIDES]
    unturned = orientation >= SIDEWAYS and height != width and said == [width, height]
    if unturned:
        height, width = width, height
    if all(said) and said != [height, width]:
        raise UserError(
            f"{path} is of an image of {said[0]:g} x {said[1]:g}, {image} is {height} x {width}; label it anew"
        )
    things = [thing_in(one, path, height, width) for one in tree.iter("object")]
    return Labelled(image, height, width, things, orientation > 1 and not unturned)


SIDES = "height", "width"


def thing_in(one: ElementTree.Element, path: Path, height: int, width: int) -> Thing:
    name = (one.findtext("name") or "").strip()
    if not name:
        raise UserError(f"{path} has an object without a name; name its class")
    x1, y1, x2, y2 = (number_in(one, f"bndbox/{key}", path) for key in ("xmin", "ymin", "xmax", "ymax"))
    box = clipped((x1 - 1, y1 - 1, x2, y2), height, width, f"{path}: object {shown(name)}")
    return Thing(name, box, (one.findtext("difficult") or "0").strip() == "1")


def number_in(node: ElementTree.Element, key: str, path: Path) -> float:
    """Read a number in an xml file."""
    try:
        number = float(node.findtext(key) or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{path} has {shown(node.findtext(key))} for {key}, which is no number; mend it")
    return number


def clipped(
    box: tuple[float, float, float, float], height: int, width: int, what: str
) -> tuple[float, float, float, float]:
    """Clip a box to its image.

    Raises:
        UserError: nothing is left.
    """
    x1, y1, x2, y2 = max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height)
    if not (x1 < x2 and y1 < y2):
        raise UserError(f"{what} has no extent within the image of {width} x {height}; mend or remove it")
    return x1, y1, x2, y2


# ---- YOLO


def is_yolo(root: Path) -> bool:
    return ((root / "labels").is_dir() and (root / "images").is_dir()) or any(yolo_parts(root).values())


def yolo_parts(root: Path) -> dict[str, tuple[str, str] | None]:
    """Find the folders of each part's images and labels; None where there are none."""
    parts: dict[str, tuple[str, str] | None] = {}
    for split, names in SPLITS.items():
        known = [(f"images/{n}", f"labels/{n}") for n in names] + [(f"{n}/images", f"{n}/labels") for n in names]
        parts[split] = next((pair for pair in known if (root / pair[0]).is_dir() and (root / pair[1]).is_dir()), None)
    return parts


def read_yolo(root: Path, val_share: float | None) -> Source:
    """Read YOLO's text files; an image without one has no objects."""
    classes, left_out = yolo_classes(root), Counter[str]()
    folders = yolo_parts(root)
    if not any(folders.values()):
        return Source(
            divided([*yolo_images(root, ("images", "labels"), classes, left_out)], val_share), classes, left_out
        )
    parts: dict[str, list[Labelled]] = {}
    for split, pair in folders.items():
        if pair is None:
            raise UserError(
                f"{root} has no images with labels for {split}; add images/{split} and labels/{split}, or "
                f"{split}/images and {split}/labels"
            )
        parts[split] = [*yolo_images(root, pair, classes, left_out)]
    refuse_share(val_share, root)
    return Source(parts, classes, left_out)


def yolo_images(root: Path, folders: tuple[str, str], classes: list[str], left_out: Counter[str]) -> Iterator[Labelled]:
    images, labels = by_stem(root / folders[0], root), root / folders[1]
    files = {str(path.relative_to(labels).with_suffix("")): path for path in sorted(labels.rglob("*.txt"))}
    if orphans := len(files.keys() - images.keys() - {"classes"}):
        left_out["labels without an image"] += orphans
    for stem, name in images.items():
        height, width, orientation = upright_size(root / name)
        lines = text_of(files[stem]).splitlines() if stem in files else []
        numbered = [(f"{files[stem]}, line {i}", line) for i, line in enumerate(lines, start=1) if line.strip()]
        things = [yolo_thing(line, classes, height, width, at) for at, line in numbered]
        yield Labelled(name, height, width, things, orientation > 1)


def yolo_thing(line: str, classes: list[str], height: int, width: int, at: str) -> Thing:
    """Read a class with centre, width and height, or with the corners of an outline: all as shares of the image.

    Raises:
        UserError: it is neither.
    """
    try:
        numbers = [float(word) for word in line.split()]
    except ValueError:
        numbers = []
    shares = numbers[1:]
    if not (len(shares) == 4 or (len(shares) > 4 and len(shares) % 2 == 0)) or not all(map(math.isfinite, numbers)):
        raise UserError(f"{at}: {shown(line)} is not a class with x, y, width and height, or with an outline; mend it")
    if numbers[0] not in range(len(classes)):
        raise UserError(f"{at}: class {line.split()[0]} is not one of 0 to {len(classes) - 1}; name it in data.yaml")
    if not all(-1 <= share <= 2 for share in shares):
        raise UserError(
            f"{at}: {shown(line)} is not in shares of the image, from 0 to 1; divide by its width and height"
        )
    name = classes[int(numbers[0])]
    if len(shares) == 4:
        x, y, w, h = shares
        corners = (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
        return Thing(name, clipped(corners, height, width, at))
    polygon = tuple(share * side for share, side in zip(shares, [width, height] * (len(shares) // 2), strict=True))
    corners = min(polygon[::2]), min(polygon[1::2]), max(polygon[::2]), max(polygon[1::2])
    return Thing(name, clipped(corners, height, width, at), polygon=polygon)


def yolo_classes(root: Path) -> list[str]:
    """Read the names of the classes.

    Raises:
        UserError: there are none.
    """
    path = root / "data.yaml"
    if path.is_file():
        try:
            content = yaml.safe_load(text_of(path))
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not YAML: {getattr(error, 'problem', error)}") from error
        names = content.get("names") if isinstance(content, dict) else None
        if isinstance(names, dict) and list(names) == [*range(len(names))]:
            names = [*names.values()]
    else:
        path = next(
            (p for p in (root / "classes.txt", root / "labels" / "classes.txt") if p.is_file()), root / "classes.txt"
        )
        if not path.is_file():
            raise UserError(
                f"{root} has neither data.yaml nor classes.txt; write the name of each class on a line there"
            )
        names = [line.strip() for line in text_of(path).splitlines() if line.strip()]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"{path} has no list of names; write names: [first, second]")
    if len(set(names)) < len(names):
        raise UserError(f"{path} has a class twice; give each a name of its own")
    return names


def text_of(path: Path) -> str:
    """Read a file of text.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from error


FORMATS: list[tuple[Callable[[Path], bool], Callable[[Path, float | None], Source]]] = [
    (is_yolo, read_yolo),
    (is_voc, read_voc),
]
"""How to tell each, and what reads it."""
