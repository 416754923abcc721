import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from xattn.errors import ConfigError
from xattn.evaluate.cost import ShapesOnly, count_macs, count_params
from xattn.models.cfsam import (
    CFSAM,
    Attention,
    ConcatExcitation,
    EachMap,
    MobileViTBlock,
    SqueezeExcitation,
    combine,
    partition,
)
from xattn.models.zoo import create_backbone, create_model, model_card

DIMS = (16, 32, 16, 8)
SIZES = ((5, 7), (3, 4), (2, 2), (1, 1))  # 52 cells


def random_maps(batch=2, dims=DIMS, sizes=SIZES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, dim, *size, generator=generator, dtype=dtype)
        for dim, size in zip(dims, sizes, strict=True)
    ]


def small(**numbers):
    torch.manual_seed(0)
    return CFSAM(DIMS, **{"width": 8, "mlp": 12, "heads": 2, "depth": 2, **numbers})


# ---- counts: the paper's table 4 and the reconstruction's ablations


@pytest.mark.parametrize(
    ("name", "params", "giga_macs"),
    [
        ("ssd300_cfsam", 45.168302, 45.236),
        ("ssd300_cfsam_shallow", 43.202, 45.055),
        ("ssd300_cfsam_deep", 29.964, 31.459),
        ("ssd300_lfe", 43.456, 39.040),
        ("ssd300_lfe_gfe", 45.037, 44.982),
        ("ssd300_se", 26.510, 31.3737),
        ("ssd300_cfam", 25.692, 30.932),
        ("ssd300_mvit", 76.749, 54.114),
    ],
)
def test_counts(name, params, giga_macs):
    card = model_card(name)
    assert card.params / 1e6 == pytest.approx(params, abs=5e-4)
    assert card.macs / 1e9 == pytest.approx(giga_macs, abs=1e-3)


def test_default_count_is_exact_and_near_the_paper():
    card = model_card("ssd300_cfsam")
    assert card.params == 45_168_302
    assert card.params == pytest.approx(card.paper_params, rel=3e-4)
    assert card.macs == pytest.approx(card.paper_macs, rel=5e-4)


@pytest.mark.parametrize(("part", "giga_macs"), [(1, 48.127), (4, 43.791)])
def test_macs_of_other_partitions(part, giga_macs):
    with ShapesOnly():
        model = create_model("ssd300_cfsam", num_classes=20, part=part)
    assert count_params(model) == 45_168_302
    macs = count_macs(model, (3, 300, 300), counting="products")
    assert macs / 1e9 == pytest.approx(giga_macs, abs=1e-3)


def test_norm_and_control_differ_by_little():
    with ShapesOnly():
        normed = create_model("ssd300_cfsam", num_classes=20, norm="bn")
    assert count_params(normed) == 45_168_302 + 5_632
    control = model_card("ssd300_control")
    assert control.params == 45_168_302 - 3 * 256
    # Without the products of 1,940 cells with 970 of their part, twice, in three layers.
    assert model_card("ssd300_cfsam").macs - control.macs == 3 * 2 * 1940 * 970 * 256


# ---- partition


def test_partition_deals_out_and_combine_gathers():
    row = torch.arange(20).view(1, 10, 2)
    parts = partition(row, 2)
    assert parts[..., 0].tolist() == [[0, 4, 8, 12, 16], [2, 6, 10, 14, 18]]
    cells = torch.randn(3, 24, 5)
    for number in (1, 2, 4):
        assert torch.equal(combine(partition(cells, number), number), cells)


def transformer(module, cells):
    """Run a module's layers on a row of cells."""
    cells = partition(cells, module.part)
    for layer in module.layers:
        cells = layer(cells)
    return combine(cells, module.part)


def test_a_part_sees_only_itself():
    module = small().double()
    cells = torch.randn(1, 12, 8, dtype=torch.float64)
    changed = cells.clone()
    changed[:, 3] += 1
    before, after = transformer(module, cells), transformer(module, changed)
    assert torch.equal(before[:, ::2], after[:, ::2])
    assert (before[:, 1::2] != after[:, 1::2]).any(-1).all()
    torch.testing.assert_close(  # each part alone is plain attention
        before[:, 1::2], transformer(small(part=1).double(), cells[:, 1::2])
    )


def test_one_part_is_plain_attention():
    torch.manual_seed(0)
    attention = Attention(8, 2).double()
    cells = torch.randn(2, 7, 8, dtype=torch.float64)
    query, key, value = attention.query_key_value(cells).split(8, 2)
    heads = []
    for head in range(2):
        own = slice(4 * head, 4 * head + 4)
        weights = (query[..., own] @ key[..., own].transpose(1, 2) / 2).softmax(-1)
        heads.append(weights @ value[..., own])
    expected = attention.output(torch.cat(heads, 2))
    torch.testing.assert_close(attention(cells), expected, rtol=0, atol=1e-12)


# ---- the module


def literal(module, maps):
    """Follow equations 1 to 5 with convolutions on rows of cells, for a width of 8."""
    rows = [conv(level).flatten(2) for conv, level in zip(module.local, maps, strict=True)]
    row = torch.cat(rows, 2)
    length = row.shape[2]
    padded = length + length % 2
    if padded != length:
        row = F.interpolate(row[..., None], (padded, 1), mode="bilinear", align_corners=False)[
            ..., 0
        ]
    parts = [row[..., 0::2].transpose(1, 2), row[..., 1::2].transpose(1, 2)]
    for layer in module.layers:
        parts = [layer(part) for part in parts]
    seen = torch.empty_like(row)
    for number, part in enumerate(parts):
        seen[..., number::2] = part.transpose(1, 2)
    row = F.conv1d(torch.cat([row, seen], 1), module.fuse.weight[..., None])
    if padded != length:
        row = F.interpolate(row[..., None], (length, 1), mode="bilinear", align_corners=False)[
            ..., 0
        ]
    out = []
    rows = row.split([level.shape[2] * level.shape[3] for level in maps], 2)
    for level, own, restore in zip(maps, rows, module.restore, strict=True):
        restored = own.unflatten(2, level.shape[2:])
        if isinstance(restore, nn.Linear):
            restored = F.conv2d(restored, restore.weight[..., None, None])
        out.append(restored)
    return out


@pytest.mark.parametrize("sizes", [SIZES, ((5, 7), (3, 4), (2, 2), (1, 2))])
def test_module_is_the_equations(sizes):
    module = small().double()
    maps = random_maps(sizes=sizes, dtype=torch.float64)
    for one, other in zip(module(maps), literal(module, maps), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


SWITCHES = [
    {},
    {"levels": (1, 3)},
    {"levels": [4]},
    {"gfe": False, "ffr": False},
    {"ffr": False},
    {"part": 1},
    {"part": 3},
    {"norm": "bn"},
    {"attention": False},
]


@pytest.mark.parametrize("numbers", SWITCHES, ids=str)
def test_switches_keep_shapes_and_train_every_parameter(numbers):
    module = small(**numbers)
    maps = random_maps()
    out = module(maps)
    assert [level.shape for level in out] == [level.shape for level in maps]
    chosen = numbers.get("levels", (1, 2, 3, 4))
    for number in range(1, 5):
        assert (out[number - 1] is maps[number - 1]) == (number not in chosen)
    sum(level.square().mean() for level in out).backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert (parameter.grad != 0).any(), key


@pytest.mark.parametrize(("levels", "cells"), [((1, 2, 3), 1905), ((4, 5, 6), 35)])
def test_odd_rows_of_ssd300_are_resampled(levels, cells):
    dims, sides = (16, 32, 16, 8, 8, 8), (38, 19, 10, 5, 3, 1)
    module = CFSAM(dims, levels=levels, width=8, mlp=8, heads=2, depth=1).eval()
    assert sum(sides[level - 1] ** 2 for level in levels) == cells
    lengths = []
    module.layers[0].register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape))
    maps = random_maps(1, dims, [(side, side) for side in sides])
    with torch.no_grad():
        out = module(maps)
    assert lengths == [(2, (cells + 1) // 2, 8)]
    assert [level.shape for level in out] == [level.shape for level in maps]


def test_attention_reaches_every_level_and_the_control_none():
    for attention in (True, False):
        module = small(part=1, attention=attention).eval()
        maps = random_maps(1)
        changed = [*maps[:3], maps[3] + 1]
        with torch.no_grad():
            pairs = list(zip(module(maps), module(changed), strict=True))
        assert all((one != other).any() for one, other in pairs[:3]) == attention
        assert (pairs[3][0] != pairs[3][1]).any()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"levels": (0, 1)}, r"levels: found \[0, 1\], expected ascending numbers of 1\.\.4"),
        ({"levels": (5,)}, "levels: found"),
        ({"levels": ()}, "levels: found"),
        ({"levels": (2, 1)}, "levels: found"),
        ({"heads": 3}, "heads: found 3, expected a divisor of the width 8"),
        ({"gfe": False}, "ffr: found True beside gfe False"),
        ({"norm": "bm"}, "norm: unknown value 'bm'; known: bn, none"),
    ],
)
def test_numbers_that_do_not_fit_are_named(numbers, message):
    with pytest.raises(ConfigError, match=message):
        small(**numbers)


def test_overrides_of_the_variants_are_named():
    with pytest.raises(ConfigError, match=r"overrides\.levels: found \[7\]"):
        create_model("ssd300_cfsam", num_classes=2, width=4, levels=[7])
    with pytest.raises(ConfigError, match=r"part: 'ssd300_se' has no such setting"):
        create_model("ssd300_se", num_classes=2, part=2)


# ---- plug and play


def test_behind_a_transformer_pyramid():
    torch.manual_seed(0)
    backbone = create_backbone("mit_b0", drop_path=0.0).eval()
    module = CFSAM(backbone.dims, width=32, depth=1, mlp=32, heads=4).eval()
    for size in ((64, 96), (65, 97)):
        maps = backbone(torch.randn(1, 3, *size))
        out = module(maps)
        assert [level.shape for level in out] == [level.shape for level in maps]
        assert all(level.isfinite().all() for level in out)


def test_behind_torchvisions_feature_pyramid():
    torch.manual_seed(0)
    pyramid = FeaturePyramidNetwork(list(DIMS), 8)
    names = "abcd"
    maps = pyramid(dict(zip(names, random_maps(), strict=True)))
    module = CFSAM([8] * 4, width=8, depth=1, mlp=8, heads=2)
    assert not [layer for layer in module.restore if isinstance(layer, nn.Linear)]
    out = module(list(maps.values()))
    assert [level.shape for level in out] == [level.shape for level in maps.values()]


# ---- rivals


RIVALS = {
    "se": lambda: SqueezeExcitation(DIMS),
    "cfam": lambda: ConcatExcitation(DIMS, 8),
    "mvit": lambda: EachMap([MobileViTBlock(dim) for dim in DIMS]),
}


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_keep_sizes_and_train_every_parameter(name):
    torch.manual_seed(0)
    module, maps = RIVALS[name](), random_maps()
    out = module(maps)
    dims = (8,) * 4 if name == "cfam" else DIMS
    assert [level.shape[1] for level in out] == list(dims)
    assert [level.shape[2:] for level in out] == [level.shape[2:] for level in maps]
    # Not the square: behind a BatchNorm its mean does not depend on what comes before.
    sum((level * torch.randn_like(level)).sum() for level in out).backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_excitation_scales_channels_by_their_means():
    torch.manual_seed(0)
    module, maps = SqueezeExcitation(DIMS), random_maps()
    out = module(maps)
    ratio = out[0] / maps[0]
    torch.testing.assert_close(ratio, ratio.mean((2, 3), keepdim=True).expand_as(ratio))
    assert ((ratio > 0) & (ratio < 1)).all()
    shuffled = maps[0].flatten(2)[..., torch.randperm(35)].view_as(maps[0])
    again = module([shuffled, *maps[1:]])[0] / shuffled
    torch.testing.assert_close(again[..., 0, 0], ratio[..., 0, 0])


def test_concatenated_excitation_crosses_levels():
    torch.manual_seed(0)
    module, maps = ConcatExcitation(DIMS, 8), random_maps()
    finest_changed = module([maps[0] + 1, *maps[1:]])
    for one, other in zip(module(maps), finest_changed, strict=True):
        assert (one != other).any()  # also coarser ones, by the joint gates


def test_cells_of_mobilevit_attend_to_those_that_lie_alike():
    torch.manual_seed(0)
    block = MobileViTBlock(16).double()
    block.norm = nn.Identity()
    cells = torch.randn(1, 4, 4, 6, dtype=torch.float64)
    changed = cells.clone()
    changed[..., 0, 0] += torch.arange(4)
    with torch.no_grad():
        moved = (block._see_alike(cells) != block._see_alike(changed)).any(1)[0]
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[::2, ::2] = True
    assert torch.equal(moved, expected)
    for layer in block.layers:
        layer.mixer, layer.mlp = Zero(), Zero()
    torch.testing.assert_close(block._see_alike(cells), cells)  # folding undoes unfolding


class Zero(nn.Module):
    def forward(self, tokens):
        return torch.zeros_like(tokens)
