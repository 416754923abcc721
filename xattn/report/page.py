"""The report: one HTML file that needs nothing else, and the same numbers as JSON.

Metrics are compared only within a data set and split. The page holds no date and no path of its
own, so the same results give the same bytes.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from xattn.report import figures, pictures, tables
from xattn.report.tables import Run
from xattn.storage import write_text

MAX_BARS = 200
"""Classes up to which bars are drawn; beyond, the table has to do."""

_CLASS_SCORE_WORDS = {
    "segmentation": "IoU",
    "classification": "accuracy",
    "detection": "AP at IoU 0.5",
}
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
    environment.filters.update(percent=pictures.percent, rate=_rate, words=_words, printed=_printed)
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
        coco_words=tables.COCO_METRICS,
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
        **pictures.picture_rows(runs),
        "attention_rows": pictures.attention_rows(runs),
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
    task = runs[0].card["task"]
    words = _CLASS_SCORE_WORDS[task]
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
        "support_words": tables.CLASS_COLUMNS[task][1],
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
