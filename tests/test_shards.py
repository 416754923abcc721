import gc
import hashlib
import io
import json
import pickle
import resource
import tarfile
import warnings
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from PIL import Image

from xattn.data.index import ShardIndex, ShardReader
from xattn.data.shards import write_shards
from xattn.data.verify import verify
from xattn.errors import CapacityError, DamageError, DataError
from xattn.structures import Box, DatasetInfo, Sample

INFO = DatasetInfo(
    name="tiny",
    tasks=("segmentation", "classification", "detection"),
    class_names=("sky", "road", "car"),
    palette=((0, 0, 0), (1, 1, 1), (2, 2, 2)),
    splits=("train", "val"),
    ignore_ids=(254, 255),
    licence="none",
    url="",
    citation="",
    layout="",
)
BOXES = (Box(2, 1.5, 2.0, 8.0, 9.0, difficult=True),)


def encode(array, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def make_sample(number, **changes):
    rng = np.random.default_rng(number)
    height, width = 16 + number % 3, 24
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[:4], mask[4:6], mask[6] = 1, 254, 255
    sample = Sample(
        key=f"img_{number:03d}",
        image=encode(image, "JPEG" if number % 2 else "PNG"),
        image_format="jpg" if number % 2 else "png",
        source=f"raw/{number}",
        mask=encode(mask),
        label=number % 3,
        boxes=BOXES if number % 2 else (),
    )
    return replace(sample, **changes)


def write(out, count=10, info=INFO, samples=None, **settings):
    stream = samples if samples is not None else (make_sample(i) for i in range(count))
    settings = {"samples_per_shard": 4, **settings}
    return write_shards(out, info, {"train": (count, stream)}, **settings)


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def flip_byte(file, offset):
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def span_of(index, position, field):
    return index.records("train")[position][field].item()


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "shards"
    write(out)
    return out


def test_two_runs_give_the_same_bytes(tmp_path, folder):
    first = digests(folder)
    assert list(first) == [
        "index.json",
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
        "train.index.npy",
    ]
    assert digests(write(tmp_path / "elsewhere").root) == first
    assert digests(write(folder).root) == first


def test_index_states_what_was_written(folder):
    index = ShardIndex.open(folder)
    split = index.splits["train"]
    assert index.info == INFO
    assert split.count == 10
    assert [shard.num_samples for shard in split.shards] == [4, 4, 2]
    assert split.fields == {"image": 10, "mask": 10, "label": 10, "boxes": 10}
    assert split.images == (4, 3, 3)
    heights = [16 + i % 3 for i in range(10)]
    assert split.pixels == (24 * sum(h - 7 for h in heights), 24 * 4 * 10, 0)
    assert split.ignored_pixels == 24 * 3 * 10
    assert index.records("train")["height"].tolist() == heights
    assert index.records("train")["key"].dtype == "S7"
    for shard in split.shards:
        data = (folder / shard.name).read_bytes()
        assert shard.num_bytes == len(data)
        assert shard.sha256 == hashlib.sha256(data).hexdigest()


def test_other_tools_read_the_tars(folder):
    urls = [str(file) for file in sorted(folder.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        read = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    assert [sample["__key__"] for sample in read] == [f"img_{i:03d}" for i in range(10)]
    expected = make_sample(1)
    assert read[1]["jpg"] == expected.image
    assert read[1]["seg.png"] == expected.mask
    assert read[1]["cls"] == b"1"
    boxes = json.loads(read[1]["boxes.json"])
    assert [Box(**box) for box in boxes] == list(BOXES)
    with tarfile.open(urls[2]) as tar:
        assert [member.mtime for member in tar] == [0] * 8


def test_fields_that_nobody_gave_are_absent(tmp_path):
    bare = make_sample(1, mask=None, label=None, boxes=None)
    index = write(tmp_path / "out", 1, samples=[bare])
    assert ShardReader(index, "train").read(0) == {"image": bare.image}
    assert index.splits["train"].fields == {"image": 1, "mask": 0, "label": 0, "boxes": 0}


def test_reader_gives_every_sample_back_in_any_order(folder):
    reader = ShardReader(ShardIndex.open(folder), "train", max_open=1)
    for copy in (reader, pickle.loads(pickle.dumps(reader))):
        for position in (9, 0, 5, 1):
            sample = make_sample(position)
            assert copy.key(position) == sample.key
            assert copy.size(position) == (16 + position % 3, 24)
            fields = copy.read(position)
            assert (fields["image"], fields["mask"]) == (sample.image, sample.mask)
            assert fields["label"] == str(sample.label).encode()


def test_shards_keep_to_the_byte_limit(tmp_path):
    index = write(tmp_path / "out", samples_per_shard=100, max_shard_bytes=20_000)
    shards = index.splits["train"].shards
    assert len(shards) > 2
    assert all(shard.num_bytes <= 20_000 + 10_240 for shard in shards)
    assert [ShardReader(index, "train").key(i) for i in (0, 9)] == ["img_000", "img_009"]


def test_progress_and_several_splits(tmp_path):
    calls = []
    splits = {"train": (2, map(make_sample, (0, 1))), "val": (1, [make_sample(0)])}
    index = write_shards(
        tmp_path / "out", INFO, splits, on_progress=lambda *call: calls.append(call)
    )
    assert calls == [("train", 1, 2), ("train", 2, 2), ("val", 1, 1)]
    assert index.shard_path("val", 0).is_file()
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        index.records("test")


def test_interrupted_run_leaves_no_index_and_the_next_one_is_undisturbed(tmp_path, folder):
    def stream():
        yield from map(make_sample, range(6))
        raise KeyboardInterrupt

    out = tmp_path / "killed"
    write(out)
    with pytest.raises(KeyboardInterrupt):
        write(out, samples=stream())
    assert list(out.iterdir()) == [], (
        "neither the old shards without their index nor half of the new"
    )
    # What a kill that cannot be caught leaves behind:
    (out / ".train-000001.tar.partial").write_bytes(b"half")
    assert digests(write(out).root) == digests(folder)


def test_foreign_file_is_refused_and_kept(tmp_path):
    note = tmp_path / "notes.txt"
    note.write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt"):
        write(tmp_path)
    assert note.read_text() == "mine"


def test_too_little_space_is_refused_beforehand(tmp_path):
    with pytest.raises(CapacityError, match=rf"about {10**18} bytes .* only \d+ are free"):
        write(tmp_path / "out", expected_bytes=10**18)


@pytest.mark.parametrize("limit", [6_000, 25_000])
def test_full_disk_is_one_line_and_publishes_nothing(tmp_path, limit):
    """The kernel's limit of a file's size stands for the full disk: it needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CapacityError, match="the disk is full") as caught:
            write(tmp_path / "out", samples_per_shard=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


MASK_OF_OTHER_SIZE = encode(np.zeros((3, 3), np.uint8))
UNKNOWN_CLASS = encode(np.full((17, 24), 7, np.uint8))
COLOUR_MASK = encode(np.zeros((17, 24, 3), np.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "a.b"}, "key must not"),
        ({"key": "a/b"}, "key must not"),
        ({"key": "_a"}, "key must not"),
        ({"key": "a" * 89}, "89 bytes, at most 88"),
        ({"key": "img_000"}, "twice"),
        ({"image": b"nothing"}, "image cannot be decoded"),
        ({"image_format": "png"}, "is a JPEG file, not png"),
        ({"mask": MASK_OF_OTHER_SIZE}, r"\(3, 3\), the image \(17, 24\)"),
        ({"mask": UNKNOWN_CLASS}, r"class id 7, expected 0\.\.2"),
        ({"mask": COLOUR_MASK}, "mode RGB, expected 8-bit grey"),
        ({"label": 3}, r"class id 3 is not in 0\.\.2"),
        ({"boxes": (Box(-1, 0, 0, 1, 1),)}, r"class id -1 is not in 0\.\.2"),
    ],
)
def test_broken_sample_is_named(tmp_path, changes, message):
    samples = [make_sample(0), make_sample(1, **changes)]
    with pytest.raises(DataError, match=rf"raw/1 \(key .*{message}"):
        write(tmp_path / "out", 2, samples=samples)
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize("promised", [9, 11])
def test_wrong_count_is_refused(tmp_path, promised):
    with pytest.raises(DataError, match=f"promised {promised} samples and gave 10"):
        write(tmp_path / "out", promised, samples=map(make_sample, range(10)))


def test_open_says_what_is_wrong(tmp_path, folder):
    with pytest.raises(DataError, match="not a shard folder; make it with `xattn shard`"):
        ShardIndex.open(tmp_path)
    file = folder / "index.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, "schema": 0}))
    with pytest.raises(DataError, match="schema 0, this program reads 1"):
        ShardIndex.open(folder)
    file.write_text(json.dumps({**whole, "dataset": {**whole["dataset"], "name": "other"}}))
    with pytest.raises(DamageError, match="fingerprint"):
        ShardIndex.open(folder)
    file.write_text('{"schema": 1,')
    with pytest.raises(DataError, match="not readable as JSON"):
        ShardIndex.open(folder)


def test_sound_folder_has_no_findings(folder):
    assert verify(folder) == []
    assert verify(folder, deep=True) == []


def test_verify_finds_missing_empty_and_extra_shards(folder):
    (folder / "train-000000.tar").unlink()
    (folder / "train-000001.tar").write_bytes(b"")
    (folder / "train-000009.tar").write_bytes(b"more")
    found = [(finding.shard, finding.problem) for finding in verify(folder)]
    assert [shard for shard, _ in found] == [f"train-00000{i}.tar" for i in (0, 1, 9)]
    problems = ("the file is missing", "the file is empty", "the index does not list it")
    assert all(
        problem.startswith(start) for (_, problem), start in zip(found, problems, strict=True)
    )


@pytest.mark.parametrize("inside", [True, False])
def test_verify_finds_a_cut_inside_a_member_or_between_two(folder, inside):
    index = ShardIndex.open(folder)
    offset, size, _ = span_of(index, 2, "image")
    file = folder / "train-000000.tar"
    file.write_bytes(file.read_bytes()[: offset + size - 1 if inside else offset - 512])
    whole, first, *_ = verify(folder)
    assert (whole.shard, whole.key) == ("train-000000.tar", None)
    assert (first.shard, first.key, first.offset) == ("train-000000.tar", "img_002", offset)
    assert "ends" in first.problem
    with pytest.raises(DamageError, match=rf"{file.name}, key img_002, offset {offset}"):
        ShardReader(index, "train").read(2)


def test_flipped_payload_byte_is_found_by_verify_and_at_read(folder):
    index = ShardIndex.open(folder)
    offset, _, crc32 = span_of(index, 5, "mask")
    flip_byte(folder / "train-000001.tar", offset + 7)
    assert verify(folder) == []
    whole, damaged = verify(folder, deep=True)
    assert "sha256" in whole.problem
    assert (damaged.key, damaged.offset) == ("img_005", offset)
    assert f"{crc32:08x}" in damaged.problem
    expected = rf"shard train-000001\.tar, key img_005, offset {offset}: .*{crc32:08x}"
    with pytest.raises(DamageError, match=expected):
        ShardReader(index, "train").read(5)
    assert ShardReader(index, "train").read(4)["label"] == b"1"


def test_damaged_tar_header_is_found(folder):
    index = ShardIndex.open(folder)
    offset, _, _ = span_of(index, 1, "label")
    flip_byte(folder / "train-000000.tar", offset - 512)
    _, damaged = verify(folder, deep=True)
    assert (damaged.key, damaged.offset) == ("img_001", offset)
    assert "tar header" in damaged.problem


def test_swapped_shards_are_found(folder):
    first, second = folder / "train-000000.tar", folder / "train-000001.tar"
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    findings = verify(folder, deep=True)
    assert {finding.shard for finding in findings} == {first.name, second.name}
    assert sum("more fields are damaged" in finding.problem for finding in findings) == 2
    with pytest.raises(DamageError, match=first.name):
        ShardReader(ShardIndex.open(folder), "train").read(0)


def test_damaged_or_missing_rows_are_found(folder):
    file = folder / "train.index.npy"
    flip_byte(file, file.stat().st_size - 1)
    (finding,) = verify(folder)
    assert finding.shard == file.name
    assert "sha256" in finding.problem
    file.unlink()
    (finding,) = verify(folder)
    assert finding.problem == "the file is missing"
    with pytest.raises(DamageError, match=r"train\.index\.npy cannot be read"):
        ShardReader(ShardIndex.open(folder), "train")


def test_missing_shard_is_named_at_read(folder):
    (folder / "train-000002.tar").unlink()
    with pytest.raises(DamageError, match=r"train-000002\.tar cannot be opened"):
        ShardReader(ShardIndex.open(folder), "train").read(9)
