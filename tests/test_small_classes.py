import json

import numpy as np
import pytest
from typer.testing import CliRunner

import cli
from xattn.evaluate.inference import SegmentationProtocol
from xattn.evaluate.small_classes import SmallClassOptions, count_small, list_file
from xattn.scoring import _small_class_ids
from xattn.structures import IGNORE_INDEX

NAMES = ("ground", "at", "below", "never", "thin")


def mask_of(*parts, size=(64, 256)):
    """Return a mask of class 0 with rectangles (class, top, left, height, width)."""
    mask = np.zeros(size, np.uint8)
    for class_id, top, left, height, width in parts:
        mask[top : top + height, left : left + width] = class_id
    return mask


def listed(masks, **options):
    counted = count_small(masks, NAMES, SmallClassOptions(**options))
    return [entry.name for entry in counted if entry.is_listed]


AT, BELOW = (1, 0, 0, 32, 32), (2, 0, 100, 31, 33)  # 1024 and 1023 px


def test_an_area_of_1024_is_not_small_and_1023_is():
    assert listed([mask_of(AT, BELOW)]) == ["below"]


def test_a_share_of_exactly_60_percent_is_not_enough():
    small, large = (1, 0, 0, 31, 31), (1, 0, 0, 40, 40)
    at = [mask_of(small)] * 3 + [mask_of(large)] * 2
    assert listed(at) == []
    assert listed([*at, mask_of(small)]) == ["at"]
    assert listed(at, share=0.59) == ["at"]
    assert 0.7 * 90 < 63
    assert listed([mask_of(small)] * 63 + [mask_of(large)] * 27, share=0.7) == []


def test_ignored_pixels_and_absent_classes_do_not_count():
    mask = mask_of((IGNORE_INDEX, 0, 0, 5, 5), BELOW)
    counted = count_small(
        [mask, np.full((8, 8), IGNORE_INDEX, np.uint8)], NAMES, SmallClassOptions()
    )
    assert [entry.appearances for entry in counted] == [1, 0, 1, 0, 0]
    assert [entry.is_listed for entry in counted] == [False, False, True, False, False]


def test_a_box_counts_both_sides():
    thin = (4, 0, 0, 2, 40)  # 80 px, but 40 wide
    assert listed([mask_of(thin)]) == ["thin"]
    assert listed([mask_of(thin)], measure="box") == []
    assert listed([mask_of((4, 0, 0, 31, 31))], measure="box") == ["thin"]
    assert listed([mask_of((4, 0, 0, 31, 32))], measure="box") == []


def test_components_hang_together_over_corners_and_specks_are_left_out():
    mask = mask_of((2, 0, 0, 40, 40), (2, 40, 40, 4, 4), (2, 0, 100, 3, 3), (2, 50, 200, 9, 9))
    assert listed([mask]) == []
    options = SmallClassOptions(unit="component")
    assert [(c.appearances, c.small) for c in count_small([mask], NAMES, options)][2] == (3, 2)
    options = SmallClassOptions(unit="component", min_pixels=10)
    assert [(c.appearances, c.small) for c in count_small([mask], NAMES, options)][2] == (2, 1)
    assert listed([mask], unit="component") == ["below"]
    assert listed([mask], unit="component", min_pixels=10) == []
    boxes = SmallClassOptions(unit="component", measure="box", min_pixels=81)
    assert [(c.appearances, c.small) for c in count_small([mask], NAMES, boxes)][2] == (2, 1)


def test_components_are_those_of_a_flood_fill():
    mask = np.random.default_rng(0).integers(0, 3, (20, 23)).astype(np.uint8)
    seen, found = np.zeros(mask.shape, bool), [0, 0, 0]
    for start in np.ndindex(mask.shape):
        if seen[start]:
            continue
        found[mask[start]] += 1
        waiting = [start]
        while waiting:
            row, column = waiting.pop()
            if not (0 <= row < 20 and 0 <= column < 23) or seen[row, column]:
                continue
            if mask[row, column] == mask[start]:
                seen[row, column] = True
                waiting += [(row + y, column + x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    counted = count_small([mask], NAMES, SmallClassOptions(unit="component"))
    assert [entry.appearances for entry in counted][:3] == found


def test_masks_can_be_measured_as_a_model_sees_them():
    mask = mask_of((1, 0, 0, 20, 20), size=(64, 64))
    assert listed([mask]) == ["at"]
    assert listed([mask], resize=SegmentationProtocol(base=(128, 128))) == []


def test_the_list_is_what_evaluate_reads(tmp_path):
    options = SmallClassOptions(share=0.5)
    counted = count_small([mask_of(AT, BELOW, (4, 60, 0, 1, 1))], NAMES, options)
    text = list_file(counted, "tiny/val, 1 image", options)
    assert "# 2 small classes of tiny/val, 1 image\n" in text
    assert "# listed: more than 0.5 of the appearances are small\n" in text
    (tmp_path / "small.txt").write_text(text)
    assert _small_class_ids(str(tmp_path / "small.txt"), NAMES) == [2, 4]


def test_the_command_counts_a_split_and_writes_the_list(project):
    words = ["small-classes", "scenes", "--split", "val", "--out", "small.txt", "--json"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    records = json.loads(done.stdout)
    text = (project / "small.txt").read_text()
    assert "of scenes/val, 6 images" in text
    names = [entry["name"] for entry in records if entry["is_listed"]]
    assert names
    assert {line.split("#")[0].strip() for line in text.splitlines()} - {""} == set(names)
    assert sum(entry["appearances"] for entry in records) > 6


def test_the_command_measures_in_the_size_of_the_evaluation(project):
    outputs = []
    for more in ([], ["--as-evaluated"], ["--unit", "component", "--measure", "box"]):
        words = ["small-classes", "scenes", "--split", "val", *more]
        assert CliRunner().invoke(cli.app, words).exit_code == 0
        outputs.append((project / "small_classes.txt").read_text())
    assert "# masks: as stored" in outputs[0]
    assert "# masks: in the size of: whole image, single scale" in outputs[1]
    assert "# appearance: an 8-connected component of at least 1 px" in outputs[2]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere"], 1, "unknown data set 'nowhere'"),
        (["labels"], 1, "0 of 6 samples have a mask"),
        (["scenes", "--split", "vall"], 1, "vall"),
    ],
)
def test_what_cannot_be_counted_is_said(project, words, code, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["xattn", "small-classes", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code
    assert message in capsys.readouterr().err
