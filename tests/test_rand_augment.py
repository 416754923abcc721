"""RandAugment against timm's on PIL images."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_augment
from torch.nn import functional as F

from xattn.data.pixels import MEAN
from xattn.data.rand_augment import OPERATIONS, RandAugment, apply_operation
from xattn.data.transforms import rng_for

TIMM_NAMES = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "saturation": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "rotate": "Rotate",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
FILL = tuple(round(value) for value in MEAN)
SIGNED = {"saturation", "contrast", "brightness", "sharpness"} | set(OPERATIONS[10:])


@pytest.fixture(scope="module")
def image():
    generator = torch.Generator().manual_seed(0)
    coarse = 255 * torch.rand(1, 3, 7, 9, generator=generator)
    smooth = F.interpolate(coarse, (70, 90), mode="bicubic")[0]
    noise = 8 * torch.randn(3, 70, 90, generator=generator)
    return (smooth + noise).clamp(0, 255).to(torch.uint8)


def by_timm(image, name, magnitude, interpolation):
    """Return timm's results with both signs that it draws."""
    resample = getattr(Image.Resampling, interpolation.upper())
    hparams = {"img_mean": FILL, "interpolation": resample}
    operation = timm_augment.AugmentOp(TIMM_NAMES[name], 1.0, magnitude, hparams)
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    results = {}
    for seed in range(20):
        random.seed(seed)
        pixels = np.array(operation(pil))
        results[pixels.tobytes()] = torch.from_numpy(pixels).permute(2, 0, 1)
    return list(results.values())


def test_operations_are_those_of_timm():
    by_name = timm_augment.rand_augment_transform("rand-m9-mstd0.5-inc1")
    assert sorted(TIMM_NAMES[name] for name in OPERATIONS) == sorted(op.name for op in by_name.ops)
    ours, theirs = RandAugment(), by_name.ops[0]
    assert ours.num_operations == by_name.num_layers
    assert ours.probability == theirs.prob
    assert ours.magnitude == theirs.magnitude
    assert ours.magnitude_std == theirs.magnitude_std


@pytest.mark.parametrize("magnitude", [0, 2.5, 6, 9, 9.9])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_gives_what_timm_gives(image, name, magnitude):
    state = random.getstate()
    theirs = by_timm(image, name, magnitude, "bilinear")
    random.setstate(state)
    ours = [apply_operation(name, image, sign * magnitude / 10, "bilinear") for sign in (1, -1)]
    if name in SIGNED and magnitude > 0:
        assert not torch.equal(*ours)
    else:
        assert torch.equal(*ours)
    assert len(theirs) == len({result.numpy().tobytes() for result in ours})
    for result in ours:
        assert result.dtype == torch.uint8
        apart = [(result.int() - other.int()).abs().max().item() for other in theirs]
        assert min(apart) <= 1


@pytest.mark.parametrize("name", OPERATIONS[10:])
def test_bicubic_moves_are_close_to_timm(image, name):
    state = random.getstate()
    theirs = by_timm(image, name, 9, "bicubic")
    random.setstate(state)
    for sign in (1, -1):
        result = apply_operation(name, image, sign * 0.9).float()
        apart = [(result - other.float()).abs() for other in theirs]
        nearest = min(apart, key=lambda difference: difference.mean().item())
        assert nearest.mean() < 1
        assert nearest.max() < 10


def test_no_operation_fails_or_blackens_at_the_ends(image):
    for name in OPERATIONS:
        for strength in (-1.0, 0.0, 1.0):
            result = apply_operation(name, image, strength)
            assert result.shape == image.shape
            assert result.any()


def test_signed_operations_are_mirror_images(image):
    """Moves to one side are those to the other of the mirrored image."""
    for name in ("translate_x", "rotate"):
        there = apply_operation(name, image, 0.5, "bilinear").int()
        mirrored = apply_operation(name, image.flip(-1), -0.5, "bilinear").flip(-1).int()
        # The border belongs to the image on one side and not on the other.
        assert ((there - mirrored).abs() > 1).float().mean() < 0.02


def test_draws_repeat_leave_the_input_and_follow_the_probability(image):
    before, state = image.clone(), torch.get_rng_state()
    augment = RandAugment()
    results = [augment(image, "bicubic", rng_for(0, 0, draw)) for draw in range(200)]
    assert torch.equal(results[3], augment(image, "bicubic", rng_for(0, 0, 3)))
    assert torch.equal(image, before)
    assert torch.equal(torch.get_rng_state(), state)
    unchanged = sum(torch.equal(result, image) for result in results) / 200
    assert 0.17 < unchanged < 0.36  # a quarter, and solarize_add or equalize may change little
    never = RandAugment(probability=0.0)
    assert torch.equal(never(image, "bicubic", rng_for(0, 0, 0)), image)


def test_magnitude_is_drawn_around_its_mean_and_kept_in_range():
    """Brightness of a grey image tells the factor; of 15 operations it comes often enough."""
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    augment = RandAugment(num_operations=1, probability=1.0)
    values = {int(augment(grey, "bilinear", rng_for(0, 0, d))[0, 0, 0]) for d in range(2000)}
    brighter = [value for value in values if 165 < value <= 190]
    assert len(brighter) > 5
    assert max(brighter) == 190
    still = augment.model_copy(update={"magnitude_std": 0.0})
    values = {int(still(grey, "bilinear", rng_for(0, 0, d))[0, 0, 0]) for d in range(500)}
    assert [value for value in values if 165 < value <= 190] == [181]
