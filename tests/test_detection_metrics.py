import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import PROJECT
from xattn.errors import DataError
from xattn.evaluate.detection import (
    Found,
    Objects,
    VocScores,
    coco_results,
    coco_scores,
    found_in,
    objects_in,
    voc_scores,
    write_voc_files,
)
from xattn.structures import Box

REFERENCES = PROJECT.parent / "shared" / "data" / "metric_refs"


def detections(*rows):
    """Make the detections of one image of (label, score, x1, y1, x2, y2)."""
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6)
    return {"labels": table[:, 0].long(), "scores": table[:, 1], "boxes": table[:, 2:]}


def slow_best(found, class_id, boxes, extra):
    """Return the largest IoU with a box of the class, and which one it is."""
    x1, y1, x2, y2 = found
    best, which = 0.0, None
    for number, box in enumerate(boxes):
        width = min(x2, box.x2) - max(x1, box.x1) + extra
        height = min(y2, box.y2) - max(y1, box.y1) + extra
        if box.class_id != class_id or width <= 0 or height <= 0:
            continue
        area = (x2 - x1 + extra) * (y2 - y1 + extra)
        own = (box.x2 - box.x1 + extra) * (box.y2 - box.y1 + extra)
        overlap = width * height / (area + own - width * height)
        if overlap > best:
            best, which = overlap, number
    return best, which


def slow_scores(images, truths, num_classes, iou, extra):
    """Follow the development kit detection by detection."""
    scores = []
    for class_id in range(num_classes):
        rows = [
            (-float(s), n, image, b.tolist())
            for image, found in enumerate(images)
            for n, (c, s, b) in enumerate(
                zip(found["labels"], found["scores"], found["boxes"], strict=True)
            )
            if c == class_id
        ]
        rows.sort(key=lambda row: row[0])
        count = sum(b.class_id == class_id and not b.difficult for own in truths for b in own)
        taken, right, wrong, curve = set(), 0, 0, []
        for _, _, image, box in rows:
            best, which = slow_best(box, class_id, truths[image], extra)
            if best >= iou:
                if truths[image][which].difficult:
                    continue
                if (image, which) not in taken:
                    taken.add((image, which))
                    right += 1
                else:
                    wrong += 1
            else:
                wrong += 1
            curve.append((right / count if count else 0.0, right / (right + wrong)))
        if not count:
            scores.append((math.nan, math.nan))
            continue
        eleven = sum(max((p for r, p in curve if r >= t * 0.1), default=0.0) for t in range(11))
        area, last = 0.0, 0.0
        for n, (recall, _) in enumerate(curve):
            area += (recall - last) * max(p for _, p in curve[n:])
            last = recall
        scores.append((eleven / 11, area))
    return np.array(scores)


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("iou", [0.3, 0.5, 0.75])
def test_voc_scores_are_those_of_the_slow_reference(inclusive, iou):
    rng = np.random.default_rng(0)
    truths, images = [], []
    for _ in range(25):
        corners = rng.integers(0, 40, (rng.integers(0, 6), 2))
        sizes = rng.integers(5, 30, corners.shape)
        classes = rng.integers(0, 4, len(corners))
        truths.append(
            [
                Box(int(c), *map(float, p), *map(float, p + s), difficult=bool(rng.random() < 0.2))
                for c, p, s in zip(classes, corners, sizes, strict=True)
            ]
        )
        shifted = [
            (
                box.class_id,
                rng.integers(0, 9) / 10,
                *(np.array(corner(box)) + rng.integers(-4, 5, 4)),
            )
            for box in truths[-1]
            for _ in range(rng.integers(0, 4))
        ]
        strays = [
            (rng.integers(0, 4), rng.random(), *p, *(p + 20)) for p in rng.random((3, 2)) * 40
        ]
        images.append(detections(*shifted, *strays))
    found, objects = found_in(images), objects_in(truths)
    scores = voc_scores(found, objects, 5, iou=iou, inclusive=inclusive)
    expected = slow_scores(images, truths, 5, iou, float(inclusive))
    np.testing.assert_allclose(scores.ap_11, expected[:, 0], atol=1e-12)
    np.testing.assert_allclose(scores.ap_area, expected[:, 1], atol=1e-12)
    assert math.isnan(scores.ap_11[4])  # no object of this class
    assert 0 < scores.map_area < 1


def corner(box):
    return box.x1, box.y1, box.x2, box.y2


TWO = [[Box(0, 0, 0, 10, 10), Box(0, 20, 0, 30, 10)]]


def test_a_second_hit_is_wrong():
    rows = (0, 0.9, 0, 0, 10, 10), (0, 0.8, 0, 0, 10, 9), (0, 0.7, 20, 0, 30, 10)
    scores = voc_scores(found_in([detections(*rows)]), objects_in(TWO), 1)
    # Precisions 1, 1/2, 2/3 at recalls 1/2, 1/2, 1.
    assert scores.map_area == pytest.approx((1 + 2 / 3) / 2)
    assert scores.map_11 == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    # The better box does not win over the higher score.
    worse_first = (0, 0.9, 0, 0, 10, 6), (0, 0.8, 0, 0, 10, 10)
    assert voc_scores(found_in([detections(*worse_first)]), objects_in(TWO), 1).map_area == 0.5


def test_difficult_objects_neither_count_nor_harm():
    truth = [[Box(0, 0, 0, 10, 10), Box(0, 20, 0, 30, 10, difficult=True)]]
    hits = [(0, s, 20, 0, 30, 10) for s in (0.9, 0.8, 0.7)]
    scores = voc_scores(found_in([detections(*hits, (0, 0.5, 0, 0, 10, 10))]), objects_in(truth), 1)
    assert scores.map_11 == scores.map_area == 1.0
    assert scores.objects.tolist() == [1]
    missed = voc_scores(found_in([detections(*hits)]), objects_in(truth), 1)
    assert missed.map_11 == missed.map_area == 0.0
    alone = objects_in([[Box(0, 20, 0, 30, 10, difficult=True)]])
    assert math.isnan(voc_scores(found_in([detections(*hits)]), alone, 1).map_11)


def test_empty_sides():
    nothing = voc_scores(found_in([detections()]), objects_in(TWO), 2)
    assert nothing.ap_11[0] == nothing.ap_area[0] == 0.0
    assert math.isnan(nothing.ap_11[1])
    assert nothing.map_area == 0.0
    strays = found_in([detections((0, 0.5, 0, 0, 9, 9))])
    assert math.isnan(voc_scores(strays, objects_in([[]]), 2).map_11)
    assert math.isnan(voc_scores(found_in([]), objects_in([]), 2).map_11)
    other_image = found_in([detections(), detections((0, 0.9, 0, 0, 10, 10))])
    assert voc_scores(other_image, objects_in([*TWO, []]), 1).map_area == 0.0


def test_the_threshold_is_reached_and_both_conventions():
    truth = objects_in([[Box(0, 0, 0, 9, 9)]])
    # 5 of 10 columns with the last pixel, 4 of 9 without.
    found = found_in([detections((0, 0.9, 0, 0, 4, 9))])
    assert voc_scores(found, truth, 1, inclusive=True).map_area == 1.0
    assert voc_scores(found, truth, 1).map_area == 0.0
    exact = found_in([detections((0, 0.9, 0, 0, 4.5, 9))])
    assert voc_scores(exact, truth, 1).map_area == 1.0


def test_eleven_points_are_rounded_as_by_others():
    # 3 of 10 objects found, all right: reach 0, 0.1 and 0.2; the point at 0.3 is rounded up.
    boxes = [Box(0, 20.0 * n, 0, 20.0 * n + 10, 10) for n in range(10)]
    rows = [(0, 0.9 - 0.1 * n, *corner(box)) for n, box in enumerate(boxes[:3])]
    scores = voc_scores(found_in([detections(*rows)]), objects_in([boxes]), 1)
    assert scores.map_11 == pytest.approx(3 / 11)
    assert scores.map_area == pytest.approx(0.3)


def test_means_of_the_papers_table_1():
    # SSD300 and CFSAM on VOC 2007: the mean of the classes is the printed mAP.
    rows = {
        75.5: "81.2 82.4 72.4 66.0 47.2 84.2 85.1 85.3 57.4 80.9 76.0 82.1 85.9 82.9 77.3 49.9 76.7"
        " 76.7 86.5 73.8",
        78.6: "82.7 85.4 76.1 73.3 52.7 85.4 86.9 88.8 62.2 87.2 76.6 86.1 88.0 85.1 79.3 52.1 78.9"
        " 79.1 88.1 78.1",
    }
    for printed, row in rows.items():
        ap = np.array([float(value) / 100 for value in row.split()])
        scores = VocScores(ap, ap, np.ones(20, dtype=np.int64))
        assert f"{100 * scores.map_11:.1f}" == f"{printed}"


def test_files_for_other_tools(tmp_path):
    found = found_in([detections((1, 0.25, 2, 3, 12.5, 23)), detections((0, 0.5, 0, 0, 4, 4))])
    write_voc_files(tmp_path, found, ["000001", "000002"], ["cat", "dog"], "test")
    assert (tmp_path / "comp4_det_test_dog.txt").read_text() == (
        "000001 0.250000 3.000000 4.000000 12.500000 23.000000\n"
    )
    assert (tmp_path / "comp4_det_test_cat.txt").read_text().startswith("000002 0.5")
    assert coco_results(found, [7, 9], [18, 90]) == [
        {"image_id": 7, "category_id": 90, "bbox": [2.0, 3.0, 10.5, 20.0], "score": 0.25},
        {"image_id": 9, "category_id": 18, "bbox": [0.0, 0.0, 4.0, 4.0], "score": 0.5},
    ]


def test_a_slash_in_the_name_of_a_class_leads_to_no_other_folder(tmp_path):
    found = found_in([detections((0, 0.5, 0, 0, 4, 4))])
    write_voc_files(tmp_path / "found", found, ["a b"], ["../up/er"], "test")
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["comp4_det_test_..%2Fup%2Fer.txt"]
    line = (tmp_path / "found" / "comp4_det_test_..%2Fup%2Fer.txt").read_text()
    assert line.split()[:2] == ["a%20b", "0.500000"], "six words, as VOC's tools read them"


# ---- reference results


def reference(name):
    path = REFERENCES / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def read_rows(folder: Path):
    for image, path in enumerate(sorted(folder.iterdir())):
        for line in path.read_text().split("\n"):
            if line.strip():
                yield image, [float(value) for value in line.split()[1:]]


@pytest.mark.shared
def test_published_voc_case():
    folder = reference("voc_ap_case1")
    found = np.array([(image, *row) for image, row in read_rows(folder / "dets")])
    truth = np.array([(image, *row) for image, row in read_rows(folder / "gts")])
    zeros = np.zeros(len(found), dtype=np.int64)
    detected = Found(found[:, 0].astype(np.int64), zeros, found[:, 1], to_corners(found[:, 2:]))
    objects = Objects(
        truth[:, 0].astype(np.int64),
        np.zeros(len(truth), dtype=np.int64),
        to_corners(truth[:, 1:]),
        np.zeros(len(truth), dtype=np.bool_),
    )
    assert len(truth) == 15
    expected = {
        0.1: (0.3333333333, 0.3371980676),
        0.3: (0.2683982683, 0.2456866804),
        0.5: (0.0303030303, 0.0222222222),
        0.75: (0.0, 0.0),
    }
    for iou, (eleven, area) in expected.items():
        scores = voc_scores(detected, objects, 1, iou=iou, inclusive=True)
        assert scores.map_11 == pytest.approx(eleven, abs=1e-10)
        assert scores.map_area == pytest.approx(area, abs=1e-10)


def to_corners(boxes_xywh):
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], 1)


COCO_CASES = {
    "coco_val2014_fake100": (
        "instances_val2014_100.json",
        "instances_val2014_fakebbox100_results.json",
    ),
    "coco_sampled_gt_area_from_box": ("gt.json", "dets.json"),
    "coco_small": ("gt_dataset.json", "dt_dataset.json"),
}


@pytest.mark.shared
@pytest.mark.parametrize("case", COCO_CASES)
def test_published_coco_cases(case):
    truth, results = (reference(case) / name for name in COCO_CASES[case])
    rows = json.loads(results.read_text())
    if isinstance(rows, dict):
        rows = rows["annotations"]
    document = json.loads((REFERENCES / "expected_pycocotools.json").read_text())
    expected = document[case]["bbox"]
    scores = coco_scores(truth, rows)
    for name, value in scores.items():
        if expected[name] < 0:
            assert math.isnan(value), name
        else:
            assert value == pytest.approx(expected[name], abs=1e-12), name


def test_coco_figures_of_a_hand_made_truth(tmp_path):
    truth = {
        "images": [{"id": 1, "width": 100, "height": 100}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 50, 50], "area": 2500,
             "iscrowd": 0}
        ],
    }  # fmt: skip
    result = coco_results(found_in([detections((0, 0.9, 0, 0, 50, 40))]), [1], [3])
    scores = coco_scores(truth, result)  # IoU 0.8: right at 0.5 to 0.8, 7 of 10 thresholds
    assert scores["AP"] == pytest.approx(0.7)
    assert scores["AP50"] == scores["AP75"] == pytest.approx(1.0)
    assert math.isnan(scores["AP_small"])
    assert coco_scores(truth, [])["AP"] == 0.0
    with pytest.raises(DataError, match="results: image 2 is not among"):
        coco_scores(truth, [{**result[0], "image_id": 2}])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match=r"bad\.json: cannot be read as COCO annotations"):
        coco_scores(tmp_path / "bad.json", [])
