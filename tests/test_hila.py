import math
import re

import pytest
import torch

from benchmarks.attention import listing
from xattn.models.hila import ExchangeConfig, HilaMiT, exchange_steps
from xattn.models.zoo import create_model
from xattn.nn.interlevel import BottomUpAttention, TopDownAttention

TOP_DOWN_ORACLE = """
1.905229 -0.393495 2.107395 -0.302545 2.074754 -0.317229 2.282881 -0.223597 1.894909 -0.321033
1.889197 -0.283932 1.908433 -0.269087 1.64919 -0.290404 1.885656 -0.256069 1.444271 -0.308823
1.544742 -0.295112 1.490743 -0.307108 1.877827 -0.201099 1.394433 -0.29243 1.272104 -0.315543
1.097088 -0.34861
"""
BOTTOM_UP_ORACLE = """
2.0498 -0.448309 1.637516 2.210464 -0.503878 1.572086 1.798567 -0.428485 1.854774
1.039893 -0.298637 2.390919
"""


def fill(shape, step):
    """Return sin(step), sin(2 step), ... row by row."""
    count = math.prod(shape)
    return torch.sin(step * torch.arange(1, count + 1, dtype=torch.float64)).reshape(shape)


def oracle_values(text):
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


@torch.no_grad()
def fill_weights(attention):
    """Fill an attention's weights as the oracle's were."""
    width = attention.query.out_features
    source = attention.key_value.in_features
    attention.double()
    attention.query.weight.copy_(fill(attention.query.weight.shape, 0.7))
    attention.query.bias.copy_(fill((width,), 0.3))
    key, value = fill((width, source), 0.9), fill((width, source), 1.1)
    attention.key_value.weight.copy_(torch.cat([key, value]))
    attention.key_value.bias.copy_(torch.cat([fill((width,), 0.4), fill((width,), 0.6)]))
    attention.output.weight.copy_(fill(attention.output.weight.shape, 1.3))
    attention.output.bias.copy_(fill(attention.output.bias.shape, 0.5))
    attention.position_bias.copy_(fill(attention.position_bias.shape, 0.2))
    return attention


def oracle_maps():
    return fill((4, 3), 0.35).view(1, 2, 2, 3), fill((16, 2), 0.55).view(1, 4, 4, 2)


def test_top_down_gives_the_reference_codes_values():
    high, low = oracle_maps()
    out = fill_weights(TopDownAttention(low_dim=2, high_dim=3, patch=4))(low, high)
    torch.testing.assert_close(out.flatten(), oracle_values(TOP_DOWN_ORACLE), rtol=0, atol=6e-7)


def test_bottom_up_gives_the_reference_codes_values():
    high, low = oracle_maps()
    out = fill_weights(BottomUpAttention(high_dim=3, low_dim=2, patch=4))(high, low)
    torch.testing.assert_close(out.flatten(), oracle_values(BOTTOM_UP_ORACLE), rtol=0, atol=6e-7)


def naive_bottom_up(attention, high, low):
    """Loop over high tokens and their cells; outside cells are zero tokens, or left out."""
    patch, pad = attention.patch, attention.patch // 2 - 1
    rows, columns = low.shape[1:3]
    out = torch.zeros_like(high)
    for b, i, j in torch.cartesian_prod(*map(torch.arange, high.shape[:3])).tolist():
        cells, places = [], []
        for u in range(patch):
            for w in range(patch):
                y, x = 2 * i - pad + u, 2 * j - pad + w
                inside = 0 <= y < rows and 0 <= x < columns
                if inside or not attention.masks:
                    cells.append(low[b, y, x] if inside else torch.zeros_like(low[0, 0, 0]))
                    places.append(u * patch + w)
        key, value = attention.key_value(torch.stack(cells)).chunk(2, dim=1)
        logits = key @ attention.query(high[b, i, j]) * high.shape[3] ** -0.5
        weights = (logits + attention.position_bias[places]).softmax(0)
        out[b, i, j] = attention.output(weights @ value)
    return out


def naive_top_down(attention, low, high):
    """Loop over low cells and over all high tokens, keeping those whose patch has the cell."""
    patch, pad = attention.patch, attention.patch // 2 - 1
    out = torch.zeros_like(low)
    for b, y, x in torch.cartesian_prod(*map(torch.arange, low.shape[:3])).tolist():
        tokens, places = [], []
        for i in range(high.shape[1]):
            for j in range(high.shape[2]):
                u, w = y - 2 * i + pad, x - 2 * j + pad
                if 0 <= u < patch and 0 <= w < patch:
                    tokens.append(high[b, i, j])
                    places.append(u * patch + w)
        key, value = attention.key_value(torch.stack(tokens)).chunk(2, dim=1)
        logits = key @ attention.query(low[b, y, x]) * low.shape[3] ** -0.5
        weights = (logits + attention.position_bias[places]).softmax(0)
        out[b, y, x] = attention.output(weights @ value)
    return out


def masked_bottom_up(*dims):
    return BottomUpAttention(*dims, border="mask")


CASES = {
    "masked": (masked_bottom_up, naive_bottom_up, (5, 3)),
    "bottom-up": (BottomUpAttention, naive_bottom_up, (5, 3)),
    "top-down": (TopDownAttention, naive_top_down, (3, 5)),
}


@pytest.mark.parametrize("patch", [2, 4, 6, 8])
@pytest.mark.parametrize("low_size", [(8, 6), (7, 5)])
@pytest.mark.parametrize("direction", CASES)
def test_attention_is_the_double_loop_forward_and_backward(direction, low_size, patch):
    build, naive, dims = CASES[direction]
    attention = fill_weights(build(*dims, patch))
    high = fill((2, 4, 3, 5), 0.37).requires_grad_()
    low = fill((2, *low_size, 3), 0.53).requires_grad_()
    pair = (high, low) if direction != "top-down" else (low, high)
    out, expected = attention(*pair), naive(attention, *pair)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    inputs = [high, low, *attention.parameters()]
    weight = fill(out.shape, 0.71)
    gradients = torch.autograd.grad((out * weight).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("direction", CASES)
def test_logits_far_above_100_stay_finite(direction):
    build, _, dims = CASES[direction]
    attention = fill_weights(build(*dims, 4)).float()
    high = (400 * fill((1, 4, 3, 5), 0.37)).float().requires_grad_()
    low = (400 * fill((1, 8, 6, 3), 0.53)).float().requires_grad_()
    target, source = (high, low) if direction != "top-down" else (low, high)
    key = attention.key_value(source).chunk(2, dim=3)[0].flatten(0, 2)
    assert (attention.query(target).flatten(0, 2) @ key.t() * attention.scale).max() > 1000
    out = attention(target, source)
    out.sum().backward()
    assert out.isfinite().all()
    assert high.grad.isfinite().all()
    assert low.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("direction", CASES)
def test_half_precision_is_finite_and_near(direction, dtype):
    build, _, dims = CASES[direction]
    attention = fill_weights(build(*dims, 4))
    high, low = fill((1, 3, 3, 5), 0.37), fill((1, 5, 6, 3), 0.53)
    pair = (high, low) if direction != "top-down" else (low, high)
    expected = attention(*pair)
    pair = [level.to(dtype).requires_grad_() for level in pair]
    out = attention.to(dtype)(*pair)
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.05)
    out.sum().backward()
    assert all(level.grad.isfinite().all() for level in pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attention.float()(*(level.detach().float() for level in pair))
    torch.testing.assert_close(mixed.double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("patch", [2, 4, 6])
@pytest.mark.parametrize("direction", ["bottom-up", "top-down"])
def test_the_listing_is_the_same_function(direction, patch):
    build, _, dims = CASES[direction]
    attention = fill_weights(build(*dims, patch))
    high, low = fill((2, 4, 3, 5), 0.37), fill((2, 8, 6, 3), 0.53)
    pair = (high, low) if direction == "bottom-up" else (low, high)
    torch.testing.assert_close(attention(*pair), listing(attention, *pair), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("depth", "stride", "bottom_up", "top_down"),
    [
        (2, 1, [0, 1], [0]),
        (6, 1, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4]),
        (6, 2, [0, 2, 4], [1, 3]),
        (6, 3, [0, 3], [1, 4]),
    ],
)
def test_schedule_is_the_reference_codes(depth, stride, bottom_up, top_down):
    steps = exchange_steps(depth, stride)
    assert [index for index, step in enumerate(steps) if step[0]] == bottom_up
    assert [index for index, step in enumerate(steps) if step[1]] == top_down


@pytest.mark.parametrize("stride", [1, 2])
def test_paired_schedule_differs_from_stride_3_on(stride):
    assert exchange_steps(6, stride, "paired") == exchange_steps(6, stride)
    steps = exchange_steps(6, 3, "paired")
    assert [index for index, step in enumerate(steps) if step[0]] == [0, 3]
    assert [index for index, step in enumerate(steps) if step[1]] == [2]


def test_inner_scale_is_that_of_the_narrower_width():
    for build, dims in ((BottomUpAttention, (5, 3)), (TopDownAttention, (3, 5))):
        assert build(*dims, 4).scale == dims[0] ** -0.5
        assert build(*dims, 4, scale="inner").scale == 3**-0.5


@torch.no_grad()
def test_without_top_down_the_low_map_is_the_stages_own():
    model = create_model("hila_mit_b0_s3", num_classes=3, top_down=False).eval().backbone
    assert not hasattr(model.exchanges["3"], "low_norm")
    plain = create_model("mit_b0", num_classes=3).eval().backbone
    plain.load_state_dict(model.state_dict(), strict=False)
    batch = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours, base = model(batch), plain(batch)
    assert torch.equal(ours[0], base[0])
    assert torch.equal(ours[1], base[1])
    assert not torch.equal(ours[2], base[2])


@torch.no_grad()
def test_without_bottom_up_the_high_path_is_the_plain_one():
    model = create_model("hila_mit_b0_s3", num_classes=3, bottom_up=False).eval().backbone
    plain = create_model("mit_b0", num_classes=3).eval().backbone
    plain.load_state_dict(model.state_dict(), strict=False)
    batch = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    same = [torch.equal(*pair) for pair in zip(model(batch), plain(batch), strict=True)]
    assert same == [True, False, True, True]


def test_unshared_iterations_are_used_in_turn():
    torch.manual_seed(0)
    shared = create_model("hila_segformer_b2_s234", num_classes=2)
    for share, parts in ((False, [2, 2, 2]), ("bu", [2, 1, 1])):
        model = create_model("hila_segformer_b2_s234", num_classes=2, share=share)
        exchange = model.backbone.exchanges["3"]
        names = ("bottom_up", "top_down", "low_block")
        found = [
            len(part) if isinstance(part := getattr(exchange, name), torch.nn.ModuleList) else 1
            for name in names
        ]
        assert found == parts
    state = {  # with every copy set to the shared weights, the model is the shared one
        key: shared.state_dict()[re.sub(r"(exchanges\.\d\.bottom_up)\.\d\.", r"\1.", key)]
        for key in model.state_dict()
    }
    model.load_state_dict(state)
    batch = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.eval()(batch), shared.eval()(batch))


@torch.no_grad()
def test_without_its_exchanges_hila_is_mit():
    model = create_model("hila_mit_b0_s3", num_classes=3, alpha=1.0, beta=0.0).eval()
    for update in (model.backbone.exchanges["3"].bottom_up, model.backbone.exchanges["3"].top_down):
        update.attention.output.weight.zero_()
        update.attention.output.bias.zero_()
    plain = create_model("mit_b0", num_classes=3).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    batch = torch.randn(2, 3, 72, 104, generator=torch.Generator().manual_seed(0))
    ours, base = model.backbone(batch), plain.backbone(batch)
    for level in (0, 2, 3):
        assert torch.equal(ours[level], base[level])
    assert not torch.equal(ours[1], base[1])


def test_low_block_starts_as_a_copy_that_trains_alone():
    backbone = create_model("hila_segformer_b0_s3", num_classes=3).backbone
    source, copied = backbone.stages[1].blocks[1], backbone.exchanges["3"].low_block
    assert copied.drop_path.rate == source.drop_path.rate == pytest.approx(0.3 / 7)
    for one, other in zip(source.parameters(), copied.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


def test_what_hila_adds_starts_as_in_the_authors_code():
    torch.manual_seed(0)
    exchange = create_model("hila_segformer_b1_s3", num_classes=3).backbone.exchanges["3"]
    assert (exchange.low_norm.weight == 1).all()
    assert not exchange.low_norm.bias.any()
    for update in (exchange.top_down, exchange.bottom_up):
        assert not update.attention.position_bias.any()
        for module in update.modules():
            if isinstance(module, torch.nn.LayerNorm):
                assert module.eps == 1e-5
                assert (module.weight == 1).all()
            elif isinstance(module, torch.nn.Linear):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
                assert not module.bias.any()
            elif isinstance(module, torch.nn.Conv2d):  # depth-wise 3x3
                assert module.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
                assert not module.bias.any()


@torch.no_grad()
def test_all_stages_strides_and_patches_run():
    model = HilaMiT(
        dims=(8, 16, 24, 32),
        depths=(2, 2, 6, 2),
        heads=(1, 2, 3, 4),
        sr_ratios=(8, 4, 2, 1),
        stages=(2, 3, 4),
        stride=(1, 3, 1),
        exchange=ExchangeConfig(patch=6),
    ).eval()
    maps = model(torch.zeros(1, 3, 65, 97))
    assert [tuple(level.shape[1:]) for level in maps] == [
        (8, 17, 25),
        (16, 9, 13),
        (24, 5, 7),
        (32, 3, 4),
    ]


def test_compiles_without_a_graph_break():
    overrides = {"stages": (2, 3, 4), "drop_path": 0.0, "dropout": 0.0}
    model = create_model("hila_segformer_b0_s3", num_classes=5, **overrides)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
