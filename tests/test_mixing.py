import random

import pytest
import torch
from pydantic import ValidationError
from timm.data.mixup import mixup_target

from xattn.data.mixing import ClassificationMix, soften
from xattn.data.order import mixing_partners
from xattn.data.transforms import rng_for

K = 5


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 20, 30, generator=generator)
    return images, torch.randint(0, K, (8,), generator=generator)


def shares(mixed, images, partners):
    """Return the one share of their own that all images have in `mixed`."""
    others = images[partners]
    share = ((mixed - others) / (images - others)).flatten()
    return share.median().item()


def test_soft_targets_are_those_of_timm():
    target = torch.tensor([0, 4, 2, 2])
    for share in (0.0, 0.3, 1.0):
        for smoothing in (0.0, 0.1):
            soft = soften(target, K, smoothing)
            ours = torch.lerp(soft.flip(0), soft, share)
            theirs = mixup_target(target, K, share, smoothing)
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_mixup_blends_images_and_targets_by_one_share(batch):
    images, target = batch
    partners = [7, 6, 5, 4, 3, 2, 1, 0]
    mix = ClassificationMix(cutmix=0.0, label_smoothing=0.1)
    for step in range(20):
        mixed, soft = mix(images, target, K, partners, rng_for(0, step))
        share = shares(mixed, images, partners)
        expected = images * share + images.flip(0) * (1 - share)
        torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(soft, mixup_target(target, K, share, 0.1), atol=1e-4, rtol=0)


def test_cutmix_pastes_one_box_and_counts_its_pixels(batch):
    images, target = batch
    partners = [1, 0, 3, 2, 5, 4, 7, 6]
    mix = ClassificationMix(mixup=0.0, label_smoothing=0.0)
    areas = []
    for step in range(200):
        mixed, soft = mix(images, target, K, partners, rng_for(0, step))
        pasted = (mixed != images).all(1)
        assert (pasted == pasted[0]).all()
        assert torch.equal(mixed[:, :, pasted[0]], images[partners][:, :, pasted[0]])
        areas.append(pasted[0].float().mean().item())
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        assert torch.equal(pasted[0], rows[:, None] & columns[None])
        own = soften(target, K, 0.0)
        expected = (1 - areas[-1]) * own + areas[-1] * own[partners]
        torch.testing.assert_close(soft, expected, atol=1e-5, rtol=0)
    assert min(areas) < 0.05
    assert max(areas) > 0.7
    # Beta(1, 1) is even: half of the image on average, less what sticks out of it.
    assert 0.25 < sum(areas) / len(areas) < 0.45


def test_inputs_stay_and_the_generator_alone_decides(batch):
    images, target = batch
    before, state = images.clone(), torch.get_rng_state()
    mix, partners = ClassificationMix(), list(range(7, -1, -1))
    for step in range(10):
        first, again = (mix(images, target, K, partners, rng_for(0, step)) for _ in range(2))
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_sample_that_is_its_own_partner_stays_as_it_is(batch):
    images, target = batch
    for step in range(20):
        mixed, soft = ClassificationMix()(images, target, K, range(8), rng_for(0, step))
        assert torch.equal(mixed, images)
        assert torch.equal(soft, soften(target, K, 0.1))


def test_kinds_come_as_often_as_stated(batch):
    images, target = batch
    partners = list(range(7, -1, -1))

    def kinds(mix):
        counts = {"none": 0, "mixup": 0, "cutmix": 0}
        for step in range(400):
            mixed, _ = mix(images, target, K, partners, rng_for(3, step))
            kept = (mixed == images).float().mean().item()
            counts["none" if kept == 1 else "mixup" if kept < 0.01 else "cutmix"] += 1
        return counts

    default = kinds(ClassificationMix())
    assert 150 < default["mixup"] < 250
    rare = kinds(ClassificationMix(probability=0.25, switch=0.2))
    assert 60 < rare["mixup"] + rare["cutmix"] < 140
    assert rare["cutmix"] < rare["mixup"] / 2


def test_mixup_share_follows_its_beta_distribution():
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    target = torch.tensor([0, 1])
    mix = ClassificationMix(cutmix=0.0)
    drawn = [mix(images, target, 2, [1, 0], rng_for(0, s))[0][1, 0, 0, 0] for s in range(3000)]
    drawn = torch.stack(drawn)
    assert drawn.mean() == pytest.approx(0.5, abs=0.02)
    assert drawn.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.006)


@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_any_number_of_ranks_mixes_the_same(world):
    generator = torch.Generator().manual_seed(1)
    size, partitions, step = 36, 12, 5
    images = torch.randn(size, 3, 6, 6, generator=generator)
    target = torch.randint(0, K, (size,), generator=generator)
    mix = ClassificationMix()
    partners = mixing_partners(step, size, partitions)
    whole = mix(images, target, K, partners, rng_for(0, step))
    for rank in range(world):
        own = [i for i in range(size) if (step * size + i) % world == rank]
        partners = mixing_partners(step, size, partitions, rank, world)
        part = mix(images[own], target[own], K, partners, rng_for(0, step))
        for ours, theirs in zip(part, whole, strict=True):
            assert torch.equal(ours, theirs[own])


def test_targets_sum_to_one_and_settings_are_checked(batch):
    images, target = batch
    partners = random.Random(0).sample(range(8), 8)
    for step in range(20):
        _, soft = ClassificationMix()(images, target, K, partners, rng_for(0, step))
        torch.testing.assert_close(soft.sum(1), torch.ones(8))
    with pytest.raises(ValidationError, match="at least one above 0"):
        ClassificationMix(mixup=0.0, cutmix=0.0)
    with pytest.raises(ValidationError, match="label_smoothing"):
        ClassificationMix(label_smoothing=1.0)
