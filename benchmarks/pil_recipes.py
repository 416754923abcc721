"""The papers' recipes as their authors' tools run them: PIL and numpy, one image at a time."""

import io
import random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from xattn.data.index import ShardReader
from xattn.data.pixels import MEAN, STD

Pixels = npt.NDArray[np.float32]


def imagenet() -> Any:
    """Return torchvision's classic transforms on PIL images: crop, flip, to tensor, normalise."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]),
        ]
    )


_MEAN: Pixels = np.array(MEAN, np.float32)
_STD: Pixels = np.array(STD, np.float32)


class Segmentation(Dataset[Any]):
    """Resize, crop with a class cap, flip, photometric distortion, normalise, pad.

    The steps and probabilities of mmsegmentation's training pipeline, written with PIL and numpy.
    """

    def __init__(self, reader: ShardReader, base: tuple[int, int], crop: int) -> None:
        self._reader, self._base, self._crop = reader, base, crop

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        fields = self._reader.read(position)
        image = Image.open(io.BytesIO(fields["image"])).convert("RGB")
        mask = Image.open(io.BytesIO(fields["mask"]))
        ratio = random.uniform(0.5, 2.0)
        factor = ratio * min(max(self._base) / max(image.size), min(self._base) / min(image.size))
        size = int(image.width * factor + 0.5), int(image.height * factor + 0.5)
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        ids = np.asarray(mask.resize(size, Image.Resampling.NEAREST))
        pixels, ids = self._cut(pixels, ids)
        if random.random() < 0.5:
            pixels, ids = pixels[:, ::-1], ids[:, ::-1]
        floats = _distort(pixels)
        floats = (floats - _MEAN) / _STD
        below, right = self._crop - floats.shape[0], self._crop - floats.shape[1]
        floats = np.pad(floats, ((0, below), (0, right), (0, 0)))
        ids = np.pad(ids, ((0, below), (0, right)), constant_values=255)
        return (
            torch.from_numpy(np.ascontiguousarray(floats.transpose(2, 0, 1))),
            torch.from_numpy(ids.astype(np.int64)),
        )

    def _cut(self, pixels: Any, ids: Any) -> tuple[Any, Any]:
        height, width = ids.shape
        for _ in range(10):
            top = random.randint(0, max(height - self._crop, 0))
            left = random.randint(0, max(width - self._crop, 0))
            window = slice(top, top + self._crop), slice(left, left + self._crop)
            labels, counts = np.unique(ids[window], return_counts=True)
            counts = counts[labels != 255]
            if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
                break
        return pixels[window], ids[window]


def _distort(pixels: npt.NDArray[np.uint8]) -> Pixels:
    """Brightness, contrast, saturation, hue on uint8 images, as mmsegmentation's transform."""
    if random.random() < 0.5:
        pixels = _convert(pixels, beta=random.uniform(-32, 32))
    contrast_first = random.random() < 0.5
    if contrast_first and random.random() < 0.5:
        pixels = _convert(pixels, alpha=random.uniform(0.5, 1.5))
    if random.random() < 0.5:
        hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
        hsv[..., 1] = _convert(hsv[..., 1], alpha=random.uniform(0.5, 1.5))
        pixels = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    if random.random() < 0.5:
        hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
        hsv[..., 0] = (hsv[..., 0].astype(int) + random.randint(-18, 17)) % 256
        pixels = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    if not contrast_first and random.random() < 0.5:
        pixels = _convert(pixels, alpha=random.uniform(0.5, 1.5))
    return pixels.astype(np.float32)


def _convert(pixels: Any, alpha: float = 1.0, beta: float = 0.0) -> Any:
    return np.clip(pixels.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)
