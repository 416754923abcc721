"""Scores: equal to a slow reference, and the same however a set was split."""

import math

import numpy as np
import pytest
import torch

from xattn.evaluate.inference import ClassificationScores, score_classification, score_segmentation
from xattn.evaluate.segmentation import confusion_matrix, score
from xattn.scoring import per_class_csv
from xattn.structures import IGNORE_INDEX, Batch, Recipe, identity_mean

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
