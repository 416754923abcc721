import pytest
import torch
from pydantic import ValidationError
from torchvision.ops import box_iou

from xattn.data.augment_detection import DetectionAugment, DetectionEval
from xattn.data.pixels import MEAN, STD, normalise
from xattn.data.transforms import rng_for

STILL = {"photometric": False, "zoom_out": 0.0, "min_ious": (), "flip": 0.0}
NO_BOXES = torch.zeros(0, 4)


def scene(height=80, width=120, count=6, seed=0):
    """A black image with bright squares, each with its own shade of red, and their boxes."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    boxes = []
    for i in range(count):
        # A grid of three columns, so that no object hides another.
        cell_height, cell_width = height // (-(-count // 3)), width // 3
        top, left = i // 3 * cell_height, i % 3 * cell_width
        y1 = top + int(torch.randint(0, cell_height // 3, (), generator=generator))
        x1 = left + int(torch.randint(0, cell_width // 3, (), generator=generator))
        y2, x2 = y1 + cell_height // 2, x1 + cell_width // 2
        image[0, y1:y2, x1:x2] = 250 - 20 * i
        boxes.append([x1, y1, x2, y2])
    return image, torch.tensor(boxes, dtype=torch.float32)


def denormalise(pixels):
    return pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def test_every_setting_off_only_resizes():
    image, boxes = scene()
    pixels, moved, kept = DetectionAugment(size=40, **STILL)(image, boxes, rng_for(0, 0, 0))
    shown, scaled = DetectionEval(size=40)(image, boxes)
    torch.testing.assert_close(denormalise(pixels), denormalise(shown), atol=0.51, rtol=0)
    assert pixels.shape == (3, 40, 40)
    torch.testing.assert_close(scaled, moved)
    torch.testing.assert_close(moved, boxes * torch.tensor([40 / 120, 40 / 80] * 2))
    assert kept.tolist() == list(range(6))
    assert kept.dtype == torch.int64


def test_flip_mirrors_image_and_boxes():
    image, boxes = scene()
    plain = DetectionAugment(size=40, **STILL)
    flipped = plain.model_copy(update={"flip": 1.0})
    pixels, moved, _ = plain(image, boxes, rng_for(0, 0, 0))
    mirrored, boxes_mirrored, _ = flipped(image, boxes, rng_for(0, 0, 0))
    assert torch.equal(pixels.flip(-1), mirrored)
    torch.testing.assert_close(boxes_mirrored[:, 0], 40 - moved[:, 2])
    torch.testing.assert_close(boxes_mirrored[:, 2], 40 - moved[:, 0])
    assert torch.equal(boxes_mirrored[:, 1::2], moved[:, 1::2])


def test_boxes_move_with_their_objects():
    """The object's shade says which box it is, wherever patch, canvas and flip have put it."""
    image, boxes = scene()
    augment = DetectionAugment(size=200, photometric=False)
    seen = 0
    for draw in range(60):
        pixels, moved, kept = augment(image, boxes, rng_for(0, 0, draw))
        red = denormalise(pixels)[0]
        assert (moved >= 0).all()
        assert (moved <= 200).all()
        assert (moved[:, 2:] > moved[:, :2]).all()
        assert kept.tolist() == sorted(set(kept.tolist()))
        for box, index in zip(moved.tolist(), kept.tolist(), strict=True):
            x1, y1, x2, y2 = box
            if min(x2 - x1, y2 - y1) < 12:
                continue  # resized without antialiasing: only the middle is sure
            inner = red[round(y1) + 4 : round(y2) - 4, round(x1) + 4 : round(x2) - 4]
            assert (inner - (250 - 20 * index)).abs().max() < 3
            seen += 1
    assert seen > 100


def test_zoom_out_lays_the_image_on_the_mean_colour():
    image, boxes = scene()
    augment = DetectionAugment(size=160, **{**STILL, "zoom_out": 1.0})
    factors = []
    for draw in range(100):
        pixels, moved, kept = augment(image, boxes, rng_for(0, 0, draw))
        assert len(kept) == 6
        shrunk = (moved[:, 2:] - moved[:, :2]) / (boxes[:, 2:] - boxes[:, :2])
        factors.append((160 / 120 / shrunk[0, 0]).item())
        padded = (pixels.abs() < 1e-4).all(0).float().mean().item()
        assert padded == pytest.approx(1 - 1 / factors[-1] ** 2, abs=0.05)
    assert 1 <= min(factors) < 1.3
    assert 3.7 < max(factors) <= 4.01


@pytest.mark.parametrize("min_iou", [0.0, 0.3, 0.7, 0.9])
def test_patch_overlaps_an_object_whose_centre_it_holds(min_iou):
    boxes = scene(count=3)[1]
    boxes[0] = torch.tensor([5.0, 5.0, 100.0, 70.0])  # large enough for any patch
    augment = DetectionAugment(size=50, min_ious=(min_iou,))
    shapes, whole = [], 0
    for draw in range(80):
        window = augment._choose_patch((0, 0, 120, 80), boxes, rng_for(0, 0, draw))
        if window == (0, 0, 120, 80):
            whole += 1
            continue
        x1, y1, x2, y2 = window
        shapes.append((x2 - x1, y2 - y1))
        assert 0 <= x1 < x2 <= 120
        assert 0 <= y1 < y2 <= 80
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        low, high = torch.tensor([x1, y1]), torch.tensor([x2, y2])
        inside = ((centres > low) & (centres < high)).all(1)
        overlap = box_iou(torch.tensor([window]).float(), boxes)[0]
        assert overlap[inside].max() >= min_iou
    # Half of the draws, by equal chance; the other half too where no patch fits in 50 tries.
    assert 20 < whole < (60 if min_iou < 0.8 else 80)
    for width, height in shapes:
        assert 0.5 <= width / height <= 2
        assert width >= int(0.3 * 120)
        assert height >= int(0.3 * 80)
    if min_iou == 0:
        assert min(width * height for width, height in shapes) < 0.25 * 120 * 80


def test_boxes_are_clipped_to_the_patch_and_those_centred_outside_go():
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 60, 60], [50, 50, 100, 100], [90, 0, 100, 10]])
    augment = DetectionAugment(size=50, **{**STILL, "min_ious": (0.0,)})
    dropped = clipped = 0
    for draw in range(100):
        rng = rng_for(0, 0, draw)
        rng.random()  # as __call__ draws for the canvas
        x1, y1, x2, y2 = augment._choose_patch((0, 0, 100, 100), boxes, rng)
        _, moved, kept = augment(image, boxes, rng_for(0, 0, draw))
        expected, indices = [], []
        for i, (a, b, c, d) in enumerate(boxes.tolist()):
            if x1 < (a + c) / 2 < x2 and y1 < (b + d) / 2 < y2:
                corners = [max(a, x1) - x1, max(b, y1) - y1, min(c, x2) - x1, min(d, y2) - y1]
                scale = [50 / (x2 - x1), 50 / (y2 - y1)] * 2
                expected.append([v * s for v, s in zip(corners, scale, strict=True)])
                indices.append(i)
        assert kept.tolist() == indices
        torch.testing.assert_close(moved, torch.tensor(expected), atol=1e-3, rtol=0)
        dropped += len(indices) < 3
        clipped += bool((moved == 0).any())
    assert dropped > 10
    assert clipped > 10


def test_image_without_boxes_is_shown_whole():
    image, _ = scene()
    augment = DetectionAugment(size=40)
    for draw in range(30):
        pixels, boxes, kept = augment(image, NO_BOXES, rng_for(0, 0, draw))
        assert pixels.shape == (3, 40, 40)
        assert pixels.isfinite().all()
        assert boxes.shape == (0, 4)
        assert kept.shape == (0,)
    pixels, _, _ = DetectionAugment(size=40, **{**STILL, "min_ious": (0.9,)})(
        image, NO_BOXES, rng_for(0, 0, 0)
    )
    expected = DetectionEval(size=40).prepare(image)
    torch.testing.assert_close(denormalise(pixels), denormalise(expected), atol=0.51, rtol=0)


def test_boxes_without_area_or_outside_go_and_never_choose_the_patch():
    image, boxes = scene(count=3)
    bad = torch.tensor(
        [[10.0, 10, 10, 40], [30, 30, 20, 40], [200, 0, 300, 50], [-9, -9, 0, 0], [-5, 70, 20, 99]]
    )
    augment = DetectionAugment(size=60, **STILL)
    _, moved, kept = augment(image, torch.cat([bad, boxes]), rng_for(0, 0, 0))
    assert kept.tolist() == [4, 5, 6, 7]  # the last of the bad ones is partly in the image
    torch.testing.assert_close(moved[0], torch.tensor([0.0, 70 * 60 / 80, 20 / 2, 60.0]))
    full = DetectionAugment(size=60)
    for draw in range(30):
        pixels, moved, kept = full(image, bad[:4], rng_for(0, 0, draw))
        assert len(moved) == len(kept) == 0
        assert pixels.isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2), (500, 7)])
def test_odd_images_give_a_result(size):
    height, width = size
    image = torch.full((3, height, width), 200, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, width, height], [0.0, 0.0, width * 1e-7, height]])
    augment = DetectionAugment(size=30, swap_channels=0.5)
    for draw in range(30):
        pixels, moved, kept = augment(image, boxes, rng_for(0, 0, draw))
        assert pixels.shape == (3, 30, 30)
        assert pixels.isfinite().all()
        assert len(moved) == len(kept)
        assert (moved[:, 2:] > moved[:, :2]).all()
        assert len(kept) >= 1


def test_colours_change_in_the_object_and_not_on_the_canvas():
    image = torch.full((3, 40, 40), 90, dtype=torch.uint8)
    augment = DetectionAugment(size=80, **{**STILL, "photometric": True, "zoom_out": 1.0})
    changed = 0
    for draw in range(20):
        pixels, moved, _ = augment(image, torch.tensor([[0.0, 0, 40, 40]]), rng_for(0, 0, draw))
        x1, y1, x2, y2 = moved[0].round().int().tolist()
        value = denormalise(pixels)[:, (y1 + y2) // 2, (x1 + x2) // 2]
        changed += bool((value - 90).abs().max() > 1)
        outside = pixels.clone()
        outside[:, max(y1 - 1, 0) : y2 + 1, max(x1 - 1, 0) : x2 + 1] = 0
        assert outside.abs().max() < 1e-4
    assert changed > 8


def test_channels_are_swapped_as_often_as_stated():
    image = torch.tensor([10, 100, 200], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8)
    augment = DetectionAugment(size=8, **STILL, swap_channels=0.5)
    orders = [
        tuple(denormalise(augment(image, NO_BOXES, rng_for(0, 0, d))[0])[:, 4, 4].round().tolist())
        for d in range(300)
    ]
    assert len(set(orders)) == 6
    assert 0.5 < orders.count((10, 100, 200)) / 300 < 0.67  # one in six swaps changes nothing


def test_results_repeat_and_inputs_stay():
    image, boxes = scene()
    before, boxes_before, state = image.clone(), boxes.clone(), torch.get_rng_state()
    augment = DetectionAugment(size=50, swap_channels=0.5)
    for draw in range(20):
        first, again = (augment(image, boxes, rng_for(0, 0, draw)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert first[0].is_contiguous()
        assert first[0].dtype == first[1].dtype == torch.float32
    assert torch.equal(image, before)
    assert torch.equal(boxes, boxes_before)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_stretches_the_image():
    image, _ = scene(64, 64)
    torch.testing.assert_close(DetectionEval(size=64).prepare(image), normalise(image))


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 0},
        {"max_zoom": 0.5},
        {"min_ious": (1.5,)},
        {"patch": (0.0, 1.0)},
        {"patch": (0.5, 1.5)},
        {"patch_aspect": (2.0, 0.5)},
        {"tries": 0},
        {"flip": -0.1},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        DetectionAugment(**{"size": 8, **settings})
