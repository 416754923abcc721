"""A trained model folder, ready to be shown images.

A model folder is what a training stage leaves: `model.json`, which says how the model is built and
how images are shown to it, and `model.safetensors`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from xattn.data.augment_detection import DetectionEval
from xattn.data.index import DECODE_ERRORS
from xattn.data.pixels import Size
from xattn.data.transforms import ClassificationEval, SegmentationEval
from xattn.errors import CheckpointError, DataError
from xattn.evaluate.inference import PLAIN, SegmentationProtocol, detect, segment
from xattn.models.weights import load_weights
from xattn.models.zoo import create_recipe
from xattn.storage import read_json, sha256_file
from xattn.structures import DatasetInfo, Recipe, Task
from xattn.train.distributed import resolve_device

Transform = SegmentationEval | ClassificationEval | DetectionEval

_TRANSFORMS: dict[Task, type[Transform]] = {
    "segmentation": SegmentationEval,
    "classification": ClassificationEval,
    "detection": DetectionEval,
}

_CARD_KEYS = (
    *("model", "overrides", "dataset", "task", "class_names", "palette", "transform"),
    *("weights", "weights_sha256"),
)


@dataclass(frozen=True, slots=True)
class Predictor:
    """A recipe with weights, on a device, in eval mode.

    Args:
        recipe: model and decoding.
        card: the content of model.json.
        transform: how an image is shown to the model.
        device: where it computes.
    """

    recipe: Recipe
    card: dict[str, Any]
    transform: Transform
    device: torch.device

    @torch.inference_mode()
    def predict(self, image: npt.NDArray[np.uint8]) -> Any:
        """Predict one image.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            Segmentation: (H, W) uint8 class ids (int64 for more than 256 classes). Classification:
            (K,) float32 probabilities. Detection: "boxes" (N, 4) float32 x1, y1, x2, y2 in pixels
            of the image, "scores" (N,) float32 descending, "labels" (N,) int64.

        Raises:
            DataError: the array has another shape or dtype.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise DataError(
                f"expected an image (height, width, 3) of uint8, "
                f"found {image.shape} of {image.dtype}"
            )
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).contiguous()
        size = image.shape[0], image.shape[1]
        if isinstance(self.transform, SegmentationEval):
            return self._segment(pixels, size, self.transform)
        if isinstance(self.transform, DetectionEval):
            shown = self.transform.prepare(pixels)[None].to(self.device)
            (found,) = detect(self.recipe, shown, [size])
            return {name: value.numpy() for name, value in found.items()}
        outputs = self.recipe.model(self.transform(pixels)[None].to(self.device))
        logits: Tensor = self.recipe.decode(outputs, size)[0]
        return np.asarray(logits.softmax(dim=0).float().cpu().numpy())

    def _segment(self, pixels: Tensor, size: Size, transform: SegmentationEval) -> npt.NDArray[Any]:
        protocol = transform if isinstance(transform, SegmentationProtocol) else PLAIN
        shown = transform.prepare(pixels) if protocol.num_views == 1 else pixels
        scores = segment(self.recipe, shown[None].to(self.device), size, protocol)[0]
        ids = scores.argmax(dim=0)
        return np.asarray(ids.to(torch.uint8 if len(scores) <= 256 else ids.dtype).cpu().numpy())


def load_predictor(
    folder: Path,
    device: str,
    transform: Transform | None = None,
    loss: Mapping[str, Any] | None = None,
) -> Predictor:
    """Load a model folder.

    Args:
        folder: holds model.json and its weights.
        device: "auto", "cpu" or "cuda".
        transform: another way to show images than the one of the model's validation.
        loss: numbers of the recipe's loss, see `create_recipe`.

    Raises:
        DataError: model.json is missing or broken.
        CheckpointError: the weights are missing, or not those that model.json vouches for.
    """
    card = read_json(folder / "model.json")
    lacking = [key for key in _CARD_KEYS if key not in card]
    if lacking:
        raise DataError(f"{folder / 'model.json'}: lacks '{lacking[0]}'; not what a training left")
    weights = folder / str(card["weights"])
    if not weights.exists():
        raise CheckpointError(f"{weights}: missing; run `dvc repro` or `dvc pull` to have it back")
    if sha256_file(weights) != card["weights_sha256"]:
        raise CheckpointError(
            f"{weights}: not the weights that {folder / 'model.json'} vouches for"
        )
    recipe = create_recipe(card["model"], _info(card), loss, **card["overrides"])
    load_weights(recipe.model, weights)
    place = resolve_device(device)
    recipe.model.to(place).eval()
    if transform is None:
        transform = _TRANSFORMS[recipe.task](**card["transform"])
    return Predictor(recipe, card, transform, place)


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """Read an image file as (H, W, 3) uint8 RGB.

    Raises:
        DataError: no such file, or no image in it; the message names it.
    """
    try:
        with Image.open(path) as image:
            return np.array(_to_8_bit(image).convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except DECODE_ERRORS as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from None


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Keep the high byte of 16-bit grey, which `convert` would clip to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))


def _info(card: dict[str, Any]) -> DatasetInfo:
    """Return what a recipe needs to know of the data that the model was trained on."""
    return DatasetInfo(
        name=card["dataset"],
        tasks=(card["task"],),
        class_names=tuple(card["class_names"]),
        palette=tuple((red, green, blue) for red, green, blue in card["palette"]),
        splits=(),
        ignore_ids=(),
        licence="",
        url="",
        citation="",
        layout="",
    )
