"""Segmentation benchmarks as they lie on disk: PASCAL VOC 2012, PASCAL Context, COCO-Object, and shards.

voc          JPEGImages/*.jpg, SegmentationClass/*.png; names in ImageSets/Segmentation/val.txt
context      JPEGImages/*.jpg, SegmentationClassContext/*.png; names in ImageSets/SegmentationContext/val.txt
coco_object  images/val2017/*.jpg, annotations/val2017/*_instanceTrainIds.png (or COCO-Stuff's *.png)
shards       members jpg, png or webp, and mask.png; classes.txt beside the shards or above them

Masks hold 0 for the background and classes from 1; 255 is ignored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ....models.pictures import PictureError, load_labels, read_picture_file
from ...data.decode import decode_rgb
from ...data.report import BadSample
from ...data.shards.reader import image_of
from ...data.text import read_text_file
from .labels import read_labels

# COCO-Stuff numbers its things 0..89 with these ten unused; COCO-Object counts them from 1 without gaps.
_UNUSED_THINGS = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82}
_STUFF_TO_OBJECT = np.zeros(256, dtype=np.uint8)
for _number, _thing in enumerate(sorted(set(range(90)) - _UNUSED_THINGS)):
    _STUFF_TO_OBJECT[_thing] = _number + 1


@dataclass(frozen=True)
class Scene:
    """One labelled image: RGB uint8 [H, W, 3] and class ids uint8 [H, W]."""

    name: str
    image: np.ndarray
    mask: np.ndarray


class SegmentationData(ABC):
    """A benchmark: class names (``background`` first) and scenes in a fixed order."""

    kind: str
    classes: list[str]
    threshold: float

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Scene]: ...


@dataclass(frozen=True)
class Layout:
    """Where a benchmark of image files keeps what, and the background threshold published for it."""

    images: str
    masks: str
    split: str | None
    threshold: float


LAYOUTS = {
    "voc": Layout("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", 0.95),
    "context": Layout("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext", 0.35),
    "coco_object": Layout("images", "annotations", None, 0.95),
}


class ImageFiles(SegmentationData):
    """A benchmark laid out as files.

    Raises:
        FileNotFoundError: a folder, the list of names, an image or a mask is missing.
        ValueError: the list is empty.
    """

    def __init__(self, root: Path, kind: str, split: str = "val"):
        layout = LAYOUTS[kind]
        self.kind = kind
        self.classes = read_labels(kind)
        self.threshold = layout.threshold
        part = f"{split}2017" if layout.split is None else ""
        images, masks = root / layout.images / part, root / layout.masks / part
        for folder in (images, masks):
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} does not exist; {root} is not laid out as {kind}.")
        if layout.split is None:
            names = sorted(path.stem for path in images.glob("*.jpg"))
        else:
            file = root / layout.split / f"{split}.txt"
            if not file.is_file():
                raise FileNotFoundError(f"{file} does not exist; it names the images of the split {split!r}.")
            names = [
                line.strip() for line in read_text_file(file, "list of names").splitlines() if line.strip()
            ]
        if not names:
            raise ValueError(f"{root} has no images in the split {split!r}; check the data set.")
        self._pairs = [(name, images / f"{name}.jpg", self._mask(masks, name)) for name in names]
        missing = [str(path) for _, *paths in self._pairs for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} files of {root} are missing, the first is {missing[0]}.")

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[Scene]:
        for name, image, mask in self._pairs:
            ids = decode_mask(_bytes(mask), str(mask))
            if self.kind == "coco_object" and not mask.stem.endswith("_instanceTrainIds"):
                ids = _STUFF_TO_OBJECT[ids]
            yield _scene(name, _bytes(image), ids, str(image))

    def _mask(self, folder: Path, name: str) -> Path:
        converted = folder / f"{name}_instanceTrainIds.png"
        return converted if self.kind == "coco_object" and converted.is_file() else folder / f"{name}.png"


class Shards(SegmentationData):
    """Shards of pairs whose samples carry a ``mask.png``, with a ``classes.txt`` beside them or above.

    Raises:
        FileNotFoundError: no shards or no ``classes.txt``.
        ValueError: shards without samples.
    """

    threshold = 0.95
    kind = "shards"

    def __init__(self, root: Path, split: str = "val"):
        from ...data.shards.reader import ShardReader, ShardSet

        folder = root / split if (root / split).is_dir() else root
        names = next(
            (p for p in (folder / "classes.txt", folder.parent / "classes.txt") if p.is_file()), None
        )
        if names is None:
            raise FileNotFoundError(
                f"{folder / 'classes.txt'} does not exist; write the names of the classes there, one a line."
            )
        self.classes = ["background", *(name for name in read_labels(names) if name != "background")]
        self._shards = ShardSet.open([str(folder)], kind="pairs")
        if len(self._shards) == 0:
            raise ValueError(f"{folder} holds no samples; build shards with `interloom data`.")
        self._reader = ShardReader(self._shards)

    def __len__(self) -> int:
        return len(self._shards)

    def __iter__(self) -> Iterator[Scene]:
        return (self.scene(index) for index in range(len(self)))

    def scene(self, index: int) -> Scene:
        """One scene of the order.

        Raises:
            ValueError: it lacks its image or mask.
        """
        record = self._reader.read(index)
        mask = record.members.get("mask.png")
        if mask is None:
            raise ValueError(f"{record.name} has no mask.png; segmentation needs an image and a mask.")
        try:
            image = image_of(record)
        except BadSample:
            raise ValueError(f"{record.name} has no image; segmentation needs an image and a mask.") from None
        return _scene(record.name, image, decode_mask(mask, record.name), record.name)


def open_segmentation(data: str | Path, kind: str = "auto", split: str = "val") -> SegmentationData:
    """The benchmark in a folder, told by its layout unless ``kind`` says.

    Args:
        data: folder; of PASCAL's, ``VOCdevkit`` serves as well as ``VOCdevkit/VOC2012``.
        kind: ``auto``, ``voc``, ``context``, ``coco_object`` or ``shards``.
        split: which part, ``val`` as a rule.

    Raises:
        FileNotFoundError: the folder or something in it is missing.
        ValueError: an unknown kind, or a folder of unknown layout.
    """
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(f"data={data} does not exist; give the folder of a segmentation data set.")
    if kind not in ("auto", "shards", *LAYOUTS):
        raise ValueError(f"kind={kind!r} is not known; use auto, {', '.join(LAYOUTS)} or shards.")
    candidates = [root, *(root / year for year in ("VOC2012", "VOC2010"))]
    for name, layout in LAYOUTS.items():
        for folder in candidates:
            if (
                kind in (name, "auto")
                and (folder / layout.masks).is_dir()
                and (folder / layout.images).is_dir()
            ):
                return ImageFiles(folder, name, split)
    if kind in LAYOUTS:
        return ImageFiles(root, kind, split)
    if kind == "shards" or any(root.glob("*.tar")) or any((root / split).glob("*.tar")):
        return Shards(root, split)
    layouts = "; ".join(f"{name}: {layout.images}, {layout.masks}" for name, layout in LAYOUTS.items())
    raise ValueError(f"data={data} is laid out like none of the known data sets ({layouts}; or shards).")


def decode_mask(data: bytes | memoryview, name: str) -> np.ndarray:
    """Class ids uint8 [H, W] of a palette or grey PNG.

    Raises:
        ValueError: it is no such image.
    """
    try:
        ids = load_labels(data, name)
    except PictureError as error:
        raise ValueError(
            f"the mask {name} cannot be read as an image ({error.reason}); restore it."
        ) from error
    if ids.ndim != 2:
        raise ValueError(f"the mask {name} has shape {list(ids.shape)}; expected class ids, one channel.")
    if ids.dtype != np.uint8 and ids.size and (ids.min() < 0 or ids.max() > 255):
        raise ValueError(
            f"the mask {name} holds class ids from {ids.min()} to {ids.max()}; expected 0 to 255 (255: not "
            "judged)."
        )
    return ids.astype(np.uint8)


def _bytes(path: Path) -> bytes:
    try:
        return read_picture_file(path)
    except PictureError as error:
        raise ValueError(f"the file {path} cannot be read ({error.reason}); restore it.") from error


def _scene(name: str, image: bytes | memoryview, mask: np.ndarray, source: str) -> Scene:
    try:
        pixels = decode_rgb(image, source)
    except BadSample as error:
        raise ValueError(f"the image {error}; restore or remove it.") from error
    if pixels.shape[:2] != mask.shape:
        raise ValueError(
            f"the image {source} is {pixels.shape[0]}x{pixels.shape[1]} but its mask "
            f"{mask.shape[0]}x{mask.shape[1]}; they must agree."
        )
    return Scene(name, pixels, mask)
