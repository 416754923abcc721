"""How samples are stored in shards, and smaller images where a data set's own are too large."""

import io
from dataclasses import replace

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from xattn.structures import Sample


class Recode(BaseModel):
    """How images are stored; by default as they are, byte for byte.

    Args:
        max_side: longer sides are scaled down to it, px, and boxes and masks with them.
        quality: of the JPEG that a scaled image becomes; without `max_side` every image is encoded
            anew with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_side: int | None = Field(default=None, ge=32)
    quality: int | None = Field(default=None, ge=1, le=100)

    @property
    def keeps_bytes(self) -> bool:
        """Whether every image is stored as it is."""
        return self.max_side is None and self.quality is None


class ShardSettings(BaseModel):
    """What decides the content of the shards beside the raw files.

    Args:
        samples_per_shard: by default as many as fill about 128 MB, at most 1000.
        shuffle_seed: training splits are shuffled once with it, so that a shard is a fair sample;
            null keeps the reader's order. Other splits always keep it.
        images: how images are stored.
        quarantine: corrupt samples that may be set aside, in all splits together; they are listed
            in quarantine.json. 0 stops at the first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples_per_shard: int | None = Field(default=None, ge=1)
    shuffle_seed: int | None = Field(default=0, ge=0)
    images: Recode = Recode()
    quarantine: int = Field(default=0, ge=0)


_DEFAULT_QUALITY = 92


def recode(sample: Sample, settings: Recode) -> Sample:
    """Return the sample with its image as it is to be stored.

    Images are scaled with antialiasing (Lanczos), masks by the nearest pixel.
    """
    if settings.keeps_bytes:
        return sample
    with Image.open(io.BytesIO(sample.image)) as image:
        size = _fit(image.size, settings.max_side)
        if size == image.size and settings.quality is None:
            return sample
        stored = image if image.mode in ("L", "RGB") else image.convert("RGB")
        if size != image.size:
            stored = stored.resize(size, Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        stored.save(stream, "JPEG", quality=settings.quality or _DEFAULT_QUALITY)
        across, down = size[0] / image.size[0], size[1] / image.size[1]
    boxes = sample.boxes and tuple(
        replace(box, x1=box.x1 * across, y1=box.y1 * down, x2=box.x2 * across, y2=box.y2 * down)
        for box in sample.boxes
    )
    mask = sample.mask and _scale_mask(sample.mask, size)
    return replace(sample, image=stream.getvalue(), image_format="jpg", mask=mask, boxes=boxes)


def _fit(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """Return (width, height) with the longer side at most `max_side`."""
    factor = min(1.0, max_side / max(size)) if max_side else 1.0
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _scale_mask(data: bytes, size: tuple[int, int]) -> bytes:
    with Image.open(io.BytesIO(data)) as mask:
        if mask.size == size:
            return data
        stream = io.BytesIO()
        mask.resize(size, Image.Resampling.NEAREST).save(stream, "PNG")
    return stream.getvalue()
