"""Scores: equal to a slow reference, and the same however a set was split."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import small_params
from xattn.config import EvaluateConfig
from xattn.data.index import ShardIndex
from xattn.errors import ConfigError
from xattn.evaluate.inference import ClassificationScores, score_classification, score_segmentation
from xattn.evaluate.segmentation import confusion_matrix, score
from xattn.models.weights import save_weights
from xattn.models.zoo import create_recipe
from xattn.predictor import load_predictor
from xattn.scoring import evaluate_model, per_class_csv
from xattn.storage import sha256_file, write_json
from xattn.structures import IGNORE_INDEX, Batch, Progress, Recipe, identity_mean

K = 4


def masks(seed: int, shape: tuple[int, ...] = (3, 9, 11)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(K - 1, shape, generator=generator)
    target = torch.randint(K, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < 0.2] = IGNORE_INDEX
    return prediction, target


def slow_iou(prediction: torch.Tensor, target: torch.Tensor) -> list[float]:
    pairs = [
        (int(p), int(t))
        for p, t in zip(prediction.flatten(), target.flatten(), strict=True)
        if t != IGNORE_INDEX
    ]
    result = []
    for k in range(K):
        both = sum(p == k and t == k for p, t in pairs)
        either = sum(k in (p, t) for p, t in pairs)
        result.append(both / either if either else math.nan)
    return result


def test_iou_is_what_counting_pixels_gives() -> None:
    prediction, target = masks(0)
    scores = score(confusion_matrix(prediction, target, K))
    expected = slow_iou(prediction, target)
    assert scores.iou.tolist() == pytest.approx(expected)
    assert scores.mean_iou == pytest.approx(np.nanmean(expected))
    valid = target != IGNORE_INDEX
    assert scores.pixel_accuracy == pytest.approx(
        float((prediction == target)[valid].float().mean())
    )


def test_parts_add_up_to_the_whole() -> None:
    prediction, target = masks(1)
    whole = confusion_matrix(prediction, target, K)
    parts = sum(confusion_matrix(prediction[i], target[i], K) for i in range(3))
    assert torch.equal(whole, parts)


def test_a_class_that_does_not_occur_has_no_score() -> None:
    scores = score(confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 1]), 3))
    assert scores.iou.tolist()[:2] == [1.0, 1.0]
    assert math.isnan(scores.iou[2])
    assert scores.mean_iou == 1.0
    assert per_class_csv(scores, ("a", "b", "c")).splitlines()[3] == "c,2,,,0"


def test_nothing_but_ignored_pixels_is_no_crash() -> None:
    target = torch.full((4,), IGNORE_INDEX)
    scores = score(confusion_matrix(torch.zeros(4, dtype=torch.long), target, 2))
    assert math.isnan(scores.mean_iou)
    assert scores.pixel_accuracy == 0.0


def test_ranks_score_as_one(small_batches) -> None:
    recipe, batches = small_batches
    whole = score_segmentation(recipe, batches, K, torch.device("cpu"), identity_mean)
    partial = torch.zeros(K, K, dtype=torch.long)

    def add_the_other_rank(confusion: torch.Tensor) -> torch.Tensor:
        partial.add_(confusion)
        return partial

    for rank in range(2):
        both = score_segmentation(
            recipe, batches[rank::2], K, torch.device("cpu"), add_the_other_rank
        )
    assert torch.equal(both.iou, whole.iou)
    assert int(whole.pixels.sum()) == sum(int((b.target != IGNORE_INDEX).sum()) for b in batches)


@pytest.fixture
def small_batches() -> tuple[Recipe, list[Batch]]:
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, K, 3, stride=4, padding=1)
    recipe = Recipe(
        model,
        lambda outputs, target, mean: {},
        lambda outputs, size: torch.nn.functional.interpolate(outputs, size, mode="bilinear"),
        "segmentation",
    )
    batches = [
        Batch(torch.randn(1, 3, 32, 40), masks(i, (1, 30, 38))[1], (str(i),), ((30, 38),))
        for i in range(3)
    ]
    return recipe, batches


def test_classifier_counts() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [0.0, 1.0, 2.0], [2.0, 3.0, 1.0]])
    recipe = Recipe(
        torch.nn.Flatten(), lambda *_: {}, lambda outputs, _size: outputs, "classification"
    )
    batch = Batch(logits, torch.tensor([0, 1, 1]), ("a", "b", "c"), ((1, 1),) * 3)
    scores = score_classification(recipe, [batch], 3, torch.device("cpu"), identity_mean)
    assert isinstance(scores, ClassificationScores)
    assert scores.images == 3
    assert scores.top1 == pytest.approx(2 / 3)
    assert scores.top5 == 1.0
    assert scores.confusion.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]


@pytest.fixture
def model_dir(tmp_path: Path, shards: Path) -> Path:
    """Give the model folder of an untrained segmenter of the small scenes."""
    info = ShardIndex.open(shards / "scenes").info
    torch.manual_seed(0)
    save_weights(create_recipe("segformer_b0", info).model, tmp_path / "model.safetensors")
    card = {
        "run": "segmenter",
        "model": "segformer_b0",
        "overrides": {},
        "dataset": "scenes",
        "task": "segmentation",
        "num_classes": info.num_classes,
        "class_names": list(info.class_names),
        "palette": [list(colour) for colour in info.palette],
        "transform": {},
        "weights": "model.safetensors",
        "weights_sha256": sha256_file(tmp_path / "model.safetensors"),
    }
    write_json(tmp_path / "model.json", card)
    return tmp_path


def evaluate(
    model_dir: Path,
    shards: Path,
    on_progress: Callable[[Progress], None] = lambda _: None,
    **changes: Any,
) -> dict[str, Any]:
    settings = json.dumps({**small_params()["evaluate"], **changes})
    config = EvaluateConfig.model_validate_json(settings, strict=True)
    return evaluate_model(model_dir, shards / "scenes", config, model_dir / "out", on_progress)


def test_the_plain_protocol_leaves_nothing_new(model_dir: Path, shards: Path) -> None:
    metrics = evaluate(model_dir, shards)
    names = "run dataset split images protocol mIoU pixel_accuracy mean_accuracy"
    assert set(metrics) == {*names.split(), "images_per_s", "device"}
    assert metrics["protocol"] == "whole image, single scale (multiple 32)"
    header = (model_dir / "out" / "per_class.csv").read_text().splitlines()[0]
    assert header == "class,id,score,accuracy,pixels"


def test_a_full_protocol_is_stated_and_measured(model_dir: Path, shards: Path) -> None:
    names = ShardIndex.open(shards / "scenes").info.class_names
    listed = model_dir / "small.txt"
    listed.write_text(f"# area < 1024 px\n{names[1]}\n\n{names[0]} # a remark\n")
    protocol = {
        "ratios": [0.75, 1],
        "flip": True,
        "window": {"crop": [64, 64], "stride": [48, 48]},
    }
    boundary = {"thresholds": [0.02], "image_thresholds": [3]}
    metrics = evaluate(
        model_dir,
        shards,
        segmentation=protocol,
        boundary=boundary,
        crops=[[40, 60]],
        small_classes=str(listed),
    )
    assert metrics["images"] == 7
    assert metrics["protocol"] == (
        "windows of 64 x 64 every 48 x 48 px, logits averaged, scales 0.75, 1 and mirrored, "
        "probabilities averaged (multiple 32); boundary F within 0.02 of the scored part's "
        "diagonal; image-wise boundary F within 3 px; distance crops 40 x 60, 50 px above the "
        f"middle; small classes of {listed}"
    )
    with (model_dir / "out" / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    f = [float(row["boundary_F_0.02"]) for row in rows]
    assert metrics["boundary_F"] == pytest.approx(np.mean(f), abs=2e-6)
    iou = [float(row["score"]) for row in rows[:2] if row["score"]]
    assert metrics["mIoU_small"] == pytest.approx(np.mean(iou), abs=2e-6)
    assert 0 <= metrics["boundary_F_40x60"] <= 1
    assert 0 <= metrics["image_boundary_F"] <= 1


def test_several_scales_are_scored_beside_the_single_one(model_dir: Path, shards: Path) -> None:
    several = {"ratios": [0.75, 1], "flip": True}
    plain = evaluate(model_dir, shards, boundary={"thresholds": [3]})
    alone = evaluate(model_dir, shards, segmentation=several)
    done: list[tuple[int, int]] = []
    both = evaluate(
        model_dir,
        shards,
        lambda progress: done.append((progress.done, progress.total)),
        boundary={"thresholds": [3]},
        multi_scale=several,
    )
    names = ("mIoU", "pixel_accuracy", "mean_accuracy")
    assert {f"{name}_ms": alone[name] for name in names}.items() <= both.items()
    assert plain["mIoU"] != alone["mIoU"], "the two protocols differ"
    measured = {"images_per_s", "protocol"}
    same = {name: value for name, value in plain.items() if name not in measured}
    assert same.items() <= both.items()
    assert set(both) == {*plain, *(f"{name}_ms" for name in names)}
    described = f"_ms: {alone['protocol']}; boundary F within 3 px"
    assert both["protocol"] == f"whole image, single scale (multiple 32); {described}"
    assert done[-1] == (14, 14)


def test_a_predictor_follows_the_protocol(model_dir: Path, shards: Path) -> None:
    """What `predict` sees of a single image is what was scored."""
    settings = {**small_params()["evaluate"], "segmentation": {"ratios": [0.75, 1], "flip": True}}
    config = EvaluateConfig.model_validate_json(json.dumps(settings), strict=True)
    predictor = load_predictor(model_dir, "cpu", config.segmentation)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    plain = load_predictor(model_dir, "cpu")
    assert predictor.predict(image).shape == plain.predict(image).shape == (50, 70)
    # Sums in another order may tip a pixel that is on the edge.
    assert (predictor.predict(image[:, ::-1])[:, ::-1] == predictor.predict(image)).mean() > 0.99


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"evaluate\.small_classes: .*small\.txt: cannot be read"),
        ("# nothing", "found no class, expected one a line"),
        ("no such thing", r"evaluate\.small_classes: .*unknown class 'no such thing'"),
    ],
)
def test_faults_of_a_class_list_are_named(
    model_dir: Path, shards: Path, text: str | None, message: str
) -> None:
    listed = model_dir / "small.txt"
    if text is not None:
        listed.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        evaluate(model_dir, shards, small_classes=str(listed))
    assert "\n" not in str(caught.value)
