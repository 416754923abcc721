"""Readers of segmentation data sets: miniatures of the official trees, and authentic samples."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from scipy.io import savemat

from tests.raw_files import decode, samples_of, write_image, write_mask, write_text
from xattn.data.datasets import (
    _masks,
    ade20k,
    celebamask,
    cityscapes,
    cocostuff,
    pascal_context,
    voc,
)
from xattn.errors import DataError, MissingPackageError

SAMPLES = Path(__file__).parents[2] / "shared" / "data" / "format_samples"
authentic = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"needs {SAMPLES.name} beside xattn")

READERS = {
    "ade20k": (ade20k, ade20k.Settings(), 150),
    "cityscapes": (cityscapes, cityscapes.Settings(), 19),
    "cocostuff 171": (cocostuff, cocostuff.Settings(version="10k"), 171),
    "cocostuff 182": (cocostuff, cocostuff.Settings(classes=182), 182),
    "pascal_context 60": (pascal_context, pascal_context.Settings(), 60),
    "pascal_context 59": (pascal_context, pascal_context.Settings(classes=59), 59),
    "celebamask": (celebamask, celebamask.Settings(), 19),
}


def write_mat(path: Path, key: str, ids) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {key: np.asarray(ids), "captions": "a cat"}, do_compression=True)
    return path


def masks_of(reader, root: Path, split: str, settings=None) -> dict[str, list[list[int]]]:
    settings = settings or reader.Settings()
    return {s.key: decode(s.mask).tolist() for s in samples_of(reader, root, split, settings)}


# ---- all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
def test_classes_and_colours(name, tmp_path):
    reader, settings, count = READERS[name]
    info = reader.describe(tmp_path, settings)
    assert (info.name, info.tasks) == (name.split()[0], ("segmentation",))
    assert len(info.class_names) == len(set(info.class_names)) == len(info.palette) == count
    assert all(n == n.strip() and re.fullmatch(r"[a-z_ -]+", n) for n in info.class_names)
    assert all(0 <= value <= 255 for colour in info.palette for value in colour)
    # of ADE20K's published colours, one serves both road and skyscraper
    assert len(set(info.palette)) == count - (name == "ade20k")
    assert info.ignore_ids == (() if name == "celebamask" else (255,))
    assert info.licence
    assert info.citation


@pytest.mark.parametrize("name", READERS)
def test_an_empty_folder_and_an_unknown_split_are_refused(name, tmp_path):
    reader, settings, _ = READERS[name]
    with pytest.raises(DataError, match=re.escape(str(tmp_path))) as caught:
        reader.entries(tmp_path, "train", settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="unknown split 'trian'; did you mean 'train'"):
        reader.entries(tmp_path, "trian", settings)


def test_unknown_settings_are_refused():
    for reader, knob in ((cocostuff, {"classes": 172}), (pascal_context, {"classes": 33})):
        with pytest.raises(ValidationError):
            reader.Settings(**knob)


# ---- lookup tables and files --------------------------------------------------------------------


def test_table_maps_eight_and_sixteen_bits():
    table = _masks.id_table({0: 255, 2: 0, 300: 1})
    for raw in ([[0, 2], [2, 0]], [[300, 2], [0, 300]]):
        data = _masks.map_ids(np.array(raw, np.uint16), Path("m"), (2, 2), table)
        assert decode(data).tolist() == [[{0: 255, 2: 0, 300: 1}[i] for i in row] for row in raw]
        assert decode(data).dtype == np.uint8


def test_table_refuses_what_it_does_not_know():
    table = _masks.id_table({0: 255, 2: 0, 3: 1, 300: 1})
    raw = np.array([[1, 1, 0], [299, 65535, 300]], np.uint16)
    allowed = r"m\.png: unknown class id 1 in 2 pixels \(and 2 more ids\); allowed: 0, 2\.\.3, 300$"
    with pytest.raises(DataError, match=allowed):
        _masks.map_ids(raw, Path("m.png"), (3, 2), table)
    with pytest.raises(DataError, match=r"m\.png: 3 x 2 pixels .* 2 x 3"):
        _masks.map_ids(raw, Path("m.png"), (2, 3), table)


def test_matlab_files(tmp_path):
    path = write_mat(tmp_path / "m.mat", "S", np.array([[0, 182], [3, 4]], np.float64))
    assert _masks.read_mat(path, "S").tolist() == [[0, 182], [3, 4]]
    with pytest.raises(DataError, match=r"m\.mat: no variable 'LabelMap' in it"):
        _masks.read_mat(path, "LabelMap")
    with pytest.raises(DataError, match=r"n\.mat: no such file"):
        _masks.read_mat(tmp_path / "n.mat", "S")
    for odd in ([[0.5, 1]], [[-1, 1]], [[70000, 1]], [[np.nan, 1]], np.zeros((2, 2, 2)), "text"):
        write_mat(path, "S", odd)
        with pytest.raises(DataError, match=r"m\.mat: 'S' is .* expected a matrix of ids"):
            _masks.read_mat(path, "S")


@pytest.mark.parametrize("fault", ["cut", "flipped", "text", "empty"])
def test_damaged_matlab_files_are_named(tmp_path, fault):
    rng = np.random.default_rng(0)
    path = write_mat(tmp_path / "m.mat", "S", rng.integers(0, 182, (64, 64), np.uint8))
    data = path.read_bytes()
    middle = bytes(255 - b for b in data[300:320])
    damaged = {
        "cut": data[:-900],
        "flipped": data[:300] + middle + data[320:],
        "text": b"<html>not found</html>",
        "empty": b"",
    }
    path.write_bytes(damaged[fault])
    with pytest.raises(DataError, match=r"m\.mat: ") as caught:
        _masks.read_mat(path, "S")
    assert "\n" not in str(caught.value)


def test_matlab_files_need_scipy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingPackageError, match="scipy"):
        _masks.read_mat(tmp_path / "m.mat", "S")


# ---- ade20k -------------------------------------------------------------------------------------


def make_ade(root: Path, count=2) -> Path:
    for folder, prefix in (("training", "ADE_train"), ("validation", "ADE_val")):
        for number in range(count, 0, -1):
            name = f"{folder}/{prefix}_{number:08}"
            write_image(root / f"images/{name}.jpg", size=(4, 2))
            write_mask(root / f"annotations/{name}.png", [[0, 1, 2, 13], [150, 150, 0, number]])
    return root


def test_ade_subtracts_one(tmp_path):
    root = make_ade(tmp_path)
    (root / "images/training/.DS_Store").write_bytes(b"")
    assert ade20k.describe(root, ade20k.Settings()).splits == ("train", "val")
    assert masks_of(ade20k, root, "val") == {
        "ADE_val_00000001": [[255, 0, 1, 12], [149, 149, 255, 0]],
        "ADE_val_00000002": [[255, 0, 1, 12], [149, 149, 255, 1]],
    }
    sample = next(samples_of(ade20k, root, "train", ade20k.Settings()))
    assert sample.image == (root / "images/training/ADE_train_00000001.jpg").read_bytes()
    assert sample.source.endswith("ADE_train_00000001.jpg")


def test_ade_wrong_trees_name_what_is_missing(tmp_path):
    root = make_ade(tmp_path, count=12)
    (root / "images/training/ADE_train_00000003.jpg").unlink()
    missing = r"missing images: \S*images/training/ADE_train_00000003\.jpg; restore"
    with pytest.raises(DataError, match=missing):
        ade20k.entries(root, "train", ade20k.Settings())
    for mask in (root / "annotations/validation").glob("*0.png"):
        mask.unlink()
    with pytest.raises(DataError, match=r"masks: \S*annotations/validation/ADE_val_00000010\.png;"):
        ade20k.entries(root, "val", ade20k.Settings())
    for mask in (root / "annotations/validation").glob("*.png"):
        mask.rename(mask.with_suffix(".gif"))
    with pytest.raises(DataError, match=r"annotations/validation: no file \*\.png in it"):
        ade20k.entries(root, "val", ade20k.Settings())
    write_mask(root / "annotations/validation/ADE_val_00000001.png", [[0] * 4] * 2)
    with pytest.raises(DataError, match=r"ADE_val_00000011\.png and 1 more; restore") as caught:
        ade20k.entries(root, "val", ade20k.Settings())
    assert str(caught.value).count("ADE_val_") == 10
    shutil.rmtree(root / "images")
    with pytest.raises(DataError, match=r"images/training: no such folder; expected files \*\.jpg"):
        ade20k.entries(root, "train", ade20k.Settings())


def test_ade_odd_masks(tmp_path):
    root = make_ade(tmp_path, count=1)
    path = root / "annotations/training/ADE_train_00000001.png"
    for ids, message in (
        ([[151] * 4] * 2, r"unknown class id 151 in 8 pixels; allowed: 0\.\.150"),
        ([[1] * 3] * 2, r"3 x 2 pixels \(width x height\), but its image has 4 x 2"),
    ):
        write_mask(path, ids)
        with pytest.raises(DataError, match=rf"ADE_train_00000001\.png: {message}"):
            masks_of(ade20k, root, "train")
    Image.new("RGB", (4, 2)).save(path)
    with pytest.raises(DataError, match=r"00001\.png: found PNG of mode RGB"):
        masks_of(ade20k, root, "train")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"00001\.png: cannot be decoded"):
        masks_of(ade20k, root, "train")


@pytest.mark.shared
@authentic
def test_ade_authentic_samples():
    root = SAMPLES / "ade20k_sceneparse150"
    lines = (root / "objectInfo150.txt").read_text().splitlines()[1:151]
    names = tuple(line.split("\t")[4].split(",")[0].strip() for line in lines)
    assert names == ade20k.CLASS_NAMES
    found = list(samples_of(ade20k, root, "val", ade20k.Settings()))
    assert len(found) == 3
    for sample in found:
        raw = np.asarray(Image.open(root / f"annotations/validation/{sample.key}.png"))
        mask = decode(sample.mask)
        assert mask.shape == decode(sample.image).shape[:2]
        assert (mask == (raw.astype(int) - 1) % 256).all()
        assert 2 <= len(np.unique(mask)) < 150


# ---- cityscapes ---------------------------------------------------------------------------------


def make_cityscapes(root: Path, splits=("train", "val")) -> Path:
    for split in splits:
        for city, frame in (("ulm", 1), ("aachen", 2), ("aachen", 1)):
            name = f"{split}/{city}/{city}_{frame:06}_000019"
            write_image(root / f"leftImg8bit/{name}_leftImg8bit.png", size=(17, 2))
            ids = np.arange(34).reshape(2, 17) if split != "test" else np.full((2, 17), 3)
            write_mask(root / f"gtFine/{name}_gtFine_labelIds.png", ids)
            for other in ("color", "instanceIds", "labelTrainIds"):
                write_mask(root / f"gtFine/{name}_gtFine_{other}.png", ids + 100)
            write_text(root / f"gtFine/{name}_gtFine_polygons.json", "{}")
    return root


def test_cityscapes_label_ids_become_train_ids(tmp_path):
    root = make_cityscapes(tmp_path)
    found = masks_of(cityscapes, root, "val")
    keys = ["aachen_000001_000019", "aachen_000002_000019", "ulm_000001_000019"]
    assert list(found) == keys
    scored = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    wanted = [scored.index(i) if i in scored else 255 for i in range(34)]
    assert [*found[keys[0]][0], *found[keys[0]][1]] == wanted
    names = cityscapes.describe(root, cityscapes.Settings()).class_names
    assert (names[0], names[13], names[18]) == ("road", "car", "bicycle")


def test_cityscapes_lists_the_test_split_with_its_label_files(tmp_path):
    root, settings = make_cityscapes(tmp_path), cityscapes.Settings()
    write_image(root / "leftImg8bit/test/bonn/bonn_000001_000019_leftImg8bit.png")
    assert cityscapes.describe(root, settings).splits == ("train", "val")
    with pytest.raises(DataError, match="unknown split 'test'"):
        cityscapes.entries(root, "test", settings)
    shutil.rmtree(root / "leftImg8bit/test")
    make_cityscapes(root, ("test",))
    assert cityscapes.describe(root, settings).splits == ("train", "val", "test")
    assert np.unique(list(masks_of(cityscapes, root, "test").values())).tolist() == [255]


def test_cityscapes_faults(tmp_path):
    root, settings = make_cityscapes(tmp_path), cityscapes.Settings()
    mask = root / "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png"
    write_mask(mask, [[34] * 17] * 2)
    with pytest.raises(DataError, match=r"labelIds\.png: unknown class id 34 .*: 0\.\.33$"):
        masks_of(cityscapes, root, "train")
    mask.unlink()
    missing = r"missing masks: \S*gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds\.png;"
    with pytest.raises(DataError, match=missing):
        cityscapes.entries(root, "train", settings)
    image = root / "leftImg8bit/val/aachen/aachen_000002_000019_leftImg8bit.png"
    image.rename(root / "leftImg8bit/val/aachen_000002_000019_leftImg8bit.png")
    with pytest.raises(DataError, match=r"images: \S*val/aachen/aachen_000002_000019_leftImg8bit"):
        cityscapes.entries(root, "val", settings)


# ---- cocostuff ----------------------------------------------------------------------------------

NEVER = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91]
DRAWN = [i for i in range(1, 183) if i not in NEVER]


def test_cocostuff_class_maps():
    small = cocostuff.describe(Path(), cocostuff.Settings()).class_names
    full = cocostuff.describe(Path(), cocostuff.Settings(classes=182)).class_names
    assert (full[0], full[11], full[90], full[91], full[181]) == (
        *("person", "street sign", "hair brush"),
        *("banner", "wood"),
    )
    assert [full[i - 1] for i in NEVER] == [
        *("street sign", "hat", "shoe", "eye glasses", "plate", "mirror", "window", "desk"),
        *("door", "blender", "hair brush"),
    ]
    assert small == tuple(full[i - 1] for i in DRAWN)
    # mmsegmentation's map: 13 -> 11, 27 -> 24, 92 -> 80, 182 -> 170 (from 0)
    assert [small.index(full[i - 1]) for i in (13, 27, 92, 182)] == [11, 24, 80, 170]


def make_cocostuff_10k(root: Path, ids=(0, *DRAWN)) -> Path:
    for name in ("COCO_train2014_000000000077", "COCO_train2014_000000000064"):
        write_image(root / f"images/{name}.jpg", size=(len(ids), 1))
        write_mat(root / f"annotations/{name}.mat", "S", np.array([ids], np.uint8))
        write_text(root / "imageLists/train.txt", f"{name}\nCOCO_train2014_000000000077\n")
    write_text(root / "imageLists/test.txt", "COCO_train2014_000000000077\n")
    return root


def test_cocostuff_10k(tmp_path):
    root, settings = make_cocostuff_10k(tmp_path), cocostuff.Settings(version="10k")
    assert cocostuff.describe(root, settings).splits == ("train", "test")
    found = masks_of(cocostuff, root, "train", settings)
    assert list(found) == ["COCO_train2014_000000000064", "COCO_train2014_000000000077"]
    assert found["COCO_train2014_000000000064"] == [[255, *range(171)]]
    every = cocostuff.Settings(version="10k", classes=182)
    found = masks_of(cocostuff, root, "test", every)
    assert list(found.values()) == [[[255, *(i - 1 for i in DRAWN)]]]


def test_cocostuff_10k_faults(tmp_path):
    root, settings = (
        make_cocostuff_10k(tmp_path, ids=(0, 12, 183)),
        cocostuff.Settings(version="10k"),
    )
    with pytest.raises(DataError, match=r"unknown class id 12 .*1 more .* 0\.\.11, 13\.\.25, 27"):
        masks_of(cocostuff, root, "train", settings)
    with pytest.raises(DataError, match=r"unknown class id 183 in 1 pixels; allowed: 0\.\.182$"):
        masks_of(cocostuff, root, "train", settings.model_copy(update={"classes": 182}))
    write_mat(root / "annotations/COCO_train2014_000000000064.mat", "S", np.zeros((3, 1), np.uint8))
    with pytest.raises(DataError, match=r"064\.mat: 1 x 3 pixels .* 3 x 1"):
        masks_of(cocostuff, root, "train", settings)
    (root / "annotations/COCO_train2014_000000000064.mat").unlink()
    with pytest.raises(DataError, match=r"missing masks: \S*annotations/COCO_train2014_\d*64\.mat"):
        cocostuff.entries(root, "train", settings)
    (root / "imageLists/test.txt").unlink()
    with pytest.raises(DataError, match=r"imageLists/test\.txt: no such file"):
        cocostuff.entries(root, "test", settings)
    with pytest.raises(DataError, match=r"images/train2017: no such folder"):
        cocostuff.entries(root, "train", cocostuff.Settings())


@pytest.mark.parametrize("layout", [("images/", "annotations"), ("", "stuffthingmaps")])
def test_cocostuff_164k(tmp_path, layout):
    values = [i - 1 for i in DRAWN] + [255]
    for split in ("train", "val"):
        write_image(tmp_path / f"{layout[0]}{split}2017/000000000009.jpg", size=(172, 1))
        write_mask(tmp_path / f"{layout[1]}/{split}2017/000000000009.png", [values])
        # what mmsegmentation's converter adds
        extra = f"{layout[1]}/{split}2017/000000000009_labelTrainIds.png"
        write_mask(tmp_path / extra, [[1] * 172])
    settings = cocostuff.Settings()
    assert cocostuff.describe(tmp_path, settings).splits == ("train", "val")
    assert masks_of(cocostuff, tmp_path, "val") == {"000000000009": [[*range(171), 255]]}
    found = masks_of(cocostuff, tmp_path, "train", cocostuff.Settings(classes=182))
    assert found == {"000000000009": [values]}
    write_mask(tmp_path / f"{layout[1]}/val2017/000000000009.png", [[182, 11] * 86])
    with pytest.raises(DataError, match=r"unknown class id 11 in 86 pixels \(and 1 more ids\)"):
        masks_of(cocostuff, tmp_path, "val")
    write_image(tmp_path / f"{layout[0]}val2017/000000000010.jpg")
    missing = rf"missing masks: \S*{layout[1]}/val2017/000000000010\.png;"
    with pytest.raises(DataError, match=missing):
        cocostuff.entries(tmp_path, "val", settings)


@pytest.mark.shared
@authentic
def test_cocostuff_authentic_labels_and_pixel_maps():
    lines = (SAMPLES / "cocostuff/labels.txt").read_text().splitlines()
    labels = [line.split(": ")[1].strip() for line in lines if line.strip()]
    assert ("unlabeled", *cocostuff.NAMES) == tuple(labels)
    # Result files of upstream's stuff API: ids 92..183 from 1, where 183 is "other".
    raw = np.asarray(Image.open(SAMPLES / "cocostuff/pixelmaps/000000000934.png"))
    info = cocostuff.describe(Path(), cocostuff.Settings())
    table = cocostuff._table(cocostuff.Settings(version="10k"))
    drawn = raw[raw < 183]
    data = _masks.map_ids(drawn[None], Path("m"), (drawn.size, 1), table)
    stored = [info.class_names[i] for i in np.unique(decode(data))]
    assert stored == [labels[i] for i in np.unique(drawn)]


# ---- pascal_context -----------------------------------------------------------------------------

OFFICIAL_IDS = [
    *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113),
    *(115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324),
    *(326, 347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
]
"""The 59 classes among the 459 (mmsegmentation's converter); they sort as their names do."""


def make_context(root: Path, source: str) -> Path:
    for split, name in (("train", "2008_000002"), ("val", "2008_000003")):
        write_image(root / f"JPEGImages/{name}.jpg", size=(60, 1))
        kind = "SegmentationContext" if source == "png" else "Main"
        write_text(root / f"ImageSets/{kind}/{split}.txt", f"{name}\n")
        if source == "png":
            write_mask(root / f"SegmentationClassContext/{name}.png", [[*range(60)]])
        else:
            ids = np.array([[431, *OFFICIAL_IDS]], np.uint16)
            write_mat(root / f"trainval/{name}.mat", "LabelMap", ids)
    if source == "mat":
        names = {i: f"other thing {i}" for i in range(1, 460)}
        names |= dict(zip(OFFICIAL_IDS, pascal_context.NAMES[1:], strict=True))
        write_text(root / "labels.txt", "".join(f"{i}: {n}\n" for i, n in names.items()))
    return root


@pytest.mark.parametrize("source", ["png", "mat"])
def test_context_ids(tmp_path, source):
    root = make_context(tmp_path, source)
    assert masks_of(pascal_context, root, "train") == {"2008_000002": [[*range(60)]]}
    few = pascal_context.Settings(classes=59)
    assert masks_of(pascal_context, root, "val", few) == {"2008_000003": [[255, *range(59)]]}
    assert pascal_context.describe(root, few).class_names[:2] == ("aeroplane", "bag")
    assert pascal_context.describe(root, pascal_context.Settings()).class_names[0] == "background"
    assert pascal_context.NAMES[1:] == tuple(sorted(pascal_context.NAMES[1:]))


def test_context_faults(tmp_path):
    root, settings = make_context(tmp_path / "png", "png"), pascal_context.Settings()
    write_mask(root / "SegmentationClassContext/2008_000002.png", [[60] * 60])
    with pytest.raises(DataError, match=r"unknown class id 60 in 60 pixels; allowed: 0\.\.59$"):
        masks_of(pascal_context, root, "train")
    (root / "JPEGImages/2008_000002.jpg").unlink()
    with pytest.raises(DataError, match=r"missing images: \S*JPEGImages/2008_000002\.jpg;"):
        pascal_context.entries(root, "train", settings)
    (root / "ImageSets/SegmentationContext/val.txt").unlink()
    with pytest.raises(DataError, match=r"SegmentationContext/val\.txt: missing list of the split"):
        pascal_context.entries(root, "val", settings)


def test_context_label_list_faults(tmp_path):
    for number, (text, message) in enumerate(
        {
            "1: sky\n": r"labels\.txt: 58 of the 59 class names are not in it: aeroplane, bag, ",
            "sky\n": r"labels\.txt: expected 'number: name', found 'sky'",
        }.items()
    ):
        root = make_context(tmp_path / str(number), "mat")
        write_text(root / "labels.txt", text)
        with pytest.raises(DataError, match=message):
            masks_of(pascal_context, root, "train")
    (root / "labels.txt").unlink()
    with pytest.raises(DataError, match=r"labels\.txt: missing list of the 459 class names"):
        pascal_context.entries(root, "train", pascal_context.Settings())
    root = make_context(tmp_path / "odd", "mat")
    write_mat(root / "trainval/2008_000002.mat", "LabelMap", np.full((1, 60), 460))
    with pytest.raises(DataError, match=r"000002\.mat: unknown class id 460 .* 0\.\.459$"):
        masks_of(pascal_context, root, "train")


# ---- celebamask ---------------------------------------------------------------------------------


def draw_part(root: Path, number: int, part: str, columns: slice, size=4, mode="L") -> Path:
    mask = np.zeros((size, size), np.uint8)
    mask[:, columns] = 255
    path = root / f"CelebAMask-HQ-mask-anno/{number // 2000}/{number:05}_{part}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).convert(mode).save(path)
    return path


def make_celeba(root: Path) -> Path:
    celeba = {0: 162770, 1: 162771, 2: 182637, 2001: 182638, 4: 5}
    lines = "".join(f"{n:<11}{i:<11}{i + 1:06}.jpg\n" for n, i in celeba.items())
    write_text(
        root / "CelebA-HQ-to-CelebA-mapping.txt", f"idx        orig_idx   orig_file\n{lines}"
    )
    for number in celeba:
        write_image(root / f"CelebA-HQ-img/{number}.jpg", size=(8, 8))
        draw_part(root, number, "skin", slice(0, 3), mode="RGB")
        draw_part(root, number, "hair", slice(2, 4))
        draw_part(root, number, "nose", slice(1, 3))
        write_text(root / f"CelebAMask-HQ-mask-anno/{number // 2000}/.DS_Store", "")
    draw_part(root, 4, "neck", slice(0, 1), mode="1")
    return root


def test_celeba_merges_in_the_official_order_and_enlarges(tmp_path):
    root = make_celeba(tmp_path)
    names = celebamask.describe(root, celebamask.Settings()).class_names
    skin, nose, hair, neck = (names.index(n) for n in ("skin", "nose", "hair", "neck"))
    assert (skin, nose, hair, neck) == (1, 2, 13, 17)
    assert names[1:] == (
        *("skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear"),
        *("mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
    )
    found = masks_of(celebamask, root, "train")
    assert found["0"] == [[skin, skin, nose, nose, hair, hair, hair, hair]] * 8
    assert found["4"] == [[neck, neck, nose, nose, hair, hair, hair, hair]] * 8
    sample = next(samples_of(celebamask, root, "train", celebamask.Settings()))
    assert sample.image == (root / "CelebA-HQ-img/0.jpg").read_bytes()


def test_celeba_background_is_what_no_part_covers(tmp_path):
    root = make_celeba(tmp_path)
    (root / "CelebAMask-HQ-mask-anno/0/00000_hair.png").unlink()
    assert masks_of(celebamask, root, "train")["0"] == [[1, 1, 2, 2, 2, 2, 0, 0]] * 8


def test_celeba_splits_are_upstream_s(tmp_path):
    root, settings = make_celeba(tmp_path), celebamask.Settings()
    wanted = {"train": ["0", "4"], "val": ["1", "2"], "test": ["2001"]}
    found = {s: [e.key for e in celebamask.entries(root, s, settings)] for s in wanted}
    assert found == wanted
    mapping = root / "CelebA-HQ-to-CelebA-mapping.txt"
    write_text(mapping, mapping.read_text().split("\n", 1)[1])  # some copies have no header
    assert {s: [e.key for e in celebamask.entries(root, s, settings)] for s in wanted} == wanted


def test_celeba_faults(tmp_path):
    root, settings = make_celeba(tmp_path), celebamask.Settings()
    bad = draw_part(root, 1, "hair", slice(0, 1), size=3)
    with pytest.raises(
        DataError, match=r"00001_hair\.png: 3 x 3 pixels .* size of the other parts"
    ):
        masks_of(celebamask, root, "val")
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(DataError, match=r"mask part \S*00001_hair\.png: cannot be decoded"):
        masks_of(celebamask, root, "val")
    write_image(root / "CelebA-HQ-img/4.jpg", size=(8, 6))
    with pytest.raises(DataError, match=r"00004_skin\.png: 4 x 4 .* of its image, 8 x 6"):
        masks_of(celebamask, root, "train")
    draw_part(root, 4, "hiar", slice(0, 1))
    with pytest.raises(DataError, match=r"00004_hiar\.png: unknown part 'hiar'; .* 'hair'"):
        celebamask.entries(root, "train", settings)
    for part in (root / "CelebAMask-HQ-mask-anno/1").glob("*.png"):
        part.unlink()
    with pytest.raises(DataError, match=r"missing masks: \S*anno/1/02001_skin\.png"):
        celebamask.entries(root, "test", settings)
    (root / "CelebA-HQ-img/2001.jpg").unlink()
    with pytest.raises(DataError, match=r"missing images: \S*CelebA-HQ-img/2001\.jpg"):
        celebamask.entries(root, "test", settings)
    write_text(root / "CelebA-HQ-to-CelebA-mapping.txt", "idx orig\n0 a.jpg\n")
    with pytest.raises(DataError, match=r"mapping\.txt: expected .*, found '0 a\.jpg'"):
        celebamask.entries(root, "train", settings)


# ---- voc, train_aug -----------------------------------------------------------------------------


@pytest.mark.parametrize("list_name", ["trainaug", "train_aug"])
def test_voc_train_aug_prefers_voc_s_own_masks(tmp_path, list_name):
    for name in ("own", "sbd"):
        write_image(tmp_path / f"JPEGImages/{name}.jpg", size=(3, 1))
        write_mask(tmp_path / f"SegmentationClassAug/{name}.png", [[0, 7, 7]])
    write_mask(tmp_path / "SegmentationClass/own.png", [[0, 255, 7]], mode="P")
    write_text(tmp_path / "ImageSets/Segmentation/train.txt", "own\n")
    settings = voc.Settings()
    assert voc.describe(tmp_path, settings).splits == ("train",)
    write_text(tmp_path / f"ImageSets/Segmentation/{list_name}.txt", "sbd\nown\n")
    assert voc.describe(tmp_path, settings).splits == ("train", "train_aug")
    wanted = {"sbd": [[0, 7, 7]], "own": [[0, 255, 7]]}
    assert masks_of(voc, tmp_path, "train_aug") == wanted
    assert masks_of(voc, tmp_path, "train") == {"own": wanted["own"]}
    (tmp_path / "SegmentationClassAug/sbd.png").unlink()
    with pytest.raises(DataError, match=r"SegmentationClassAug/sbd\.png: missing mask of sbd\.jpg"):
        voc.entries(tmp_path, "train_aug", settings)
    write_text(tmp_path / "ImageSets/Segmentation/train.txt", "sbd\n")
    with pytest.raises(DataError, match=r"SegmentationClass/sbd\.png: missing mask of sbd\.jpg"):
        voc.entries(tmp_path, "train", settings)
