"""Collects what the stages left into plain records, and prints the small tables.

The tree, with `stage` one of pretrain and finetune:

    results/<stage>/<run>/model.json      what was trained, on what, how
    results/<stage>/<run>/curve.csv       loss and learning rate over the steps
    results/<stage>/<run>/metrics.json    the last numbers of the training
    results/evaluate/<run>/metrics.json   the data set's protocol (optional, as are the two below)
    results/evaluate/<run>/per_class.csv
    results/evaluate/<run>/pictures/<key>.{image.jpg,truth.png,prediction.png}
    (of detection the latter two are .json, see `box_pictures`)
    results/evaluate/<run>/pictures/<key>.attention.json  (of models that have it)

Metrics are fractions in [0, 1] in files and records; only what is printed is in per cent.
"""

import csv
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from xattn.errors import DataError

SCHEMA_VERSION = 1
STAGES = ("finetune", "pretrain")
"""Stages that leave a model, in the order of the report: what was wanted before what it took."""

HEADLINE = {"segmentation": "mIoU", "classification": "top1", "detection": "mAP_50"}
"""The metric that a task is judged by."""

CLASS_COLUMNS = {
    "segmentation": ("score", "pixels"),
    "classification": ("accuracy", "images"),
    "detection": ("score", "objects"),
}
"""The score and support columns of a task's per_class.csv."""

PICTURE_SUFFIX = {"segmentation": "png", "detection": "json"}
"""How the truth and the predictions of a picture are kept; a task that is not here keeps none."""

COCO_METRICS = {
    "AP": "AP",
    "AP50": "AP at IoU 0.5",
    "AP75": "AP at IoU 0.75",
    "AP_small": "AP, small",
    "AP_medium": "AP, medium",
    "AP_large": "AP, large",
    "AR_1": "AR, 1 box",
    "AR_10": "AR, 10 boxes",
    "AR_100": "AR, 100 boxes",
    "AR_small": "AR, small",
    "AR_medium": "AR, medium",
    "AR_large": "AR, large",
}
"""COCO's twelve figures, with words for the heads of a table of their own."""

METRICS = {
    "mIoU": "mIoU",
    "mIoU_ms": "mIoU, multi-scale",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "mIoU_small": "mIoU, small classes",
    "boundary_F": "boundary F",
    "image_boundary_F": "image-wise boundary F",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mAP_50": "mAP at IoU 0.5",
    "mAP_50_11": "mAP at IoU 0.5, 11 points",
    **COCO_METRICS,
}
"""Metrics that an evaluation may hold, with the words for them; all are fractions."""

_PAPER_NUMBERS = Path(__file__).with_name("paper_numbers.yaml")
_REPEAT = "delete the folder and repeat the stage with `dvc repro`"
_CURVE_COLUMNS = ("step", "samples", "epoch", "loss", "lr", "images_per_s", "val_metric")
_NUMBER = (int, float)
_MAYBE_NUMBER = (*_NUMBER, type(None))
_MAYBE_TEXT = (str, type(None))
_MODEL_KEYS: dict[str, tuple[type, ...]] = {
    "run": (str,),
    "stage": (str,),
    "model": (str,),
    "task": (str,),
    "overrides": (dict, list, str, type(None)),
    "dataset": (str,),
    "num_classes": (int,),
    "class_names": (list,),
    "palette": (list,),
    "weights": (str,),
    "weights_sha256": (str,),
    "fingerprint": (str,),
    "data_fingerprint": (str,),
    "init": _MAYBE_TEXT,
    "params": (int,),
    "macs": (int,),
    "macs_input": (list,),
    "steps": (int,),
    "global_batch": (int,),
    "workers": (int,),
    "wall_s": _NUMBER,
    "images_per_s": _MAYBE_NUMBER,
    "git_commit": _MAYBE_TEXT,
    "mlflow_run_id": _MAYBE_TEXT,
}
_TRAINING_KEYS: dict[str, tuple[type, ...]] = {
    "loss": _MAYBE_NUMBER,
    "val_metric": _MAYBE_NUMBER,
    "metric_name": (str,),
    "steps": (int,),
}
_EVALUATION_KEYS: dict[str, tuple[type, ...]] = {
    "run": (str,),
    "dataset": (str,),
    "split": (str,),
    "images": (int,),
    "protocol": (str, dict),
    "images_per_s": _MAYBE_NUMBER,
    "device": (str,),
}


@dataclass(frozen=True, slots=True)
class Curve:
    """Columns of curve.csv, equally long; None where nothing was measured."""

    samples: tuple[float, ...]
    loss: tuple[float | None, ...]
    val_metric: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class of per_class.csv.

    Args:
        class_id: its id.
        name: its name.
        score: IoU (segmentation), accuracy (classification) or average precision (detection), a
            fraction; None when the class is absent.
        support: true pixels, images or objects.
    """

    class_id: int
    name: str
    score: float | None
    support: int


@dataclass(frozen=True, slots=True)
class PictureFiles:
    """The files of one picture that was kept for looking at; `attention` of some models only."""

    key: str
    image: Path
    truth: Path
    prediction: Path
    attention: Path | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One run under its data set's protocol.

    Args:
        card: metrics.json as it was read.
        metrics: those of METRICS that it holds, fractions.
        classes: per-class scores by id.
        pictures: by key; classification has none.
    """

    card: Mapping[str, Any]
    metrics: Mapping[str, float]
    classes: tuple[ClassScore, ...]
    pictures: tuple[PictureFiles, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One trained model.

    Args:
        name: the run's name.
        stage: pretrain or finetune.
        card: model.json as it was read.
        training: the training's metrics.json as it was read.
        curve: the training's curve.
        evaluation: None when the run was not evaluated.
    """

    name: str
    stage: str
    card: Mapping[str, Any]
    training: Mapping[str, Any]
    curve: Curve
    evaluation: Evaluation | None

    @property
    def metric_name(self) -> str:
        """Key of the headline metric."""
        return HEADLINE[self.card["task"]]

    @property
    def headline(self) -> float | None:
        """The evaluated headline metric, a fraction; None when the run was not evaluated."""
        return self.evaluation.metrics[self.metric_name] if self.evaluation else None


@dataclass(frozen=True, slots=True)
class Results:
    """Every run that was found: fine-tuned ones first, each stage by name."""

    runs: tuple[Run, ...]


def collect(results: Path, names: Collection[str] | None = None) -> Results:
    """Read the results tree.

    Args:
        results: the folder that holds pretrain, finetune and evaluate.
        names: the runs to read; None reads all. Folders of other runs, left by an earlier
            params.yaml, are passed over.

    Raises:
        DataError: nothing was trained yet, or a file breaks its format (names the file and key).
    """
    folders = [
        folder
        for stage in STAGES
        for folder in _folders(results / stage)
        if names is None or folder.name in names
    ]
    if not folders:
        raise DataError(f"no runs in {results}, run `dvc repro`")
    finetuned = {folder.name for folder in folders if folder.parent.name == "finetune"}
    runs = []
    for folder in folders:
        # Where both stages use a name, what was evaluated is the final model.
        is_final = folder.parent.name == "finetune" or folder.name not in finetuned
        runs.append(_read_run(folder, results / "evaluate" / folder.name if is_final else None))
    return Results(tuple(runs))


def results_json(results: Results) -> dict[str, Any]:
    """Return everything measured as one JSON document with a stable order of keys.

    A number that is not finite becomes None. Metrics are fractions in [0, 1].
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": [
            {
                **{key: run.card[key] for key in _MODEL_KEYS},
                "training": {key: _finite(run.training[key]) for key in _TRAINING_KEYS},
                "evaluation": _evaluation_json(run.evaluation),
            }
            for run in results.runs
        ],
    }


def summary_table(results: Results) -> str:
    """Return the runs as a plain-text table for a terminal, without a final newline."""
    header = ("run", "model", "data set", "metric", "params M", "MACs G", "images/s", "steps")
    rows: list[tuple[str, ...]] = [header]
    for run in results.runs:
        card = run.card
        rows.append(
            (
                run.name,
                card["model"],
                card["dataset"],
                _metric_text(run),
                f"{card['params'] / 1e6:.2f}",
                f"{card['macs'] / 1e9:.2f}",
                "-" if card["images_per_s"] is None else f"{card['images_per_s']:.1f}",
                str(card["steps"]),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    if any(run.headline is None for run in results.runs):
        lines.append("(in brackets: last validation while training; the run was not evaluated)")
    return "\n".join(lines)


def paper_numbers() -> list[dict[str, Any]]:
    """Return the papers of paper_numbers.yaml, whose head says what each holds."""
    try:
        document = YAML(typ="safe").load(_PAPER_NUMBERS)
    except YAMLError as error:
        raise DataError(f"{_PAPER_NUMBERS}: not valid YAML: {error}") from error
    papers: list[dict[str, Any]] = document["papers"]
    return papers


def _evaluation_json(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {
        **{key: _finite(evaluation.card[key]) for key in _EVALUATION_KEYS if key != "run"},
        "metrics": dict(evaluation.metrics),
        "classes": [
            {"id": row.class_id, "name": row.name, "score": row.score, "support": row.support}
            for row in evaluation.classes
        ],
        "pictures": [picture.key for picture in evaluation.pictures],
    }


def _finite(value: Any) -> Any:
    """Return `value`, or None for a number that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _metric_text(run: Run) -> str:
    if run.headline is not None:
        return f"{run.metric_name} {100 * run.headline:.1f} %"
    value = run.training["val_metric"]
    return "-" if value is None else f"({run.training['metric_name']} {100 * value:.1f} %)"


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    """Pad words on the right and numbers (from the fourth column on) on the left."""
    return [
        cell.ljust(width) if column < 3 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _folders(parent: Path) -> list[Path]:
    """Return the folders in `parent` by name; none when it does not exist."""
    if not parent.is_dir():
        return []
    return sorted(f for f in parent.iterdir() if f.is_dir() and not f.name.startswith("."))


def _read_run(folder: Path, evaluated: Path | None) -> Run:
    path = folder / "model.json"
    card = _read_object(path, _MODEL_KEYS)
    if card["task"] not in HEADLINE:
        raise DataError(f"{path}: task is '{card['task']}', expected one of {', '.join(HEADLINE)}")
    for key in ("class_names", "palette"):
        if card[key] and len(card[key]) != card["num_classes"]:
            raise DataError(
                f"{path}: {key} has {len(card[key])} entries, num_classes is "
                f"{card['num_classes']}; {_REPEAT}"
            )
    training = _read_object(folder / "metrics.json", _TRAINING_KEYS)
    curve = _read_curve(folder / "curve.csv", card["global_batch"])
    has_evaluation = evaluated is not None and evaluated.is_dir()
    evaluation = _read_evaluation(evaluated, card["task"]) if evaluated and has_evaluation else None
    return Run(folder.name, folder.parent.name, card, training, curve, evaluation)


def _read_evaluation(folder: Path, task: str) -> Evaluation:
    path = folder / "metrics.json"
    card = _read_object(path, {**_EVALUATION_KEYS, HEADLINE[task]: _NUMBER})
    metrics = {key: card[key] for key in METRICS if key in card}
    for key, value in metrics.items():
        if not isinstance(value, _NUMBER) or not 0 <= value <= 1:
            raise DataError(f"{path}: {key} is {value!r}, expected a fraction in 0..1; {_REPEAT}")
    suffix = PICTURE_SUFFIX.get(task)
    pictures = _find_pictures(folder / "pictures", suffix) if suffix else ()
    return Evaluation(card, metrics, _read_classes(folder / "per_class.csv", task), pictures)


def _find_pictures(folder: Path, suffix: str) -> tuple[PictureFiles, ...]:
    """Return the pictures by key; each needs its three files."""
    pictures = []
    for image in sorted(folder.glob("*.image.jpg")):
        key = image.name.removesuffix(".image.jpg")
        attention = folder / f"{key}.attention.json"
        files = PictureFiles(
            key,
            image,
            folder / f"{key}.truth.{suffix}",
            folder / f"{key}.prediction.{suffix}",
            attention if attention.is_file() else None,
        )
        for path in (files.truth, files.prediction):
            if not path.is_file():
                raise DataError(f"{path}: not found, though {image.name} is there; {_REPEAT}")
        pictures.append(files)
    return tuple(pictures)


def _read_object(path: Path, keys: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """Read a JSON object that has at least `keys`, with values of these types."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found; {_REPEAT}") from error
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); {_REPEAT}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: holds {type(document).__name__}, expected an object; {_REPEAT}")
    for key, types in keys.items():
        expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
        if key not in document:
            raise DataError(f"{path}: key '{key}' is missing, expected {expected}; {_REPEAT}")
        value = document[key]
        if not isinstance(value, types) or isinstance(value, bool):
            raise DataError(f"{path}: key '{key}' is {value!r}, expected {expected}; {_REPEAT}")
    return document


def _read_curve(path: Path, global_batch: int) -> Curve:
    """Read curve.csv; a step that was validated but not logged has no samples of its own."""
    rows = _read_csv(path, _CURVE_COLUMNS)
    return Curve(
        tuple(
            _number(path, row, "samples" if row["samples"] else "step")
            * (1 if row["samples"] else global_batch)
            for row in rows
        ),
        tuple(_maybe_number(path, row, "loss") for row in rows),
        tuple(_maybe_number(path, row, "val_metric") for row in rows),
    )


def _read_classes(path: Path, task: str) -> tuple[ClassScore, ...]:
    score, support = CLASS_COLUMNS[task]
    rows = _read_csv(path, ("class", "id", score, support))
    return tuple(
        ClassScore(
            int(_number(path, row, "id")),
            row["class"],
            _maybe_number(path, row, score),
            int(_number(path, row, support)),
        )
        for row in rows
    )


def _read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Read a CSV file that has at least `columns`; each row also gets its line number."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, restval="")
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path}: column '{missing[0]}' is missing; {_REPEAT}")
            return [{**row, "#line": str(reader.line_num)} for row in reader]
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found; {_REPEAT}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid CSV ({error}); {_REPEAT}") from error


def _maybe_number(path: Path, row: Mapping[str, str], column: str) -> float | None:
    """Return a cell's number, or None when it is blank or not finite."""
    text = row[column].strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError as error:
        raise DataError(
            f"{path}, line {row['#line']}: {column} is '{text}', expected a number; {_REPEAT}"
        ) from error
    return value if math.isfinite(value) else None


def _number(path: Path, row: Mapping[str, str], column: str) -> float:
    """Return a cell's number.

    Raises:
        DataError: it is blank or not a finite number.
    """
    value = _maybe_number(path, row, column)
    if value is None:
        raise DataError(
            f"{path}, line {row['#line']}: {column} is '{row[column]}', expected a number; "
            f"{_REPEAT}"
        )
    return value
