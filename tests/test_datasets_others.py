"""Readers of ImageNet, COCO, VOC 07+12 and of the user's own folders, on miniature copies."""

import json
import pickle
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from tests.raw_files import decode, samples_of, write_image, write_mask, write_text
from tests.test_datasets import make_voc
from xattn.data.datasets import DatasetConfig, coco, folder, imagenet, voc, voc0712
from xattn.errors import DataError, MissingPackageError
from xattn.structures import Box

SHARED = Path(__file__).parents[2] / "shared" / "data"


def authentic(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"the real files {name} are not here")
    return SHARED / name


def settings_error(reader: str, settings: dict) -> str:
    with pytest.raises(ValidationError) as caught:
        DatasetConfig(reader=reader, settings=settings)
    return str(caught.value)


# ---- imagenet -----------------------------------------------------------------------------------

WNIDS = ("n02012849", "n02102480", "n03126707")
THREE = imagenet.Settings(classes=3)
VAL = {1: "n03126707", 2: "n02012849", 3: "n03126707"}
SYNONYMS = {
    "n02012849": "crane",
    "n02102480": "Sussex spaniel, spaniel",
    "n03126707": "crane, hoist",
}


def make_imagenet(root: Path, flat=False, base=".") -> Path:
    for wnid in WNIDS:
        for number in (7, 31):
            write_image(root / base / f"train/{wnid}/{wnid}_{number}.JPEG")
    write_text(root / base / f"train/{WNIDS[0]}/notes.txt", "no image")
    for number, wnid in {**VAL, **({} if flat else {4: "n02102480"})}.items():
        home = root / base / "val" / ("." if flat else wnid)
        write_image(home / f"ILSVRC2012_val_{number:08d}.JPEG")
    return root


def write_mapping(root: Path) -> Path:
    lines = (f"{wnid} {words}" for wnid, words in SYNONYMS.items())
    return write_text(root / "LOC_synset_mapping.txt", "\n".join(lines) + "\n")


def write_solution(root: Path) -> Path:
    lines = (f"ILSVRC2012_val_{n:08d},{wnid} 1 2 3 4 {wnid} 5 6 7 8 " for n, wnid in VAL.items())
    text = "\n".join(["ImageId,PredictionString", *reversed(list(lines))]) + "\n"
    return write_text(root / "LOC_val_solution.csv", text)


def write_devkit(data: Path) -> Path:
    """Write a devkit whose class numbers have another order than the WordNet ids, as the real."""
    savemat = pytest.importorskip("scipy.io").savemat
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [
        (2, "n02012849", SYNONYMS["n02012849"], 0),
        (1, "n03126707", SYNONYMS["n03126707"], 0),
        (3, "n02102480", SYNONYMS["n02102480"], 0),
        (4, "n00001740", "entity", 2),
    ]
    data.mkdir(parents=True, exist_ok=True)
    savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    write_text(data / imagenet.GROUND_TRUTH, "1\n2\n1\n")
    return data


def labels_of(root: Path, split: str, settings=THREE) -> list[tuple[str, int]]:
    return [(s.key, s.label) for s in samples_of(imagenet, root, split, settings)]


def test_imagenet_class_ids_are_the_order_of_the_wordnet_ids(tmp_path):
    root = make_imagenet(tmp_path)
    info = imagenet.describe(root, THREE)
    assert info.class_names == WNIDS
    assert len(set(info.palette)) == 3
    wanted = [(f"{wnid}_{number}", i) for i, wnid in enumerate(WNIDS) for number in (31, 7)]
    assert labels_of(root, "train") == wanted
    keys = {1: 2, 2: 0, 3: 2, 4: 1}
    assert dict(labels_of(root, "val")) == {
        f"ILSVRC2012_val_{number:08d}": label for number, label in keys.items()
    }


@pytest.mark.parametrize("source", ["mapping", "devkit", "data"])
def test_imagenet_names_are_the_first_synonyms_made_unique(tmp_path, source):
    root = make_imagenet(tmp_path)
    if source == "mapping":
        write_mapping(root)
    else:
        write_devkit(root / ("data" if source == "data" else "ILSVRC2012_devkit_t12/data"))
    names = imagenet.describe(root, THREE).class_names
    assert names == ("crane (n02012849)", "Sussex spaniel", "crane (n03126707)")


@pytest.mark.parametrize("source", ["solution", "devkit"])
@pytest.mark.parametrize("base", [".", "ILSVRC/Data/CLS-LOC"])
def test_imagenet_flat_val_takes_its_labels_from_a_file(tmp_path, source, base):
    root = make_imagenet(tmp_path, flat=True, base=base)
    if source == "solution":
        write_solution(root)
    else:
        write_devkit(root / "ILSVRC2012_devkit_t12/data")
    assert labels_of(root, "val") == [
        ("ILSVRC2012_val_00000001", 2),
        ("ILSVRC2012_val_00000002", 0),
        ("ILSVRC2012_val_00000003", 2),
    ]
    assert len(labels_of(root, "train")) == 6


def test_imagenet_odd_files_are_read(tmp_path):
    root = make_imagenet(tmp_path)
    home = root / "train" / WNIDS[0]
    for name, mode in (("a.jpg", "CMYK"), ("b.png", "RGB")):
        write_image(home / name, mode=mode).rename(home / f"{name[0]}.JPEG")
    found = {s.key: s for s in samples_of(imagenet, root, "train", THREE)}
    assert found["a"].image_format == found["b"].image_format == "png"
    assert decode(found["a"].image).shape == decode(found["b"].image).shape == (6, 8, 3)
    assert found["b"].image == (home / "b.JPEG").read_bytes()
    assert found[f"{WNIDS[0]}_7"].image_format == "jpg"


def test_imagenet_half_trees(tmp_path):
    with pytest.raises(DataError, match=r"missing folder .*train \(or .*CLS-LOC/train\)"):
        imagenet.describe(tmp_path, THREE)
    root = make_imagenet(tmp_path)
    with pytest.raises(DataError, match=r"train: found 3 class folders, expected 1000; unpack"):
        imagenet.describe(root, imagenet.Settings())
    with pytest.raises(DataError, match="unknown split 'test'"):
        imagenet.entries(root, "test", THREE)
    (root / "val/n02102480/ILSVRC2012_val_00000004.JPEG").unlink()
    with pytest.raises(DataError, match=r"missing images: .*val/n02102480/\*\.JPEG; restore"):
        imagenet.entries(root, "val", THREE)
    (root / "val/n02102480").rmdir()
    with pytest.raises(DataError, match=r"missing class folders: .*val/n02102480; restore"):
        imagenet.entries(root, "val", THREE)
    (root / "val/n09999999").mkdir()
    with pytest.raises(DataError, match=r"val/n09999999: there is no such class in train"):
        imagenet.entries(root, "val", THREE)
    (root / "train/cat").mkdir()
    with pytest.raises(DataError, match=r"train/cat: no folder of a class"):
        imagenet.describe(root, THREE)


def test_imagenet_keys_are_unique(tmp_path):
    root = make_imagenet(tmp_path)
    write_image(root / f"train/{WNIDS[1]}/{WNIDS[0]}_7.jpg")
    with pytest.raises(DataError, match=f"both have the key '{WNIDS[0]}_7'"):
        imagenet.entries(root, "train", THREE)


def test_imagenet_images_are_counted(tmp_path):
    for number in range(1000):
        write_text(tmp_path / f"train/n{number:08d}/n{number:08d}_1.JPEG", "")
    with pytest.raises(DataError, match=r"found 1000 images, expected 1281167.*complete: false"):
        imagenet.entries(tmp_path, "train", imagenet.Settings())
    found = imagenet.entries(tmp_path, "train", imagenet.Settings(complete=False))
    assert [entry.target for entry in found] == list(range(1000))
    # 1.28 million of these are held at once
    assert len(pickle.dumps(found)) / len(found) < len(str(tmp_path)) + 120


def test_imagenet_flat_val_without_all_images_or_labels(tmp_path):
    root = make_imagenet(tmp_path, flat=True)
    with pytest.raises(DataError, match=r"missing labels.*LOC_val_solution\.csv, .*meta\.mat"):
        imagenet.entries(root, "val", THREE)
    solution = write_solution(root)
    write_text(solution, solution.read_text() + "".join(f"v{n},{WNIDS[1]} 1\n" for n in range(12)))
    with pytest.raises(
        DataError, match=r"missing validation images: .*val/v0\.JPEG, .* and 2 more"
    ):
        imagenet.entries(root, "val", THREE)
    assert len(imagenet.entries(root, "val", imagenet.Settings(classes=3, complete=False))) == 3
    write_text(solution, "ImageId,PredictionString\nILSVRC2012_val_00000001,n03126707 1 2 3 4\n")
    with pytest.raises(DataError, match=r"_00000002\.JPEG: .*solution\.csv has no label for it"):
        imagenet.entries(root, "val", THREE)
    write_text(solution, "ImageId,PredictionString\nILSVRC2012_val_00000001,crane\n")
    with pytest.raises(DataError, match=r"line 2: expected 'NAME,n00000000 \.\.\.', found 'ILSVRC"):
        imagenet.entries(root, "val", THREE)
    write_solution(root)
    (root / "train/n03126707").rename(root / "train/n04000000")
    with pytest.raises(DataError, match="its class n03126707 is not a folder of train"):
        imagenet.entries(root, "val", THREE)


def test_imagenet_broken_devkit_and_names(tmp_path, monkeypatch):
    root = make_imagenet(tmp_path, flat=True)
    data = write_devkit(root / "data")
    write_text(data / imagenet.GROUND_TRUTH, "1\n4\n1\n")
    with pytest.raises(DataError, match=r"truth\.txt: line 2: '4' is no class of .*meta\.mat"):
        imagenet.entries(root, "val", THREE)
    whole = (data / "meta.mat").read_bytes()
    for broken in (b"", b"no matlab", whole[:200], whole[: len(whole) // 2]):
        (data / "meta.mat").write_bytes(broken)
        with pytest.raises(DataError, match=r"meta\.mat: not readable"):
            imagenet.describe(root, THREE)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingPackageError, match="needs scipy"):
        imagenet.describe(root, THREE)
    write_text(write_mapping(root), "n02012849 crane\n")
    with pytest.raises(DataError, match=r"mapping\.txt: no name for class n02102480"):
        imagenet.describe(root, THREE)


def test_imagenet_settings_are_strict():
    assert "classes" in settings_error("imagenet", {"classes": 0})
    assert "complete" in settings_error("imagenet", {"complete": "no"})


# ---- coco ---------------------------------------------------------------------------------------

# COCO's category ids are 1..90 without these.
GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
CATEGORIES = [
    {"id": number, "name": name, "supercategory": "any"}
    for number, name in zip(sorted(set(range(1, 91)) - GAPS), coco.CLASSES, strict=True)
]


def an_image(number: int, name: str | None = None, width=8, height=6) -> dict:
    name = name or f"{number:012d}.jpg"
    return {"id": number, "file_name": name, "width": width, "height": height}


def an_object(number: int, image: int, category: int, bbox, crowd=0) -> dict:
    polygon = [[0.0, 0.0, 1.0, 0.0, 1.0, 1.0]]
    keys = ("id", "image_id", "category_id", "bbox", "iscrowd", "segmentation")
    return dict(zip(keys, (number, image, category, bbox, crowd, polygon), strict=True))


OBJECTS = [
    an_object(11, 9, 90, [1.25, 2, 3.5, 4]),
    an_object(12, 2, 1, [0, 0, 8, 6], crowd=1),
    an_object(13, 9, 1, [-0.25, 0, 2.25, 6.01]),
]


def write_instances(path: Path, images=None, objects=None, categories=None, **changes) -> Path:
    document = {
        "images": images or [an_image(9), an_image(2), an_image(5)],
        "annotations": OBJECTS if objects is None else objects,
        "categories": categories or CATEGORIES[::-1],
        **changes,
    }
    return write_text(path, json.dumps(document))


def make_coco(root: Path, year=2017, **changes) -> Path:
    for split in ("train", "val"):
        for number in (9, 2, 5):
            write_image(root / f"{split}{year}/{number:012d}.jpg")
        write_instances(root / f"annotations/instances_{split}{year}.json", **changes)
    return root


def test_coco_boxes_and_contiguous_ids(tmp_path):
    root = make_coco(tmp_path)
    info = coco.describe(root, coco.Settings())
    assert info.splits == ("train", "val")
    assert info.num_classes == len(set(info.palette)) == 80
    found = list(samples_of(coco, root, "train", coco.Settings()))
    assert [s.key for s in found] == ["000000000009", "000000000002", "000000000005"]
    assert [s.boxes for s in found] == [
        (Box(79, 1.25, 2, 4.75, 6), Box(0, 0, 0, 2, 6)),
        (Box(0, 0, 0, 8, 6, crowd=True),),
        (),
    ]
    assert found[0].image == (root / "train2017/000000000009.jpg").read_bytes()
    entries = coco.entries(root, "val", coco.Settings())
    assert pickle.loads(pickle.dumps(entries)) == entries


def test_coco_2014_has_the_halves_of_val_that_are_there(tmp_path):
    settings = coco.Settings(year=2014)
    root = make_coco(tmp_path, 2014)
    assert coco.describe(root, settings).splits == ("train", "val")
    write_instances(
        root / "annotations/instances_minival2014.json", images=[an_image(2)], objects=[]
    )
    assert coco.describe(root, settings).splits == ("train", "val", "minival")
    (entry,) = coco.entries(root, "minival", settings)
    assert entry.image == str(root / "val2014/000000000002.jpg")
    with pytest.raises(DataError, match="unknown split 'valminusminival'"):
        coco.entries(root, "valminusminival", settings)
    with pytest.raises(DataError, match=r"missing part of COCO.*train2017\.json, .*train2017; "):
        coco.entries(root, "train", coco.Settings())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objects": [an_object(3, 9, 91, [0, 0, 1, 1])]}, r"3: unknown .* id 91.*1\.\.90"),
        ({"objects": [an_object(3, 9, 12, [0, 0, 1, 1])]}, "annotation 3: unknown category id 12"),
        ({"objects": [an_object(3, 8, 1, [0, 0, 1, 1])]}, "annotation 3: there is no image 8"),
        ({"objects": [an_object(3, 9, 1, [0, 0, 1])]}, "annotation 3: expected .* bbox"),
        ({"objects": [an_object(3, 9, 1, None)]}, "annotation 3: expected .* bbox"),
        ({"objects": [{"image_id": 9}]}, "annotation number 0: expected id"),
        ({"objects": ["a"]}, "annotation number 0: expected id"),
        ({"objects": [an_object(3, 9, 1, [2, 0, 8, 1])]}, r"bbox .*\(10, 1\) is not inside.*8 x 6"),
        ({"objects": [an_object(3, 9, 1, [8, 0, 1, 1])]}, "annotation 3: bbox .* is not inside"),
        ({"objects": [an_object(3, 9, 1, [0, 0, float("nan"), 1])]}, "3: bbox .* is not inside"),
        ({"objects": [an_object(3, 9, 1, [0, 0, float("inf"), 1])]}, "3: bbox .* is not inside"),
        ({"images": [an_image(9), an_image(9, "b.jpg")]}, "two images have the id 9"),
        ({"images": [{"id": 9}]}, "image number 0: expected id, width, height and file_name"),
        ({"images": [an_image(9), an_image(2), an_image(1, "000000000009.png")]}, "missing images"),
        ({"categories": CATEGORIES[:79]}, "79 instead of 80.* not those of COCO.*'folder'"),
        ({"categories": [*CATEGORIES, CATEGORIES[0]]}, "81 categories need ids .* that differ"),
        ({"categories": [{**c, "id": -c["id"]} for c in CATEGORIES]}, "'toothbrush' where '"),
        ({"categories": [{"id": 1}]}, "a category has no number 'id' and 'name'"),
        ({"annotations": None}, "expected the lists images, annotations, categories"),
    ],
)  # fmt: skip
def test_coco_faults(tmp_path, changes, message):
    root = make_coco(tmp_path, **changes)
    with pytest.raises(DataError, match=message) as caught:
        coco.entries(root, "train", coco.Settings())
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)


def test_coco_missing_and_damaged_files(tmp_path):
    root, settings = make_coco(tmp_path), coco.Settings()
    for number in (2, 9):
        (root / f"train2017/{number:012d}.jpg").unlink()
    with pytest.raises(DataError, match=r"train2017/0+9\.jpg, .*train2017/0+2\.jpg; restore"):
        coco.entries(root, "train", settings)
    many = [an_image(number) for number in range(100, 125)]
    write_instances(root / "annotations/instances_train2017.json", images=many, objects=[])
    with pytest.raises(DataError, match=r"0000109\.jpg and 15 more"):
        coco.entries(root, "train", settings)
    twice = [an_image(2), an_image(3, "000000000002.jpeg")]
    write_image(root / "val2017/000000000002.jpeg")
    path = write_instances(root / "annotations/instances_val2017.json", images=twice, objects=[])
    with pytest.raises(DataError, match="both have the key '000000000002'"):
        coco.entries(root, "val", settings)
    write_instances(path, images=[an_image(2, width=6, height=8)], objects=[])
    with pytest.raises(DataError, match=r"8 x 6 pixels .* its boxes are for 6 x 8"):
        list(samples_of(coco, root, "val", settings))
    for broken in (b"{", b"[]", b"\xff\xfe{}", b"", b"[" * 100_000):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"val2017\.json: (not readable|expected)"):
            coco.entries(root, "val", settings)


def test_coco_boxes_without_area_stop_or_are_left_out(tmp_path):
    flat = [an_object(918, 9, 58, [1, 2, 1.03, 0.0]), an_object(919, 2, 1, [3, 3, -1, 2])]
    root = make_coco(tmp_path, objects=[*OBJECTS, *flat])
    with pytest.raises(DataError, match=r"annotations 918 \(image 9, .*height 0\), 919 .*drop"):
        coco.entries(root, "train", coco.Settings())
    found = list(samples_of(coco, root, "train", coco.Settings(degenerate="drop")))
    assert [len(s.boxes) for s in found] == [2, 1, 0]


def test_coco_settings_are_strict():
    assert "year" in settings_error("coco", {"year": 2015})
    assert "degenerate" in settings_error("coco", {"degenerate": "keep"})


@pytest.mark.parametrize(
    ("split", "images", "objects", "crowds"), [("train", 26, 181, 1), ("val", 27, 174, 2)]
)
def test_coco_authentic(split, images, objects, crowds):
    root, settings = authentic("coco_mini"), coco.Settings(prefix="instances_from_panoptic")
    found = list(samples_of(coco, root, split, settings))
    boxes = [box for sample in found for box in sample.boxes]
    instances = coco.read_instances(root / f"annotations/{settings.prefix}_{split}2017.json")
    assert instances.categories == {c["id"]: c["name"] for c in CATEGORIES}
    assert (len(found), len(boxes), sum(box.crowd for box in boxes)) == (images, objects, crowds)
    assert sum(not sample.boxes for sample in found) == (split == "train")
    # Labels by others: the classes and corners of official boxes, which are nearly the same.
    matched = total = 0
    for sample in found:
        height, width = decode(sample.image).shape[:2]
        labels = root / f"yolo_boxes/{split}2017/{sample.key}.txt"
        for line in labels.read_text().splitlines() if labels.exists() else ():
            class_id, x, y, w, h = map(float, line.split())
            wanted = (x - w / 2) * width, (y - h / 2) * height, w * width, h * height
            total += 1
            matched += any(
                box.class_id == class_id
                and np.allclose((box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1), wanted, atol=30)
                for box in sample.boxes
            )
    assert matched > 0.9 * total > 100


# ---- voc 07+12 ----------------------------------------------------------------------------------


def make_voc0712(root: Path) -> Path:
    make_voc(root / "VOC2007", ("000001", "000002", "000004"), [("dog", 1, 2, 3, 8, 6)])
    make_voc(root / "VOC2012", ("000001", "2008_000002"), [("cat", 0, 1, 1, 2, 2)])
    write_text(root / "VOC2007/ImageSets/Main/trainval.txt", "000002\n000001\n")
    write_text(root / "VOC2007/ImageSets/Main/test.txt", "000004\n")
    write_text(root / "VOC2012/ImageSets/Main/trainval.txt", "000001\n2008_000002\n")
    return root


def test_voc0712_joins_the_years(tmp_path):
    root, settings = make_voc0712(tmp_path), voc0712.Settings()
    info = voc0712.describe(root, settings)
    assert (info.name, info.splits, info.class_names) == ("voc0712", ("train", "test"), voc.CLASSES)
    found = list(samples_of(voc0712, root, "train", settings))
    dog = Box(voc.CLASSES.index("dog"), 1, 2, 8, 6, difficult=True)
    cat = Box(voc.CLASSES.index("cat"), 0, 0, 2, 2)
    assert [(s.key, s.boxes) for s in found] == [
        ("2007_000002", (dog,)),
        ("2007_000001", (dog,)),
        ("2012_000001", (cat,)),
        ("2012_2008_000002", (cat,)),
    ]
    assert found[2].source == str(root / "VOC2012/JPEGImages/000001.jpg")
    assert [s.key for s in samples_of(voc0712, root, "test", settings)] == ["2007_000004"]


def test_voc0712_half_trees(tmp_path):
    settings = voc0712.Settings()
    with pytest.raises(DataError, match=r"missing split lists: .*2007.*trainval.txt, .*2012/Image"):
        voc0712.entries(tmp_path, "train", settings)
    root = make_voc0712(tmp_path)
    (root / "VOC2012/JPEGImages/2008_000002.jpg").unlink()
    with pytest.raises(DataError, match=r"2008_000002\.jpg: missing image of '2008_000002'"):
        voc0712.entries(root, "train", settings)
    assert len(voc0712.entries(root, "test", settings)) == 1
    with pytest.raises(DataError, match="unknown split 'val'"):
        voc0712.entries(root, "val", settings)


def test_voc0712_degenerate_boxes(tmp_path):
    root = make_voc0712(tmp_path)
    make_voc(root / "VOC2007", ("000004",), [("dog", 0, 3, 3, 3, 3), ("dog", 0, 1, 1, 2, 2)])
    with pytest.raises(DataError, match=r"000004\.xml: object 0: .* a pixel at most"):
        list(samples_of(voc0712, root, "test", voc0712.Settings()))
    (sample,) = samples_of(voc0712, root, "test", voc0712.Settings(degenerate="drop"))
    assert len(sample.boxes) == 1


def test_voc0712_authentic():
    root = authentic("format_samples/VOCdevkit")
    found = {s.key: s for s in samples_of(voc0712, root, "train", voc0712.Settings())}
    assert list(found) == ["2007_000001", "2012_000001"]
    dog, person = voc.CLASSES.index("dog"), voc.CLASSES.index("person")
    wanted = (Box(dog, 47, 239, 195, 371), Box(person, 7, 11, 352, 498))
    assert found["2007_000001"].boxes == wanted


def test_voc_boxes_authentic():
    root, classes = authentic("bccd_voc"), ("RBC", "WBC", "Platelets")
    strict = folder.Settings(task="detection", format="voc", classes=classes)
    lenient = strict.model_copy(update={"degenerate": "drop"})
    counts, faults = Counter(), []
    info = folder.describe(root, lenient)
    assert info.splits == ("train", "val", "trainval", "test")
    for split, images in (("train", 205), ("val", 87), ("test", 72)):
        entries = folder.entries(root, split, lenient)
        assert len(entries) == images
        for entry in entries:
            boxes = folder.read(entry, info, lenient).boxes
            counts.update(info.class_names[box.class_id] for box in boxes)
            if entry.key in ("BloodImage_00338", "BloodImage_00343"):
                with pytest.raises(DataError, match=f"{entry.key}.xml.* a pixel at most"):
                    folder.read(entry, info, strict)
                faults.append(entry.key)
    assert counts == {"RBC": 4155 - 2, "WBC": 372, "Platelets": 361}
    assert len(faults) == 2


# ---- folder: masks and boxes --------------------------------------------------------------------

MASKED = folder.Settings(task="segmentation", classes=("sky", "road"))
BOXED = folder.Settings(task="detection")


def make_masked(root: Path) -> Path:
    for name, mode in (("train/b", "L"), ("train/a 1", "P"), ("val/c", "L")):
        write_image(root / f"images/{name}.jpg")
        write_mask(root / f"masks/{name}.png", [[0, 1, 255, 0] * 2] * 6, mode=mode)
    write_text(root / "images/train/notes.txt", "no image")
    return root


def test_folder_masks(tmp_path):
    root = make_masked(tmp_path)
    info = folder.describe(root, MASKED)
    assert (info.class_names, info.ignore_ids) == (("sky", "road"), (255,))
    assert info.splits == ("train", "val")
    found = list(samples_of(folder, root, "train", MASKED))
    assert [s.key for s in found] == ["a 1", "b"]
    assert all((decode(s.mask) == [[0, 1, 255, 0] * 2] * 6).all() for s in found)
    other = MASKED.model_copy(update={"ignore": 200})
    with pytest.raises(DataError, match=r"a 1\.png: unknown class id 255 .*0\.\.1 or 200"):
        list(samples_of(folder, root, "train", other))


def test_folder_masks_faults(tmp_path):
    root = make_masked(tmp_path)
    write_image(root / "images/train/x.png")
    write_image(root / "images/train/y.png")
    with pytest.raises(DataError, match=r"missing masks: .*train/x\.png, .*train/y\.png; restore"):
        folder.entries(root, "train", MASKED)
    write_mask(root / "masks/val/d.png", [[0]])
    with pytest.raises(DataError, match=r"missing images of masks: .*images/val/d\.jpg"):
        folder.entries(root, "val", MASKED)
    write_image(root / "images/val/c.png")
    write_image(root / "images/val/d.png")
    with pytest.raises(DataError, match=r"both have the key 'c'"):
        folder.entries(root, "val", MASKED)
    (root / "images/test").mkdir()
    with pytest.raises(DataError, match=r"missing folder of masks: .*masks/test"):
        folder.entries(root, "test", MASKED)
    (root / "masks/test").mkdir()
    with pytest.raises(DataError, match=r"images/test: no image in it"):
        folder.entries(root, "test", MASKED)
    only_val = tmp_path / "only val"
    (only_val / "images/val").mkdir(parents=True)
    with pytest.raises(DataError, match=r"images: no folder 'train' in it; expected images/train"):
        folder.describe(only_val, MASKED)


def make_boxed(root: Path) -> Path:
    categories = [{"id": 7, "name": "nut"}, {"id": 0, "name": "bolt"}]
    objects = [an_object(1, 2, 7, [1, 1, 2, 3])]
    for split in ("train", "val"):
        write_image(root / f"images/{split}/x/1.jpg")
        write_image(root / f"images/{split}/2.png")
        images = [an_image(1, "x/1.jpg"), an_image(2, "2.png")]
        write_instances(root / f"{split}.json", images, objects, categories)
    return root


def test_folder_boxes_in_cocos_format(tmp_path):
    root = make_boxed(tmp_path)
    info = folder.describe(root, BOXED)
    assert (info.name, info.class_names, info.splits) == (
        "folder",
        ("bolt", "nut"),
        ("train", "val"),
    )
    found = list(samples_of(folder, root, "val", BOXED))
    assert [(s.key, s.boxes) for s in found] == [("x_1", ()), ("2", (Box(1, 1, 1, 3, 4),))]


def test_folder_boxes_faults(tmp_path):
    root = make_boxed(tmp_path)
    other = [{"id": 7, "name": "nut"}, {"id": 0, "name": "screw"}]
    write_instances(root / "val.json", [an_image(2, "2.png")], [], other)
    with pytest.raises(DataError, match=r"val\.json: .*'screw' where 'bolt'.*those of train\.json"):
        folder.entries(root, "val", BOXED)
    (root / "val.json").unlink()
    with pytest.raises(DataError, match=r"missing boxes of a split: .*val\.json"):
        folder.entries(root, "val", BOXED)
    (root / "images/train/2.png").unlink()
    with pytest.raises(DataError, match=r"missing images of train\.json: .*images/train/2\.png"):
        folder.entries(root, "train", BOXED)
    (root / "train.json").unlink()
    with pytest.raises(DataError, match=r"missing boxes of a split: .*train\.json"):
        folder.describe(root, BOXED)


def test_folder_boxes_in_vocs_format(tmp_path):
    root = make_voc(tmp_path, objects=[("nut", 1, 1, 1, 3, 4), ("nut", 0, 3, 3, 3, 3)])
    settings = folder.Settings(
        task="detection", format="voc", classes=("bolt", "nut"), degenerate="drop"
    )
    info = folder.describe(root, settings)
    assert (info.name, info.class_names, info.url) == ("folder", ("bolt", "nut"), "")
    (sample,) = samples_of(folder, root, "train", settings)
    assert sample.boxes == (Box(1, 0, 0, 3, 4, difficult=True),)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ["a"]}, "classes: has no meaning for the task 'classification'"),
        ({"task": "detection", "ignore": 3}, "ignore: has no meaning for the task 'detection'"),
        ({"task": "segmentation", "format": "voc"}, "format: has no meaning"),
        ({"task": "segmentation"}, "classes: expected the names"),
        ({"task": "detection", "format": "voc"}, "classes: expected the names"),
        ({"task": "detection", "classes": ["a"]}, "classes: the format 'coco' names them"),
        ({"task": "segmentation", "classes": ["a", "a"]}, "a name occurs twice"),
        ({"task": "segmentation", "classes": ["a"], "ignore": 0}, "ignore: 0 is the id of 'a'"),
        ({"task": "segmentation", "classes": ["a"], "ignore": 256}, "ignore"),
        ({"task": "detection", "format": "yolo"}, "format"),
    ],
)  # fmt: skip
def test_folder_settings_that_mean_nothing_are_refused(settings, message):
    assert message in settings_error("folder", settings)
