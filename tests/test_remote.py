import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.shard import shard
from tests.conftest import PROJECT, small_params, write_params
from tests.raw_files import Samples, write_samples
from xattn import remote
from xattn.data import cache as cache_module
from xattn.data.cache import ShardCache, cache_bytes
from xattn.data.index import ShardIndex, ShardReader
from xattn.data.loader import build_train_loader
from xattn.data.shards import repair_shards, write_shards
from xattn.data.stored import ShardSettings
from xattn.data.transforms import SegmentationAugment
from xattn.data.verify import verify
from xattn.errors import CapacityError, ConfigError, DamageError, DataError, MissingPackageError
from xattn.remote import Bucket
from xattn.structures import DatasetInfo, Sample

pytest_plugins = ["tests.s3_server"]

SECRET = "testing-only-0123456789"  # that of the fixture s3
KB = 1000
INFO = DatasetInfo(
    name="tiny",
    tasks=("segmentation",),
    class_names=("a", "b", "c"),
    palette=((0, 0, 0), (1, 1, 1), (2, 2, 2)),
    splits=("train",),
    ignore_ids=(255,),
    licence="none",
    url="",
    citation="",
    layout="",
)


def some_bytes(size, seed=0):
    return random.Random(seed).randbytes(size)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def make_sample(number):
    rng = np.random.default_rng(number)
    arrays = (rng.integers(0, 256, (8, 12, 3), np.uint8), rng.integers(0, 3, (8, 12), np.uint8))
    files = []
    for array in arrays:
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, "PNG")
        files.append(stream.getvalue())
    return Sample(f"s{number:03d}", files[0], "png", f"raw/{number}", files[1])


@pytest.fixture
def fresh_clients():
    """Let clients of other settings be made."""
    remote._client.cache_clear()
    yield
    remote._client.cache_clear()


@pytest.fixture
def bucket(s3):
    return Bucket(f"{s3.place}/some/folder")


@pytest.fixture
def shelf(tmp_path):
    return ShardCache(tmp_path / "cache", 100 * KB)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A shard folder of 5 tars."""
    out = tmp_path_factory.mktemp("remote") / "shards"
    splits = {"train": [make_sample(i) for i in range(24)]}
    return write_samples(out, INFO, splits, samples_per_shard=5)


@pytest.fixture(scope="module")
def expected(local):
    """What training on the local folder sees."""
    return batches(local)


@pytest.fixture
def stored(local, bucket, s3):
    """The same folder in the bucket."""
    for file in sorted(local.root.iterdir(), key=lambda file: file.name == "index.json"):
        if file.is_file():
            bucket.upload(file, file.name)
    s3.reset()
    return bucket.place


def put(bucket, name, size, seed=0):
    data = some_bytes(size, seed)
    bucket.write(name, data)
    return sha256(data)


def files_of(shelf_folder):
    return sorted(file.name for file in shelf_folder.iterdir() if file.is_file())


def batches(index, **changes):
    settings = {"seed": 5, "global_batch": 6, "steps": 5, **changes}
    augment = SegmentationAugment(base=(8, 12), crop=(8, 8))
    return list(build_train_loader(index, "train", "segmentation", augment, **settings))


def assert_same_batches(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.target, other.target)


# --- objects


def test_objects_round_trip(bucket, tmp_path):
    data = some_bytes(50 * KB)
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    source.write_bytes(data)
    bucket.upload(source, "a.tar")
    bucket.write("empty", b"")
    assert bucket.list() == {"a.tar": len(data), "empty": 0}
    assert Bucket(bucket.place.removesuffix("/some/folder")).list() == {
        "some/folder/a.tar": len(data),
        "some/folder/empty": 0,
    }
    assert (bucket.size("a.tar"), bucket.size("b.tar")) == (len(data), None)
    assert (bucket.read("a.tar"), bucket.read("empty")) == (data, b"")
    assert bucket.read_range("a.tar", 10, 90) == data[10:100]
    assert bucket.read_range("a.tar", 10, 0) == b""
    bucket.download("a.tar", target, sha256(data), len(data))
    assert target.read_bytes() == data
    assert files_of(target.parent) == ["target"]
    bucket.delete("a.tar")
    bucket.delete("a.tar")
    assert bucket.list() == {"empty": 0}


def test_large_files_go_in_parts_and_appear_whole(bucket, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_PART_BYTES", 5 << 20)  # the least that S3 allows
    data = some_bytes((10 << 20) + 5)
    source = tmp_path / "source"
    source.write_bytes(data)
    seen = []
    s3.fail("slow", method="POST", part="uploadId", delay_s=0.5)  # the last request of all
    thread = threading.Thread(target=bucket.upload, args=(source, "large.tar"))
    thread.start()
    while thread.is_alive():
        seen.append(bucket.size("large.tar"))
        thread.join(0.1)
    assert set(seen) <= {None, len(data)}
    assert None in seen
    assert len(s3.requests("PUT", "partNumber")) == 3
    assert bucket.size("large.tar") == len(data)
    # The store proved it by its ETag, and will again: nothing is read back, nothing sent twice.
    bucket.upload(source, "large.tar")
    assert s3.requests("GET", "large.tar") == []
    assert len(s3.requests("PUT", "partNumber")) == 3
    bucket.download("large.tar", tmp_path / "target", sha256(data), len(data))


@pytest.mark.parametrize(
    ("status", "code"),
    [(503, "SlowDown"), (429, "TooManyRequests"), (500, "InternalError"), (502, "BadGateway")],
)
def test_throttling_and_server_faults_are_waited_out(bucket, s3, status, code):
    s3.fail("status", status=status, code=code, times=4)
    s3.fail("status", method="PUT", status=status, code=code, times=4)
    bucket.write("x", b"hello")
    assert bucket.read("x") == b"hello"
    s3.fail("status", status=status, code=code, times=100)
    with pytest.raises(DataError, match=rf"{bucket.place}/x: GetObject failed \({code}, HTTP"):
        bucket.read("x")
    assert len(s3.requests("GET", "/x")) == 4 + 1 + 8


def test_a_cut_body_goes_on_where_it_ended(bucket, s3, tmp_path):
    digest = put(bucket, "x", 3 << 20)
    s3.fail("cut", times=2)
    bucket.download("x", tmp_path / "x", digest, 3 << 20)
    spans = [span for _, span in s3.requests("GET", "/x")]
    assert spans[0] is None
    starts = [int(span.removeprefix("bytes=").split("-")[0]) for span in spans[1:]]
    assert 0 < starts[0] < starts[1]
    s3.reset()
    s3.fail("cut", times=2)
    assert bucket.read_range("x", 1000, 2000) == some_bytes(3 << 20)[1000:3000]


def test_cut_for_ever_is_one_line(bucket, s3, tmp_path):
    digest = put(bucket, "x", 100 * KB)
    s3.fail("cut", times=100)
    with pytest.raises(DataError, match=rf"{bucket.place}/x: the connection was cut 8 times"):
        bucket.download("x", tmp_path / "x", digest, 100 * KB)
    assert list(tmp_path.iterdir()) == []


def test_an_object_replaced_meanwhile_is_not_mixed(bucket, s3):
    put(bucket, "x", 100 * KB)
    s3.fail("cut")
    chunks = bucket._stream("x")
    first = next(chunks)
    put(bucket, "x", 100 * KB, seed=1)
    assert first == some_bytes(100 * KB)[: len(first)]
    with pytest.raises(DataError, match="replaced while it was read"):
        list(chunks)


def test_a_changed_body_is_fetched_again_once(bucket, s3, tmp_path):
    digest = put(bucket, "x", 100 * KB)
    s3.fail("flip")
    bucket.download("x", tmp_path / "x", digest, 100 * KB)
    s3.fail("flip", times=2)
    with pytest.raises(
        DamageError, match=rf"{bucket.place}/x: .* expected 100000 bytes with {digest}"
    ):
        bucket.download("x", tmp_path / "y", digest, 100 * KB)
    assert files_of(tmp_path) == ["x"]


@pytest.mark.parametrize("size", [100 * KB, (5 << 20) + 1])
def test_upload_of_changed_bytes_is_sent_again_and_then_refused(
    bucket, s3, tmp_path, monkeypatch, size
):
    monkeypatch.setattr(remote, "_PART_BYTES", 5 << 20)
    source = tmp_path / "source"
    source.write_bytes(some_bytes(size))
    s3.fail("flip_sent", method="PUT")
    bucket.upload(source, "x")
    assert len(s3.requests("PUT", "/x")) == (2 if size == 100 * KB else 4)
    assert bucket.read("x") == source.read_bytes()
    bucket.delete("x")
    s3.fail("flip_sent", method="PUT", times=100)
    with pytest.raises(DamageError, match=rf"{bucket.place}/x: what arrived there twice is not"):
        bucket.upload(source, "x")
    assert bucket.size("x") is None
    with pytest.raises(DamageError, match=f"{bucket.place}/y"):
        bucket.write("y", b"hello")


def test_etag_that_is_no_md5_is_made_good_by_reading_back(bucket, s3, tmp_path):
    s3.fail("etag", method="HEAD", times=1)
    bucket.write("x", b"hello")
    assert len(s3.requests("GET", "/x")) == 1


def test_missing_things_are_named(bucket, tmp_path):
    with pytest.raises(DataError, match=rf"^{bucket.place}/x: no such object$"):
        bucket.read("x")
    with pytest.raises(DataError, match="s3://no-such-bucket/a/x: no such bucket"):
        Bucket("s3://no-such-bucket/a").read("x")
    with pytest.raises(DataError, match="s3://no-such-bucket/a/x: no such bucket"):
        Bucket("s3://no-such-bucket/a").write("x", b"")
    with pytest.raises(DataError, match="no such bucket"):
        Bucket("s3://no-such-bucket/a").list()
    bucket.write("x", b"hello")
    with pytest.raises(DataError, match="ends before"):
        bucket.read_range("x", 5, 1)
    with pytest.raises(DataError, match=r"source: cannot be read \(No such file"):
        bucket.upload(tmp_path / "source", "y")
    for wrong in ("bucket/folder", "s3://", "gs://bucket"):
        with pytest.raises(ConfigError, match="expected s3://BUCKET/FOLDER"):
            Bucket(wrong)


def assert_says_no_secret(error):
    assert "\n" not in str(error)
    assert SECRET not in "".join(traceback.format_exception(error))
    assert "testing-key" not in str(error)


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_denied_access_is_one_line(bucket, s3, tmp_path, code):
    s3.fail("status", status=403, code=code)
    with pytest.raises(DataError, match=rf"{bucket.place}/x: access denied \({code}\)") as caught:
        bucket.read("x")
    assert_says_no_secret(caught.value)
    source = tmp_path / "source"
    source.write_bytes(b"hello")
    s3.fail("status", method="PUT", status=403, code=code)
    with pytest.raises(DataError, match=rf"{bucket.place}/x: access denied \({code}\)") as caught:
        bucket.upload(source, "x")
    assert_says_no_secret(caught.value)


def test_no_credentials_is_one_line(bucket, monkeypatch, fresh_clients):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing-key")
    with pytest.raises(DataError, match="no usable AWS credentials") as partial:
        bucket.read("x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    remote._client.cache_clear()
    with pytest.raises(DataError, match=r"looked for AWS_ACCESS_KEY_ID .* AWS_PROFILE") as missing:
        bucket.read("x")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    remote._client.cache_clear()
    with pytest.raises(
        DataError, match=r"no usable AWS credentials \(ProfileNotFound\)"
    ) as profile:
        bucket.read("x")
    for caught in (partial, missing, profile):
        assert_says_no_secret(caught.value)


def test_store_that_is_not_there_is_one_line(s3, monkeypatch, fresh_clients):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{SECRET}@127.0.0.1:9")
    with pytest.raises(DataError, match=r"127\.0\.0\.1 does not answer") as caught:
        Bucket("s3://bucket").read("x")
    assert_says_no_secret(caught.value)
    remote._client.cache_clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"nonsense {SECRET}")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL is not an address") as caught:
        Bucket("s3://bucket").read("x")
    assert_says_no_secret(caught.value)


def test_boto3_is_needed_by_remote_places_only(tmp_path, local):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from xattn.data.index import ShardIndex, ShardReader\n"
        "assert not {'boto3', 'botocore', 'torch'} & set(sys.modules)\n"
        "sys.modules['boto3'] = None\n"
        f"ShardReader(ShardIndex.open({str(local.root)!r}), 'train').read(0)\n"
        "from xattn.errors import MissingPackageError\n"
        "try: ShardIndex.open('s3://bucket/folder')\n"
        "except MissingPackageError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "s3://bucket/folder/index.json: needs boto3, which is not installed\n"
    assert issubclass(MissingPackageError, Exception)


def test_threads_forks_and_pickles_read(bucket):
    bucket.write("x", b"hello")
    found = []
    threads = [threading.Thread(target=lambda: found.append(bucket.read("x"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"hello"] * 8

    own = id(remote._client(os.getpid()))
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(
        target=lambda: send.send((bucket.read("x"), id(remote._client(os.getpid()))))
    )
    child.start()
    assert receive.poll(20)
    data, other = receive.recv()
    child.join(20)
    assert data == b"hello"
    assert other != own
    assert id(remote._client(os.getpid())) == own
    copy = pickle.loads(pickle.dumps(bucket))
    assert copy.read("x") == b"hello"
    assert SECRET.encode() not in pickle.dumps(copy)


# --- the cache

FETCH = (
    "import sys\n"
    "from pathlib import Path\n"
    "from xattn.data.cache import ShardCache\n"
    "from xattn.remote import Bucket\n"
    "place, name, sha256, folder = sys.argv[1:]\n"
    "print(ShardCache(Path(folder), 10**9).fetch(Bucket(place), name, sha256, 100_000))\n"
)


def start_fetch(bucket, name, digest, folder):
    command = [sys.executable, "-c", FETCH, bucket.place, name, digest, str(folder)]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)


def test_two_processes_fetch_a_shard_once(bucket, s3, tmp_path):
    digest = put(bucket, "x", 100 * KB)
    s3.fail("slow", delay_s=0.7)
    processes = [start_fetch(bucket, "x", digest, tmp_path / "cache") for _ in range(2)]
    answers = [process.communicate(timeout=30)[0].strip() for process in processes]
    assert answers == [str(tmp_path / "cache" / digest)] * 2
    assert Path(answers[0]).read_bytes() == some_bytes(100 * KB)
    assert len(s3.requests("GET", "/x")) == 1


def test_kill_during_a_download_leaves_nothing_that_matters(bucket, s3, tmp_path):
    folder = tmp_path / "cache"
    digest, other = put(bucket, "x", 100 * KB), put(bucket, "y", 100 * KB, seed=1)
    s3.fail("hang", part="/x")
    process = start_fetch(bucket, "x", digest, folder)
    deadline = time.monotonic() + 20
    while not s3.requests("GET", "/x") or not (folder / f"{digest}.partial").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert files_of(folder) == [f"{digest}.partial"]
    cache = ShardCache(folder, 1000 * KB)
    cache.fetch(bucket, "y", other, 100 * KB)
    assert files_of(folder) == [other]
    assert cache.fetch(bucket, "x", digest, 100 * KB).read_bytes() == some_bytes(100 * KB)


def test_limit_is_kept_by_evicting_what_was_not_used_for_longest(bucket, s3, shelf, tmp_path):
    digests = [put(bucket, f"x{i}", 30 * KB, seed=i) for i in range(5)]

    def fetch(number):
        time.sleep(0.01)
        return shelf.fetch(bucket, f"x{number}", digests[number], 30 * KB)

    kept = [fetch(number) for number in (0, 1, 2)]
    fetch(0)
    still_open = kept[1].open("rb")
    for number, expected in ((3, (0, 2, 3)), (0, (0, 2, 3)), (4, (0, 3, 4))):
        fetch(number)
        held = files_of(tmp_path / "cache")
        assert held == sorted(digests[i] for i in expected)
    with still_open:
        assert still_open.read() == some_bytes(30 * KB, 1)
    assert len(s3.requests("GET")) == 5


def test_many_at_once_keep_the_limit(bucket, s3, shelf, tmp_path):
    digests = [put(bucket, f"x{i}", 30 * KB, seed=i) for i in range(12)]
    found, most = [], [0]

    def fetch(number):
        path = shelf.fetch(bucket, f"x{number}", digests[number], 30 * KB)
        most[0] = max(most[0], sum(file.stat().st_size for file in shelf._files()))
        found.append(path.name)

    # Two at a time: what is on its way cannot be evicted.
    for start in range(0, 12, 2):
        pair = [threading.Thread(target=fetch, args=(start + i,)) for i in (0, 1)]
        for thread in pair:
            thread.start()
        for thread in pair:
            thread.join()
    assert sorted(found) == sorted(digests)
    assert 60 * KB <= most[0] <= 100 * KB


def test_a_file_beyond_the_limit_is_kept_alone(bucket, shelf, tmp_path):
    large, small = put(bucket, "large", 200 * KB), put(bucket, "small", KB, seed=1)
    shelf.fetch(bucket, "large", large, 200 * KB)
    assert files_of(tmp_path / "cache") == [large]
    shelf.fetch(bucket, "small", small, KB)
    assert files_of(tmp_path / "cache") == [small]


def test_full_disk_is_refused_beforehand(bucket, s3, shelf, tmp_path, monkeypatch):
    digests = [put(bucket, f"x{i}", 30 * KB, seed=i) for i in range(2)]
    shelf.fetch(bucket, "x0", digests[0], 30 * KB)
    monkeypatch.setattr(cache_module, "free_bytes", lambda _: 20 * KB)
    with pytest.raises(CapacityError, match=r"30000 bytes are needed .* 20000 are free"):
        shelf.fetch(bucket, "x1", digests[1], 30 * KB)
    assert files_of(tmp_path / "cache") == []
    assert len(s3.requests("GET")) == 1


def test_files_of_others_are_left_alone(bucket, shelf, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("thesis.doc", "thesis.partial"):
        (folder / name).write_bytes(some_bytes(90 * KB))
    for i in range(4):
        shelf.fetch(bucket, f"x{i}", put(bucket, f"x{i}", 40 * KB, seed=i), 40 * KB)
    assert len(files_of(folder)) == 4
    assert {"thesis.doc", "thesis.partial"} < set(files_of(folder))
    in_the_way = tmp_path / "file"
    in_the_way.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"file: cannot be written \(Not a directory"):
        ShardCache(in_the_way, 100 * KB).fetch(bucket, "x0", "0" * 64, 40 * KB)


def test_only_damaged_files_are_dropped(bucket, s3, shelf):
    digest = put(bucket, "x", 30 * KB)
    path = shelf.fetch(bucket, "x", digest, 30 * KB)
    shelf.drop_damaged(digest)
    assert path.exists()
    path.write_bytes(b"?")
    shelf.drop_damaged(digest)
    shelf.drop_damaged(digest)
    assert not path.exists()


def test_cache_limit_is_read_from_the_environment(monkeypatch):
    for text, expected in (("", 50e9), ("0", 0), ("1.5", 1.5e9)):
        monkeypatch.setenv("XATTN_CACHE_GB", text)
        assert cache_bytes() == expected
    for text in ("much", "-1", "inf"):
        monkeypatch.setenv("XATTN_CACHE_GB", text)
        with pytest.raises(ConfigError, match=f"XATTN_CACHE_GB is '{text}', expected gigabytes"):
            cache_bytes()


# --- shard folders


@pytest.mark.parametrize("gigabytes", ["1", "0"])
def test_training_on_remote_shards_is_bit_equal(
    local, expected, stored, s3, monkeypatch, gigabytes
):
    monkeypatch.setenv("XATTN_CACHE_GB", gigabytes)
    index = ShardIndex.open(stored)
    assert (index.fingerprint, index.info, index.splits) == (
        local.fingerprint,
        local.info,
        local.splits,
    )
    assert index.place == stored
    assert_same_batches(batches(index), expected)
    assert_same_batches(batches(pickle.loads(pickle.dumps(index)), threads=2), expected)
    spans = [span for _, span in s3.requests("GET", ".tar")]
    if gigabytes == "1":
        assert spans == [None] * 5
    else:
        assert len(spans) == 2 * 30
        assert None not in spans
    assert len(s3.requests("GET", ".npy")) == 1


def test_folder_may_hold_the_index_and_say_where_the_tars_are(local, stored, s3, tmp_path):
    folder = tmp_path / "tracked"
    folder.mkdir()
    for name in ("index.json", "train.index.npy"):
        shutil.copy(local.root / name, folder / name)
    (folder / "location.json").write_text(json.dumps({"shards": stored}))
    index = ShardIndex.open(folder)
    assert (index.root, index.location, index.fingerprint) == (folder, stored, local.fingerprint)
    assert ShardReader(index, "train").read(7) == ShardReader(local, "train").read(7)
    assert index.shard_path("train", 1).read_bytes() == local.shard_path("train", 1).read_bytes()
    assert [path.rsplit("/")[-1] for path, _ in s3.requests("GET")] == ["train-000001.tar"]
    for wrong in ("{}", '{"shards": "elsewhere"}'):
        (folder / "location.json").write_text(wrong)
        with pytest.raises(DataError, match=r'location\.json: expected {"shards": "s3://'):
            ShardIndex.open(folder)


def test_faults_of_the_store_do_not_show_in_the_batches(expected, stored, s3):
    s3.fail("status", status=503, code="SlowDown", times=3)
    s3.fail("cut", part=".tar", skip=1, times=2)
    s3.fail("flip", part=".tar", skip=1)
    s3.fail("flip", part=".npy")
    assert_same_batches(batches(ShardIndex.open(stored)), expected)


def test_a_store_that_refuses_is_no_damage_to_be_skipped(stored, s3):
    index = ShardIndex.open(stored)
    s3.fail("status", part=".tar", status=403, code="AccessDenied", times=100)
    with pytest.raises(DataError, match="access denied") as caught:
        batches(index, skip_damaged=100)
    assert not isinstance(caught.value, DamageError)


def test_damage_in_the_cache_is_mended_from_the_store(local, stored, s3, tmp_path):
    index = ShardIndex.open(stored)
    reader = ShardReader(index, "train")
    expected = reader.read(0)
    offset, _, _ = index.records("train")[0]["mask"].item()
    file = index.shard_path("train", 0)
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"?")
    assert reader.read(0) == expected
    assert len(s3.requests("GET", "train-000000.tar")) == 2
    # What is damaged in the store itself cannot be mended.
    data = bytearray(local.shard_path("train", 1).read_bytes())
    data[offset] ^= 1
    Bucket(stored).write("train-000001.tar", bytes(data))
    with pytest.raises(DamageError, match=rf"{stored}/train-000001\.tar: .* expected"):
        reader.read(5)
    Bucket(stored).delete("train-000001.tar")
    with pytest.raises(DataError, match=rf"{stored}/train-000001\.tar: no such object"):
        reader.read(5)


def test_damage_of_a_request_is_mended_by_another(stored, s3, monkeypatch):
    monkeypatch.setenv("XATTN_CACHE_GB", "0")
    reader = ShardReader(ShardIndex.open(stored), "train")
    expected = reader.read(3)
    s3.fail("flip", part=".tar")
    assert reader.read(3) == expected
    s3.fail("flip", part=".tar", times=2)
    with pytest.raises(DamageError, match=r"shard train-000000\.tar, key s003, offset \d+"):
        reader.read(3)


def test_rows_are_checked_before_they_are_used(local, stored, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(local.root, folder)
    file = folder / "train.index.npy"
    index = ShardIndex.open(folder)
    assert len(index.records("train")) == 24
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamageError, match=r"train\.index\.npy: crc32 is [0-9a-f]{8}, expected"):
        index.records("train")
    # Rows from the store that the disk has damaged are fetched again.
    index = ShardIndex.open(stored)
    rows = np.array(index.records("train"))
    cached = tmp_path / "cache" / index.splits["train"].records_sha256
    cached.write_bytes(data)
    assert np.array_equal(index.records("train"), rows)


def test_remote_index_that_is_missing_or_damaged_is_named(stored, s3):
    with pytest.raises(DataError, match=r"/nowhere/index\.json: no such object"):
        ShardIndex.open(f"{stored}/nowhere")
    document = json.loads(Bucket(stored).read("index.json"))
    document["dataset"]["name"] = "other"
    Bucket(stored).write("index.json", json.dumps(document).encode())
    with pytest.raises(DamageError, match=rf"{stored}/index\.json: its content has fingerprint"):
        ShardIndex.open(stored)


def test_evicted_at_the_wrong_moment_is_fetched_again(stored, s3, monkeypatch):
    index = ShardIndex.open(stored)
    reader = ShardReader(index, "train")
    fetch, evictions = ShardCache.fetch, [3]

    def fetch_and_evict(*arguments):
        path = fetch(*arguments)
        if evictions[0]:
            evictions[0] -= 1
            path.unlink()
        return path

    monkeypatch.setattr(ShardCache, "fetch", fetch_and_evict)
    assert set(reader.read(0)) == {"image", "mask"}
    assert len(s3.requests("GET", ".tar")) == 4


# ---- writing ------------------------------------------------------------------------------------


def sharding(samples=None, **settings):
    """Return the arguments of write_shards and repair_shards for 24 samples in 5 tars."""
    read = Samples(samples or [make_sample(i) for i in range(24)])
    return (
        INFO,
        {"train": read.entries},
        read,
        ShardSettings(shuffle_seed=None, samples_per_shard=5, **settings),
    )


@pytest.fixture
def at_work(tmp_path, monkeypatch, s3):
    """Work in an empty folder, where remote shards are packed before they go."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XATTN_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    s3.reset()


def test_shards_written_to_the_store_are_the_local_ones(local, at_work, bucket):
    index = write_shards(bucket.place, *sharding())
    assert index.fingerprint == local.fingerprint
    assert set(bucket.list()) == {path.name for path in local.root.iterdir()}
    assert verify(bucket.place, deep=True) == []
    assert not list(at_work.glob(".xattn/staging/*")), "nothing is left behind"
    write_shards(bucket.place, INFO, {"train": []}, Samples([]), sharding()[3])
    assert set(bucket.list()) == {"index.json", "train.index.npy"}, "stale shards are gone"


def test_interrupted_writing_goes_on_in_the_store(local, at_work, bucket, s3):
    info, entries, _, settings = sharding()
    stop = Samples([make_sample(i) for i in range(24)], fail_at="s012")
    with pytest.raises(KeyboardInterrupt):
        write_shards(bucket.place, info, entries, stop, settings)
    with pytest.raises(DataError, match=r"index\.json"):
        ShardIndex.open(bucket.place)
    again = Samples([make_sample(i) for i in range(24)])
    index = write_shards(bucket.place, info, entries, again, settings)
    assert index.fingerprint == local.fingerprint
    assert again.opened == [f"s{i:03d}" for i in range(10, 24)]


def test_damage_in_the_store_is_found_and_repaired(local, at_work, bucket, stored):
    first = bytearray(bucket.read("train-000001.tar"))
    first[700] ^= 1
    bucket.write("train-000001.tar", bytes(first))
    bucket.delete("train-000003.tar")
    bucket.write("train-000009.tar", b"more")
    findings = verify(stored, deep=True)
    assert {finding.shard for finding in findings} == {f"train-00000{i}.tar" for i in (1, 3, 9)}
    whole, part = findings[:2]
    assert "sha256" in whole.problem
    assert part.key == "s005"
    assert part.offset is not None
    assert repair_shards(stored, *sharding())
    assert verify(stored, deep=True) == []
    assert bucket.read("train-000001.tar") == (local.root / "train-000001.tar").read_bytes()


def test_foreign_objects_are_refused_and_kept(at_work, bucket):
    bucket.write("thesis.tex", b"precious")
    with pytest.raises(DataError, match=r"some/folder holds 'thesis\.tex'"):
        write_shards(bucket.place, *sharding())
    assert bucket.read("thesis.tex") == b"precious"


def test_a_data_set_may_keep_its_shards_in_the_store(at_work, bucket):
    params = small_params()
    params["datasets"]["scenes"]["remote"] = f"{bucket.place}/scenes"
    write_params(at_work, params)
    index = shard("scenes", at_work, jobs=1)  # packing processes keep an older environment
    folder = at_work / "data/shards/scenes"
    assert index.root == folder
    assert index.location == f"{bucket.place}/scenes"
    assert not list(folder.glob("*.tar"))
    assert len(batches(index)) > 0
    assert verify(folder, deep=True) == []
