"""Windows, scales and mirror images: where they lie, what they weigh, and that sharing them out
among batches or ranks changes nothing."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from xattn.data.transforms import SegmentationEval
from xattn.evaluate.boundary import BoundaryConfig
from xattn.evaluate.inference import (
    PLAIN,
    SegmentationProtocol,
    SlidingWindow,
    metrics_of,
    score_segmentation,
    segment,
    slide,
    window_starts,
)
from xattn.evaluate.segmentation import SegmentationMeter, distance_crop
from xattn.structures import IGNORE_INDEX, Batch, Recipe, identity_mean

K = 4
CPU = torch.device("cpu")


def recipe_of(model: nn.Module) -> Recipe:
    def decode(outputs: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(outputs, size, mode="bilinear", align_corners=False)

    return Recipe(model.eval(), lambda *_: {}, decode, "segmentation")


@pytest.fixture
def local() -> Recipe:
    """A model whose answer for a pixel depends on that pixel alone."""
    torch.manual_seed(0)
    return recipe_of(nn.Conv2d(3, K, 1))


@pytest.fixture
def wide() -> Recipe:
    """A model that looks around, at a quarter of the resolution."""
    torch.manual_seed(0)
    return recipe_of(nn.Conv2d(3, K, 7, stride=4, padding=3))


def photos(count: int = 2, size: tuple[int, int] = (50, 70)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, *size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("length", "crop", "stride", "starts"),
    [
        (2048, 1024, 768, [0, 768, 1024]),  # Cityscapes, spec HILA 5.1
        (1024, 1024, 768, [0]),
        (1792, 1024, 768, [0, 768]),
        (683, 512, 341, [0, 171]),
        (853, 512, 341, [0, 341]),
        (854, 512, 341, [0, 341, 342]),
        (300, 512, 341, [0]),
    ],
)
def test_windows_begin_where_mmsegmentation_has_them(
    length: int, crop: int, stride: int, starts: list[int]
) -> None:
    assert window_starts(length, crop, stride) == starts


@pytest.mark.parametrize("size", [(50, 70), (32, 32), (20, 90), (33, 40)])
def test_windows_cover_every_pixel_within_the_image(size: tuple[int, int]) -> None:
    seen = torch.zeros(size)
    for place in SlidingWindow(crop=(32, 40), stride=(20, 25)).places(size):
        part = seen[place]
        assert part.shape == (min(32, size[0]), min(40, size[1]))
        part += 1
    assert seen.min() >= 1


def test_windows_of_a_local_model_are_the_whole_image(local: Recipe) -> None:
    images = torch.randn(2, 3, 50, 70)
    whole = local.model(images)
    for batch in (1, 3, 100):
        window = SlidingWindow(crop=(32, 40), stride=(20, 25), batch=batch)
        assert torch.allclose(slide(local, images, window), whole, atol=1e-6)


def test_overlaps_are_averaged_by_their_counts() -> None:
    """Each window answers with its mean: 7 columns in windows 0..3, 2..5 and 3..6."""

    class Mean(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, :1].mean(dim=(2, 3), keepdim=True).expand(-1, 1, *images.shape[2:])

    image = torch.arange(7.0).expand(1, 3, 5, 7)
    found = slide(recipe_of(Mean()), image, SlidingWindow(crop=(5, 4), stride=(1, 2)))
    left, middle, right = 1.5, 3.5, 4.5
    expected = [left, left, (left + middle) / 2, 8 / 3 + 1 / 2, (middle + right) / 2, 4, right]
    assert expected[3] == pytest.approx((left + middle + right) / 3)
    assert found[0, 0].tolist() == [pytest.approx(expected)] * 5


def test_the_size_of_chunks_and_batches_makes_no_difference(wide: Recipe) -> None:
    images = torch.randn(3, 3, 50, 70)
    window = {"crop": (32, 40), "stride": (20, 25)}
    together = slide(wide, images, SlidingWindow(**window, batch=50))
    alone = [slide(wide, image[None], SlidingWindow(**window, batch=1)) for image in images]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_windows_at_once_are_limited(local: Recipe) -> None:
    seen: list[int] = []
    local.model.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    slide(local, torch.randn(2, 3, 50, 70), SlidingWindow(crop=(32, 40), stride=(20, 25), batch=5))
    assert seen == [4, 4, 4]  # 2 x 3 windows of two images


def test_a_windowed_prediction_has_the_original_size(local: Recipe) -> None:
    protocol = SegmentationProtocol(
        base=(40, 60), multiple=1, window=SlidingWindow(crop=(32, 32), stride=(24, 24))
    )
    shown = torch.stack([protocol.prepare(photo) for photo in photos()])
    found = segment(local, shown, (50, 70), protocol)
    assert shown.shape[-2:] == (40, 56)
    whole = F.interpolate(local.model(shown), (50, 70), mode="bilinear", align_corners=False)
    assert torch.allclose(found, whole, atol=1e-5)


def test_the_plain_protocol_is_the_model_bit_for_bit(wide: Recipe) -> None:
    assert PLAIN.num_views == 1
    assert PLAIN.of_loader == PLAIN
    photo = photos(1)[0]
    for settings in ({}, {"base": (40, 60)}, {"size": (64, 64)}, {"base": (33, 77), "multiple": 8}):
        plain, before = SegmentationProtocol(**settings), SegmentationEval(**settings)
        assert torch.equal(plain.prepare(photo), before.prepare(photo))
        shown = plain.prepare(photo)[None]
        assert torch.equal(
            segment(wide, shown, (50, 70), plain), wide.decode(wide.model(shown), (50, 70))
        )


def test_views_are_averaged_as_probabilities_or_as_logits(wide: Recipe) -> None:
    settings = {"base": (40, 60), "multiple": 8, "ratios": (0.5, 1.0, 1.75), "flip": True}
    protocol = SegmentationProtocol(**settings)
    assert protocol.num_views == 6
    assert protocol.of_loader is None
    views = []
    for ratio in (0.5, 1.0, 1.75):
        resized = SegmentationEval(base=(int(40 * ratio), int(60 * ratio)), multiple=8)
        shown = torch.stack([resized.prepare(photo) for photo in photos()])
        views.append(wide.decode(wide.model(shown), (50, 70)))
        views.append(wide.decode(wide.model(shown.flip(-1)), (50, 70)).flip(-1))
    found = segment(wide, photos(), (50, 70), protocol)
    expected = torch.stack([view.softmax(dim=1) for view in views]).mean(dim=0)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found.sum(dim=1), torch.ones(2, 50, 70), atol=1e-5)
    logits = segment(wide, photos(), (50, 70), SegmentationProtocol(**settings, average="logits"))
    assert torch.allclose(logits, torch.stack(views).mean(dim=0), atol=1e-5)


@pytest.mark.parametrize("window", [None, SlidingWindow(crop=(32, 40), stride=(17, 23))])
def test_the_mirror_image_gets_the_mirrored_answer(
    wide: Recipe, window: SlidingWindow | None
) -> None:
    # 72 columns in windows of 40 every 32 lie symmetrically.
    if window is not None:
        window = SlidingWindow(crop=(32, 40), stride=(16, 32))
    protocol = SegmentationProtocol(ratios=(1.0,), flip=True, multiple=1, window=window)
    images = photos(1, (48, 72))
    straight = segment(wide, images, (48, 72), protocol)
    mirrored = segment(wide, images.flip(-1), (48, 72), protocol)
    assert torch.allclose(mirrored.flip(-1), straight, atol=1e-5)


def test_a_batch_of_views_is_its_images_one_by_one(wide: Recipe) -> None:
    protocol = SegmentationProtocol(base=(40, 60), ratios=(0.75, 1.25), flip=True)
    together = segment(wide, photos(3), (50, 70), protocol)
    alone = [segment(wide, photo[None], (50, 70), protocol) for photo in photos(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)


def test_sizes_of_views() -> None:
    ade = SegmentationProtocol(base=(512, 2048))
    assert ade.output_size((512, 683)) == (512, 704)
    assert ade.output_size((512, 800), 0.75) == (384, 608)  # 600 columns, rounded up to 32s
    assert SegmentationProtocol(multiple=1).output_size((101, 51), 0.5) == (51, 26)
    assert SegmentationProtocol(size=(64, 96)).output_size((10, 10), 0.5) == (32, 48)
    square = SegmentationProtocol(base=(512, 2048), multiple=1, shortest=512)
    assert square.output_size((400, 600), 1.5) == (768, 1152)
    assert square.output_size((400, 600), 0.5) == (512, 768)
    assert square.output_size((200, 1600)) == (512, 4096)  # 256 x 2048 without


def test_settings_that_cannot_be_meant() -> None:
    with pytest.raises(ValidationError, match=r"stride is \[40, 20\], expected at most crop"):
        SlidingWindow(crop=(32, 32), stride=(40, 20))
    with pytest.raises(ValidationError, match="expected none beside size"):
        SegmentationProtocol(size=(64, 64), shortest=32)
    with pytest.raises(ValidationError):
        SegmentationProtocol(ratios=())


def test_the_protocol_in_words() -> None:
    assert PLAIN.describe() == "whole image, single scale (multiple 32)"
    window = SlidingWindow(crop=(1024, 1024), stride=(768, 768))
    city = SegmentationProtocol(ratios=(0.5, 1.75), flip=True, window=window, multiple=1)
    assert city.describe() == (
        "windows of 1024 x 1024 every 768 x 768 px, logits averaged, "
        "scales 0.5, 1.75 and mirrored, probabilities averaged (multiple 1)"
    )


@pytest.mark.parametrize(
    ("crop", "rows", "columns"),
    [
        ((1024, 2048), (0, 1024), (0, 2048)),
        ((624, 1248), (150, 774), (400, 1648)),
        ((424, 848), (250, 674), (600, 1448)),
        ((224, 448), (350, 574), (800, 1248)),
        ((1000, 2000), (0, 1000), (24, 2024)),
    ],
)
def test_distance_crops(
    crop: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    assert distance_crop((1024, 2048), crop) == (slice(*rows), slice(*columns))


def draw_batches(uint8: bool) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    batches = []
    for number in range(7):
        target = torch.randint(K, (1, 1, 13, 18), generator=generator).float()
        target = F.interpolate(target, (50, 70))[0].long()
        target[torch.rand(1, 50, 70, generator=generator) < 0.1 * number] = IGNORE_INDEX
        image = torch.randint(256, (1, 3, 50, 70), generator=generator, dtype=torch.uint8)
        image = image if uint8 else PLAIN.prepare(image[0])[None]
        batches.append(Batch(image, target, (str(number),), ((50, 70),)))
    return batches


def join(batches: list[Batch]) -> Batch:
    return Batch(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.target for batch in batches]),
        tuple(batch.keys[0] for batch in batches),
        tuple(batch.sizes[0] for batch in batches),
    )


def test_batches_and_ranks_give_the_same_scores(wide: Recipe) -> None:
    protocol = SegmentationProtocol(ratios=(1.0, 1.25), flip=True)
    settings = {
        "protocol": protocol,
        "boundary": BoundaryConfig(thresholds=(2, 0.05), image_thresholds=(3,)),
        "crops": ((20, 30),),
    }
    batches = draw_batches(uint8=True)

    def run(part: list[Batch], add) -> dict[str, float]:
        return dict(metrics_of(score_segmentation(wide, part, K, CPU, add, **settings)))

    whole = run(batches, identity_mean)
    assert {"mIoU", "boundary_F_0.05", "image_boundary_F", "mIoU_20x30"} <= set(whole)
    assert all(math.isfinite(value) for value in whole.values())
    assert run([join(batches[:4]), join(batches[4:])], identity_mean) == whole
    states: list[list[torch.Tensor]] = [[], [], []]
    for rank in range(3):
        run(batches[rank::3], lambda value, rank=rank: states[rank].append(value) or value)
    totals = iter([sum(values) for values in zip(*states, strict=True)])
    assert run(batches[::3], lambda _value: next(totals)) == whole


def test_a_crop_is_scored_as_if_it_were_the_image() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randint(K, (2, 3, 140, 60), generator=generator)
    boundary = BoundaryConfig(thresholds=(0.02,))
    meter = SegmentationMeter(K, CPU, boundary, [(20, 30)])
    meter.add(prediction, target)
    alone = SegmentationMeter(K, CPU, boundary)
    alone.add(prediction[:, 10:30, 15:45], target[:, 10:30, 15:45])
    named = metrics_of(meter.scores(identity_mean))
    for name, value in metrics_of(alone.scores(identity_mean)).items():
        assert named[f"{name}_20x30"] == value
