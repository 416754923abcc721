"""Detectors through the pipeline: boxes in batches, training on two ranks, scores and pictures."""

import csv
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from pipelines.evaluate import evaluate
from pipelines.finetune import finetune
from pipelines.predict import predict_images
from pipelines.shard import shard
from tests.conftest import small_params, write_params
from tests.raw_files import write_samples
from tests.test_stages import STAGES
from tests.test_training import run_ranks
from xattn.config import load_config
from xattn.data.augment_detection import DetectionAugment, DetectionEval
from xattn.data.index import ShardIndex
from xattn.data.loader import build_eval_loader, build_train_loader
from xattn.errors import ConfigError, DamageError, DataError
from xattn.evaluate.detection import SeenImage, coco_scores, detection_scores
from xattn.evaluate.inference import score_detection
from xattn.experiment import run_training
from xattn.job import plan_job
from xattn.scoring import write_detections
from xattn.storage import alone_in
from xattn.structures import Box, BoxTarget, DatasetInfo, Recipe, Sample
from xattn.train.history import read_history

INFO = DatasetInfo(
    name="tiny",
    tasks=("detection",),
    class_names=("disc", "bar"),
    palette=((200, 0, 0), (0, 0, 200)),
    splits=("train", "val"),
    ignore_ids=(),
    licence="none",
    url="",
    citation="none",
    layout="none",
)
STILL = DetectionAugment(size=40, photometric=False, zoom_out=0.0, min_ious=(), flip=0.0)


def encode(pixels: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def jpeg(height: int, width: int) -> bytes:
    return encode(np.full((height, width, 3), 99, np.uint8))


SAMPLES = [
    Sample("a", jpeg(20, 40), "jpg", "raw", boxes=(Box(0, 4, 5, 12, 15), Box(1, 0, 0, 40, 20))),
    Sample(
        "b",
        jpeg(30, 10),
        "jpg",
        "raw",
        boxes=(
            Box(1, 1, 1, 9, 9, difficult=True),
            Box(0, 2, 3, 4, 9, area=7.5),
            Box(0, 0, 0, 10, 30, crowd=True),
        ),
    ),
    Sample("c", jpeg(40, 40), "jpg", "raw", boxes=()),
]


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return write_samples(tmp_path / "boxes", INFO, {"train": SAMPLES, "val": SAMPLES})


def test_batches_of_boxes_are_padded_and_leave_out_what_is_not_learnt(index: ShardIndex) -> None:
    loader = build_train_loader(index, "train", "detection", STILL, seed=1, global_batch=3, steps=1)
    (batch,) = loader
    assert isinstance(batch.target, BoxTarget)
    assert batch.images.shape == (3, 3, 40, 40)
    assert batch.target.boxes.shape == (3, 2, 4)
    order = [batch.keys.index(key) for key in "abc"]
    assert batch.target.labels[order].tolist() == [[0, 1], [0, -1], [-1, -1]]
    expected = [[4.0, 10, 12, 30], [0, 0, 40, 40], [8, 4, 16, 12]]
    found = batch.target.boxes[order][[0, 0, 1], [0, 1, 0]]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert [batch.objects[row] for row in order] == [sample.boxes for sample in SAMPLES]
    moved = batch.to("cpu", channels_last=True)
    assert isinstance(moved.target, BoxTarget)
    assert moved.images.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_without_any_object(tmp_path: Path) -> None:
    index = write_samples(tmp_path / "none", INFO, {"train": [SAMPLES[2]]})
    loader = build_train_loader(index, "train", "detection", STILL, seed=1, global_batch=1, steps=1)
    (batch,) = loader
    assert batch.target.boxes.shape == (1, 0, 4)
    assert batch.target.labels.shape == (1, 0)


def test_images_of_all_sizes_share_a_batch_of_evaluation(index: ShardIndex) -> None:
    loader = build_eval_loader(index, "val", "detection", DetectionEval(size=20), batch=8)
    (batch,) = loader
    assert batch.keys == ("a", "b", "c")
    assert batch.sizes == ((20, 40), (30, 10), (40, 40))
    torch.testing.assert_close(batch.target.boxes[0, 0], torch.tensor([2.0, 5, 6, 15]))


def test_boxes_of_another_form_are_damage(index: ShardIndex, monkeypatch: Any) -> None:
    monkeypatch.setattr("xattn.data.loader.json.loads", lambda _data: [{"x": 1}])
    loader = build_eval_loader(index, "val", "detection", DetectionEval(size=20), batch=1)
    with pytest.raises(DamageError, match=r"key a: cannot be decoded: .*'x'"):
        next(iter(loader))


def seen(key: str, boxes: list[list[float]], objects: tuple[Box, ...]) -> SeenImage:
    found = {
        "boxes": torch.tensor(boxes).view(-1, 4),
        "scores": torch.linspace(0.9, 0.5, len(boxes)),
        "labels": torch.zeros(len(boxes), dtype=torch.int64),
    }
    return SeenImage(key, (100, 100), found, objects)


def test_scores_of_a_hand_worked_set() -> None:
    images = [
        seen("a", [[0, 0, 10, 10], [50, 50, 60, 60]], (Box(0, 0, 0, 10, 10, area=5000.0),)),
        seen("b", [], (Box(0, 0, 0, 10, 10), Box(0, 20, 20, 30, 30, crowd=True))),
        seen("c", [[20, 20, 30, 30]], (Box(0, 20, 20, 30, 30, difficult=True),)),
    ]
    scores = detection_scores(images, 2)
    assert scores.images == 3
    assert scores.voc.objects.tolist() == [2, 0], "neither difficult nor crowd are to be found"
    metrics = scores.metrics()
    assert metrics["mAP_50"] == pytest.approx(0.5), "one of two, first of all"
    assert metrics["mAP_50_11"] == pytest.approx(6 / 11)
    # To COCO the difficult one is an object, and found; by its stated area the first is not small.
    assert metrics["AP50"] == pytest.approx(67 / 101, abs=0.01)
    assert metrics["AP_medium"] == pytest.approx(1.0)
    assert "AP_large" not in metrics, "there is nothing large"
    assert detection_scores(images[::-1], 2).metrics() == metrics


def test_a_split_without_objects_has_no_score() -> None:
    with pytest.raises(DataError, match="none of 1 images has an object to be found"):
        detection_scores([seen("a", [[0, 0, 9, 9]], ())], 1)


def detection_params(model: str = "ssd300") -> dict[str, Any]:
    params = small_params()
    settings = {"task": "detection", "image_size": [64, 96], "train": 12, "val": 5, "test": 4}
    params["datasets"]["objects"] = {
        "reader": "synthetic",
        "root": "data/raw/objects",
        "settings": {**settings, "seed": 3},
    }
    fit = {**params["finetune"]["fit"], "steps": 4, "clip_norm": 10.0}
    params["finetune"] = {
        "task": "detection",
        "augment": {"size": 300},
        "fit": fit,
        "optim": {"optimizer": "sgd", "lr": 1e-3, "schedule": "step", "milestones": [3]},
        "validate_on": {"split": "val", "batch": 2, "every_steps": 2, "transform": {"size": 300}},
    }
    run = {"model": model, "dataset": "objects", "overrides": {"width": 8}}
    params["runs"] = {"detector": {**params["runs"]["segmenter"], **run}}
    return params


@pytest.fixture
def detecting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a project folder with drawn objects and a small detector, as working folder."""
    write_params(tmp_path, detection_params())
    monkeypatch.chdir(tmp_path)
    shard("objects", tmp_path)
    return tmp_path


def test_a_detector_is_trained_scored_and_shown(detecting: Path) -> None:
    out = finetune("detector", detecting)
    card = json.loads((out / "model.json").read_text())
    assert card["task"] == "detection"
    assert card["macs_input"] == [3, 300, 300]
    trained = json.loads((out / "metrics.json").read_text())
    assert trained["metric_name"] == "mAP_50"
    curve = list(csv.DictReader((out / "curve.csv").read_text().splitlines()))
    assert {"loss_boxes", "loss_classes"} <= curve[0].keys()
    assert [float(row["lr"]) for row in curve] == pytest.approx([1e-3, 1e-3, 1e-3, 1e-4])

    metrics = evaluate("detector", detecting, detections=detecting / "found")
    assert metrics["images"] == 4
    again = coco_scores(
        detecting / "found/truth.json", json.loads((detecting / "found/results.json").read_text())
    )
    assert again["AP50"] == pytest.approx(metrics["AP50"], abs=1e-6)
    names = sorted(path.name for path in (detecting / "found").glob("comp4_det_test_*.txt"))
    assert names == sorted(f"comp4_det_test_{name}.txt" for name in card["class_names"])
    assert {"mAP_50", "mAP_50_11", "AP", "AP50"} <= metrics.keys()
    assert all(0 <= metrics[name] <= 1 for name in ("mAP_50", "mAP_50_11", "AP"))
    folder = detecting / "results/evaluate/detector"
    rows = list(csv.DictReader((folder / "per_class.csv").read_text().splitlines()))
    (plot,) = STAGES["evaluate"]["do"]["plots"][0].values()
    assert {plot["x"], plot["y"]} <= rows[0].keys(), "what `dvc plots show` draws"
    objects = sum(
        len(batch.objects[0])
        for batch in build_eval_loader(
            ShardIndex.open(detecting / "data/shards/objects"), "test", "detection", None, batch=1
        )
    )
    assert sum(int(row["objects"]) for row in rows) == objects > 0
    found = sorted(path.name for path in (folder / "pictures").iterdir())
    assert len(found) == 6, "two pictures"
    truth = json.loads((folder / "pictures" / found[2]).read_text())
    assert truth[0].keys() == {"class_id", "box", "difficult", "crowd"}

    images = detecting / "data/raw/objects/JPEGImages"
    assert predict_images(out, images / "test_000000.jpg", detecting / "seen", "cpu") == 1
    with Image.open(detecting / "seen/test_000000.png") as picture:
        assert picture.width >= 96


def test_two_ranks_detect_as_one(detecting: Path) -> None:
    # From weights that find something: after 24 steps, objects as large as their images.
    rng = np.random.default_rng(0)
    samples = []
    for number in range(12):
        box = Box(number % 2, *rng.uniform(0, 4, 2).tolist(), *rng.uniform(60, 64, 2).tolist())
        pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
        samples.append(Sample(f"{number}", encode(pixels), "jpg", "raw", boxes=(box,)))
    shutil.rmtree(shards := detecting / "data/shards/objects")
    write_samples(shards, INFO, {"train": samples, "val": samples[:5]})
    params = detection_params()
    params["finetune"]["fit"]["steps"] = 24
    params["finetune"]["optim"] |= {"lr": 1e-2, "milestones": [20]}
    config = load_config(write_params(detecting, params))
    before = run_training(config, "finetune", "detector", detecting, lambda _progress: None)
    shutil.copy(before.final_dir / "model.safetensors", detecting / "first.safetensors")
    params = detection_params()
    params["runs"]["detector"]["init"] = "first.safetensors"
    config = load_config(write_params(detecting, params))
    alone = run_training(config, "finetune", "detector", detecting, lambda _progress: None)
    expected = read_history(alone.run_dir / "history.jsonl")
    first = load_file(alone.final_dir / "model.safetensors")
    alone.run_dir.rename(detecting / "alone")
    run_ranks(detecting, "detector", world=2)
    together = read_history(alone.run_dir / "history.jsonl")
    second = load_file(alone.final_dir / "model.safetensors")
    for name in ("loss", "loss_boxes", "loss_classes"):
        one, two = ([row[name] for row in rows if name in row] for rows in (expected, together))
        assert two == pytest.approx(one, abs=1e-5)
    one, two = (
        [row["val_metric"] for row in rows if "val_metric" in row] for rows in (expected, together)
    )
    assert len(one) == 2
    assert 0.1 < one[0] < 1
    assert two == pytest.approx(one, abs=1e-6)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-6)


class Guesser(nn.Module):
    """Boxes of a fixed grid, the brighter the surer: no detector, but its scores are not zero."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(images.mean(1, keepdim=True), (4, 6)).flatten(1)


def guess(outputs: torch.Tensor, size: tuple[int, int]) -> list[dict[str, torch.Tensor]]:
    rows, columns = torch.arange(24) // 6 / 4, torch.arange(24) % 6 / 6
    boxes = torch.stack([columns, rows, columns + 1 / 4, rows + 1 / 3], 1)
    scale = torch.tensor([size[1], size[0]] * 2)
    return [
        {
            "boxes": boxes[(order := row.argsort(descending=True))] * scale,
            "scores": row[order].sigmoid(),
            "labels": order % 4,
        }
        for row in outputs
    ]


@pytest.mark.parametrize("world", [2, 3])
def test_scores_are_those_of_one_rank_on_any_number(detecting: Path, world: int) -> None:
    index = ShardIndex.open(detecting / "data/shards/objects")
    recipe = Recipe(Guesser(), lambda *_: {}, guess, "detection")
    parts: list[list[SeenImage]] = []
    count = index.info.num_classes

    def score(rank: int, of: int, gather: Any) -> dict[str, float]:
        show = DetectionEval(size=40)
        loader = build_eval_loader(index, "train", "detection", show, batch=3, rank=rank, world=of)
        return score_detection(recipe, loader, count, torch.device("cpu"), gather).metrics()

    alone = score(0, 1, lambda seen: [seen])
    assert 0.001 < alone["mAP_50"] < 0.5
    for rank in range(world):
        score(rank, world, lambda seen: parts.append(seen) or [seen])
    assert len(parts) == world
    together = [image for part in reversed(parts) for image in part]
    assert detection_scores(together, count).metrics() == pytest.approx(alone, abs=1e-12)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (("000000000042", "COCO_val2014_000000000007"), [42, 7]),
        (("my photo", "000000000007"), [1, 2]),
        (("a_7", "b_07"), [1, 2]),
    ],
)
def test_ids_are_cocos_where_all_names_are(
    tmp_path: Path, keys: tuple[str, ...], expected: list[int]
) -> None:
    images = [seen(key, [[0, 0, 9, 9]], (Box(0, 0, 0, 9, 9),)) for key in keys]
    names = tuple(f"class {number}" for number in range(80))
    coco = dataclasses.replace(INFO, name="coco", class_names=names, palette=((0, 0, 0),) * 80)
    write_detections(tmp_path, images, coco, "val")
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["image_id"] for row in rows] == expected
    assert coco_scores(tmp_path / "truth.json", rows)["AP50"] == 1


@pytest.mark.parametrize("key", ["augment.size", "validate_on.transform.size"])
def test_sizes_that_no_detector_takes_are_refused_before_training(
    detecting: Path, key: str
) -> None:
    params = detection_params()
    section = params["finetune"]
    for part in key.split(".")[:-1]:
        section = section[part]
    section["size"] = 320
    config = load_config(write_params(detecting, params))
    with pytest.raises(ConfigError, match=rf"finetune\.{key}: found 320, expected 300"):
        plan_job(config, "finetune", "detector", detecting)


def test_what_evaluation_cannot_do_is_told_before_it_starts(detecting: Path) -> None:
    finetune("detector", detecting)
    evaluate("detector", detecting)
    kept = sorted((detecting / "results/evaluate/detector/pictures").iterdir())
    with pytest.raises(DataError, match=r"params\.yaml.*"):
        evaluate("detector", detecting, detections=detecting / "params.yaml")
    with (
        alone_in(detecting / "results/evaluate/detector"),
        pytest.raises(DataError, match="another process is writing it"),
    ):
        evaluate("detector", detecting)
    params = detection_params()
    params["evaluate"]["detection"] = {"size": 512}
    write_params(detecting, params)
    with pytest.raises(ConfigError, match=r"^evaluate\.detection\.size: found 512, expected 300"):
        evaluate("detector", detecting)
    assert sorted((detecting / "results/evaluate/detector/pictures").iterdir()) == kept
    assert not list((detecting / "results/evaluate").glob(".*.partial"))


@pytest.mark.parametrize(("split", "key"), [("train", "train_split"), ("val", "validate_on.split")])
def test_a_split_without_objects_is_told_before_training(
    detecting: Path, split: str, key: str
) -> None:
    boxes = (Box(0, 1, 1, 9, 9, difficult=True), Box(1, 0, 0, 10, 30, crowd=True))
    nothing = [SAMPLES[2], Sample("d", jpeg(30, 10), "jpg", "raw", boxes=boxes)]
    shutil.rmtree(shards := detecting / "data/shards/objects")
    write_samples(shards, INFO, {"train": SAMPLES, "val": SAMPLES, split: nothing})
    message = rf"^finetune\.{key}: split '{split}' of 'tiny' has no object in its 2 images"
    with pytest.raises(DataError, match=message):
        finetune("detector", detecting)
    assert not (detecting / "runs").exists()


@pytest.mark.parametrize("name", ["train-000000.tar", "val-000000.tar"])
def test_a_lost_shard_is_damage_and_no_lack_of_objects(detecting: Path, name: str) -> None:
    (detecting / "data/shards/objects" / name).unlink()
    with pytest.raises(DamageError, match=name):
        finetune("detector", detecting)


def test_segmenters_are_no_detectors(detecting: Path) -> None:
    config = load_config(write_params(detecting, detection_params("segformer_b0")))
    message = r"runs\.detector\.model: found 'segformer_b0', expected a model for detection"
    with pytest.raises(ConfigError, match=message):
        plan_job(config, "finetune", "detector", detecting)
    params = detection_params()
    for task, found in (("detecton", "'detecton'"), (["detection"], r"\['detection'\]")):
        params["finetune"]["task"] = task
        message = rf"task: expected segmentation or detection, found {found}"
        with pytest.raises(ConfigError, match=message):
            load_config(write_params(detecting, params))
