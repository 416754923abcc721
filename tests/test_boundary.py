"""Boundary F: equal to its definition in plain numpy, to the spec's numbers, however split."""

import math

import numpy as np
import pytest
import torch

from benchmarks.metrics import plain_boundary_f
from xattn.evaluate.boundary import (
    BoundaryConfig,
    BoundaryMeter,
    class_boundary_f,
    image_boundary_f,
    tolerance_px,
)
from xattn.structures import IGNORE_INDEX, identity_mean

CPU = torch.device("cpu")


def draw(seed: int, num_classes: int, size: tuple[int, int] = (37, 50)) -> list[torch.Tensor]:
    """Return a prediction and a truth in blocks; some classes are in one or none of the two."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(num_classes, (2, 1, 9, 11), generator=generator).float()
    prediction, target = torch.nn.functional.interpolate(coarse, size)[:, 0].long()
    target[torch.rand(size, generator=generator) < 0.05] = IGNORE_INDEX
    target[:5, 20:30] = IGNORE_INDEX
    return [prediction.clamp(max=num_classes - 2), target.where(target != 1, 0)]


def square(shift: int) -> torch.Tensor:
    """Return the spec's 12x12 mask of rows and columns 3..7, moved to the right."""
    mask = torch.zeros(12, 12, dtype=torch.long)
    mask[3:8, 3 + shift : 8 + shift] = 1
    return mask


@pytest.mark.parametrize("num_classes", [2, 6, 40])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_the_definition_gives(seed: int, num_classes: int) -> None:
    prediction, target = draw(seed, num_classes)
    radii = [3.0, 1, 2.5, 12, 0]
    found = class_boundary_f(prediction, target, num_classes, radii)
    for row, radius in zip(found, radii, strict=True):
        expected = plain_boundary_f(prediction.numpy(), target.numpy(), num_classes, radius)
        assert np.abs(row.numpy() - expected).max() <= 1e-12


def test_noise_is_no_special_case() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randint(5, (2, 20, 31), generator=generator)
    found = class_boundary_f(prediction, target, 5, [1])[0]
    expected = plain_boundary_f(prediction.numpy(), target.numpy(), 5, 1)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("radius", "expected"),
    [
        (1, [1, 1, 0.6, 0.5, 0.555556]),
        (2, [1, 1, 1, 0.7, 0.666667]),
        (3, [1, 1, 1, 1, 0.777778]),
    ],
)
def test_the_oracle_of_the_spec(radius: int, expected: list[float]) -> None:
    """Spec HILA, section 10; of one class, as the other one's outline is the same."""
    for shift, f in enumerate(expected):
        found = class_boundary_f(square(shift), square(0), 2, [radius])[0]
        assert found.tolist() == pytest.approx([f, f], abs=1e-6)
        assert image_boundary_f(square(shift), square(0), [radius]).item() == pytest.approx(f, 1e-5)


def test_the_last_row_and_column_look_only_inwards() -> None:
    """Spec HILA, section 10: the outline is row 3, columns 3..5, and column 3, rows 4 and 5."""
    corner, point = torch.zeros(2, 6, 6, dtype=torch.long)
    corner[4:, 4:] = 1
    point[0, 0] = 1  # its outline is (0, 0) alone: none is above or left of it
    f = class_boundary_f(point, corner, 2, [math.sqrt(18)])[0, 1]
    assert f == pytest.approx(2 * 1 * 0.2 / 1.2)  # of five pixels (3, 3) is near enough


def test_empty_cases() -> None:
    nothing = torch.zeros(8, 8, dtype=torch.long)
    one = nothing.clone()
    one[3:5, 3:5] = 1
    assert class_boundary_f(nothing, nothing, 3, [3]).tolist() == [[1, 1, 1]]
    assert class_boundary_f(one, nothing, 3, [3]).tolist() == [[0, 0, 1]]
    assert class_boundary_f(nothing, one, 3, [3]).tolist() == [[0, 0, 1]]
    assert image_boundary_f(nothing, nothing, [3]).tolist() == [1]
    assert image_boundary_f(one, nothing, [3]).tolist() == [0]
    ignored = torch.full_like(nothing, IGNORE_INDEX)
    assert class_boundary_f(one, ignored, 3, [3]).tolist() == [[1, 1, 1]]


def test_the_outlines_of_an_image_are_those_of_its_classes_together() -> None:
    prediction, target = draw(4, 6)
    marks = []
    for labels in (prediction.where(target != IGNORE_INDEX, IGNORE_INDEX), target):
        outline = np.zeros(labels.shape, bool)
        for k in range(6):
            mask = np.pad((labels == k).numpy(), ((0, 1), (0, 1)), mode="edge")
            own = mask[:-1, :-1]
            outline |= (own != mask[1:, :-1]) | (own != mask[:-1, 1:]) | (own != mask[1:, 1:])
        marks.append(np.argwhere(outline))
    distance = np.linalg.norm(marks[0][:, None] - marks[1][None], axis=2)
    precision = (distance.min(axis=1) <= 2).mean()
    recall = (distance.min(axis=0) <= 2).mean()
    expected = 2 * precision * recall / (precision + recall)
    assert image_boundary_f(prediction, target, [2]).item() == pytest.approx(expected, abs=1e-12)


def test_thresholds_as_meant_and_as_printed() -> None:
    size = 1024, 2048
    meant = [tolerance_px(t, size) for t in BoundaryConfig().numbers]
    assert meant == [3, 5, 9, 12]
    printed = BoundaryConfig(thresholds="printed").numbers
    assert [tolerance_px(t, size) for t in printed] == [1, 5, 9, 12]
    crops = [(1024, 2048), (624, 1248), (424, 848), (224, 448)]
    assert [tolerance_px(0.00088, crop) for crop in crops] == [3, 2, 1, 1]  # spec HILA 5.4
    assert tolerance_px(3, (10, 10)) == 3
    words = BoundaryConfig(thresholds=(0.00088,), image_thresholds=(3,)).describe()
    assert words == (
        "boundary F within 0.00088 of the scored part's diagonal; image-wise boundary F within 3 px"
    )


def test_batches_and_ranks_make_no_difference() -> None:
    config = BoundaryConfig(thresholds=(2, 0.05), image_thresholds=(3,))
    pairs = [torch.stack(images) for images in zip(*(draw(i, 6) for i in range(7)), strict=True)]

    def meter(parts: list[slice]) -> BoundaryMeter:
        result = BoundaryMeter(config, 6, CPU)
        for part in parts:
            result.add(pairs[0][part], pairs[1][part])
        return result

    whole = meter([slice(0, 7)]).scores(identity_mean)
    one_by_one = meter([slice(i, i + 1) for i in reversed(range(7))]).scores(identity_mean)
    ranks = [meter([slice(rank, 7, 3)]) for rank in range(3)]
    states: list[list[torch.Tensor]] = [[], [], []]
    for state, rank in zip(states, ranks, strict=True):
        rank.scores(lambda value, state=state: state.append(value) or value)
    totals = iter([sum(values) for values in zip(*states, strict=True)])
    summed = ranks[0].scores(lambda _value: next(totals))
    for other in (one_by_one, summed):
        assert all(torch.equal(whole.f[t], other.f[t]) for t in config.numbers)
        assert whole.image_f == other.image_f
    expected = torch.stack(
        [class_boundary_f(*pair, 6, [2])[0] for pair in zip(*pairs, strict=True)]
    ).mean(dim=0)
    assert whole.f[2].tolist() == pytest.approx(expected.tolist(), abs=1e-11)
    metrics = whole.metrics()
    assert set(metrics) == {
        *("boundary_F", "boundary_F_2", "boundary_F_0.05"),
        *("image_boundary_F", "image_boundary_F_3"),
    }
    assert metrics["boundary_F"] == metrics["boundary_F_2"] == pytest.approx(expected.mean().item())
