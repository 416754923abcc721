"""Command `predict`: pictures of what a trained model sees. No stage: nothing depends on it."""

from pathlib import Path

import numpy as np

from pipelines.edge import progress_bar
from xattn.errors import DataError
from xattn.predictor import Predictor, load_predictor, read_image
from xattn.report.box_pictures import SHOWN_SCORE
from xattn.report.boxes import draw_boxes
from xattn.report.overlay import draw_label, draw_overlay
from xattn.storage import write_atomic
from xattn.structures import Progress

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
_SHOWN_LABELS = 3


def predict_images(model_dir: Path, source: Path, out: Path, device: str) -> int:
    """Write one PNG an image into `out`, named as the image is.

    Args:
        model_dir: a model folder.
        source: an image, or a folder whose images are taken in the order of their names.
        out: made when missing.
        device: "auto", "cpu" or "cuda".

    Returns:
        The number of pictures.

    Raises:
        DataError: there is no image, or one cannot be read; pictures before it are kept.
    """
    images = _list_images(source)
    names = _output_names(images)
    for path, name in zip(images, names, strict=True):
        if (out / name).resolve() == path.resolve():
            raise DataError(f"--out {out}: would overwrite the image {path}; name another folder")
    predictor = load_predictor(model_dir, device)
    with progress_bar("predict", "img") as show:
        for done, (path, name) in enumerate(zip(images, names, strict=True), start=1):
            _write_picture(predictor, path, out / name)
            show(Progress(done, len(images)))
    return len(images)


def _write_picture(predictor: Predictor, image_path: Path, out: Path) -> None:
    image = read_image(image_path)
    prediction = predictor.predict(image)
    names = predictor.card["class_names"]
    palette = [tuple(colour) for colour in predictor.card["palette"]]
    if predictor.recipe.task == "detection":
        sure = prediction["scores"] >= SHOWN_SCORE
        boxes, labels, scores = (prediction[name][sure] for name in ("boxes", "labels", "scores"))
        picture = draw_boxes(image, boxes, labels, scores, names, palette)
    elif predictor.recipe.task == "classification":
        best = np.argsort(-prediction)[:_SHOWN_LABELS]
        picture = draw_label(image, [(names[i], float(prediction[i])) for i in best])
    else:
        picture = draw_overlay(image, prediction, names, palette)
    write_atomic(out, lambda path: picture.save(path, format="PNG"))


def _list_images(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: no such image or folder")
    images = sorted(path for path in source.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not images:
        raise DataError(f"{source}: holds no images ({', '.join(sorted(_SUFFIXES))})")
    return images


def _output_names(images: list[Path]) -> list[str]:
    """Return a PNG name for each image; where a.jpg lies beside a.png, endings are kept."""
    stems = {path.stem for path in images}
    if len(stems) == len(images):
        return [f"{path.stem}.png" for path in images]
    return [f"{path.name}.png" for path in images]
