import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from tests.raw_files import decode, samples_of, write_image, write_mask, write_text
from xattn.data.datasets import (
    DatasetConfig,
    GeneratingReader,
    Reader,
    _files,
    _masks,
    _scenes,
    camvid,
    folder,
    list_readers,
    load_reader,
    reader_settings,
    resolve_root,
    synthetic,
    voc,
)
from xattn.errors import ConfigError, DataError, UnknownNameError
from xattn.structures import Box

SMALL = synthetic.Settings(image_size=(96, 128), train=24, val=3, test=2)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def ignore_progress(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "synthetic"
    synthetic.generate(root, SMALL, ignore_progress)
    return root


# ---- readers by name, configuration, root -------------------------------------------------------


def test_every_reader_has_the_surface():
    assert {"camvid", "folder", "synthetic", "voc"} <= set(list_readers())
    for name in list_readers():
        assert isinstance(load_reader(name), Reader), name
        assert not name.startswith("_")
    assert isinstance(load_reader("synthetic"), GeneratingReader)
    assert not isinstance(load_reader("voc"), GeneratingReader)


def test_unknown_reader_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown data set reader 'camvd'.*'camvid'"):
        load_reader("camvd")
    with pytest.raises(ConfigError, match="'camvid'"):
        DatasetConfig(reader="camvd")


def test_config_settings_are_checked_by_the_reader():
    config = DatasetConfig(reader="synthetic", settings={"image_size": [64, 80], "seed": 3})
    assert reader_settings(config) == synthetic.Settings(image_size=(64, 80), seed=3)
    with pytest.raises(ValidationError) as caught:
        DatasetConfig(reader="synthetic", settings={"trian": 3, "noise": -1})
    assert {e["loc"] for e in caught.value.errors()} == {
        ("settings", "trian"),
        ("settings", "noise"),
    }


def test_relative_root_is_looked_for_under_xattn_data_first(tmp_path, monkeypatch):
    config = DatasetConfig(reader="camvid", root="sets/camvid")
    (tmp_path / "base/sets/camvid").mkdir(parents=True)
    (tmp_path / "shared/sets").mkdir(parents=True)
    monkeypatch.setenv("XATTN_DATA", str(tmp_path / "shared"))
    assert resolve_root(config, tmp_path / "base") == tmp_path / "base/sets/camvid"
    (tmp_path / "shared/sets/camvid").mkdir()
    assert resolve_root(config, tmp_path / "base") == tmp_path / "shared/sets/camvid"
    monkeypatch.delenv("XATTN_DATA")
    assert resolve_root(config, tmp_path / "base") == tmp_path / "base/sets/camvid"
    absolute = DatasetConfig(reader="camvid", root=str(tmp_path / "shared"))
    assert resolve_root(absolute, tmp_path / "base") == tmp_path / "shared"


def test_missing_root_says_where_it_was_looked_for_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XATTN_DATA", str(tmp_path / "shared"))
    with pytest.raises(DataError) as caught:
        resolve_root(DatasetConfig(reader="camvid", root="camvid"), tmp_path / "base")
    message = str(caught.value)
    wanted = (tmp_path / "shared/camvid", tmp_path / "base/camvid", "datasets.NAME.root")
    for part in (*map(str, wanted), "params.yaml", "XATTN_DATA", camvid.URL):
        assert part in message
    assert "\n" not in message
    monkeypatch.delenv("XATTN_DATA")
    with pytest.raises(DataError, match="XATTN_DATA is not set"):
        resolve_root(DatasetConfig(reader="camvid", root="camvid"), tmp_path)
    with pytest.raises(DataError, match="no root is set"):
        resolve_root(DatasetConfig(reader="voc"), tmp_path)


def test_generated_root_need_not_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("XATTN_DATA", str(tmp_path / "shared"))
    without = DatasetConfig(reader="synthetic")
    assert resolve_root(without, tmp_path) == tmp_path / "data/raw/synthetic"
    named = DatasetConfig(reader="synthetic", root="my/own")
    assert resolve_root(named, tmp_path) == tmp_path / "my/own"


def test_readers_import_without_torch():
    code = (
        "import sys; from xattn.data.datasets import list_readers, load_reader;"
        "[load_reader(n) for n in list_readers()]; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"), [("a.jpg", "L"), ("a.jpg", "RGB"), ("a.png", "L"), ("a.png", "RGB")]
)
def test_plain_images_keep_their_bytes(tmp_path, name, mode):
    path = write_image(tmp_path / name, mode=mode)
    image = _files.read_image(path)
    assert image.data == path.read_bytes()
    assert (image.format, image.size) == (name[-3:], (8, 6))


@pytest.mark.parametrize(
    ("name", "mode"), [("a.jpg", "CMYK"), ("a.png", "RGBA"), ("a.png", "P"), ("a.png", "I;16")]
)
def test_other_images_become_rgb_png(tmp_path, name, mode):
    path = write_image(tmp_path / name, mode=mode, value=0x5A12 if mode == "I;16" else 90)
    image = _files.read_image(path)
    pixels = decode(image.data)
    assert (image.format, pixels.shape) == ("png", (6, 8, 3))
    if mode == "I;16":
        assert (pixels == 0x5A).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_broken_images_are_named(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / name
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(DataError, match=f"{name}: cannot be decoded") as caught:
        _files.read_image(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=f"{name}.*no image"):
        _files.read_image(path)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: no such file"):
        _files.read_image(path)


def test_masks_keep_grey_bytes_and_turn_palette_into_grey(tmp_path):
    ids = np.array([[0, 1, 2], [2, 255, 0]])
    grey = write_mask(tmp_path / "grey.png", ids)
    assert _masks.read_mask(grey, (3, 2), 3, (255,)) == grey.read_bytes()
    indexed = write_mask(tmp_path / "indexed.png", ids, mode="P")
    data = _masks.read_mask(indexed, (3, 2), 3, (255,))
    assert Image.open(io.BytesIO(data)).mode == "L"
    assert (decode(data) == ids).all()


def test_bad_masks_are_refused(tmp_path):
    path = write_mask(tmp_path / "m.png", [[0, 7, 7], [9, 255, 0]])
    with pytest.raises(DataError, match=r"m.png: 3 x 2 pixels .* 4 x 2"):
        _masks.read_mask(path, (4, 2), 3, (255,))
    with pytest.raises(DataError, match=r"class id 7 in 2 pixels \(and 1 more.*0..2 or 255"):
        _masks.read_mask(path, (3, 2), 3, (255,))
    with pytest.raises(DataError, match=r"id 255 in 1 pixels; allowed: 0..9"):
        _masks.read_mask(path, (3, 2), 10, ())
    for mode in ("RGB", "1"):
        Image.new(mode, (3, 2)).save(path)
        with pytest.raises(DataError, match=f"m.png: found PNG of mode {mode}"):
            _masks.read_mask(path, (3, 2), 3, ())


def test_palette_opens_like_voc_and_repeats_no_colour():
    assert _files.palette(4) == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert _files.palette(2, first=20) == ((0, 64, 128), (128, 64, 128))
    assert len(set(_files.palette(1000, first=1))) == 1000


# ---- synthetic ----------------------------------------------------------------------------------


def test_generation_is_byte_identical_and_runs_once(drawn, tmp_path):
    seen = []
    synthetic.generate(tmp_path / "again", SMALL, lambda done, total: seen.append((done, total)))
    assert files_of(tmp_path / "again") == files_of(drawn)
    assert seen[0] == (1, 29)
    assert seen[-1] == (29, 29)
    seen.clear()
    other_task = SMALL.model_copy(update={"task": "detection"})
    synthetic.generate(tmp_path / "again", other_task, lambda *counts: seen.append(counts))
    assert seen == []


def test_an_image_depends_on_seed_split_and_number_alone(drawn, tmp_path):
    more = SMALL.model_copy(update={"train": 2, "val": 1, "test": 1, "seed": 1})
    synthetic.generate(tmp_path / "r", more, ignore_progress)
    assert len(list((tmp_path / "r/JPEGImages").iterdir())) == 4
    same = more.model_copy(update={"seed": SMALL.seed})
    synthetic.generate(tmp_path / "r", same, ignore_progress)
    first, second = files_of(tmp_path / "r"), files_of(drawn)
    name = "JPEGImages/train_000001.jpg"
    assert first[name] == second[name]
    assert first[name] != first["JPEGImages/val_000000.jpg"]


def test_interrupted_generation_goes_on(drawn, tmp_path):
    root = tmp_path / "r"

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic.generate(root, SMALL, stop)
    with pytest.raises(DataError, match="not there in full"):
        synthetic.entries(root, "train", SMALL)
    before = (root / "JPEGImages/train_000000.jpg").stat().st_mtime_ns
    synthetic.generate(root, SMALL, ignore_progress)
    assert (root / "JPEGImages/train_000000.jpg").stat().st_mtime_ns == before
    assert files_of(root) == files_of(drawn)


def test_generation_refuses_a_folder_of_others(tmp_path):
    write_text(tmp_path / "thesis.tex", "precious")
    with pytest.raises(DataError, match=r"holds files but no synthetic.json"):
        synthetic.generate(tmp_path, SMALL, ignore_progress)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_every_class_appears_in_every_task(drawn):
    seen = np.zeros(256, bool)
    for sample in samples_of(synthetic, drawn, "train", SMALL):
        mask = decode(sample.mask)
        assert mask.shape == decode(sample.image).shape[:2] == (96, 128)
        assert sample.label is None
        assert sample.boxes is None
        seen[mask] = True
    info = synthetic.describe(drawn, SMALL)
    assert info.class_names == _scenes.NAMES
    assert (np.flatnonzero(seen) == np.arange(info.num_classes)).all()
    boxed = SMALL.model_copy(update={"task": "detection"})
    found = [s.boxes for s in samples_of(synthetic, drawn, "train", boxed)]
    names = synthetic.describe(drawn, boxed).class_names
    assert {names[b.class_id] for boxes in found for b in boxes} == set(_scenes.THINGS)
    labelled = SMALL.model_copy(update={"task": "classification"})
    labels = [s.label for s in samples_of(synthetic, drawn, "train", labelled)]
    largest = [max(b, key=lambda b: (b.x2 - b.x1) * (b.y2 - b.y1)).class_id for b in found]
    assert labels == largest
    assert len(set(labels)) >= 6


@pytest.mark.parametrize("index", range(6))
def test_boxes_enclose_what_is_visible(drawn, index):
    height, width = SMALL.image_size
    rng = synthetic.image_rng(SMALL, "train", index)
    scene = _scenes.draw_scene(rng, (width, height), SMALL.noise)
    mask, owners = np.asarray(scene.mask), np.asarray(scene.owners)
    boxed = SMALL.model_copy(update={"task": "detection"})
    sample = list(samples_of(synthetic, drawn, "train", boxed))[index]
    stored = list(samples_of(synthetic, drawn, "train", SMALL))[index]
    assert (decode(stored.mask) == mask).all()
    assert len(sample.boxes) == len(scene.things) > 0
    for thing, box in zip(scene.things, sample.boxes, strict=True):
        rows, columns = np.nonzero(owners == thing.number)
        assert (box.x1, box.x2) == (columns.min(), columns.max() + 1)
        assert (box.y1, box.y2) == (rows.min(), rows.max() + 1)
        assert (mask[rows, columns] == box.class_id + 1).all()
        assert len(rows) >= _scenes.MIN_VISIBLE_PX.get(thing.name, 8)
        if thing.name == "dot":
            assert max(box.x2 - box.x1, box.y2 - box.y1) < 16


# ---- voc ----------------------------------------------------------------------------------------

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def make_voc(root: Path, names=("a",), objects=(("dog", 0, 1, 1, 8, 6),)) -> Path:
    for name in names:
        write_image(root / f"JPEGImages/{name}.jpg")
        write_mask(root / f"SegmentationClass/{name}.png", [[0, 20, 255, 0] * 2] * 6, mode="P")
        body = "".join(OBJECT.format(*o) for o in objects)
        write_text(root / f"Annotations/{name}.xml", f"<annotation>{body}</annotation>")
    for kind in ("Main", "Segmentation"):
        write_text(root / f"ImageSets/{kind}/train.txt", "\n".join(names) + "\n\n")
    return root


def read_voc(root: Path, task: str, split="train"):
    return list(samples_of(voc, root, split, voc.Settings(task=task)))


def test_voc_tasks_in_a_path_with_spaces_and_unicode(tmp_path):
    root = make_voc(tmp_path / "Bilder \u00e4\u6f22 1", ("x 1", "\u00fc.2"))
    for task in ("segmentation", "detection", "classification"):
        info = voc.describe(root, voc.Settings(task=task))
        assert info.num_classes == len(info.palette) == (21 if task == "segmentation" else 20)
        assert info.splits == ("train",)
        assert len(voc.entries(root, "train", voc.Settings(task=task))) == 2
        found = read_voc(root, task)
        assert [s.key for s in found] == ["x 1", "\u00fc_2"]
        targets = [found[0].mask, found[0].boxes, found[0].label]
        assert [t is not None for t in targets] == [
            task == t for t in ("segmentation", "detection", "classification")
        ]


def test_voc_boxes_are_pixel_edges_and_the_largest_gives_the_label(tmp_path):
    objects = [("cat", 1, 1, 1, 1, 2), ("dog", 0, 2, 3, 8, 6), ("cow", 0, 0, 1, 2, 2)]
    root = make_voc(tmp_path, objects=objects)
    boxes = read_voc(root, "detection")[0].boxes
    cat, dog, cow = (voc.CLASSES.index(name) for name in ("cat", "dog", "cow"))
    assert boxes == (
        Box(cat, 0, 0, 1, 2, difficult=True),
        Box(dog, 1, 2, 8, 6),
        Box(cow, 0, 0, 2, 2),
    )
    assert read_voc(root, "classification")[0].label == dog


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (("dgo", 0, 1, 1, 2, 2), "object 0: unknown class 'dgo'; did you mean 'dog'"),
        (("dog", 0, 1, 1, 10, 2), "object 0: bndbox .* not inside the image of 8 x 6"),
        (("dog", 0, 0, 1, 0, 2), "object 0: bndbox .* not inside"),
        (("dog", 0, 5, 1, 3, 2), "object 0: bndbox xmin 5 .* a pixel at most.*degenerate: drop"),
        (("dog", 0, 5, 4, 5, 4), "object 0: bndbox xmin 5 .* a pixel at most.*degenerate: drop"),
        (("dog", 0, 1, 1, "wide", 2), "object 0: bndbox .*wide.* not four numbers"),
        (("dog", 0, 1, 1, "nan", 2), "object 0: bndbox .* not inside"),
    ],
)
def test_voc_bad_objects(tmp_path, thing, message):
    root = make_voc(tmp_path, objects=[thing])
    with pytest.raises(DataError, match=rf"a\.xml: {message}"):
        read_voc(root, "detection")


def test_voc_degenerate_boxes_are_left_out_on_demand(tmp_path):
    swapped, click = ("dog", 0, 5, 1, 3, 2), ("dog", 0, 5, 4, 5, 4)
    root = make_voc(tmp_path, objects=[swapped, ("cat", 0, 2, 2, 2, 6), click])
    settings = voc.Settings(task="detection", degenerate="drop")
    (sample,) = samples_of(voc, root, "train", settings)
    assert sample.boxes == (Box(voc.CLASSES.index("cat"), 1, 1, 2, 6),)
    beyond = make_voc(tmp_path / "beyond", objects=[("dog", 0, 1, 1, 10, 2)])
    with pytest.raises(DataError, match="not inside the image"):
        list(samples_of(voc, beyond, "train", settings))


def test_voc_bad_annotations(tmp_path):
    root = make_voc(tmp_path, objects=())
    assert read_voc(root, "detection")[0].boxes == ()
    with pytest.raises(DataError, match=r"a\.xml: no object"):
        read_voc(root, "classification")
    write_text(root / "Annotations/a.xml", "<annotation><object>")
    with pytest.raises(DataError, match=r"a\.xml: not readable as XML"):
        read_voc(root, "detection")


@pytest.mark.parametrize(
    ("path", "task", "what"),
    [
        ("JPEGImages/a.jpg", "segmentation", "missing image of 'a'"),
        ("SegmentationClass/a.png", "segmentation", "missing mask of a.jpg"),
        ("Annotations/a.xml", "detection", "missing boxes of a.jpg"),
    ],
)
def test_voc_missing_partner(tmp_path, path, task, what):
    root = make_voc(tmp_path)
    (root / path).unlink()
    with pytest.raises(DataError, match=f"{path}: {what}"):
        read_voc(root, task)


def test_voc_split_lists(tmp_path):
    root = make_voc(tmp_path, ("a.1", "a_1"))
    with pytest.raises(DataError, match=r"a\.1\.jpg and .*a_1\.jpg: both have the key 'a_1'"):
        read_voc(root, "segmentation")
    with pytest.raises(DataError, match="unknown split 'trian'; did you mean 'train'"):
        read_voc(root, "segmentation", "trian")
    write_text(root / "ImageSets/Main/train.txt", "\n \n")
    with pytest.raises(DataError, match=r"train\.txt: empty"):
        read_voc(root, "detection")
    (root / "ImageSets/Main/train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"train\.txt: not UTF-8"):
        read_voc(root, "detection")
    (root / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(DataError, match=r"train\.txt: no such file"):
        read_voc(root, "detection")


# ---- camvid -------------------------------------------------------------------------------------


def make_camvid(root: Path) -> Path:
    for number, suffix in ((1, "jpg"), (2, "png")):
        write_image(root / f"train/f{number}.{suffix}")
        write_mask(root / f"trainannot/f{number}.png", [[0, 10, 11, 3] * 2] * 6)
    lines = "train/f2.jpg trainannot/f2.png\n/SegNet/CamVid/train/f1.png /x/trainannot/f1.png\n"
    write_text(root / "train.txt", lines)
    return root


def test_camvid_reads_both_suffixes_in_list_order(tmp_path):
    root, settings = make_camvid(tmp_path), camvid.Settings()
    info = camvid.describe(root, settings)
    assert info.class_names[10] == "bicyclist"
    assert info.palette[3] == (128, 64, 128)
    assert info.ignore_ids == (11,)
    assert len(camvid.entries(root, "train", settings)) == 2
    found = list(samples_of(camvid, root, "train", settings))
    assert [(s.key, s.image_format) for s in found] == [("f2", "png"), ("f1", "jpg")]
    assert found[0].mask == (root / "trainannot/f2.png").read_bytes()


def test_camvid_faults(tmp_path):
    root, settings = make_camvid(tmp_path), camvid.Settings()
    write_mask(root / "trainannot/f1.png", [[12] * 8] * 6)
    stream = samples_of(camvid, root, "train", settings)
    assert next(stream).key == "f2"
    with pytest.raises(DataError, match=r"f1\.png: unknown class id 12 in 48 pixels.*0..10 or 11"):
        next(stream)
    (root / "train/f2.png").unlink()
    with pytest.raises(DataError, match=r"f2\.jpg: missing image of f2\.png"):
        camvid.entries(root, "train", settings)
    with pytest.raises(DataError, match=r"val\.txt: no such file"):
        camvid.entries(root, "val", settings)
    write_text(root / "val.txt", "train/f1.jpg\n")
    with pytest.raises(DataError, match=r"val\.txt: expected 'image mask', found 'train/f1\.jpg'"):
        camvid.entries(root, "val", settings)


# ---- folder -------------------------------------------------------------------------------------


def make_folder(root: Path) -> Path:
    for name in ("train/b/1.jpg", "train/a c/1.JPG", "train/b/0.png", "val/b/9.jpeg"):
        write_image(root / name)
    write_text(root / "train/b/notes.txt", "no image")
    return root


def test_folder_classes_come_from_train(tmp_path):
    root, settings = make_folder(tmp_path), folder.Settings()
    info = folder.describe(root, settings)
    assert info.class_names == ("a c", "b")
    assert info.splits == ("train", "val")
    assert len(set(info.palette)) == 2
    found = list(samples_of(folder, root, "train", settings))
    assert [(s.key, s.label) for s in found] == [("a c_1", 0), ("b_0", 1), ("b_1", 1)]
    assert len(folder.entries(root, "train", settings)) == 3
    assert [s.label for s in samples_of(folder, root, "val", settings)] == [1]


def test_folder_faults(tmp_path):
    root, settings = make_folder(tmp_path), folder.Settings()
    with pytest.raises(DataError, match="unknown split 'tset'"):
        folder.entries(root, "tset", settings)
    write_image(root / "train/b/1.png")
    with pytest.raises(DataError, match=r"b/1\.jpg and .*b/1\.png: both have the key 'b_1'"):
        folder.entries(root, "train", settings)
    write_image(root / "val/bb/1.png")
    with pytest.raises(DataError, match=r"val/bb: unknown class 'bb'.*those of 'train'"):
        folder.entries(root, "val", settings)
    (root / "test").mkdir()
    with pytest.raises(DataError, match="test: no image in it"):
        folder.entries(root, "test", settings)
    with pytest.raises(DataError, match="no folder 'train' in it"):
        folder.describe(root / "val", settings)
