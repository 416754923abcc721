"""The report: one HTML file that needs nothing else, and the same numbers as JSON.

Metrics are compared only within a data set and split. The page holds no date and no path of its
own, so the same results give the same bytes.
"""

import base64
import io
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from xattn.errors import DataError
from xattn.report import attention_maps, figures, overlay, tables
from xattn.report.tables import PictureFiles, Run
from xattn.storage import write_text
from xattn.structures import IGNORE_INDEX

MAX_PICTURES = 12
"""Picture rows of one data set: more are work for a viewer, not for a page."""

MAX_ATTENTION = 3
"""Pictures of one data set that also show attention, for each run that has some."""

MAX_BARS = 200
"""Classes up to which bars are drawn; beyond, the table has to do."""

_PICTURE_PX = 512  # longest side of an embedded picture
_STAGE_WORDS = {"finetune": "fine-tuned", "pretrain": "pretrained"}


def write_report(
    results_dir: Path,
    out_dir: Path,
    title: str,
    params_text: str | None = None,
    names: Collection[str] | None = None,
) -> Path:
    """Write `report.html` and `results.json`, each whole or not at all.

    Args:
        results_dir: the results tree (see `tables`).
        out_dir: where to write; made when missing.
        title: the page's title.
        params_text: the params file to show, or None.
        names: the runs to show; None shows all.

    Returns:
        The path of report.html.

    Raises:
        DataError: nothing was trained yet, or a file of the tree breaks its format.
    """
    results = tables.collect(results_dir, names)
    document = json.dumps(tables.results_json(results), indent=2, allow_nan=False)
    page = render(results, title, params_text)
    write_text(out_dir / "results.json", document + "\n")
    write_text(out_dir / "report.html", page)
    return out_dir / "report.html"


def render(results: tables.Results, title: str, params_text: str | None) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, rate=_rate, words=_words, printed=_printed)
    runs = results.runs
    index = {(run.stage, run.name): number for number, run in enumerate(runs)}
    groups = [_group(number, members, index) for number, members in enumerate(_by_data_set(runs))]
    return environment.get_template("page.html.j2").render(
        title=title,
        params_text=params_text,
        runs=runs,
        index=index,
        colours=figures.RUN_COLOURS,
        stage_words=_STAGE_WORDS,
        metric_words=tables.METRICS,
        groups=groups,
        curves=_curves(runs, index),
        papers=_papers(runs),
    )


def _by_data_set(runs: Iterable[Run]) -> list[list[Run]]:
    """Group the evaluated runs whose numbers may be compared: same task, data set and split."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if run.evaluation:
            card = run.evaluation.card
            key = (run.card["task"], card["dataset"], card["split"])
            groups.setdefault(key, []).append(run)
    return list(groups.values())


def _group(number: int, runs: list[Run], index: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    """Return what the page says about one data set, its runs best first.

    Figures are `Markup`, not to be escaped again: they escape the names in them.
    """
    runs = sorted(runs, key=lambda run: -(run.headline or 0.0))
    assert runs[0].evaluation
    metric = runs[0].metric_name
    card = runs[0].evaluation.card
    words = tables.METRICS[metric]
    points = [
        figures.Cost(run.name, index[run.stage, run.name], run.card["params"], run.card["macs"], v)
        for run in runs
        if (v := run.headline) is not None
    ]
    about = f"{words} on {card['dataset']} {card['split']}"
    return {
        "id": f"data-{number}",
        "dataset": card["dataset"],
        "split": card["split"],
        "images": card["images"],
        "metric": metric,
        "metric_words": words,
        "runs": runs,
        "scatter": Markup(
            figures.cost_scatter(
                points, words, f"cost-{number}", f"{about} over parameters and multiply-adds"
            )
        ),
        **_classes(number, runs, index, about),
        **_pictures(runs),
        "attention_rows": _attention_rows(runs),
    }


def _classes(
    number: int, runs: Sequence[Run], index: Mapping[tuple[str, str], int], about: str
) -> dict[str, Any]:
    """Return the per-class table and bars, best class first."""
    scores: dict[int, dict[str, Any]] = {}
    for column, run in enumerate(runs):
        for row in run.evaluation.classes if run.evaluation else ():
            blank = {"name": row.name, "support": row.support, "scores": [None] * len(runs)}
            scores.setdefault(row.class_id, blank)["scores"][column] = row.score
    total = sum(entry["support"] for entry in scores.values()) or 1
    for entry in scores.values():
        entry["share"] = entry["support"] / total
        entry["best"] = max((v for v in entry["scores"] if v is not None), default=None)
    rows = sorted(scores.values(), key=lambda row: -_mean(row["scores"]))
    score, support = tables.CLASS_COLUMNS[runs[0].card["task"]]
    words = {"iou": "IoU", "accuracy": "accuracy"}[score]
    bars = [
        figures.Bars(run.name, index[run.stage, run.name], [row["scores"][i] for row in rows])
        for i, run in enumerate(runs)
    ]
    drawn: list[str] = []
    if 0 < len(rows) <= MAX_BARS:
        names = [row["name"] for row in rows]
        drawn = figures.class_bars(names, bars, words, f"class-{number}", f"{about}, per class")
    return {
        "class_rows": rows,
        "class_words": words,
        "support_words": support,
        "class_bars": [Markup(svg) for svg in drawn],
    }


def _mean(scores: Iterable[float | None]) -> float:
    """Return the mean of the scores that there are; -1 when there is none, to sort last."""
    present = [score for score in scores if score is not None]
    return sum(present) / len(present) if present else -1.0


def _curves(runs: Sequence[Run], index: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
    """Return the curves of each stage and metric."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.stage, run.training["metric_name"]), []).append(run)
    curves = []
    for number, ((stage, metric), members) in enumerate(groups.items()):
        words = tables.METRICS.get(metric, metric)
        drawn = []
        if loss := _lines(members, index, "loss"):
            about = f"Training loss of the {_STAGE_WORDS[stage]} models"
            drawn.append(figures.loss_curves(loss, f"loss-{number}", about))
        if score := _lines(members, index, "val_metric"):
            about = f"Validation {words} of the {_STAGE_WORDS[stage]} models"
            drawn.append(figures.metric_curves(score, words, f"validation-{number}", about))
        curves.append({"stage": stage, "figures": [Markup(svg) for svg in drawn]})
    return curves


def _lines(
    runs: Sequence[Run], index: Mapping[tuple[str, str], int], column: str
) -> list[figures.Line]:
    """Return one column of the runs' curves, without the runs where nothing was measured."""
    lines = [
        figures.Line(
            run.name, index[run.stage, run.name], run.curve.samples, getattr(run.curve, column)
        )
        for run in runs
    ]
    return [line for line in lines if any(value is not None for value in line.y)]


def _pictures(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the picture rows that all runs of a data set share, and their legend."""
    columns = [
        (run, {picture.key: picture for picture in run.evaluation.pictures})
        for run in runs
        if run.evaluation and run.evaluation.pictures and run.card["palette"]
    ]
    keys = sorted({key for _, pictures in columns for key in pictures})
    rows, present = [], set[int]()
    for key in keys[:MAX_PICTURES]:
        row, classes = _picture_row(key, columns)
        rows.append(row)
        present |= classes
    card = columns[0][0].card if columns else {"class_names": [], "palette": []}
    legend = [
        {
            "name": card["class_names"][i],
            "colour": "#{:02x}{:02x}{:02x}".format(*card["palette"][i]),
        }
        for i in sorted(present)
    ]
    return {"picture_rows": rows, "num_pictures": len(keys), "legend": legend}


def _picture_row(
    key: str, columns: Sequence[tuple[Run, Mapping[str, PictureFiles]]]
) -> tuple[dict[str, Any], set[int]]:
    """Return one picture with its truth and predictions, and the classes that they show."""
    run, files = next((run, found[key]) for run, found in columns if key in found)
    palette, names = run.card["palette"], run.card["class_names"]
    truth = _read_mask(files.truth)
    present = {i for i, _ in overlay.areas(truth, len(names))}
    predictions = []
    for run, found in columns:
        if key not in found:
            continue
        mask = _read_mask(found[key].prediction)
        if mask.shape != truth.shape:
            raise DataError(
                f"{found[key].prediction}: {mask.shape[0]} x {mask.shape[1]} pixels, its truth "
                f"has {truth.shape[0]} x {truth.shape[1]}; repeat `dvc repro`"
            )
        present |= {i for i, _ in overlay.areas(mask, len(names))}
        iou, right = picture_scores(mask, truth)
        uri = _mask_uri(mask, palette)
        predictions.append({"run": run, "uri": uri, "iou": iou, "right": right})
    row = {
        "key": key,
        "image": _image_uri(files.image),
        "truth": _mask_uri(truth, palette),
        "predictions": predictions,
    }
    return row, present


def _attention_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
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


def _papers(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the papers' numbers for the models that were run, with those runs beside."""
    papers = []
    for paper in tables.paper_numbers():
        models = []
        named = (row["model"] for row in paper["rows"])
        for name in dict.fromkeys([*named, *paper.get("models", [])]):
            measured = [run for run in runs if run.card["model"] == name]
            if measured:
                rows = [row for row in paper["rows"] if row["model"] == name]
                models.append({"name": name, "rows": rows, "runs": measured})
        if models:
            printed = {row["dataset"] for model in models for row in model["rows"]}
            ours = {run.card["dataset"] for model in models for run in model["runs"]}
            elsewhere = sorted(ours - printed) if printed else []
            has_small = any("miou_small" in row for row in paper["rows"])
            found = {"models": models, "elsewhere": elsewhere, "has_small": has_small}
            papers.append({**paper, **found})
    return papers


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


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _percent(value: float | None) -> str:
    """Return a fraction as a number of per cent with one decimal, or a dash."""
    return "-" if value is None else f"{100 * value:.1f}"


def _printed(value: float | None) -> str:
    """Return a number as the paper has it, or a dash."""
    return "-" if value is None else str(value)


def _rate(value: float | None) -> str:
    """Return a number of images per second, or a dash."""
    return "-" if value is None else f"{value:.1f}"


def _words(value: Any) -> str:
    """Return a setting of any JSON type as text for a table cell."""
    if value is None or value in ("", {}, []):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {_words(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
