"""Command `cam`: what stands out in a detector's levels. No stage depends on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from xattn.data.augment_detection import DetectionEval
from xattn.errors import ConfigError, DataError
from xattn.evaluate.cam import ActivationMaps, Method, activation_maps, nothing_to_show
from xattn.predictor import Predictor, load_predictor, read_image
from xattn.report.box_pictures import SHOWN_SCORE
from xattn.report.cam_sheet import Detections, draw_cam_sheet
from xattn.storage import write_atomic

_METHODS = {"eigencam": "EigenCAM", "gradcam++": "Grad-CAM++"}


def draw_cam(
    model_dir: Path,
    image_path: Path,
    out: Path,
    method: Method = "eigencam",
    levels: Sequence[int] | None = None,
    detection: int | None = None,
    device: str = "auto",
) -> str:
    """Write one PNG: the image with its boxes, a panel a level, and their mean.

    Args:
        model_dir: a detector's model folder.
        image_path: any image.
        out: the PNG.
        method: see `evaluate.cam`, as are `levels` and `detection`.
        levels: numbers of levels from 1, or None.
        detection: number of the detection to explain, or None.
        device: "auto", "cpu" or "cuda".

    Returns:
        What is drawn, in words.

    Raises:
        ConfigError: the model is no detector, or has no such level or detection.
        DataError: the image cannot be read, nothing was found in it, or `out` is the image itself.
    """
    if out.resolve() == image_path.resolve():
        raise DataError(f"--out {out}: would overwrite the image; name another file")
    predictor = load_predictor(model_dir, device)
    picture, words = cam_picture(predictor, read_image(image_path), method, levels, detection)
    write_atomic(out, lambda path: picture.save(path, format="PNG"))
    return words


def cam_picture(
    predictor: Predictor,
    image: npt.NDArray[np.uint8],
    method: Method = "eigencam",
    levels: Sequence[int] | None = None,
    detection: int | None = None,
) -> tuple[Image.Image, str]:
    """Draw the maps of one image (H, W, 3); arguments and errors as of `draw_cam`.

    Boxes of score 0.3 or more are drawn, or the one that is explained.
    """
    if reason := nothing_to_show(predictor.recipe):
        raise ConfigError(f"model: '{predictor.card['model']}' {reason}")
    assert isinstance(predictor.transform, DetectionEval)
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    found = activation_maps(
        predictor.recipe,
        predictor.transform.prepare(pixels).to(predictor.device),
        (image.shape[0], image.shape[1]),
        method=method,
        levels=levels,
        detection=detection,
    )
    words = _words(predictor.card, found, method)
    boxes = (
        f"Boxes of score {SHOWN_SCORE} or more."
        if found.explained is None
        else "The box is that of the detection."
    )
    caption = [words, f"{boxes} Each map has its own scale."]
    return draw_cam_sheet(image, _detections(predictor.card, found), _panels(found), caption), words


def _words(card: dict[str, Any], found: ActivationMaps, method: Method) -> str:
    levels = ", ".join(map(str, found.levels))
    noun = "levels" if len(found.levels) > 1 else "level"
    words = f"{card['model']}, {_METHODS[method]}, {noun} {levels}"
    if found.explained is None:
        return words
    name = card["class_names"][int(found.found["labels"][found.explained])]
    score = float(found.found["scores"][found.explained])
    return f"{words}, detection {found.explained + 1}: {name} {score:.2f}"


def _detections(card: dict[str, Any], found: ActivationMaps) -> Detections:
    boxes, labels, scores = (found.found[name].numpy() for name in ("boxes", "labels", "scores"))
    shown = np.arange(len(scores)) == found.explained
    if found.explained is None:
        shown = scores >= SHOWN_SCORE
    names, palette = card["class_names"], card["palette"]
    return Detections(boxes[shown], labels[shown], scores[shown], names, palette)


def _panels(found: ActivationMaps) -> list[tuple[str, npt.NDArray[np.float32]]]:
    nothing = "nothing stands out" if found.explained is None else "nothing raises the score"
    panels = []
    for level, (rows, columns), values in zip(
        found.levels, found.cells, found.maps.numpy(), strict=True
    ):
        words = f"level {level}, {rows} x {columns} cells"
        panels.append((words if values.any() else f"{words}: {nothing}", values))
    if len(panels) > 1:
        panels.append(("mean of the levels", found.mean.numpy()))
    return panels
