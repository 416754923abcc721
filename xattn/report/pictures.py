"""The pictures of a report: an image, its truth and what each run made of it; and attention."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xattn.errors import DataError
from xattn.report import attention_maps, box_pictures, overlay
from xattn.report.tables import PictureFiles, Run
from xattn.structures import IGNORE_INDEX

MAX_PICTURES = 12
"""Picture rows of one data set: more are work for a viewer, not for a page."""

MAX_ATTENTION = 3
"""Pictures of one data set that also show attention, for each run that has some."""

_PICTURE_PX = 512  # longest side of an embedded picture
_MOST_COLUMNS = {"segmentation": 6, "detection": 4}  # lines need more room than areas
_NOTES = {
    "segmentation": "mIoU and share of right pixels of this one picture; the mean goes over the "
    "classes that occur in it. Light grey pixels are ignored.",
    "detection": f"Boxes of score {box_pictures.SHOWN_SCORE} or more, of this one picture; one is "
    f"right that has the class of an object not yet found and IoU {box_pictures.RIGHT_IOU} with "
    "it. Dashed: difficult objects and crowds, which count neither way.",
}


def picture_rows(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the picture rows that all runs of a data set share, and their legend."""
    columns = [
        (run, {picture.key: picture for picture in run.evaluation.pictures})
        for run in runs
        if run.evaluation and run.evaluation.pictures and run.card["palette"]
    ]
    keys = sorted({key for _, pictures in columns for key in pictures})
    task = runs[0].card["task"]
    rows, present = [], set[int]()
    for key in keys[:MAX_PICTURES]:
        cells = [(run, found[key]) for run, found in columns if key in found]
        row, classes = (_box_row if task == "detection" else _mask_row)(cells)
        rows.append({"key": key, **row})
        present |= classes
    card = columns[0][0].card if columns else {"class_names": [], "palette": []}
    legend = [
        {
            "name": card["class_names"][i],
            "colour": "#{:02x}{:02x}{:02x}".format(*card["palette"][i]),
        }
        for i in sorted(present)
    ]
    return {
        "picture_rows": rows,
        "picture_note": _NOTES.get(task, ""),
        "most_columns": _MOST_COLUMNS.get(task, 0),
        "num_pictures": len(keys),
        "legend": legend,
    }


def _mask_row(cells: Sequence[tuple[Run, PictureFiles]]) -> tuple[dict[str, Any], set[int]]:
    """Return one picture with its truth and predictions, and the classes that they show."""
    run, files = cells[0]
    palette, names = run.card["palette"], run.card["class_names"]
    truth = _read_mask(files.truth)
    present = {i for i, _ in overlay.areas(truth, len(names))}
    predictions = []
    for run, files in cells:
        mask = _read_mask(files.prediction)
        if mask.shape != truth.shape:
            raise DataError(
                f"{files.prediction}: {mask.shape[0]} x {mask.shape[1]} pixels, its truth "
                f"has {truth.shape[0]} x {truth.shape[1]}; repeat `dvc repro`"
            )
        present |= {i for i, _ in overlay.areas(mask, len(names))}
        iou, right = picture_scores(mask, truth)
        about = f"mIoU {percent(iou)}, right {percent(right)} %"
        predictions.append({"run": run, "uri": _mask_uri(mask, palette), "about": about})
    row = {
        "image": _image_uri(cells[0][1].image),
        "truth": _mask_uri(truth, palette),
        "truth_about": "",
        "predictions": predictions,
    }
    return row, present


def _box_row(cells: Sequence[tuple[Run, PictureFiles]]) -> tuple[dict[str, Any], set[int]]:
    """Return one picture with its true and its predicted boxes, and the classes that they show."""
    run, files = cells[0]
    palette, names = run.card["palette"], run.card["class_names"]
    image = Image.fromarray(_read_image(files.image))
    truth = box_pictures.read_truth(files.truth, len(names))
    present = set(truth.labels.tolist())

    def drawn(boxes: box_pictures.PictureBoxes) -> str:
        return _jpeg_uri(box_pictures.draw_small(image, boxes, names, palette, _PICTURE_PX))

    predictions = []
    for run, files in cells:
        boxes = box_pictures.read_prediction(files.prediction, len(names))
        present |= set(boxes.labels.tolist())
        right, objects = box_pictures.count_right(boxes, truth)
        about = f"{len(boxes.labels)} boxes, {right} right of {objects}"
        predictions.append({"run": run, "uri": drawn(boxes), "about": about})
    row = {
        "image": _image_uri(cells[0][1].image),
        "truth": drawn(truth),
        "truth_about": f"{len(truth.labels)} objects",
        "predictions": predictions,
    }
    return row, present


def attention_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the panels of hierarchical attention, the runs of one picture together."""
    found = [
        (picture, run)
        for run in runs
        if run.evaluation
        for picture in run.evaluation.pictures
        if picture.attention
    ]
    keys = sorted({picture.key for picture, _ in found})[:MAX_ATTENTION]
    return [
        {"key": key, "run": run, **_attention_panels(picture)}
        for key in keys
        for picture, run in found
        if picture.key == key
    ]


def _attention_panels(files: PictureFiles) -> dict[str, Any]:
    assert files.attention
    token = attention_maps.read_attention(files.attention)
    image = _read_image(files.image)
    maps = attention_maps.draw_maps(image, token)
    return {
        "image": _jpeg_uri(attention_maps.draw_token(image, token)),
        "maps": [
            {
                "uri": _jpeg_uri(panel),
                "title": level.title,
                "about": attention_maps.describe(level),
            }
            for panel, level in zip(maps, token.maps, strict=True)
        ],
    }


def picture_scores(
    prediction: overlay.Picture, truth: overlay.Picture
) -> tuple[float | None, float | None]:
    """Return one picture's mean IoU and pixel accuracy, None when all of it is ignored.

    Args:
        prediction: (H, W) class ids.
        truth: (H, W) class ids or IGNORE_INDEX. The mean goes over the classes that occur in
            either, outside ignored pixels.
    """
    valid = truth != IGNORE_INDEX
    if not valid.any():
        return None, None
    said, true = prediction[valid], truth[valid]
    hits = np.bincount(true[said == true], minlength=256)
    union = np.bincount(said, minlength=256) + np.bincount(true, minlength=256) - hits
    iou = hits[union > 0] / union[union > 0]
    return float(iou.mean()), float((said == true).mean())


def _read_mask(path: Path) -> overlay.Picture:
    """Read a single-channel 8-bit PNG of class ids."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P"):
                raise DataError(f"{path}: mode {image.mode}, expected an 8-bit index PNG")
            return np.asarray(image)
    except OSError as error:
        raise DataError(f"{path}: not a readable picture ({error})") from error


def _mask_uri(mask: overlay.Picture, palette: Sequence[overlay.Colour]) -> str:
    """Return a mask in its colours as a PNG data URI."""
    picture = Image.fromarray(mask)
    picture.thumbnail((_PICTURE_PX, _PICTURE_PX), Image.Resampling.NEAREST)
    picture.putpalette(overlay.colour_table(palette).tobytes())  # a third of the bytes of RGB
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return _data_uri("image/png", buffer.getvalue())


def _image_uri(path: Path) -> str:
    """Return a photograph as a JPEG data URI, made smaller when it is large."""
    try:
        with Image.open(path) as image:
            if max(image.size) <= _PICTURE_PX:
                return _data_uri("image/jpeg", path.read_bytes())
            small = image.convert("RGB")
    except OSError as error:
        raise DataError(f"{path}: not a readable picture ({error})") from error
    small.thumbnail((_PICTURE_PX, _PICTURE_PX), Image.Resampling.LANCZOS)
    return _jpeg_uri(small)


def _read_image(path: Path) -> overlay.Picture:
    """Read a photograph as (H, W, 3)."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise DataError(f"{path}: not a readable picture ({error})") from error


def _jpeg_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return _data_uri("image/jpeg", buffer.getvalue())


def percent(value: float | None) -> str:
    """Return a fraction as a number of per cent with one decimal, or a dash."""
    return "-" if value is None else f"{100 * value:.1f}"


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
