"""Reading, decoding and augmenting images: our loader beside what others use, on the same images.

Every loop computes on one thread, but for those of our own threads. Turns are interleaved, and each
loop's best turn counts. Run by `xattn bench loader`.
"""

import importlib.util
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks import pil_recipes
from xattn.data.datasets import Entry, _scenes, folder, load_reader
from xattn.data.index import ShardIndex, ShardReader
from xattn.data.loader import build_eval_loader, build_train_loader, decode_image
from xattn.data.shards import write_shards
from xattn.data.stored import ShardSettings
from xattn.data.transforms import ClassificationAugment, SegmentationAugment
from xattn.memory import keep_freed_memory
from xattn.structures import DatasetInfo

_SIZE = (500, 375)  # (width, height) px: ImageNet's usual
_CLASSES = 4
_BATCH = 16
_EPOCHS_OF_THREADS = 4  # so that their start does not count for much
_TINY_IMAGES = 50_000
_TINY = DatasetInfo(
    name="tiny",
    tasks=("classification",),
    class_names=("image",),
    palette=((0, 0, 0),),
    splits=("train",),
    ignore_ids=(),
    licence="none",
    url="",
    citation="",
    layout="",
)
_AUGMENT = ClassificationAugment(size=224, scale=(0.08, 1.0), flip=0.5)

Loop = Callable[[], int]
"""Runs once over the images and returns their number."""


def measure(images: int, turns: int, camvid: Path | None) -> dict[str, Any]:
    """Time every loop.

    Args:
        images: JPEG images of 500 x 375 px to draw, one epoch of each loop.
        turns: interleaved turns of each loop.
        camvid: CamVid's raw folder for the segmentation loops, or None for drawn scenes.

    Returns:
        Images a second of each loop's best turn, and the ratios that matter.
    """
    torch.set_num_threads(1)
    keep_freed_memory()  # as our trainings do; the peers gain from it too
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        raw = _draw(Path(name) / "raw", images)
        index = _shard(raw, Path(name) / "shards")
        segmentation = _shard_segmentation(camvid, raw, Path(name) / "segmentation")
        loops = {
            **_decoding_loops(raw, index, Path(name)),
            **_training_loops(raw, index),
            **_segmentation_loops(segmentation),
        }
        rates = _best_rates(loops, turns)
        resume_s = _resume_s(Path(name), turns)
    return {
        "images": images,
        "turns": turns,
        "torch_threads": 1,
        "images_per_s": {loop: round(rate, 1) for loop, rate in rates.items()},
        "ratios": _ratios(rates),
        "resume_s": resume_s,
    }


def _best_rates(loops: dict[str, Loop], turns: int) -> dict[str, float]:
    best = dict.fromkeys(loops, 0.0)
    for loop in loops.values():
        loop()  # the first time imports, and fills the page cache
    for _ in range(turns):
        for name, loop in loops.items():
            started = time.perf_counter()
            count = loop()
            best[name] = max(best[name], count / (time.perf_counter() - started))
    return best


def _ratios(rates: dict[str, float]) -> dict[str, float]:
    pairs = {
        "decode: ours / bare torchvision": ("decode ours", "decode bare torchvision"),
        "decode: ours / webdataset + PIL": ("decode ours", "decode webdataset"),
        "decode: ours / timm's WDS reader": ("decode ours", "decode timm"),
        "decode: ours / mosaicml-streaming": ("decode ours", "decode mosaicml-streaming"),
        "decode: 2 threads / 1": ("decode ours, 2 threads ahead", "decode ours, 1 thread ahead"),
        "imagenet: ours / ImageFolder + PIL": ("imagenet ours", "imagenet torchvision"),
        "segmentation: ours / PIL + numpy": ("segmentation ours", "segmentation PIL + numpy"),
    }
    ratios = {
        name: round(rates[ours] / rates[peer], 3)
        for name, (ours, peer) in pairs.items()
        if peer in rates
    }
    check_s = 1 / rates["read ours"] - 1 / rates["read ours, unchecked"]
    ratios["share of crc32 in reading and decoding"] = round(check_s * rates["decode ours"], 4)
    return ratios


def _draw(root: Path, images: int) -> Path:
    """Draw JPEG files into class folders."""
    for number in range(images):
        rng = np.random.Generator(np.random.Philox(number))
        scene = _scenes.draw_scene(rng, _SIZE, 8.0)
        path = root / "train" / f"class{number % _CLASSES}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene.image.save(path, "JPEG", quality=92)
        masks = root / "masks" / "train"
        masks.mkdir(parents=True, exist_ok=True)
        scene.mask.save(masks / f"{number:05d}.png")
    return root


def _shard(raw: Path, out: Path) -> ShardIndex:
    settings = folder.Settings()
    info = folder.describe(raw, settings)
    entries = folder.entries(raw, "train", settings)
    read = partial(_read_folder, info, settings)
    return write_shards(out, info, {"train": entries}, read, ShardSettings(samples_per_shard=100))


def _read_folder(info: Any, settings: Any, entry: Any) -> Any:
    return folder.read(entry, info, settings)


def _shard_segmentation(camvid: Path | None, raw: Path, out: Path) -> ShardIndex:
    """Shard CamVid, or the drawn scenes with their masks."""
    if camvid is not None:
        reader: Any = load_reader("camvid")
        settings = reader.Settings()
        info = reader.describe(camvid, settings)
        entries = {"train": reader.entries(camvid, "train", settings)}
        return write_shards(out, info, entries, lambda e: reader.read(e, info, settings))
    images = raw / "images" / "train"
    images.mkdir(parents=True)
    for path in raw.glob("train/*/*.jpg"):
        (images / path.name).symlink_to(path)
    settings = folder.Settings(task="segmentation", classes=_scenes.NAMES)
    info = folder.describe(raw, settings)
    entries = {"train": folder.entries(raw, "train", settings)}
    return write_shards(out, info, entries, partial(_read_folder, info, settings))


def _decoding_loops(raw: Path, index: ShardIndex, place: Path) -> dict[str, Loop]:
    paths = sorted(raw.glob("train/*/*.jpg"))
    reader = ShardReader(index, "train")
    tars = [os.open(tar, os.O_RDONLY) for tar in _tars(index)]

    def bare() -> int:
        for path in paths:
            decode_image(path.read_bytes())
        return len(paths)

    def ours() -> int:
        loader = build_eval_loader(index, "train", "classification", None, batch=1)
        return sum(len(batch.keys) for batch in loader)

    def in_threads(threads: int) -> int:
        loader = build_train_loader(
            index,
            "train",
            "classification",
            None,
            seed=0,
            global_batch=_BATCH,
            steps=_EPOCHS_OF_THREADS * len(paths) // _BATCH,
            threads=threads,
        )
        return sum(len(batch.keys) for batch in loader)

    def read() -> int:
        for position in range(len(reader)):
            reader.read(position)
        return len(reader)

    def read_unchecked() -> int:
        for row in index.records("train"):
            tar = tars[int(row["shard"])]
            for field in ("image", "label"):
                offset, size, _ = row[field].item()
                os.pread(tar, size, offset)
        return len(reader)

    loops: dict[str, Loop] = {
        "decode bare torchvision": bare,
        "decode ours": ours,
        "decode ours, 1 thread ahead": partial(in_threads, 1),
        "decode ours, 2 threads ahead": partial(in_threads, 2),
        "decode webdataset": partial(_count, _webdataset(index)),
        "decode timm": partial(_count, _timm(index)),
        "read ours": read,
        "read ours, unchecked": read_unchecked,
    }
    if importlib.util.find_spec("streaming"):
        loops["decode mosaicml-streaming"] = partial(_count, _streaming(paths, place / "mds"))
    return loops


def _count(dataset: Iterable[Any]) -> int:
    return sum(1 for _ in dataset)


def _tars(index: ShardIndex) -> list[str]:
    return [str(index.root / shard.name) for shard in index.splits["train"].shards]


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _webdataset(index: ShardIndex) -> Iterable[Any]:
    tars = webdataset.WebDataset(_tars(index), shardshuffle=False)
    decoded: Iterable[Any] = (
        tars.decode("pil").to_tuple("jpg", "cls").map_tuple(_to_tensor, lambda label: label)
    )
    return decoded


def _timm(index: ShardIndex) -> Iterable[Any]:
    last = len(_tars(index)) - 1
    dataset: Any = create_dataset(
        "wds/bench",
        root=str(index.root),
        split=f"train-{{000000..{last:06d}}}.tar|{index.splits['train'].count}",
        batch_size=_BATCH,
        is_training=False,
    )
    dataset.transform = _to_tensor
    return _OnceOver(dataset, index.splits["train"].count)


class _OnceOver:
    """A stream that knows no length, cut after one epoch."""

    def __init__(self, dataset: Iterable[Any], count: int) -> None:
        self._dataset, self._count = dataset, count

    def __iter__(self) -> Any:
        for _, sample in zip(range(self._count), self._dataset, strict=False):
            yield sample


def _streaming(paths: list[Path], out: Path) -> Iterable[Any]:
    """Read MosaicML's format, decoded by PIL as it does."""
    from streaming import StreamingDataset  # noqa: PLC0415 (only where it is installed)

    _write_mds(paths, out)
    return _Mapped(StreamingDataset(local=str(out), shuffle=False, batch_size=_BATCH))


def _write_mds(paths: Iterable[Path], out: Path) -> None:
    from streaming import MDSWriter  # noqa: PLC0415 (only where it is installed)

    with MDSWriter(out=str(out), columns={"image": "jpeg", "label": "int"}) as writer:
        for path in paths:
            with Image.open(path) as image:  # by its path: only then are the bytes kept
                writer.write({"image": image, "label": 0})


def _resume_s(place: Path, turns: int) -> dict[str, float]:
    """Time from nothing to the first batch in the middle of an epoch of tiny images, best turn."""
    tiny = place / "tiny.jpg"
    Image.new("RGB", (8, 8)).save(tiny)
    entries = [Entry(f"{number:06d}", str(tiny), 0) for number in range(_TINY_IMAGES)]
    read = partial(_read_folder, _TINY, folder.Settings())
    shards = write_shards(place / "tiny", _TINY, {"train": entries}, read).root
    half = _TINY_IMAGES // 2 // _BATCH

    def ours() -> None:
        loader = build_train_loader(
            ShardIndex.open(shards),
            "train",
            "classification",
            None,
            seed=0,
            global_batch=_BATCH,
            steps=1,
            start_step=half,
        )
        next(iter(loader))

    def theirs() -> None:
        from streaming import StreamingDataLoader, StreamingDataset  # noqa: PLC0415

        dataset = StreamingDataset(local=str(mds), shuffle=True, batch_size=_BATCH)
        loader = StreamingDataLoader(dataset, batch_size=_BATCH, collate_fn=list)
        state = dataset.state_dict(half * _BATCH, from_beginning=True)
        loader.load_state_dict({**state, "sample_in_epoch": half * _BATCH})
        next(iter(loader))

    loops = {"ours": ours}
    if importlib.util.find_spec("streaming"):
        mds = place / "tiny-mds"
        _write_mds([tiny] * _TINY_IMAGES, mds)
        loops["mosaicml-streaming"] = theirs
    return {
        name: round(min(_seconds(loop) for _ in range(turns)), 4) for name, loop in loops.items()
    }


def _seconds(loop: Callable[[], None]) -> float:
    started = time.perf_counter()
    loop()
    return time.perf_counter() - started


class _Mapped:
    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __iter__(self) -> Any:
        for position in range(len(self._dataset)):
            yield _to_tensor(self._dataset[position]["image"])


def _training_loops(raw: Path, index: ShardIndex) -> dict[str, Loop]:
    count = index.splits["train"].count // _BATCH * _BATCH
    theirs = ImageFolder(str(raw / "train"), pil_recipes.imagenet())

    def ours() -> int:
        loader = build_train_loader(
            index,
            "train",
            "classification",
            _AUGMENT,
            seed=0,
            global_batch=_BATCH,
            steps=count // _BATCH,
        )
        return sum(len(batch.keys) for batch in loader)

    def torchvision() -> int:
        loader = DataLoader(theirs, batch_size=_BATCH, shuffle=True, drop_last=True)
        return sum(len(labels) for _, labels in loader)

    return {"imagenet ours": ours, "imagenet torchvision": torchvision}


def _segmentation_loops(index: ShardIndex) -> dict[str, Loop]:
    count = min(index.splits["train"].count, 128) // 8 * 8
    augment = SegmentationAugment(base=(512, 2048), crop=(512, 512))
    theirs = pil_recipes.Segmentation(ShardReader(index, "train"), base=(512, 2048), crop=512)

    def ours() -> int:
        loader = build_train_loader(
            index, "train", "segmentation", augment, seed=0, global_batch=8, steps=count // 8
        )
        return sum(len(batch.keys) for batch in loader)

    def numpy() -> int:
        loader = DataLoader(theirs, batch_size=8, shuffle=True, drop_last=True)
        seen = 0
        for images, _ in loader:
            seen += len(images)
            if seen >= count:
                break
        return seen

    return {"segmentation ours": ours, "segmentation PIL + numpy": numpy}
