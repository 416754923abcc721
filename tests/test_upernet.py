import pytest
import torch
from torch.nn import functional as F

from tests.test_models import INFO
from xattn.errors import ConfigError
from xattn.models.upernet import ConvBNReLU, UPerHead, convolve_resized
from xattn.models.zoo import create_recipe
from xattn.structures import identity_mean

SIZES = ((18, 26), (9, 13), (5, 7), (3, 4))
DIMS = (4, 6, 8, 10)


def upsample(level, size):
    return F.interpolate(level, size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("size", [(5, 7), (10, 14), (13, 29), (40, 57), (1, 9), (3, 4)])
def test_convolving_before_resizing_is_the_same(size):
    torch.manual_seed(0)
    small = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    literal = F.conv2d(upsample(small, size), weight, padding=1)
    fast = convolve_resized(small, weight, size)
    torch.testing.assert_close(fast, literal, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(fast)
    for one, other in zip(
        torch.autograd.grad(fast, (small, weight), cotangent),
        torch.autograd.grad(literal, (small, weight), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_convolving_before_resizing_in_half_precision_is_near():
    torch.manual_seed(0)
    small, weight = torch.randn(1, 3, 5, 7), torch.randn(4, 3, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = convolve_resized(small, weight, (20, 28))
    expected = F.conv2d(upsample(small, (20, 28)), weight, padding=1)
    torch.testing.assert_close(mixed.float(), expected, rtol=0.05, atol=0.1)


def literal_head(head, maps):
    """Upsample, concatenate, convolve: as the paper draws it."""
    coarsest = maps[-1]
    pooled = [
        upsample(conv(F.adaptive_avg_pool2d(coarsest, pool)), coarsest.shape[2:])
        for conv, pool in zip(head.pooled, (1, 2, 3, 6), strict=True)
    ]
    above = head.context(torch.cat([coarsest, *pooled], 1))
    levels = [above]
    for index in (2, 1, 0):
        above = head.laterals[index](maps[index]) + upsample(above, maps[index].shape[2:])
        levels.insert(0, head.smooths[index](above))
    joined = torch.cat([upsample(level, maps[0].shape[2:]) for level in levels], 1)
    return head.classifier(head.fuse(joined))


def test_fast_head_is_the_literal_head_forward_and_backward():
    torch.manual_seed(0)
    head = UPerHead(DIMS, width=12, num_classes=3, dropout=0.0).double()
    maps = [
        torch.randn(2, dim, *size, dtype=torch.float64, requires_grad=True)
        for dim, size in zip(DIMS, SIZES, strict=True)
    ]
    inputs = [*maps, *head.parameters()]
    fast, literal = head(maps), literal_head(head, maps)
    assert fast.shape == (2, 3, 18, 26)
    torch.testing.assert_close(fast, literal, rtol=0, atol=1e-10)
    weight = torch.randn_like(fast)
    fast_gradients = torch.autograd.grad((fast * weight).sum(), inputs)
    literal_gradients = torch.autograd.grad((literal * weight).sum(), inputs)
    for one, other in zip(fast_gradients, literal_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_only_maps_upsampled_to_more_than_twice_their_sides_are_convolved_small(monkeypatch):
    small = []
    monkeypatch.setattr(
        "xattn.models.upernet.convolve_resized",
        lambda level, weight, size: small.append(level.shape[2]) or torch.zeros(1, 2, *size),
    )
    conv = ConvBNReLU(4, 2, 3).eval()
    conv.of_resized([torch.zeros(1, 1, side, side) for side in (16, 8, 7, 1)])
    assert small == [7, 1]


@pytest.fixture(scope="module")
def recipe():
    torch.manual_seed(0)
    return create_recipe("upernet_swin_t", INFO, dropout=0.0, drop_path=0.0, head_width=32)


def test_auxiliary_logits_train_but_do_not_predict(recipe):
    batch = torch.randn(2, 3, 64, 64)
    target = torch.randint(0, 3, (2, 64, 64))
    main, auxiliary = recipe.model.train()(batch)
    assert main.shape == (2, 3, 16, 16)
    assert auxiliary.shape == (2, 3, 4, 4)
    losses = recipe.loss((main, auxiliary), target, identity_mean)
    assert set(losses) == {"loss", "loss_main", "loss_auxiliary"}
    for logits, name in ((main, "loss_main"), (auxiliary, "loss_auxiliary")):
        expected = F.cross_entropy(upsample(logits, (64, 64)), target)
        torch.testing.assert_close(losses[name], expected)
    total = losses["loss_main"] + 0.4 * losses["loss_auxiliary"]
    torch.testing.assert_close(losses["loss"], total)

    with torch.no_grad():
        logits = recipe.model.eval()(batch)
    assert logits.shape == (2, 3, 16, 16)
    assert recipe.decode(logits, (64, 64)).shape == (2, 3, 64, 64)
    assert set(recipe.loss(logits, target, identity_mean)) == {"loss"}


def test_auxiliary_weight_is_a_number_of_this_loss_only():
    other = create_recipe("upernet_swin_t", INFO, {"auxiliary_weight": 0.0}, head_width=8)
    pair = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)
    target = torch.randint(0, 3, (2, 8, 8))
    losses = other.loss(pair, target, identity_mean)
    assert torch.equal(losses["loss"], losses["loss_main"])
    with pytest.raises(ConfigError, match=r"loss\.auxiliary_weight: .* no such setting"):
        create_recipe("segformer_b0", INFO, {"auxiliary_weight": 0.4})


def test_recipe_descends(recipe):
    target = (torch.arange(64 * 64).reshape(1, 64, 64) // 700).clamp(max=2).repeat(2, 1, 1)
    batch = F.one_hot(target, 3).permute(0, 3, 1, 2).float()
    optimizer = torch.optim.AdamW(recipe.model.train().parameters(), lr=2e-3)
    losses = []
    for _ in range(14):
        loss = recipe.loss(recipe.model(batch), target, identity_mean)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
