"""Hierarchical attention against loops that follow the paper's equations word by word."""

import json
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from xattn.data.transforms import SegmentationEval
from xattn.errors import ConfigError, DataError
from xattn.evaluate.hierarchy import (
    attend,
    attend_from_points,
    nothing_to_show,
    top_down_weights,
)
from xattn.evaluate.inference import SegmentationProtocol, SlidingWindow
from xattn.models.hila import ExchangeConfig, HilaMiT
from xattn.models.segformer import SegFormerHead, Segmenter
from xattn.models.zoo import create_recipe
from xattn.nn.interlevel import TopDownAttention
from xattn.scoring import busiest_point
from xattn.structures import IGNORE_INDEX, DatasetInfo

AS_STORED = SegmentationEval(multiple=1)


def tiny(stages=(2, 3, 4), stride=1, **exchange) -> Segmenter:
    """A small HILA segmenter with random weights, position biases too."""
    torch.manual_seed(0)
    backbone = HilaMiT(
        dims=(8, 12, 16, 20),
        depths=(2, 2, 6, 2),
        heads=(1, 2, 2, 2),
        sr_ratios=(4, 2, 2, 1),
        stages=stages,
        stride=stride,
        exchange=ExchangeConfig(**exchange),
    )
    for module in backbone.modules():
        if isinstance(module, TopDownAttention):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
    return Segmenter(backbone, SegFormerHead(backbone.dims, 8, 3, 0.0)).eval()


def photo(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


def random_attention(patch: int) -> TopDownAttention:
    torch.manual_seed(patch)
    attention = TopDownAttention(low_dim=3, high_dim=5, patch=patch).double()
    torch.nn.init.normal_(attention.position_bias)
    return attention


def folded_weights(attention: TopDownAttention, low: Tensor, high: Tensor) -> Tensor:
    """The authors' way: exponentials of copied patches, folded to sums, unfolded, divided."""
    patch, pad = attention.patch, attention.patch // 2 - 1
    size, (rows, columns) = high.shape[1:3], low.shape[1:3]
    # They know even maps only: an odd one has a row or column more, whose cells do not exist.
    full = 2 * size[0], 2 * size[1]
    exists = F.pad(torch.ones(1, 1, rows, columns), (0, full[1] - columns, 0, full[0] - rows))
    query = attention.query(low).permute(0, 3, 1, 2)
    query = F.pad(query, (0, full[1] - columns, 0, full[0] - rows))
    how = {"kernel_size": patch, "padding": pad, "stride": 2}

    def unfold(maps: Tensor) -> Tensor:
        # p - 2 - pad more cells at the right and below, where the patches of the last tokens end
        return F.unfold(maps, **how).unflatten(1, (maps.shape[1], patch * patch))

    keys = attention.key_value(high).chunk(2, dim=3)[0].flatten(1, 2)  # B N A
    logits = torch.einsum("bapn,bna->bpn", unfold(query), keys) * attention.scale
    raised = (logits + attention.position_bias[:, None]).exp() * unfold(exists.double())[:, 0]
    total = unfold(F.fold(raised, full, **how))[:, 0]
    weights = raised / total.where(total > 0, 1)
    return weights.transpose(1, 2).unflatten(1, size)


@pytest.mark.parametrize("patch", [2, 4, 6])
@pytest.mark.parametrize("low_size", [(8, 6), (7, 5)])
@torch.no_grad()
def test_weights_are_those_of_fold_and_unfold(patch, low_size):
    attention = random_attention(patch)
    low = torch.randn(2, *low_size, 3, dtype=torch.float64)
    high = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    found = attention.weights(low, high)
    torch.testing.assert_close(found, folded_weights(attention, low, high), rtol=0, atol=1e-12)


@pytest.mark.parametrize("patch", [2, 4, 6])
@torch.no_grad()
def test_weights_of_each_cell_add_up_to_one_and_mix_what_forward_mixes(patch):
    attention = random_attention(patch)
    low = torch.randn(1, 7, 6, 3, dtype=torch.float64)
    high = torch.randn(1, 4, 3, 5, dtype=torch.float64)
    weights = attention.weights(low, high)[0]
    value = attention.key_value(high).chunk(2, dim=3)[1][0]
    total = torch.zeros(7, 6, dtype=torch.float64)
    mixed = torch.zeros(7, 6, attention.width, dtype=torch.float64)
    for (i, j), (u, w) in product(product(range(4), range(3)), product(range(patch), repeat=2)):
        y, x = 2 * i - (patch // 2 - 1) + u, 2 * j - (patch // 2 - 1) + w
        share = weights[i, j, u * patch + w]
        if 0 <= y < 7 and 0 <= x < 6:
            total[y, x] += share
            mixed[y, x] += share * value[i, j]
        else:
            assert share == 0, "outside of the map"
    torch.testing.assert_close(total, torch.ones_like(total))
    torch.testing.assert_close(attention.output(mixed), attention(low, high)[0])


@torch.no_grad()
def test_weights_of_large_logits_stay_finite():
    attention = random_attention(4).float()
    weights = attention.weights(400 * torch.randn(1, 8, 6, 3), 400 * torch.randn(1, 4, 3, 5))
    assert weights.isfinite().all()
    assert weights.sum() == pytest.approx(48)


def spread(above: dict[tuple[int, int], float], weights, patch: int) -> dict:
    """One equation of the appendix: loop over tokens and the cells of their patches."""
    rows, columns = weights.low_size
    found: dict[tuple[int, int], float] = {}
    for (i, j), held in above.items():
        for u in range(patch):
            for w in range(patch):
                y, x = 2 * i - (patch // 2 - 1) + u, 2 * j - (patch // 2 - 1) + w
                if 0 <= y < rows and 0 <= x < columns:
                    share = held * float(weights.weights[i, j, u * patch + w])
                    found[y, x] = found.get((y, x), 0.0) + share
    return found


@pytest.mark.parametrize("patch", [2, 4, 6])
@pytest.mark.parametrize("token", [(0, 0), (1, 2), (2, 3)])
def test_maps_are_the_double_loops(patch, token):
    weights = top_down_weights(tiny(patch=patch), torch.randn(1, 3, 96, 120))
    maps = attend(weights, token)
    assert [stages for stages, _, _ in maps] == [(4,), (3, 4), (2, 3, 4)]
    assert [tuple(whole.shape) for *_, whole in maps] == [(6, 8), (12, 15), (24, 30)]
    expected = {token: 1.0}
    for stage, (_, (rows, columns), whole) in zip((4, 3, 2), maps, strict=True):
        expected = spread(expected, weights[stage], patch)
        total = sum(expected.values())
        by_loop = torch.zeros_like(whole)
        for cell, share in expected.items():
            by_loop[cell] = share / total
        torch.testing.assert_close(whole, by_loop)
        assert (whole >= 0).all()
        assert whole.sum() == pytest.approx(1, abs=1e-5)
        # The box is the smallest that holds every cell that a patch reaches.
        cells = torch.tensor(list(expected))
        assert (rows.start, columns.start) == tuple(cells.amin(0).tolist())
        assert (rows.stop - 1, columns.stop - 1) == tuple(cells.amax(0).tolist())


def test_the_maximum_is_another_scale_of_the_same_maps():
    weights = top_down_weights(tiny(), torch.randn(1, 3, 64, 64))
    for (*_, by_sum), (*_, by_max) in zip(
        attend(weights, (1, 1)), attend(weights, (1, 1), "max"), strict=True
    ):
        assert by_max.max() == 1
        torch.testing.assert_close(by_sum / by_sum.max(), by_max)
    with pytest.raises(ConfigError, match=r"normalise.*'maxx'.*'max'"):
        attend(weights, (1, 1), "maxx")


@pytest.mark.parametrize(
    ("stages", "shown"),
    [((3,), [(3,)]), ((3, 4), [(4,), (3, 4)]), ((2, 4), [(4,)]), ((2, 3), [(3,), (2, 3)])],
)
def test_fewer_stages_show_what_there_is(stages, shown):
    (token,) = attend_from_points(tiny(stages), photo(64, 96), [(50, 30)], AS_STORED)
    assert [level.stages for level in token.maps] == shown
    assert token.maps[-1].title == f"stage {' & '.join(map(str, shown[-1]))}"


@pytest.mark.parametrize("share", [True, False, "bu"])
@torch.inference_mode()
def test_the_last_call_of_several_is_taken(share):
    model = tiny((3,), stride=2, share=share)
    calls = []

    def note(module, maps, output):
        calls.append((module, *maps))

    for module in model.modules():
        if isinstance(module, TopDownAttention):
            module.register_forward_hook(note)
    weights = top_down_weights(model, torch.randn(1, 3, 64, 96))
    assert len(calls) == 2
    first, last = (module.weights(*maps)[0] for module, *maps in calls)
    assert torch.equal(weights[3].weights, last)
    assert not torch.allclose(first, last)


def test_looking_changes_nothing():
    model, images = tiny(), torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        before = model(images)
        top_down_weights(model, images)
        assert torch.equal(model(images), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_boxes_lie_where_the_token_is():
    pixels = photo(128, 160)
    (token,) = attend_from_points(tiny((3,)), pixels, [(40, 70)], AS_STORED)
    # Token row 4, column 2 of stage 3; its patch: rows 7..10, columns 3..6 of stage 2.
    assert token.box == (24, 56, 56, 88)
    assert token.maps[0].box == token.box
    whole = attend_from_points(tiny(), pixels, [(0, 0), (159, 127)], AS_STORED)
    # Two rows and columns of each corner's patch are left, one of four cells lies outside.
    assert whole[0].box == (0, 0, 48, 48)
    assert whole[1].box == (160 - 48, 128 - 48, 160, 128)
    assert whole[0].maps[2].box == (0, 0, 60, 60)  # and 8 + 4 px more a stage
    for found in whole:
        for level in found.maps:
            assert sum(map(sum, level.values)) == pytest.approx(1, abs=1e-5)
    twice = SegmentationEval(base=(256, 320), multiple=1)
    (token,) = attend_from_points(tiny((3,)), pixels, [(40, 70)], twice)
    assert token.box == (36, 60, 52, 76)  # half as large: of token row 8, column 5


def test_a_point_outside_is_refused():
    with pytest.raises(DataError, match="point 160,3: outside of the image, whose x go from 0 to"):
        attend_from_points(tiny(), photo(128, 160), [(160, 3)], AS_STORED)


def test_the_window_around_the_point_is_shown():
    model, pixels = tiny((3,)), photo(96, 192)
    window = SlidingWindow(crop=(64, 64), stride=(32, 32))
    protocol = SegmentationProtocol(multiple=1, window=window, ratios=(0.5, 1.0), flip=True)
    (token,) = attend_from_points(model, pixels, [(100, 60)], protocol)
    # Windows from x = 0, 32, 64, ... and y = 0, 32: the middle nearest to it is 96, 64.
    (alone,) = attend_from_points(model, pixels[:, 32:96, 64:128], [(36, 28)], AS_STORED)
    assert token.maps[0].values == alone.maps[0].values
    assert token.box == tuple(
        part + shift for part, shift in zip(alone.box, (64, 32, 64, 32), strict=True)
    )
    left, top, right, bottom = token.box
    assert left <= 100 < right
    assert top <= 60 < bottom


INFO = DatasetInfo(
    "toy", ("segmentation", "classification"), ("a", "b"), (), (), (), "", "", "", ""
)


@pytest.mark.parametrize(
    ("model", "overrides", "reason"),
    [
        ("segformer_b0", {}, "has no inter-level attention"),
        ("hila_mit_b0_s3", {}, "is for classification"),
        ("hila_segformer_b0_s3", {"top_down": False}, "built with top_down false"),
        ("hila_segformer_b0_s3", {}, None),
    ],
)
def test_models_without_say_why(model, overrides, reason):
    with torch.device("meta"):
        found = nothing_to_show(create_recipe(model, INFO, **overrides))
    assert found is None if reason is None else reason in found


def test_the_busiest_part_is_where_classes_are_mixed():
    truth = torch.zeros(70, 130, dtype=torch.long)
    truth[32:64, 64:80] = 1  # half of the part from (64, 32) on
    truth[:32, 96:100] = 2
    truth[:, :32] = IGNORE_INDEX
    assert busiest_point(truth) == (80, 48)
    assert busiest_point(torch.zeros(20, 90, dtype=torch.long)) == (16, 10)


def test_records_are_json(tmp_path):
    from dataclasses import asdict

    from xattn.report.attention_maps import read_attention

    (token,) = attend_from_points(tiny(), photo(64, 96), [(50, 30)], AS_STORED)
    path = tmp_path / "key.attention.json"
    path.write_text(json.dumps(asdict(token)))
    assert read_attention(path) == token
