import pytest
import torch
from torch.nn import functional as F

from xattn.losses import classification_cross_entropy, segmentation_cross_entropy
from xattn.structures import IGNORE_INDEX, identity_mean


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 16, 24), generator=generator)
    target[0, :5] = IGNORE_INDEX
    return logits, target


def naive_sum(logits, target):
    """Sum the cross entropy pixel by pixel."""
    large = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
    chances = large.log_softmax(1)
    return -sum(
        chances[image, target[image, row, column], row, column]
        for image in range(2)
        for row in range(16)
        for column in range(24)
        if target[image, row, column] != IGNORE_INDEX
    )


def as_two_steps(logits, target):
    large = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(large, target, ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize("limit", [1, 100, 2**18])
@pytest.mark.parametrize(
    ("small", "large"),
    [((5, 7), (20, 28)), ((5, 7), (15, 28)), ((5, 7), (5, 7)), ((1, 1), (4, 4)), ((5, 7), (18, 26)),
     ((6, 6), (3, 3))],
)  # fmt: skip
def test_enlarging_in_blocks_equals_enlarging_first(monkeypatch, small, large, limit):
    monkeypatch.setattr("xattn.losses._BLOCK_ON_CPU", limit)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, *small, generator=generator, dtype=torch.float64) * 300
    logits = logits.to(memory_format=torch.channels_last).requires_grad_()
    target = torch.randint(4, (3, *large), generator=generator)
    target[torch.rand(3, *large, generator=generator) < 0.3] = IGNORE_INDEX
    expected = as_two_steps(logits, target)
    ours = segmentation_cross_entropy(logits, target, "all", identity_mean)["loss"]
    torch.testing.assert_close(ours * target.numel(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(ours * target.numel(), logits),
        torch.autograd.grad(expected, logits),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_compared_in_full(dtype):
    logits = (torch.randn(2, 150, 8, 8, generator=torch.Generator().manual_seed(0)) * 40).to(dtype)
    target = torch.randint(150, (2, 32, 32), generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = segmentation_cross_entropy(logits, target, "all", identity_mean)["loss"]
    expected = as_two_steps(logits.float(), target) / target.numel()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


def test_normalisation_counts_all_or_valid_pixels(pixels):
    total = naive_sum(*pixels)
    every = segmentation_cross_entropy(*pixels, "all", identity_mean)["loss"]
    valid = segmentation_cross_entropy(*pixels, "valid", identity_mean)["loss"]
    torch.testing.assert_close(every, total / (2 * 16 * 24))
    torch.testing.assert_close(valid, total / (2 * 16 * 24 - 5 * 24))


@pytest.mark.parametrize("normalise", ["all", "valid"])
def test_mean_over_two_ranks_is_the_whole_batch(pixels, normalise):
    logits, target = pixels
    counts = [(target[rank] != IGNORE_INDEX).sum().double() for rank in range(2)]

    def mean_of_both(_):
        return torch.stack(counts).mean()

    whole = segmentation_cross_entropy(logits, target, normalise, identity_mean)["loss"]
    ranks = [
        segmentation_cross_entropy(logits[r : r + 1], target[r : r + 1], normalise, mean_of_both)
        for r in range(2)
    ]
    torch.testing.assert_close(torch.stack([rank["loss"] for rank in ranks]).mean(), whole)


@pytest.mark.parametrize("normalise", ["all", "valid"])
def test_nothing_to_train_on_gives_zero(pixels, normalise):
    logits, target = pixels
    ignored = torch.full_like(target, IGNORE_INDEX)
    loss = segmentation_cross_entropy(logits, ignored, normalise, identity_mean)["loss"]
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0.0
    assert (gradient == 0).all()


def test_label_smoothing_mixes_in_the_uniform_distribution():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    target = torch.tensor([1, 0])
    chances = logits.log_softmax(1)
    expected = -(0.9 * chances[[0, 1], target] + 0.1 * chances.mean(1)).mean()
    torch.testing.assert_close(classification_cross_entropy(logits, target, 0.1)["loss"], expected)


@pytest.mark.parametrize("size", [(16, 24), (13, 19)])
@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_class_ids_may_be_of_any_integer_type(pixels, kind, size):
    logits, target = pixels
    target = target[:, : size[0], : size[1]]
    loss = segmentation_cross_entropy(logits, target.to(kind), "all", identity_mean)["loss"]
    wanted = segmentation_cross_entropy(logits, target, "all", identity_mean)["loss"]
    assert torch.equal(loss, wanted)


def test_a_target_of_fewer_images_is_refused(pixels):
    logits, target = pixels
    with pytest.raises(AssertionError):
        segmentation_cross_entropy(logits, target[:1], "all", identity_mean)


def test_second_derivatives_are_refused_rather_than_wrong(pixels):
    logits, target = pixels
    loss = segmentation_cross_entropy(logits, target, "all", identity_mean)["loss"]
    (slope,) = torch.autograd.grad(loss**2, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
