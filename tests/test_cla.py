import pytest
import torch
from torch.nn import functional as F

from benchmarks.cla import compare_afma, compare_forms, forms_kept_mib
from tests.test_models import images
from xattn.errors import ConfigError
from xattn.evaluate.cost import ShapesOnly, count_params
from xattn.models.cla import CLAConfig, CLAHead, CrossLayerAttention, merge, partition
from xattn.models.zoo import create_model, model_card

IDLE = 19_350  # of the convolution that SegFormer's published code holds and never uses


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_partition_is_an_unfold_of_each_channel_and_merge_undoes_it(d):
    maps = normal(2, 8, 12, 3)
    parts = partition(maps, d)
    unfolded = F.unfold(maps.permute(0, 3, 1, 2), d, stride=d).unflatten(1, (3, d * d))
    assert torch.equal(parts, unfolded.permute(0, 3, 2, 1))
    assert torch.equal(merge(parts, d, (8, 12)), maps)


def test_sides_that_d_does_not_divide_are_filled_with_zeros_and_cut_off_again():
    maps = normal(2, 5, 7, 3)
    parts = partition(maps, 4)
    assert parts.shape == (2, 2 * 2, 16, 3)
    assert parts.abs().sum() == pytest.approx(maps.abs().sum())
    assert torch.equal(merge(parts, 4, (5, 7)), maps)


# (fine channels, coarse channels, width): with a projection, and without one.
PROJECTED, DIRECT = (3, 6, 5), (3, 5, 5)
SCALES = {"encoder_scale": "one", "decoder_scale": "one"}


def both_forms(dims, **given):
    pair = []
    for impl in ("literal", "factored"):
        torch.manual_seed(0)
        config = CLAConfig(impl=impl, **given)
        pair.append(CrossLayerAttention(*dims, config).double())
    return pair


@pytest.mark.parametrize(
    ("dims", "given"),
    [
        *((dims, {"d": d}) for dims in (PROJECTED, DIRECT) for d in (1, 2, 4)),
        (DIRECT, {"d": 2, "proj": "always"}),
        (PROJECTED, {"d": 2, **SCALES}),
        (DIRECT, {"d": 2, **SCALES}),
    ],
)
@pytest.mark.parametrize("sizes", [((8, 12), (4, 4)), ((9, 7), (3, 2))])
def test_factored_is_literal_forward_and_backward(dims, given, sizes):
    literal, factored = both_forms(dims, **given)
    assert (literal.project is None) == (dims == DIRECT and "proj" not in given)
    fine, coarse = sizes
    inputs = [
        normal(2, *fine, dims[0], seed=1).requires_grad_(),
        normal(2, *coarse, dims[1], seed=2).requires_grad_(),
        normal(2, *coarse, dims[2], seed=3).requires_grad_(),
    ]
    one, other = literal(*inputs), factored(*inputs)
    assert one.shape == (2, *fine, dims[2])
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    weight = normal(*one.shape, seed=4)
    gradients = [
        torch.autograd.grad((out * weight).sum(), [*inputs, *module.parameters()])
        for out, module in ((one, literal), (other, factored))
    ]
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-10)


def test_the_projection_s_bias_is_compared_too():
    literal, factored = both_forms(PROJECTED, d=2)
    maps = normal(1, 4, 4, 3), normal(1, 2, 2, 6), normal(1, 2, 2, 5)
    before = factored(*maps)
    for module in (literal, factored):
        torch.nn.init.constant_(module.project.bias, 3.0)
    after = factored(*maps)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(literal(*maps), after, rtol=0, atol=1e-10)


def test_equations_by_hand():
    """A patch's output is the mean over coarse patches of their values times their likeness."""
    attention = CrossLayerAttention(2, 3, 3, CLAConfig(d=2)).double()
    fine, coarse, value = normal(1, 4, 6, 2), normal(1, 2, 4, 3, seed=1), normal(1, 2, 4, 3, seed=2)
    aligned = attention.encode(fine.permute(0, 3, 1, 2))[0]
    maps = attention.attention(fine, coarse)
    assert maps.shape == (1, 3, 2, 6)
    for channel, row, column in ((0, 0, 0), (2, 1, 5)):
        top, left = 2 * (column // 3), 2 * (column % 3)
        patch = aligned[channel, top : top + 2, left : left + 2]
        other = coarse[0, :, 2 * row : 2 * row + 2, channel]
        likeness = (patch * other).mean()
        torch.testing.assert_close(maps[0, channel, row, column], likeness)
    out = attention(fine, coarse, value)
    pixel = sum(maps[0, 1, row, 4] * value[0, 1, 2 * row + 0, 1] for row in range(2)) / 2
    torch.testing.assert_close(out[0, 3, 2, 1], pixel)


# ---- the head and the models


READINGS = {
    "Q": {},
    "P'": {"final_fuse": False, "proj": "always"},
    "P": {"concat_fj": False, "proj": "always"},
    "full": {"proj": "always"},
}
COUNTS = {  # spec CLA 1.7
    "Q": (3_963_692, 14_154_796),
    "P'": (3_963_436, 14_088_748),
    "P": (3_963_948, 14_089_260),
    "full": (4_029_484, 14_154_796),
}


@pytest.mark.parametrize("reading", READINGS)
def test_parameters_of_the_readings(reading):
    counts = []
    for size in ("b0", "b1"):
        with ShapesOnly():
            model = create_model(f"cla_segformer_{size}", num_classes=150, **READINGS[reading])
        counts.append(count_params(model) + IDLE)
    assert tuple(counts) == COUNTS[reading]


def test_cards_say_both_counts():
    small, large = model_card("cla_segformer_b0"), model_card("cla_segformer_b1")
    assert (small.params, large.params) == (3_944_342, 14_135_446)
    assert (small.paper_params, large.paper_params) == (3.96e6, 13.8e6)
    assert "it counts 3,963,692, with 19,350 of" in small.notes
    assert "no reading that fits B0 has the 13.8 M" in large.notes


@pytest.mark.parametrize(
    ("dims", "expected"), [((32, 64, 160, 256), 28.9), ((64, 128, 320, 512), 57.2)]
)
def test_multiply_adds_are_those_of_the_literal_form(dims, expected):
    """Spec 1.5, both pairs with both projections at d = 2; it leaves out encoder and biases."""
    macs = 0
    for fine, coarse, side, small in ((0, 3, 128, 16), (1, 2, 64, 32)):
        with ShapesOnly():
            config = CLAConfig(proj="always")
            attention = CrossLayerAttention(dims[fine], dims[coarse], 256, config)
        macs += attention.macs((side, side), (small, small))
        macs -= side**2 * (dims[fine] + 1) * dims[coarse] + (side * small) ** 2 // 16 * 256
    assert macs / 1e9 == pytest.approx(expected, abs=0.05)


def literal_head(head, maps):
    """Compute reading Q as its flow is written: enlarge, concatenate, convolve."""

    def large(level, size):
        return F.interpolate(level, size, mode="bilinear", align_corners=False)

    levels = [level.permute(0, 2, 3, 1) for level in maps]
    own = [
        linear(level).permute(0, 3, 1, 2)
        for linear, level in zip(head.linears, levels, strict=True)
    ]

    def cla(block, fine, coarse):
        value = own[coarse].permute(0, 2, 3, 1)
        return head.attentions[block](levels[fine], levels[coarse], value).permute(0, 3, 1, 2)

    size = own[1].shape[2:]
    above = head.mixes[0].conv(torch.cat([own[1], large(own[2], size)], 1)) + cla(0, 1, 2)
    size = own[0].shape[2:]
    joined = torch.cat([own[0], large(own[3], size), large(above, size)], 1)
    above = head.mixes[1].conv(joined) + cla(1, 0, 3)
    return head.classifier(F.relu(head.bn(head.fuse.conv(above))))


SIZES = ((18, 26), (9, 13), (5, 7), (3, 4))
DIMS = (4, 6, 8, 10)


def small_head(**given):
    torch.manual_seed(0)
    return CLAHead(DIMS, 8, 3, 0.0, CLAConfig(**given)).double()


def small_maps():
    return [
        normal(2, dim, *size, seed=dim).requires_grad_()
        for dim, size in zip(DIMS, SIZES, strict=True)
    ]


@pytest.mark.parametrize("impl", ["factored", "literal"])
def test_head_is_the_flow_of_reading_q_forward_and_backward(impl):
    head, maps = small_head(impl=impl), small_maps()
    fast, literal = head(maps), literal_head(head, maps)
    assert fast.shape == (2, 3, 18, 26)
    torch.testing.assert_close(fast, literal, rtol=0, atol=1e-10)
    weight = normal(*fast.shape)
    for one, other in zip(
        torch.autograd.grad((fast * weight).sum(), [*maps, *head.parameters()]),
        torch.autograd.grad((literal * weight).sum(), [*maps, *head.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_half_precision_sums_in_single():
    """Under autocast the attention itself is as exact as without."""
    head = small_head().float().attentions[1]
    maps = normal(1, 18, 26, 4), normal(1, 3, 4, 10), normal(1, 3, 4, 8)
    maps = [level.float() for level in maps]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head(*maps)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, head(*maps))


@pytest.mark.parametrize(
    "given",
    [
        {"combine": "gate"},
        {"combine": "concat"},
        {"concat_fj": False, "proj": "always"},
        {"final_fuse": False, "proj": "always"},
        {"pairs": [[2, 3]]},
        {"pairs": [[1, 4]]},
        {"pairs": [[3, 4], [2, 3], [1, 2]]},
        {"pairs": [[1, 2], [1, 3], [1, 4]], "concat_fj": False},
        {"d": 1},
        {"d": 4, "impl": "literal"},
        {"d": 16, "impl": "literal"},
    ],
)
def test_other_readings_and_pairs_train_every_parameter(given):
    head, maps = small_head(**given).train(), small_maps()
    logits = head(maps)
    assert logits.shape == (2, 3, 18, 26)
    logits.square().mean().backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert all(level.grad.abs().sum() > 0 for level in maps)
    assert set(head.attention(maps)) == {
        tuple(pair) for pair in given.get("pairs", [(2, 3), (1, 4)])
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pairs": [[3, 2]]}, r"overrides\.pairs: found \[\[3, 2\]\], expected pairs of a level"),
        ({"pairs": [[1, 5]]}, "expected pairs of a level 1..3 and a coarser one up to 4"),
        ({"pairs": []}, "expected pairs of"),
        ({"pairs": [[]]}, "expected pairs of"),
        ({"pairs": [[1, 4], [1, 4]]}, "expected each of them once"),
        ({"pairs": [1, 4]}, r"pairs: found \[1, 4\], expected a list of pairs"),
        ({"pairs": [[1, 4], [2, 3]]}, r"found fine levels \[1, 2\], expected them from coarse to"),
        ({"pairs": [[1, 4]], "final_fuse": False}, "final_fuse: found False beside pairs"),
        ({"combine": "sum"}, "combine: unknown value 'sum'"),
        ({"proj": "if_neded"}, "did you mean 'if_needed'"),
        ({"d": 0}, "d: found 0, expected a whole number above 0"),
    ],
)
def test_what_cannot_be_built_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        create_model("cla_segformer_b0", num_classes=3, **overrides)


def test_shapes_of_the_attention_at_512_and_at_a_size_that_must_be_filled_up():
    """Spec part 4, check 3."""
    with ShapesOnly():
        model = create_model("cla_segformer_b0", num_classes=150).eval()
        for size, shapes in (
            ((512, 512), {(1, 4): (256, 64, 4096), (2, 3): (160, 256, 1024)}),
            ((544, 672), {(1, 4): (256, 9 * 11, 68 * 84), (2, 3): (160, 17 * 21, 34 * 42)}),
        ):
            maps = model.backbone(torch.zeros(1, 3, *size))
            found = {
                pair: tuple(level.shape[1:]) for pair, level in model.head.attention(maps).items()
            }
            assert found == shapes
            assert model(torch.zeros(1, 3, *size)).shape == (1, 150, size[0] // 4, size[1] // 4)


MODELS = ["cla_segformer_b0", "cla_segformer_b1"]


@pytest.mark.parametrize("name", MODELS)
def test_compiles_whole(name):
    model = create_model(name, num_classes=5).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    batch = images(2, 3, 65, 97)
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch), model(batch))


@pytest.mark.parametrize("impl", ["factored", "literal"])
def test_exports_with_sides_left_open(impl):
    """Any multiples of 32 * d from two on; of other sides, torch.export decides the padding."""
    head = small_head(impl=impl).float().eval()
    sides = [torch.export.Dim(name, min=2, max=32) for name in ("height", "width")]
    open_sides = [{2: part * sides[0], 3: part * sides[1]} for part in (16, 8, 4, 2)]

    def maps_of(height, width):
        return [
            normal(1, dim, part * height, part * width, dtype=torch.float32)
            for dim, part in zip(DIMS, (16, 8, 4, 2), strict=True)
        ]

    program = torch.export.export(head, (maps_of(2, 3),), dynamic_shapes=(open_sides,))
    for size in ((3, 2), (4, 5)):
        maps = maps_of(*size)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(maps), head(maps))


def test_factored_keeps_a_tenth_of_literal_and_takes_half_the_time():
    """On B1 at smaller sides, where both gain less than at 512 x 512, see `xattn bench cla`."""
    kept = forms_kept_mib(448, torch.device("cpu"))
    assert kept["literal"] > 10 * kept["factored"]
    assert compare_forms(256, 1, torch.device("cpu"))["times_faster"] > 2


def test_afma_holds_eight_times_the_attention_of_both_pairs():
    figures = compare_afma(128, torch.device("cpu"))
    assert figures["attention_times_cla"] == 8.0
    assert figures["kept_times_cla_literal"] > 4
