"""ImageNet-1k: 1.28 million images of 1,000 classes (ILSVRC2012, classification).

Class ids 0..999 are the WordNet ids of the train folders in alphabetical order, as everywhere. If
the devkit or Kaggle's list of names is there, a class is called by the first of its synonyms, with
its WordNet id behind it where classes share that (there are two "crane"); else by its WordNet id.

The validation images may lie in folders of their classes, or all in one folder as in the archive;
then their labels come from Kaggle's solution or from the devkit. A tree that is only half unpacked
is an error: the classes, and the images of each split, are counted.

Sources: readme.txt of ILSVRC2012_devkit_t12; files of Kaggle's "ImageNet Object Localization".
"""

import os
import re
from collections import Counter
from pathlib import Path

from pydantic import BaseModel, Field

from xattn.data.datasets import _files
from xattn.errors import DataError, MissingPackageError
from xattn.structures import DatasetInfo, Sample

URL = "https://image-net.org/challenges/LSVRC/2012"
NUM_CLASSES = 1000
NUM_IMAGES = {"train": 1_281_167, "val": 50_000}
LAYOUT = """\
imagenet/
  train/n01440764/*.JPEG                 1,000 folders
  val/n01440764/*.JPEG                   or val/ILSVRC2012_val_*.JPEG and one of
  LOC_val_solution.csv                     Kaggle's labels
  ILSVRC2012_devkit_t12/data/              the devkit's: meta.mat and
                                           ILSVRC2012_validation_ground_truth.txt
  LOC_synset_mapping.txt                 names of the classes; meta.mat has them too
train/ and val/ may lie in ILSVRC/Data/CLS-LOC/, as Kaggle has them, and data/ in imagenet/ itself.
"""
SOLUTION = "LOC_val_solution.csv"
NAMES = "LOC_synset_mapping.txt"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"


class Settings(BaseModel, frozen=True, extra="forbid"):
    """Knobs of the reader.

    Args:
        classes: class folders that there must be.
        complete: whether no image may be missing: with 1,000 classes each split is counted, and
            each image that the labels of a flat val folder name must be there.
    """

    classes: int = Field(NUM_CLASSES, ge=1)
    complete: bool = True


def describe(root: Path, settings: Settings) -> DatasetInfo:
    """Describe the data set from the train folders and the names of the classes.

    Raises:
        DataError: the train folders are not there or not all, or a class has no name.
        MissingPackageError: the names are in meta.mat and SciPy is not installed.
    """
    names = _class_names(root, _wordnet_ids(root, settings))
    return DatasetInfo(
        name="imagenet",
        tasks=("classification",),
        class_names=names,
        palette=_files.palette(len(names), first=1),
        splits=tuple(NUM_IMAGES),
        ignore_ids=(),
        licence="ImageNet's terms of access: non-commercial research and education",
        url=URL,
        citation="Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015",
        layout=LAYOUT,
    )


def entries(root: Path, split: str, settings: Settings) -> list[_files.Entry]:
    """List the split's samples: class by class, or for a flat val folder by file name.

    Raises:
        DataError: classes, images or labels are missing or do not fit each other.
        MissingPackageError: the labels need meta.mat and SciPy is not installed.
    """
    _files.check_split(root, split, NUM_IMAGES)
    labels = {wordnet_id: i for i, wordnet_id in enumerate(_wordnet_ids(root, settings))}
    folder = _images_root(root) / split
    if split == "val" and not _files.list_folders(folder):
        found = _list_flat(root, folder, labels, settings)
    else:
        found = _list_classes(folder, labels)
    expected = NUM_IMAGES[split]
    if settings.complete and settings.classes == NUM_CLASSES and len(found) != expected:
        raise DataError(
            f"{folder}: found {len(found)} images, expected {expected}; unpack it again, or set"
            " complete: false if that is all you want"
        )
    _files.check_unique(found)
    return found


def read(entry: _files.Entry, info: DatasetInfo, settings: Settings) -> Sample:  # noqa: ARG001
    """Read an image; its label is the entry's target.

    Raises:
        DataError: the file is damaged.
    """
    return _files.read_labelled(entry)


def _images_root(root: Path) -> Path:
    """Return the folder that train/ and val/ lie in."""
    places = (root, root / "ILSVRC" / "Data" / "CLS-LOC")
    for place in places:
        if (place / "train").is_dir():
            return place
    raise DataError(f"missing folder {places[0] / 'train'} (or {places[1] / 'train'}); unpack it")


def _wordnet_ids(root: Path, settings: Settings) -> list[str]:
    """Return the sorted names of the class folders of train."""
    folder = _images_root(root) / "train"
    found = _files.list_folders(folder)
    odd = [name for name in found if not re.fullmatch(r"n\d{8}", name)]
    if odd:
        raise DataError(f"{folder / odd[0]}: no folder of a class, whose names are n and 8 digits")
    if len(found) != settings.classes:
        raise DataError(
            f"{folder}: found {len(found)} class folders, expected {settings.classes}; unpack the"
            " rest, or set classes to their number"
        )
    return found


def _list_classes(folder: Path, labels: dict[str, int]) -> list[_files.Entry]:
    """List images in folders of their classes."""
    unknown = [name for name in _files.list_folders(folder) if name not in labels]
    if unknown:
        raise DataError(f"{folder / unknown[0]}: there is no such class in train")
    without = [folder / name for name in labels if not (folder / name).is_dir()]
    _files.refuse_missing(without, "class folders")
    found, empty = [], []
    for wordnet_id, label in labels.items():
        names = _files.list_images(folder / wordnet_id)
        if not names:
            empty.append(folder / wordnet_id / "*.JPEG")
        for name in names:
            key = _files.sample_key(os.path.splitext(name)[0])
            found.append(_files.Entry(key, f"{folder}/{wordnet_id}/{name}", label))
    _files.refuse_missing(empty, "images")
    return found


def _list_flat(
    root: Path, folder: Path, labels: dict[str, int], settings: Settings
) -> list[_files.Entry]:
    """List images that lie in one folder, whose classes stand in a file."""
    source, classes = _read_truth(root)
    names = {os.path.splitext(name)[0]: name for name in _files.list_images(folder)}
    if settings.complete or not names:
        missing = [folder / f"{stem}.JPEG" for stem in classes if stem not in names]
        _files.refuse_missing(missing, "validation images")
    found = []
    for stem, name in names.items():
        if stem not in classes:
            raise DataError(f"{folder / name}: {source} has no label for it")
        if classes[stem] not in labels:
            raise DataError(f"{folder / name}: its class {classes[stem]} is not a folder of train")
        found.append(
            _files.Entry(_files.sample_key(stem), f"{folder}/{name}", labels[classes[stem]])
        )
    return found


def _read_truth(root: Path) -> tuple[Path, dict[str, str]]:
    """Return the file with the labels of a flat val folder, and image name -> WordNet id."""
    if (root / SOLUTION).is_file():
        return root / SOLUTION, _read_solution(root / SOLUTION)
    devkit = _find_devkit(root)
    files = [devkit / GROUND_TRUTH, devkit / META]
    missing = [file for file in files if not file.is_file()]
    if missing:
        _files.refuse_missing([root / SOLUTION, *missing], "labels of a flat folder val (or)")
    wordnet_ids = {number: wordnet_id for number, wordnet_id, _ in _read_meta(files[1])}
    classes = {}
    for row, line in enumerate(_files.read_list(files[0]), 1):
        if not line.isdecimal() or int(line) not in wordnet_ids:
            raise DataError(f"{files[0]}: line {row}: '{line}' is no class of {files[1]}")
        classes[f"ILSVRC2012_val_{row:08d}"] = wordnet_ids[int(line)]
    return files[0], classes


def _read_solution(path: Path) -> dict[str, str]:
    """Return image name -> WordNet id from lines 'NAME,WNID x y x y WNID x y x y ...'."""
    classes = {}
    for row, line in enumerate(_files.read_list(path)[1:], 2):
        match = re.match(r"([^,\s]+),\s*(n\d{8})\b", line)
        if not match:
            raise DataError(
                f"{path}: line {row}: expected 'NAME,n00000000 ...', found '{line[:60]}'"
            )
        classes[match[1]] = match[2]
    return classes


def _class_names(root: Path, wordnet_ids: list[str]) -> tuple[str, ...]:
    """Return the first synonym of each class, made unique; without a file the WordNet ids."""
    meta = _find_devkit(root) / META
    if (root / NAMES).is_file():
        source = root / NAMES
        lines = (line.partition(" ") for line in _files.read_list(source))
        synonyms = {wordnet_id: words for wordnet_id, _, words in lines}
    elif meta.is_file():
        source = meta
        synonyms = {wordnet_id: words for _, wordnet_id, words in _read_meta(meta)}
    else:
        return tuple(wordnet_ids)
    names = [synonyms.get(wordnet_id, "").split(",")[0].strip() for wordnet_id in wordnet_ids]
    if "" in names:
        raise DataError(f"{source}: no name for class {wordnet_ids[names.index('')]}")
    count = Counter(names)
    return tuple(
        name if count[name] == 1 else f"{name} ({wordnet_id})"
        for name, wordnet_id in zip(names, wordnet_ids, strict=True)
    )


def _find_devkit(root: Path) -> Path:
    unpacked = root / "ILSVRC2012_devkit_t12" / "data"
    return unpacked if unpacked.is_dir() else root / "data"


def _read_meta(path: Path) -> list[tuple[int, str, str]]:
    """Return (ILSVRC2012_ID, WordNet id, synonyms) of the classes: the synsets without children."""
    try:
        from scipy.io import loadmat  # type: ignore[import-untyped] # noqa: PLC0415 (slow, rare)
    except ImportError as error:
        raise MissingPackageError(
            f"{path} needs scipy: pip install scipy, or put Kaggle's {SOLUTION} and {NAMES} there"
        ) from error
    try:
        synsets = loadmat(str(path), squeeze_me=True)["synsets"].reshape(-1)
        return [
            (int(synset["ILSVRC2012_ID"]), str(synset["WNID"]), str(synset["words"]))
            for synset in synsets
            if int(synset["num_children"]) == 0
        ]
    except Exception as error:  # damaged bytes raise whatever the decoder stumbles over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not readable as the devkit's {META} ({reason})") from error
