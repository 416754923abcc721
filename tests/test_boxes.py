"""Pictures of boxes: what lies where, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from xattn.errors import DataError
from xattn.report.boxes import draw_boxes, ink_on

NAMES = ["cell", "long \u6a39 name", "dot"]
PALETTE = [(128, 0, 0), (0, 200, 40), (250, 250, 90)]
SIDE = 500
GREY = np.full((SIDE, SIDE, 3), 100, np.uint8)


def drawn(boxes, labels, scores=None, image=GREY, **options):
    picture = draw_boxes(
        image,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        None if scores is None else np.array(scores, np.float32),
        NAMES,
        PALETTE,
        **options,
    )
    return np.asarray(picture)


def bare(*given, **options):
    return drawn(*given, words=False, **options)


def is_colour(picture, index):
    return (picture == PALETTE[index]).all(-1)


def test_the_line_runs_on_the_first_and_the_last_pixels_of_the_box():
    picture = bare([[100, 50, 200, 150]], [1])
    lines = np.argwhere(is_colour(picture, 1))
    assert lines.min(0).tolist() == [50, 100]
    assert lines.max(0).tolist() == [149, 199]
    assert (picture[52:148, 102:198] == 100).all(), "inside is the image"
    outside = picture.copy()
    outside[49:151, 99:201] = 100
    assert (outside == 100).all()


def test_small_pictures_are_enlarged_and_their_boxes_with_them():
    image = np.full((30, 40, 3), 100, np.uint8)
    picture = bare([[10, 5, 20, 25]], [0], image=image)
    assert picture.shape == (360, 480, 3)
    assert np.argwhere(is_colour(picture, 0)).min(0).tolist() == [60, 120]


@pytest.mark.parametrize(("height", "width", "factor"), [(6000, 1, 1), (1200, 4, 3), (1, 6000, 1)])
def test_pictures_are_enlarged_to_a_bounded_height(height, width, factor):
    picture = drawn([[0, 0, width, height]], [1], [0.9], np.zeros((height, width, 3), np.uint8))
    assert picture.shape[1] == max(480, width * factor), "the legend has room"
    assert 0 < picture.shape[0] - height * factor < 100, "the legend"
    assert is_colour(picture, 1)[height * factor // 2, 0]


def test_the_better_score_lies_on_top_and_without_scores_the_smaller_box():
    crossing = [[100, 100, 200, 200], [150, 50, 260, 160]]
    assert is_colour(bare(crossing, [0, 1], [0.9, 0.4]), 0)[100, 150]
    assert is_colour(bare(crossing, [0, 1], [0.4, 0.9]), 1)[100, 150]
    assert is_colour(bare(crossing, [0, 1]), 0)[100, 150]
    assert is_colour(bare(crossing[::-1], [1, 0]), 0)[100, 150]


def test_faint_boxes_are_dashed():
    def share(faint):
        picture = bare([[100, 100, 300, 200]], [2], faint=np.array([faint]))
        return is_colour(picture, 2)[100, 100:300].mean()

    assert share(False) == 1
    assert 0.4 < share(True) < 0.7


CORNERS = [(0, 0, 40, 40), (460, 0, 500, 40), (0, 460, 40, 500), (460, 460, 500, 500)]


@pytest.mark.parametrize("box", [*CORNERS, (0, 0, 500, 500), (0, 484, 500, 500)])
def test_tags_stay_whole_and_inside(box):
    with_tag = drawn([box], [1], [0.5])[:SIDE]
    assert with_tag.shape == GREY.shape
    filled = is_colour(with_tag, 1) & ~is_colour(bare([box], [1], [0.5]), 1)
    middle = drawn([(200, 200, 300, 300)], [1], [0.5])[:SIDE]
    whole = is_colour(middle, 1) & ~is_colour(bare([(200, 200, 300, 300)], [1], [0.5]), 1)
    # Where the tag lies on the box's line, that line's pixels were coloured before.
    assert whole.sum() - 2 * (16 + 150) <= filled.sum() <= whole.sum()


def test_a_tag_covers_no_other_one_and_the_best_has_its_place():
    box = [200, 200, 260, 260]
    alone = drawn([box], [0], [0.97])[:SIDE]
    crowd = drawn([box] * 30, [0] * 30, [0.97, *np.linspace(0.3, 0.9, 29)])[:SIDE]
    tag = np.s_[184:200, 200:270]
    assert (crowd[tag] == alone[tag]).all()
    assert is_colour(alone, 0)[tag].sum() > 400
    assert (crowd[:150] == 100).all(), "no tag went astray"
    assert (crowd[310:] == 100).all()


def test_the_text_of_a_tag_has_contrast_with_every_colour():
    def luminance(colour):
        channels = [part / 255 for part in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot([0.2126, 0.7152, 0.0722], linear) + 0.05

    for colour in np.ndindex(6, 6, 6):
        paint = [51 * part for part in colour]
        low, high = sorted((luminance(paint), luminance(ink_on(paint))))
        assert high / low > 4


def test_a_long_name_is_cut_and_keeps_its_score():
    boxes, labels = np.array([[200.0, 200, 300, 300]]), np.array([0])
    short, long = (
        np.asarray(draw_boxes(GREY, boxes, labels, np.array([0.5]), [name], PALETTE))
        for name in ("W", "W" * 99)
    )
    widths = [np.argwhere(is_colour(picture, 0)[190])[:, 0].size for picture in (short, long)]
    assert widths[0] < widths[1] < 220


def test_the_legend_counts_the_boxes_of_each_class():
    boxes, labels = [[10, 10, 60, 60], [100, 10, 160, 60], [10, 100, 60, 160]], [2, 0, 2]
    full, plain = drawn(boxes, labels), drawn(boxes, labels)[:SIDE]
    assert full.shape[1] == plain.shape[1]
    assert full.shape[0] > plain.shape[0]
    assert (full[: len(plain)] == plain).all()
    below = full[len(plain) :]
    places = [np.argwhere(is_colour(below, index)) for index in (2, 0)]
    assert places[0][:, 1].min() < places[1][:, 1].min(), "most frequent first"
    assert not is_colour(below, 1).any()


def test_without_boxes_it_is_the_image():
    assert (drawn([], [], []) == GREY).all()
    assert (drawn([], []) == GREY).all()


def test_boxes_beyond_the_picture_and_without_area_are_drawn_at_its_border():
    far = [[-50, -50, 30, 30], [490, 490, 900, 900], [600, 600, 700, 700], [50, 50, 50, 50]]
    picture = drawn(far, [0, 1, 1, 2])
    assert picture.shape[1] == SIDE
    assert is_colour(picture, 2)[50, 50]
    assert is_colour(picture, 0)[29, 10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [3]}, r"class id 3, but there are only 3 classes \(0..2\)"),
        ({"labels": [-1]}, "class id -1"),
        ({"labels": [0, 1]}, r"found \(1, 4\) for 2 labels, expected \(N, 4\)"),
        ({"scores": []}, "scores: found 0 for 1 boxes"),
        ({"faint": np.zeros(2, bool)}, "faint: found 2 for 1 boxes"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(DataError, match=message) as error:
        drawn(**{"boxes": [[0, 0, 9, 9]], "labels": [0], **change})
    assert "\n" not in str(error.value)


def test_the_picture_is_an_image_in_colour():
    picture = draw_boxes(GREY, np.zeros((0, 4)), np.zeros(0, int), None, NAMES, PALETTE)
    assert isinstance(picture, Image.Image)
    assert picture.mode == "RGB"
