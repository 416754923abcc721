"""Drawn scenes in the layout of PASCAL VOC: a data set that needs no download.

`generate` draws the files, `voc` reads them. Image number i of a split depends on (seed, split, i)
alone, so that any image can be drawn by itself, and equal settings give equal bytes with the same
NumPy and Pillow. What the scenes hold is described in `_scenes`. Things have masks, boxes and
labels; ground has masks only.
"""

import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, model_validator

from xattn.data.datasets import _files, _scenes, voc
from xattn.errors import DataError
from xattn.structures import DatasetInfo, Sample, Task

URL = ""
SPLITS = ("train", "val", "test")
FOLDERS = ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets")
MARKER = "synthetic.json"
"""Says which settings the files of a folder were drawn with, and whether all are there."""
LAYOUT = f"synthetic/\n  {MARKER}\n" + voc.LAYOUT.split("\n", 1)[1]
VOC_PALETTE = [channel for colour in _files.palette(256) for channel in colour]

Side = Annotated[int, Field(ge=64, le=4096)]
Count = Annotated[int, Field(ge=0)]


class Settings(BaseModel, frozen=True, extra="forbid"):
    """Knobs of the data set; all but `task` change the files.

    Args:
        task: which target the samples carry.
        image_size: (height, width) in pixels.
        train: number of images to train with.
        val: number of images to choose with.
        test: number of images to test with.
        seed: other seeds give other scenes.
        noise: typical standard deviation of the pixel noise, in grey levels of 255.
        things: fewest and most things in a scene, beside poles and dots.
    """

    task: Task = "segmentation"
    image_size: tuple[Side, Side] = (192, 256)
    train: int = Field(320, ge=1)
    val: int = Field(64, ge=1)
    test: int = Field(64, ge=1)
    seed: int = Field(0, ge=0)
    noise: float = Field(8.0, ge=0, le=64)
    things: tuple[Count, Count] = (4, 9)

    @model_validator(mode="after")
    def _check_things(self) -> Self:
        if self.things[0] > self.things[1]:
            raise ValueError(f"things: found {list(self.things)}, expected the fewest first")
        return self


def describe(root: Path, settings: Settings) -> DatasetInfo:
    """Describe the data set; the files need not be there."""
    colours: tuple[tuple[int, int, int], ...] = _scenes.PALETTE
    if settings.task != "segmentation":
        colours = colours[1 : 1 + len(_scenes.THINGS)]
    return replace(
        voc.describe(root, _voc_settings(settings)),
        name="synthetic",
        palette=colours,
        splits=SPLITS,
        licence="Apache-2.0, generated",
        url=URL,
        citation="none; drawn by xattn",
        layout=LAYOUT,
    )


def entries(root: Path, split: str, settings: Settings) -> list[_files.Entry]:
    """List a split's samples in the order of their numbers.

    Raises:
        DataError: the files were not drawn, not all, or with other settings.
    """
    _files.check_split(root, split, SPLITS)
    if _read_marker(root) != _marker(settings, complete=True):
        raise DataError(
            f"{root}: the images are not there in full with these settings; run the shard stage,"
            " which draws them"
        )
    return voc.entries(root, split, _voc_settings(settings))


def read(entry: _files.Entry, info: DatasetInfo, settings: Settings) -> Sample:
    """Read a sample as `voc` does."""
    return voc.read(entry, info, _voc_settings(settings))


def generate(root: Path, settings: Settings, on_progress: Callable[[int, int], None]) -> None:
    """Draw all files unless they are there; go on where an interrupted run stopped.

    Files drawn with other settings are removed first. Each file appears in full or not at all.

    Args:
        root: an empty or missing folder, or one that this function has filled.
        settings: what to draw.
        on_progress: called with (images there, images in all) after each.

    Raises:
        DataError: `root` holds something else.
    """
    marker = _read_marker(root)
    if marker == _marker(settings, complete=True):
        return
    if marker is None and root.exists() and (root.is_file() or any(root.iterdir())):
        raise DataError(
            f"{root}: holds files but no {MARKER}, so they are not of the synthetic data set;"
            " name an empty folder as datasets.NAME.root"
        )
    if marker is not None and marker != _marker(settings, complete=False):
        # matches no settings, so that the next run finishes a removal that is cut short
        _write(root / MARKER, b"{}\n")
        for folder in FOLDERS:
            shutil.rmtree(root / folder, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    _write(root / MARKER, _marker(settings, complete=False))
    for folder in (*FOLDERS[:3], "ImageSets/Main", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    counts = _counts(settings)
    names = [(split, i) for split in SPLITS for i in range(counts[split])]
    for done, (split, index) in enumerate(names, start=1):
        _draw_files(root, split, index, settings)
        on_progress(done, len(names))
    for split in SPLITS:
        lines = "".join(f"{_name(split, i)}\n" for i in range(counts[split])).encode()
        for folder in ("Main", "Segmentation"):
            _write(root / "ImageSets" / folder / f"{split}.txt", lines)
    _write(root / MARKER, _marker(settings, complete=True))


def image_rng(settings: Settings, split: str, index: int) -> np.random.Generator:
    """Return the stream of chance of one image."""
    seeds = np.random.SeedSequence([settings.seed, zlib.crc32(split.encode()), index])
    return np.random.Generator(np.random.Philox(seeds))


def _voc_settings(settings: Settings) -> voc.Settings:
    return voc.Settings(task=settings.task, classes=_scenes.THINGS, stuff_classes=_scenes.STUFF)


def _counts(settings: Settings) -> dict[str, int]:
    return {"train": settings.train, "val": settings.val, "test": settings.test}


def _name(split: str, index: int) -> str:
    return f"{split}_{index:06d}"


def _draw_files(root: Path, split: str, index: int, settings: Settings) -> None:
    """Write mask, annotation and, last of all, image of one sample unless they are there."""
    name = _name(split, index)
    image_path = root / "JPEGImages" / f"{name}.jpg"
    if image_path.exists():
        return
    height, width = settings.image_size
    rng = image_rng(settings, split, index)
    scene = _scenes.draw_scene(rng, (width, height), settings.noise, settings.things)
    mask = Image.frombytes("P", scene.mask.size, scene.mask.tobytes())
    mask.putpalette(VOC_PALETTE)
    _write(root / "SegmentationClass" / f"{name}.png", _encode(mask, "PNG"))
    _write(root / "Annotations" / f"{name}.xml", _annotation(name, scene))
    # the fixed quality and chroma subsampling belong to what makes the bytes repeatable
    _write(image_path, _encode(scene.image, "JPEG", quality=92, subsampling="4:2:0"))


def _annotation(name: str, scene: _scenes.Scene) -> bytes:
    """Return VOC's XML for a scene; its boxes count pixels from 1 and include both ends."""
    width, height = scene.image.size
    lines = [
        "<annotation>",
        f"  <filename>{name}.jpg</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
        "  <segmented>1</segmented>",
    ]
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        lines += [
            "  <object>",
            f"    <name>{thing.name}</name>",
            f"    <difficult>{int(thing.difficult)}</difficult>",
            "    <bndbox>",
            f"      <xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>",
            f"      <xmax>{x2}</xmax><ymax>{y2}</ymax>",
            "    </bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>\n"]).encode()


def _encode(image: Image.Image, kind: str, **options: int | str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _marker(settings: Settings, complete: bool) -> bytes:
    """Return the content of the marker file."""
    drawn = settings.model_dump(mode="json", exclude={"task"})
    recipe = json.dumps([_scenes.VERSION, drawn], sort_keys=True)
    content = {
        "complete": complete,
        "settings": drawn,
        "settings_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _read_marker(root: Path) -> bytes | None:
    path = root / MARKER
    return path.read_bytes() if path.is_file() else None


def _write(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, then give it its own."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
