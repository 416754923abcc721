import colorsys
import random

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from xattn.data.colour import distort_colours
from xattn.data.pixels import MEAN, STD, normalise
from xattn.data.rand_augment import RandAugment
from xattn.data.transforms import (
    ClassificationAugment,
    ClassificationEval,
    RandomErasing,
    SegmentationAugment,
    SegmentationEval,
    rng_for,
)
from xattn.structures import IGNORE_INDEX

PINNED = 0.9614306884449887
PLAIN = {"ratio": (1.0, 1.0), "flip": 0.0, "photometric": False, "class_cap": 1.0}


def picture(height=60, width=80, seed=0):
    """An image of random blocks whose red channel is 20 x the class id of the mask."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 11, (-(-height // 10), -(-width // 10)), generator=generator)
    mask = blocks.repeat_interleave(10, 0).repeat_interleave(10, 1)[:height, :width]
    mask = mask.to(torch.uint8)
    noise = torch.randint(0, 256, (2, height, width), generator=generator, dtype=torch.uint8)
    return torch.cat([(mask * 20)[None], noise]), mask


def denormalise(pixels):
    return pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def test_generator_is_a_function_of_its_integers():
    draws = {
        rng_for(seed, epoch, sample).random()
        for seed in (0, 1)
        for epoch in (0, 1)
        for sample in (0, 1)
    }
    assert len(draws) == 8
    assert rng_for(5, 6, 7).random() == rng_for(5, 6, 7).random()
    assert len({rng_for(*numbers).random() for numbers in ((1,), (1, 0), (1, 0, 0))}) == 3
    # Pinned: other numbers would silently change every resumed run.
    assert rng_for(1, 2, 3).random() == pytest.approx(PINNED, abs=1e-15)


@pytest.mark.parametrize("size", [(60, 80), (37, 91), (200, 30)])
def test_segmentation_augment_gives_the_crop_and_repeats_itself(size):
    augment = SegmentationAugment(base=(60, 80), crop=(48, 64))
    image, mask = picture(*size)
    before, state = image.clone(), torch.get_rng_state()
    outputs = [augment(image, mask, rng_for(0, 0, draw)) for draw in (1, 1, 2)]
    assert outputs[0][0].shape == (3, 48, 64)
    assert outputs[0][0].dtype == torch.float32
    assert outputs[0][0].is_contiguous()
    assert outputs[0][1].shape == (48, 64)
    assert outputs[0][1].dtype == torch.uint8
    for first, again, other in zip(*outputs, strict=True):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(image, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_mask_moves_with_the_image():
    augment = SegmentationAugment(base=(60, 80), crop=(40, 40), photometric=False)
    image, mask = picture()
    agreeing = []
    for draw in range(30):
        pixels, target = augment(image, mask, rng_for(0, 0, draw))
        red = denormalise(pixels)[0]
        valid = target != IGNORE_INDEX
        agreeing.append(((red - target * 20.0).abs() < 10)[valid].float().mean().item())
    # Edges of the blocks are blended in the image, not in the mask.
    assert min(agreeing) > 0.8


def test_flip_mirrors_both():
    image, mask = picture(20, 30)
    plain = SegmentationAugment(**{**PLAIN, "base": (20, 30), "crop": (20, 30)})
    flipped = plain.model_copy(update={"flip": 1.0})
    for straight, mirrored in zip(
        plain(image, mask, random.Random(0)), flipped(image, mask, random.Random(0)), strict=True
    ):
        assert torch.equal(straight.flip(-1), mirrored)
    assert torch.equal(plain(image, mask, random.Random(0))[1], mask)


@pytest.mark.parametrize(
    ("stored", "expected"), [((100, 50), (80, 40)), ((50, 100), (40, 80)), ((30, 100), (24, 80))]
)
def test_scale_keeps_the_aspect_ratio_inside_the_base(stored, expected):
    augment = SegmentationAugment(**{**PLAIN, "base": (60, 80), "crop": (90, 90)})
    image, mask = picture(*stored)
    _, target = augment(image, mask, random.Random(0))
    valid = target != IGNORE_INDEX
    limits = (60 / min(stored), 80 / max(stored))
    assert expected == tuple(round(side * min(limits)) for side in stored)
    assert (int(valid.any(1).sum()), int(valid.any(0).sum())) == expected


def test_random_ratio_covers_its_range():
    augment = SegmentationAugment(base=(40, 40), crop=(90, 90), class_cap=1.0, photometric=False)
    image, mask = picture(40, 40)
    sides = [
        int((augment(image, mask, rng_for(0, 0, draw))[1] != IGNORE_INDEX).any(0).sum())
        for draw in range(60)
    ]
    assert 20 <= min(sides) < 25
    assert 75 < max(sides) <= 80


def test_padding_is_the_mean_colour_and_ignored():
    image, mask = picture(20, 30)
    augment = SegmentationAugment(**{**PLAIN, "base": (20, 30), "crop": (32, 32)})
    pixels, target = augment(image, mask, random.Random(0))
    assert torch.equal(target[:20, :30], mask)
    torch.testing.assert_close(pixels[:, :20, :30], normalise(image))
    padded = torch.ones(32, 32, dtype=torch.bool)
    padded[:20, :30] = False
    assert (pixels[:, padded] == 0).all()
    assert (target[padded] == IGNORE_INDEX).all()


def share_of_largest(target):
    counts = torch.bincount(target[target != IGNORE_INDEX], minlength=1)
    return (counts.max() / counts.sum()).item()


def test_crops_avoid_a_class_above_the_cap():
    mask = torch.zeros(40, 80, dtype=torch.uint8)
    mask[:, 40:] = 1
    mask[:10] = IGNORE_INDEX
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    capped = SegmentationAugment(**{**PLAIN, "base": (40, 80), "crop": (40, 20), "class_cap": 0.75})
    free = capped.model_copy(update={"class_cap": 1.0})
    shares, free_shares = (
        np.array(
            [share_of_largest(augment(image, mask, rng_for(0, 0, draw))[1]) for draw in range(200)]
        )
        for augment in (capped, free)
    )
    # 11 of 61 places are good: eleven draws miss them all in 11 % of the cases.
    assert 0.02 < (shares > 0.75).mean() < 0.25
    # Without a cap only crops of one class are drawn again.
    assert (free_shares > 0.75).mean() > 0.4
    assert (free_shares == 1).mean() < 0.1


def test_class_that_covers_just_the_cap_is_too_much():
    """mmsegmentation asks for less than the share."""
    mask = torch.zeros(4, 4, dtype=torch.uint8)
    mask[0] = 1
    augment = SegmentationAugment(**{**PLAIN, "base": (4, 4), "crop": (4, 4), "class_cap": 0.75})
    assert not augment._is_varied(mask)
    mask[1, 0] = 1
    assert augment._is_varied(mask)
    mask[1:] = IGNORE_INDEX
    assert not augment._is_varied(mask)
    assert not augment._is_varied(torch.full_like(mask, IGNORE_INDEX))


@pytest.mark.parametrize("crop", [(50, 20), (20, 50), (50, 50)])
def test_crop_larger_than_the_image_is_padded_where_it_has_to_be(crop):
    image, mask = picture(30, 40)
    augment = SegmentationAugment(**{**PLAIN, "base": (30, 40), "crop": crop})
    pixels, target = augment(image, mask, rng_for(0, 0, 0))
    assert pixels.shape == (3, *crop)
    height, width = min(crop[0], 30), min(crop[1], 40)
    assert int((target != IGNORE_INDEX).sum()) == height * width
    assert (target[:height, :width] != IGNORE_INDEX).all()
    assert (pixels[:, target == IGNORE_INDEX] == 0).all()


def test_colours_change_as_hsv_says():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 6, 6), generator=generator).float()
    image[:, 0, 0], image[:, 0, 1] = 128.0, 0.0  # grey and black have no hue
    script = [
        0.9,  # no brightness
        0.9,  # contrast last
        0.9,  # no contrast
        0.1, 0.7,  # saturation x 1.2
        0.1, 0.9,  # hue + 0.08
    ]  # fmt: skip

    class Scripted(random.Random):
        def random(self):
            return script.pop(0)

    result = distort_colours(image.clone(), Scripted())
    for row in range(6):
        for column in range(6):
            hue, saturation, value = colorsys.rgb_to_hsv(*(image[:, row, column] / 255).tolist())
            rgb = colorsys.hsv_to_rgb((hue + 0.08) % 1, min(1, saturation * 1.2), value)
            expected = 255 * torch.tensor(rgb)
            torch.testing.assert_close(result[:, row, column], expected, atol=0.01, rtol=0)
    assert script == []


def test_brightness_and_contrast_stay_in_range_and_come_in_both_orders():
    grey = torch.linspace(0, 255, 256).expand(3, 1, 256)
    for draw in range(50):
        result = distort_colours(grey.clone(), rng_for(0, 0, draw))
        assert result.min() >= 0
        assert result.max() <= 255
        torch.testing.assert_close(result[0], result[1], atol=1e-3, rtol=0)
    unchanged = [
        torch.equal(distort_colours(grey.clone(), rng_for(0, 0, draw)), grey) for draw in range(400)
    ]
    # Grey has neither hue nor saturation: a quarter keeps brightness and contrast.
    assert 0.18 < sum(unchanged) / 400 < 0.32


@pytest.mark.parametrize(
    ("settings", "stored", "expected"),
    [
        ({"size": (48, 100)}, (60, 80), (48, 100)),
        ({}, (60, 80), (64, 96)),
        ({"multiple": 1}, (61, 83), (61, 83)),
        ({"base": (32, 128)}, (60, 80), (32, 64)),
        ({"base": (32, 128)}, (80, 60), (64, 32)),
        ({"base": (32, 33)}, (60, 80), (32, 64)),
    ],
)
def test_segmentation_eval_resizes_the_image_alone(settings, stored, expected):
    prepare = SegmentationEval(**settings)
    image, mask = picture(*stored)
    pixels, target = prepare(image, mask)
    assert prepare.output_size(stored) == expected
    assert pixels.shape == (3, *expected)
    assert target is mask


def test_evaluation_at_the_stored_size_only_normalises():
    image, mask = picture(64, 96)
    pixels, _ = SegmentationEval()(image, mask)
    torch.testing.assert_close(denormalise(pixels), image.float(), atol=1e-3, rtol=0)


def test_classification_augment_takes_parts_of_the_stated_area():
    augment = ClassificationAugment(size=16, scale=(0.25, 0.25), flip=0.0)
    ramp = torch.arange(100, dtype=torch.uint8).expand(3, 100, 100).contiguous()
    spans = []
    for draw in range(40):
        pixels = denormalise(augment(ramp, rng_for(0, 0, draw)))
        assert pixels.shape == (3, 16, 16)
        spans.append((pixels[0, 8, 15] - pixels[0, 8, 0]).item() * 16 / 15)
    # Half the side, by the square root of the aspect ratio 3/4 to 4/3.
    assert 40 < min(spans) < max(spans) < 62
    flipped = augment.model_copy(update={"flip": 1.0})
    straight, mirrored = (t(ramp, rng_for(0, 0, 1)) for t in (augment, flipped))
    assert torch.equal(straight.flip(-1), mirrored)


def test_classification_augment_repeats_itself_and_jitters():
    image, _ = picture()
    augment = ClassificationAugment(size=24, colour_jitter=0.4)
    state = torch.get_rng_state()
    assert torch.equal(augment(image, rng_for(0, 0, 1)), augment(image, rng_for(0, 0, 1)))
    assert not torch.equal(augment(image, rng_for(0, 0, 1)), augment(image, rng_for(0, 0, 2)))
    plain = augment.model_copy(update={"colour_jitter": 0.0})
    assert not torch.equal(augment(image, rng_for(0, 0, 1)), plain(image, rng_for(0, 0, 1)))
    assert torch.equal(torch.get_rng_state(), state)


def test_classification_augment_of_a_thin_image_takes_its_middle():
    image = torch.zeros(3, 200, 4, dtype=torch.uint8)
    image[:, 97:103] = 255
    pixels = ClassificationAugment(size=4, scale=(1.0, 1.0))(image, random.Random(0))
    assert (denormalise(pixels) > 200).all()


def test_classification_eval_takes_the_centre():
    image = torch.zeros(3, 50, 100, dtype=torch.uint8)
    image[:, :, 25:75] = 255
    pixels = ClassificationEval(size=20, resize=25)(image)
    assert pixels.shape == (3, 20, 20)
    assert (denormalise(pixels) > 250).all()


def test_settings_are_strict_and_frozen():
    with pytest.raises(ValidationError, match="cropp"):
        SegmentationAugment(base=(1, 1), crop=(1, 1), cropp=(1, 1))
    with pytest.raises(ValidationError, match="frozen"):
        SegmentationEval().multiple = 16


def test_parts_have_the_stated_aspect_ratio():
    # Of a ramp over the columns: how many of them a part spans.
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 200, 200).contiguous()
    spans = {}
    for aspect in ((0.5, 0.5), (2.0, 2.0)):
        augment = ClassificationAugment(size=20, scale=(0.1, 0.1), aspect=aspect, flip=0.0)
        pixels = denormalise(augment(ramp, rng_for(0, 0, 0)))
        spans[aspect[0]] = (pixels[0, 10, 15] - pixels[0, 10, 5]).item() * 2
    side = (0.1 * 200**2) ** 0.5
    assert spans[0.5] == pytest.approx(side * 0.5**0.5, rel=0.05)
    assert spans[2.0] == pytest.approx(side * 2**0.5, rel=0.05)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_parts_are_resized_as_pil_does(interpolation):
    image, _ = picture(90, 90)
    settings = {"scale": (1.0, 1.0), "aspect": (1.0, 1.0), "flip": 0.0}
    augment = ClassificationAugment(size=30, interpolation=interpolation, **settings)
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
        (30, 30), getattr(Image.Resampling, interpolation.upper())
    )
    expected = normalise(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
    pixels = augment(image, rng_for(0, 0, 0))
    torch.testing.assert_close(denormalise(pixels), denormalise(expected), atol=1.01, rtol=0)


def erased_box(pixels):
    """Return height and width of where `pixels`, zeros before, are noise."""
    changed = (pixels != 0).all(0)
    rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
    box = changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert box.all()
    assert box.sum() == changed.sum()
    return tuple(box.shape)


def test_erasing_fills_a_rectangle_with_standard_noise():
    erase = RandomErasing(probability=1.0)
    state = torch.get_rng_state()
    shapes, noise = [], []
    for draw in range(200):
        pixels = erase(torch.zeros(3, 60, 60), rng_for(0, 0, draw))
        assert torch.equal(pixels, erase(torch.zeros(3, 60, 60), rng_for(0, 0, draw)))
        shapes.append(erased_box(pixels))
        noise.append(pixels[pixels != 0])
    areas = [height * width / 3600 for height, width in shapes]
    aspects = [height / width for height, width in shapes]
    assert 0.015 < min(areas) < 0.04
    assert 0.28 < max(areas) < 0.35
    assert 0.25 < min(aspects) < 0.5
    assert 2 < max(aspects) < 4
    noise = torch.cat(noise)
    assert noise.mean().abs() < 0.01
    assert noise.std() == pytest.approx(1, abs=0.01)
    assert torch.equal(torch.get_rng_state(), state)


def test_erasing_happens_as_often_as_stated_and_never_whole():
    erased = [
        RandomErasing()(torch.zeros(1, 20, 20), rng_for(0, 0, draw)).any() for draw in range(400)
    ]
    assert 0.18 < sum(erased) / 400 < 0.32
    whole = RandomErasing(probability=1.0, area=(1.0, 1.0), aspect=(1.0, 1.0))
    assert not whole(torch.zeros(3, 20, 20), rng_for(0, 0, 0)).any()


def test_whole_recipe_of_the_pretraining_repeats_itself():
    image, _ = picture()
    plain = ClassificationAugment(size=24)
    augment = ClassificationAugment(size=24, rand_augment={}, random_erasing={"probability": 1.0})
    state = torch.get_rng_state()
    results = [augment(image, rng_for(0, 0, draw)) for draw in (1, 1, 2)]
    assert results[0].shape == (3, 24, 24)
    assert results[0].dtype == torch.float32
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], plain(image, rng_for(0, 0, 1)))
    assert torch.equal(torch.get_rng_state(), state)


def test_jitter_beside_rand_augment_is_refused():
    with pytest.raises(ValidationError, match=r"colour_jitter is 0\.4, expected 0"):
        ClassificationAugment(size=24, colour_jitter=0.4, rand_augment={})


@pytest.mark.parametrize(
    "settings",
    [
        {"aspect": (2.0, 1.0)},
        {"aspect": (0.0, 1.0)},
        {"interpolation": "nearest"},
        {"random_erasing": {"area": (0.0, 0.5)}},
        {"random_erasing": {"probability": 1.5}},
        {"rand_augment": {"magnitude": 11}},
        {"rand_augment": {"magnitude_std": -1}},
        {"rand_augment": {"num_operations": 0}},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        ClassificationAugment(size=8, **settings)


def test_recipe_can_be_written_as_yaml_is_read():
    """params.yaml is validated as strict JSON."""
    augment = ClassificationAugment.model_validate_json(
        """{"size": 224, "aspect": [0.75, 1.3333], "interpolation": "bilinear",
            "rand_augment": {"magnitude": 9, "magnitude_std": 0.5},
            "random_erasing": {"probability": 0.25, "area": [0.02, 0.3333]}}""",
        strict=True,
    )
    assert augment.rand_augment == RandAugment()
    assert ClassificationAugment(size=8).rand_augment is None
    assert ClassificationAugment(size=8).random_erasing is None
