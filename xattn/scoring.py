"""A trained model against held-out images: numbers, per-class scores, pictures for the report."""

import csv
import io
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from xattn.config import EvaluateConfig
from xattn.data.index import ShardIndex, ShardReader
from xattn.data.loader import build_eval_loader, check_has_objects, decode_image
from xattn.data.transforms import SegmentationEval
from xattn.errors import ConfigError, DataError, UnknownNameError
from xattn.evaluate.detection import (
    COCO_CATEGORY_IDS,
    DetectionScores,
    SeenImage,
    coco_results,
    coco_truth,
    found_in,
    write_voc_files,
)
from xattn.evaluate.hierarchy import attend_from_points, nothing_to_show
from xattn.evaluate.inference import (
    Scores,
    SegmentationProtocol,
    metrics_of,
    score_classification,
    score_detection,
    score_segmentation,
)
from xattn.evaluate.segmentation import DISTANCE_CROP_UP_PX, SegmentationScores
from xattn.memory import keep_freed_memory, memory_in_words
from xattn.models.multibox import check_input_side
from xattn.models.pyramid import COARSEST_STRIDE
from xattn.predictor import Predictor, Transform, load_predictor
from xattn.storage import alone_in, read_json, refused_disk, write_atomic, write_json, write_text
from xattn.structures import IGNORE_INDEX, Batch, DatasetInfo, Progress, Task, identity_mean


def evaluate_model(
    model_dir: Path,
    shards: Path,
    config: EvaluateConfig,
    out: Path,
    on_progress: Callable[[Progress], None],
    detections: Path | None = None,
) -> dict[str, Any]:
    """Score a model folder on a split and leave metrics, per-class scores and pictures.

    Args:
        model_dir: what a training stage left.
        shards: the shard folder to score on.
        config: split, protocol, device.
        out: replaced as a whole.
        on_progress: called with the number of images scored.
        detections: folder for all that a detector found, see `write_detections`.

    Returns:
        What metrics.json holds.

    Raises:
        DataError: the shards have other classes than the model.
        ConfigError: the list of small classes cannot be read, or names a class that is none; or
            `detections` of a model that is no detector.
    """
    index = ShardIndex.open(shards)
    card = read_json(model_dir / "model.json")
    task: Task = card["task"]
    if detections is not None and task != "detection":
        raise ConfigError(f"--detections: '{card['run']}' is for {task}, not a detector")
    small_ids = _small_class_ids(config.small_classes, index.info.class_names)
    transforms: dict[Task, Transform] = {
        "segmentation": config.segmentation,
        "classification": config.classification,
        "detection": config.detection,
    }
    if task == "detection":
        check_input_side("evaluate.detection.size", config.detection.size)
        check_has_objects(index, config.split, "evaluate.split")
    predictor = load_predictor(model_dir, config.device, transforms[task])
    if predictor.device.type == "cpu":
        keep_freed_memory()
    if list(index.info.class_names) != card["class_names"]:
        raise DataError(
            f"{shards}: its {index.info.num_classes} classes are not the {card['num_classes']} of "
            f"'{card['run']}', which was trained on '{card['dataset']}'"
        )
    num_images = index.split(config.split).count
    if detections is not None:
        with refused_disk(detections):
            detections.mkdir(parents=True, exist_ok=True)
    seen: list[SeenImage] = []
    with _replacing(out) as draft:
        pictures = _Pictures(index, config, draft / "pictures")
        again = config.multi_scale if task == "segmentation" else None
        watch = _Watch(num_images * (1 if again is None else 2), on_progress)

        def on_batch(batch: Batch, prediction: Tensor | list[SeenImage]) -> None:
            pictures.keep(batch, prediction)
            if detections is not None and isinstance(prediction, list):
                seen.extend(prediction)
            watch.add(len(batch.keys))

        with memory_in_words(f"evaluate.batch: found {config.batch}"):
            scores = _score(predictor, index, config, on_batch)
            images, rate = watch.done, watch.rate
            second = None if again is None else _score_again(predictor, index, config, again, watch)
        pictures.keep_attention(predictor)
        named = _metrics(scores, small_ids)
        if second is not None:
            named |= {f"{name}_ms": value for name, value in _metrics(second, small_ids).items()}
        metrics = {
            "run": card["run"],
            "dataset": card["dataset"],
            "split": config.split,
            "images": images,
            "protocol": _protocol(config, task),
            **{name: round(value, 6) for name, value in named.items()},
            "images_per_s": round(rate, 2),
            "device": _device_name(predictor.device),
        }
        write_text(draft / "per_class.csv", per_class_csv(scores, index.info.class_names))
        write_json(draft / "metrics.json", metrics)
    if detections is not None:
        write_detections(detections, seen, index.info, config.split)
    return metrics


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """Give an empty folder, which takes the place of `out` when the body is done.

    Until then, and if the body fails, the old one stays.

    Raises:
        DataError: another process is at it.
    """
    draft = out.with_name(f".{out.name}.partial")
    with alone_in(out):
        with refused_disk(out):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        try:
            yield draft
            shutil.rmtree(out, ignore_errors=True)
            draft.rename(out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def write_detections(
    folder: Path, images: Sequence[SeenImage], info: DatasetInfo, split: str
) -> None:
    """Write what a detector found for the tools of COCO and of VOC.

    results.json is a COCO results file, truth.json the instances file that it belongs to; of the
    data set coco itself they have COCO's own ids, others number images and classes from 1, as do
    those of coco's images whose names are not COCO's. comp4_det_SPLIT_CLASS.txt are VOC's.

    Args:
        folder: is made if need be.
        images: of the whole split.
        info: the data set.
        split: its name.
    """
    is_coco = info.name == "coco"
    categories = COCO_CATEGORY_IDS if is_coco else range(1, info.num_classes + 1)
    numbers = list(range(1, len(images) + 1))
    ends = [image.key.rsplit("_", 1)[-1] for image in images]
    if is_coco and all(re.fullmatch("[0-9]+", end) for end in ends):
        ids = [int(end) for end in ends]
        numbers = ids if len(set(ids)) == len(ids) else numbers
    found = found_in([image.found for image in images])
    truth = coco_truth(images, numbers, dict(zip(categories, info.class_names, strict=True)))
    write_json(folder / "truth.json", truth)
    write_json(folder / "results.json", coco_results(found, numbers, list(categories)))
    write_voc_files(folder, found, [image.key for image in images], info.class_names, split)


def per_class_csv(scores: Scores, class_names: tuple[str, ...]) -> str:
    """Return one line a class; a score that does not exist is left blank.

    The first is called "score" of segmenters (IoU) and of detectors (AP at IoU 0.5, area): the
    stage `evaluate` plots it of either.
    """
    columns: list[list[float]]
    if isinstance(scores, DetectionScores):
        header = ["class", "id", "score", "ap_11", "objects"]
        voc = scores.voc
        columns = [voc.ap_area.tolist(), voc.ap_11.tolist(), voc.objects.tolist()]
    elif isinstance(scores, SegmentationScores):
        header = ["class", "id", "score", "accuracy", "pixels"]
        columns = [scores.iou.tolist(), scores.accuracy.tolist(), scores.pixels.tolist()]
        for threshold, f in scores.boundary.f.items() if scores.boundary else ():
            header.append(f"boundary_F_{threshold:g}")
            columns.append(f.tolist())
    else:
        header = ["class", "id", "accuracy", "images"]
        images = scores.confusion.sum(dim=1)
        recall = scores.confusion.diagonal().double() / images
        columns = [recall.tolist(), images.tolist()]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for class_id, name in enumerate(class_names):
        writer.writerow([name, class_id, *(_cell(column[class_id]) for column in columns)])
    return text.getvalue()


def _cell(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "" if math.isnan(value) else f"{value:.6f}"


class _Pictures:
    """Keeps image, truth and prediction of a few images, the same for every model."""

    def __init__(self, index: ShardIndex, config: EvaluateConfig, folder: Path) -> None:
        self._reader = ShardReader(index, config.split)
        self._folder = folder
        total = len(self._reader)
        count = min(config.pictures, total)
        chosen = np.linspace(0, total - 1, count).astype(int).tolist() if count else []
        self._chosen = {self._reader.key(position): position for position in chosen}
        self._points: dict[str, tuple[float, float]] = {}
        folder.mkdir(parents=True)

    def keep(self, batch: Batch, prediction: Tensor | list[SeenImage]) -> None:
        """Write the chosen ones of a batch; a classifier's has no picture."""
        if isinstance(prediction, list):
            for seen in prediction:
                if seen.key in self._chosen:
                    self._write_boxes(seen)
            return
        if prediction.ndim != 3:
            return
        for row, key in enumerate(batch.keys):
            if key in self._chosen:
                self._write(key, prediction[row].to(torch.uint8).cpu().numpy(), batch.target[row])
                self._points[key] = busiest_point(batch.target[row])

    def keep_attention(self, predictor: Predictor) -> None:
        """Write the hierarchical attention in the middle of each written image's busiest part."""
        if nothing_to_show(predictor.recipe):
            return
        assert isinstance(predictor.transform, SegmentationEval)
        for key, point in self._points.items():
            pixels = decode_image(self._reader.read(self._chosen[key])["image"])
            (token,) = attend_from_points(
                predictor.recipe.model, pixels, [point], predictor.transform
            )
            write_text(self._folder / f"{key}.attention.json", json.dumps(asdict(token)))

    def _write_image(self, key: str) -> None:
        image = self._reader.read(self._chosen[key])["image"]
        with Image.open(io.BytesIO(image)) as opened:
            rgb = opened.convert("RGB")
        place = self._folder / f"{key}.image.jpg"
        write_atomic(place, partial(rgb.save, format="JPEG", quality=92))

    def _write_boxes(self, seen: SeenImage) -> None:
        self._write_image(seen.key)
        truth = [
            {
                "class_id": box.class_id,
                "box": [box.x1, box.y1, box.x2, box.y2],
                "difficult": box.difficult,
                "crowd": box.crowd,
            }
            for box in seen.objects
        ]
        columns = (seen.found[name].tolist() for name in ("labels", "boxes", "scores"))
        found = [
            {"class_id": label, "box": box, "score": score}
            for label, box, score in zip(*columns, strict=True)
        ]
        write_json(self._folder / f"{seen.key}.truth.json", truth)
        write_json(self._folder / f"{seen.key}.prediction.json", found)

    def _write(self, key: str, prediction: npt.NDArray[np.uint8], target: Tensor) -> None:
        self._write_image(key)
        for name, ids in (
            ("truth", target.to(torch.uint8).cpu().numpy()),
            ("prediction", prediction),
        ):
            mask = Image.fromarray(ids)
            save = partial(mask.save, format="PNG")
            write_atomic(self._folder / f"{key}.{name}.png", save)


def busiest_point(truth: Tensor) -> tuple[float, float]:
    """Return the (x, y) of the middle of the part whose classes are most evenly mixed, px.

    Parts are squares with the side of a token of stage 4; the first one of several.

    Args:
        truth: (H, W) ids 0..K-1 or IGNORE_INDEX.
    """
    sides = [min(COARSEST_STRIDE, side) for side in truth.shape]
    corners = product(*(range(0, truth.shape[i] - sides[i] + 1, sides[i]) for i in range(2)))

    def entropy(corner: tuple[int, ...]) -> float:
        part = truth[corner[0] : corner[0] + sides[0], corner[1] : corner[1] + sides[1]]
        counts = torch.bincount(part.reshape(-1), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        return float(torch.special.entr(counts / counts.sum().clamp(min=1)).sum())

    top, left = max(corners, key=entropy)
    return left + sides[1] / 2, top + sides[0] / 2


class _Watch:
    """Counts scored images and seconds."""

    def __init__(self, total: int, on_progress: Callable[[Progress], None]) -> None:
        self._total, self._on_progress = total, on_progress
        self._started, self.done = time.perf_counter(), 0

    def add(self, count: int) -> None:
        self.done += count
        self._on_progress(Progress(self.done, self._total))

    @property
    def rate(self) -> float:
        """Images a second since the beginning, decoding included."""
        return self.done / max(time.perf_counter() - self._started, 1e-9)


def _score(
    predictor: Predictor,
    index: ShardIndex,
    config: EvaluateConfig,
    on_batch: Callable[[Batch, Tensor | list[SeenImage]], None],
) -> Scores:
    """Score a predictor on the configured split."""
    recipe, protocol = predictor.recipe, config.segmentation
    transform = protocol.of_loader if recipe.task == "segmentation" else predictor.transform
    loader = build_eval_loader(index, config.split, recipe.task, transform, batch=config.batch)
    common = recipe, loader, index.info.num_classes, predictor.device
    if recipe.task == "detection":
        return score_detection(*common, lambda seen: [seen], on_batch)
    if recipe.task == "classification":
        return score_classification(*common, identity_mean, on_batch)
    return score_segmentation(
        *common,
        identity_mean,
        on_batch,
        protocol=protocol,
        boundary=config.boundary,
        crops=config.crops,
    )


def _score_again(
    predictor: Predictor,
    index: ShardIndex,
    config: EvaluateConfig,
    protocol: SegmentationProtocol,
    watch: _Watch,
) -> SegmentationScores:
    """Score a segmenter on the configured split by another protocol, classes alone."""
    recipe, task = predictor.recipe, predictor.recipe.task
    loader = build_eval_loader(index, config.split, task, protocol.of_loader, batch=config.batch)
    return score_segmentation(
        recipe,
        loader,
        index.info.num_classes,
        predictor.device,
        identity_mean,
        lambda batch, _: watch.add(len(batch.keys)),
        protocol=protocol,
    )


def _metrics(scores: Scores, small_ids: list[int]) -> dict[str, float]:
    named = dict(metrics_of(scores))
    if small_ids and isinstance(scores, SegmentationScores):
        named["mIoU_small"] = float(scores.iou[small_ids].nanmean())
    return named


def _small_class_ids(path: str | None, class_names: Sequence[str]) -> list[int]:
    """Return the ids of the classes that a class list file names."""
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"evaluate.small_classes: {path}: cannot be read ({error})") from None
    names = [name for line in lines if (name := line.split("#")[0].strip())]
    for name in names:
        if name not in class_names:
            near = UnknownNameError("class", name, class_names)
            raise ConfigError(f"evaluate.small_classes: {path}: {near}")
    if not names:
        raise ConfigError(f"evaluate.small_classes: {path}: found no class, expected one a line")
    return sorted({class_names.index(name) for name in names})


def _protocol(config: EvaluateConfig, task: Task) -> str:
    if task == "detection":
        side = config.detection.size
        return (
            f"image stretched to {side} x {side}; mAP_50 by the rules of VOC 2010, mAP_50_11 by "
            "those of 2007, difficult objects left out; the others by COCO's"
        )
    if task == "classification":
        settings = config.classification.model_dump(mode="json")
        shown = ", ".join(f"{name} {value}" for name, value in settings.items())
        return f"whole image, single scale ({shown})"
    parts = [config.segmentation.describe()]
    if config.multi_scale is not None:
        parts.append(f"_ms: {config.multi_scale.describe()}")
    if config.boundary is not None:
        parts.append(config.boundary.describe())
    if config.crops:
        sizes = ", ".join(f"{height} x {width}" for height, width in config.crops)
        parts.append(f"distance crops {sizes}, {DISTANCE_CROP_UP_PX} px above the middle")
    if config.small_classes is not None:
        parts.append(f"small classes of {config.small_classes}")
    return "; ".join(parts)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
