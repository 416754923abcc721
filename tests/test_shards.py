import contextlib
import gc
import hashlib
import io
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from dataclasses import replace

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image

from tests.conftest import PROJECT
from tests.raw_files import Samples
from xattn.data.datasets import Entry
from xattn.data.index import ShardIndex, ShardReader, fingerprint_of
from xattn.data.shards import plan_shards, repair_shards, write_shards
from xattn.data.stored import ShardSettings
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


def write(out, count=10, info=INFO, samples=None, read=None, jobs=1, **settings):
    read = read or Samples(samples or [make_sample(i) for i in range(count)])
    settings = ShardSettings(**{"samples_per_shard": 4, "shuffle_seed": None, **settings})
    return write_shards(out, info, {"train": read.entries}, read, settings, jobs=jobs)


def repair(out, count=10, **settings):
    read = Samples([make_sample(i) for i in range(count)])
    settings = ShardSettings(**{"samples_per_shard": 4, "shuffle_seed": None, **settings})
    return repair_shards(out, INFO, {"train": read.entries}, read, settings)


def digests(folder):
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


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


def test_shards_are_filled_by_the_size_of_the_raw_files(tmp_path):
    read = Samples([make_sample(i, source=str(tmp_path / f"{i}.raw")) for i in range(10)])
    for entry in read.entries:
        with open(entry.image, "wb") as raw:
            raw.truncate(40 << 20)  # sparse: takes no room
    index = write(tmp_path / "out", read=read, samples_per_shard=None)
    assert [shard.num_samples for shard in index.splits["train"].shards] == [3, 3, 3, 1]


def test_training_splits_are_shuffled_once(tmp_path):
    splits = {name: Samples([make_sample(i) for i in range(10)]) for name in ("train", "val")}
    entries = {name: read.entries for name, read in splits.items()}

    def keys(name, seed, split):
        index = write_shards(
            tmp_path / name, INFO, entries, splits["train"], ShardSettings(shuffle_seed=seed)
        )
        return [ShardReader(index, split).key(i) for i in range(10)]

    ordered = [f"img_{i:03d}" for i in range(10)]
    first = keys("a", 0, "train")
    assert first != ordered
    assert sorted(first) == ordered
    assert keys("b", 0, "train") == first
    assert keys("c", 1, "train") != first
    assert keys("d", 0, "val") == ordered


def test_progress_and_several_splits(tmp_path):
    calls = []
    read = Samples([make_sample(0), make_sample(1)])
    splits = {"train": read.entries, "val": read.entries[:1]}
    index = write_shards(
        tmp_path / "out", INFO, splits, read, on_progress=lambda *call: calls.append(call)
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert index.shard_path("val", 0).is_file()
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        index.records("test")


def test_interrupted_run_keeps_the_old_folder_and_is_gone_on_with(tmp_path, folder):
    out = tmp_path / "killed"
    write(out, 3)
    before = digests(out)
    samples = [make_sample(i) for i in range(10)]
    with pytest.raises(KeyboardInterrupt):
        write(out, read=Samples(samples, fail_at="img_006"))
    assert {name: digest for name, digest in digests(out).items() if name in before} == before
    # What a kill that cannot be caught leaves behind:
    (out / ".partial" / ".train-000001.tar.77.partial").write_bytes(b"half")
    again = Samples(samples)
    assert digests(write(out, read=again).root) == digests(folder)
    assert again.opened == [f"img_{i:03d}" for i in range(4, 10)], "one shard was done already"


def test_a_run_killed_while_it_publishes_is_gone_on_with(tmp_path, folder):
    out = tmp_path / "killed"
    read = Samples([make_sample(i) for i in range(10)])
    with pytest.raises(KeyboardInterrupt):
        write(out, read=Samples([make_sample(i) for i in range(10)], fail_at="img_008"))
    (out / ".partial/train-000000.tar").rename(out / "train-000000.tar")
    assert digests(write(out, read=read).root) == digests(folder)
    assert read.opened == ["img_008", "img_009"]


def test_a_changed_raw_file_redoes_its_shard(tmp_path):
    def samples():
        return [make_sample(i, source=str(tmp_path / f"{i}.raw")) for i in range(10)]

    for number in range(10):
        (tmp_path / f"{number}.raw").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", read=Samples(samples(), fail_at="img_009"))
    (tmp_path / "5.raw").write_bytes(b"newer")
    again = Samples(samples())
    write(tmp_path / "out", read=again)
    assert again.opened == [f"img_{i:03d}" for i in range(4, 10)]


def test_several_processes_give_the_same_bytes(tmp_path, folder):
    samples = [make_sample(i) for i in range(10)]
    assert digests(write(tmp_path / "out", read=Samples(samples), jobs=2).root) == digests(folder)
    broken = Samples(samples, fail_at="img_009", error=DataError("raw/9: damaged"))
    with pytest.raises(DataError, match="raw/9: damaged"):
        write(tmp_path / "other", read=broken, jobs=2)
    assert not (tmp_path / "other" / "index.json").exists()


def test_kill_minus_nine_then_again(tmp_path, folder):
    """The real thing: a packing process tree is killed, and the next run goes on."""
    script = (
        "import os, signal, sys; sys.path.insert(0, 'tests');"
        "from pathlib import Path; from tests.test_shards import Samples, make_sample, write;"
        "read = Samples([make_sample(i) for i in range(10)]); inner = read.__call__\n"
        "class Killer(Samples):\n"
        "    def __call__(self, entry):\n"
        "        if entry.key == 'img_005': os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().__call__(entry)\n"
        f"write(Path({str(tmp_path / 'out')!r}), read=Killer([make_sample(i) for i in range(10)]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "index.json").exists()
    read = Samples([make_sample(i) for i in range(10)])
    assert digests(write(tmp_path / "out", read=read).root) == digests(folder)
    assert read.opened == [f"img_{i:03d}" for i in range(4, 10)]


def test_packing_processes_end_with_the_one_that_was_killed(tmp_path):
    """kill -9 of the parent must not leave processes behind that write or wait for ever."""
    script = (
        "import time; from pathlib import Path\n"
        "from tests.test_shards import Samples, make_sample, write\n"
        "class Slow(Samples):\n"
        "    def __call__(self, entry):\n"
        "        time.sleep(0.3); return super().__call__(entry)\n"
        "if __name__ == '__main__':\n"
        f"    write(Path({str(tmp_path / 'out')!r}), jobs=2,"
        " read=Slow([make_sample(i) for i in range(12)]))\n"
    )
    (tmp_path / "slow.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    parent = subprocess.Popen([sys.executable, tmp_path / "slow.py"], env=environment)
    deadline = time.monotonic() + 60
    partial = tmp_path / "out/.partial"
    while not (partial.exists() and any(partial.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 3, "the fork server and two that pack"
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_quarantine_sets_corrupt_samples_aside_and_has_a_limit(tmp_path):
    samples = [make_sample(i) for i in range(10)]
    samples[2] = make_sample(2, image=b"nothing")
    samples[7] = make_sample(7, label=9)
    index = write(tmp_path / "out", samples=samples, quarantine=2)
    split = index.splits["train"]
    assert split.count == 8
    assert [shard.num_samples for shard in split.shards] == [3, 3, 2]
    assert sum(split.images) == 8
    reasons = json.loads((tmp_path / "out/quarantine.json").read_text())["train"]
    assert sorted(reasons) == ["img_002", "img_007"]
    assert "cannot be decoded" in reasons["img_002"]
    assert verify(tmp_path / "out", deep=True) == []
    with pytest.raises(DataError, match=r"2 corrupt samples, 1 may be set aside"):
        write(tmp_path / "other", samples=samples, quarantine=1)


def test_images_may_be_stored_smaller(tmp_path):
    box = Box(2, 0.0, 10.0, 100.0, 20.0)
    noise = np.random.default_rng(0).integers(0, 256, (100, 200, 3), dtype=np.uint8)
    mask = np.zeros((100, 200), np.uint8)
    mask[:, 100:] = 2
    sample = make_sample(0, image=encode(noise), mask=encode(mask), boxes=(box,))
    index = write(tmp_path / "out", samples=[sample], images={"max_side": 50})
    reader = ShardReader(index, "train")
    assert reader.size(0) == (25, 50)
    fields = reader.read(0)
    assert fields["image"][:2] == b"\xff\xd8"
    small = np.asarray(Image.open(io.BytesIO(fields["mask"])))
    assert (small[:, :25] == 0).all()
    assert (small[:, 25:] == 2).all()
    assert json.loads(fields["boxes"])[0] | {"class_id": 2} == {
        **dict.fromkeys(("difficult", "crowd"), False),
        "class_id": 2,
        "x1": 0.0,
        "y1": 2.5,
        "x2": 25.0,
        "y2": 5.0,
    }


def test_foreign_file_is_refused_and_kept(tmp_path):
    note = tmp_path / "notes.txt"
    note.write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt"):
        write(tmp_path)
    assert note.read_text() == "mine"


def test_too_little_space_is_refused_beforehand(tmp_path):
    samples = [make_sample(i, source=str(tmp_path / "huge.raw")) for i in range(10)]
    with open(tmp_path / "huge.raw", "wb") as raw:
        raw.truncate(10**13)  # sparse: takes no room
    with pytest.raises(CapacityError, match=r"about 1e\+05 GB .* only [\d.]+ GB are free"):
        write(tmp_path / "out", samples=samples)
    assert not (tmp_path / "out").exists()


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
    assert not (tmp_path / "out").exists()


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


def test_a_reader_that_breaks_its_promise_is_named(tmp_path):
    samples = [make_sample(0), make_sample(0)]
    with pytest.raises(DataError, match="both have the key 'img_000'"):
        write(tmp_path / "out", samples=samples)
    read = Samples([make_sample(0)])
    read.of_key["img_000"] = make_sample(1)
    with pytest.raises(DataError, match="promised the key 'img_000'"):
        write(tmp_path / "out", read=read)


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
    assert f"belongs in {second.name}" in findings[0].problem
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


def rewrite_index(folder, change):
    """Change what the index says, so that only the content tells that something is wrong."""
    document = json.loads((folder / "index.json").read_text())
    change(document)
    document["fingerprint"] = fingerprint_of(document)
    (folder / "index.json").write_text(json.dumps(document))


def test_content_that_does_not_fit_its_class_list_is_found(folder):
    def two_classes(document):
        document["dataset"]["class_names"].pop()

    rewrite_index(folder, two_classes)
    assert verify(folder) == []
    problems = [(f.key, f.problem) for f in verify(folder, deep=True)]
    assert ("img_002", "class id 2 is not in 0..1") in problems, "a label"
    assert ("img_001", "class id 2 is not in 0..1") in problems, "a box"


def test_mask_ids_and_sizes_are_found(folder, monkeypatch):
    def no_ignored(document):
        document["dataset"]["ignore_ids"] = [255]

    rewrite_index(folder, no_ignored)
    first = verify(folder, deep=True)[0]
    assert (first.shard, first.key) == ("train-000000.tar", "img_000")
    assert "the mask has class id 254, expected 0..2" in first.problem
    assert first.offset == span_of(ShardIndex.open(folder), 0, "mask")[0]
    monkeypatch.setattr("xattn.data.pack._Counts._count_pixels", lambda *_: np.zeros(256, np.int64))
    other = write(folder.parent / "other", samples=[make_sample(0, mask=MASK_OF_OTHER_SIZE)])
    (finding,) = verify(other.root, deep=True)
    assert finding.problem == "the mask has (height, width) (3, 3), the image (16, 24)"


def test_missing_fields_and_double_keys_are_found(tmp_path, monkeypatch):
    samples = [make_sample(0), make_sample(1, mask=None), make_sample(2)]
    (finding,) = verify(write(tmp_path / "out", samples=samples).root)
    assert (finding.shard, finding.key) == ("train-000000.tar", "img_001")
    assert finding.problem == "has no mask, while 2 others have one"
    monkeypatch.setattr("xattn.data.shards.check_unique", lambda _entries: None)
    double = Samples([make_sample(0), make_sample(1)])
    double.entries.append(double.entries[0])
    (finding,) = verify(write(tmp_path / "double", read=double).root)
    assert (finding.key, finding.problem) == ("img_000", "the key occurs twice in this split")


def damage_tar(folder):
    flip_byte(folder / "train-000001.tar", 700)


def damage_rows(folder):
    flip_byte(folder / "train.index.npy", 300)


def cut(folder):
    file = folder / "train-000002.tar"
    file.write_bytes(file.read_bytes()[:1024])


def lose(folder):
    (folder / "train-000000.tar").unlink()
    (folder / "train.index.npy").unlink()


def swap(folder):
    first, second = folder / "train-000000.tar", folder / "train-000001.tar"
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def add(folder):
    (folder / "train-000007.tar").write_bytes(b"more")


def damage_index(folder):
    flip_byte(folder / "index.json", 30)


@pytest.mark.parametrize("harm", [damage_tar, damage_rows, cut, lose, swap, add, damage_index])
def test_repair_brings_every_byte_back(folder, harm):
    before = digests(folder)
    harm(folder)
    assert digests(folder) != before
    assert repair(folder)
    assert digests(folder) == before
    assert repair(folder) == []


def test_repair_refuses_raw_files_that_changed(folder):
    damage_tar(folder)
    before = digests(folder)
    read = Samples([make_sample(i + 100, key=f"img_{i:03d}") for i in range(10)])
    settings = ShardSettings(samples_per_shard=4, shuffle_seed=None)
    with pytest.raises(DataError, match=r"000001\.tar: cannot be repaired, its raw files"):
        repair_shards(folder, INFO, {"train": read.entries}, read, settings)
    assert digests(folder) == before


def test_five_hundred_flips_are_found_or_harmless(folder):
    """Any byte of any file: verify names it, and a reader never gives other bytes for sound."""
    truth = {i: make_sample(i) for i in range(10)}
    chance = random.Random(1)
    files = sorted(folder.iterdir())
    for _ in range(500):
        file = chance.choice(files)
        offset = chance.randrange(file.stat().st_size)
        flip_byte(file, offset)
        with contextlib.suppress(DataError):  # what opening raises is a finding too
            assert verify(folder, deep=True), (file.name, offset)
        with contextlib.suppress(DataError):
            reader = ShardReader(ShardIndex.open(folder), "train")
            for position in range(10):
                with contextlib.suppress(DamageError):
                    assert reader.read(position)["image"] == truth[position].image
        flip_byte(file, offset)
    assert verify(folder, deep=True) == []


def test_keys_beyond_ascii_are_stored_and_read(tmp_path):
    samples = [make_sample(0, key="\u00fcn\u00ef \u65e5\u672c"), make_sample(1)]
    index = write(tmp_path / "out", samples=samples)
    assert verify(tmp_path / "out", deep=True) == []
    assert ShardReader(index, "train").read(0)["image"] == samples[0].image
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        assert tar.getnames()[0] == "\u00fcn\u00ef \u65e5\u672c.png"
    odd = Samples([make_sample(0, source="raw/\udcff.jpg")])
    with pytest.raises(DataError, match="the name is not UTF-8"):
        write(tmp_path / "odd", read=odd)


@pytest.mark.parametrize("text", ['{"schema": 1,', '{"schema": 3}', None])
def test_a_broken_index_is_a_finding(folder, text):
    before = digests(folder)
    if text is None:
        (folder / "index.json").unlink()
    else:
        (folder / "index.json").write_text(text)
    (finding,) = verify(folder)
    assert finding.shard == "index.json"
    repair(folder)
    assert digests(folder) == before
    with pytest.raises(DataError, match="not a shard folder"):
        verify(folder.parent)


def test_a_folder_in_a_shards_place_is_a_finding(folder):
    (folder / "train-000001.tar").unlink()
    (folder / "train-000001.tar").mkdir()
    (finding,) = verify(folder, deep=True)
    assert (finding.shard, finding.problem) == ("train-000001.tar", "it is no regular file")


def test_splits_may_go(tmp_path):
    read = Samples([make_sample(i) for i in range(4)])
    settings = ShardSettings(shuffle_seed=None)
    both = {"train": read.entries[:3], "test": read.entries[3:]}
    write_shards(tmp_path / "out", INFO, both, read, settings)
    write_shards(tmp_path / "out", INFO, {"train": read.entries}, read, settings)
    assert not list((tmp_path / "out").glob("test*"))
    assert verify(tmp_path / "out", deep=True) == []


def test_a_changed_part_of_a_mask_redoes_its_shard(tmp_path):
    """Targets may be several files."""
    part = tmp_path / "part.png"
    part.write_bytes(b"old")
    entry = Entry("a", str(tmp_path / "a.jpg"), ((str(part), 1)[0], 7))
    read = Samples([make_sample(0)])

    def plan():
        return plan_shards(INFO, {"train": [entry]}, read, ShardSettings())[0].fingerprint

    first = plan()
    assert plan() == first
    part.write_bytes(b"newer")
    assert plan() != first
