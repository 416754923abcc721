import pytest
import torch
from torch.nn import functional as F

from tests.test_cla import normal
from tests.test_models import INFO, images
from xattn.models.afma import AFMA, AFMAOutputs, class_shares, gold_attention
from xattn.models.zoo import create_model, create_recipe
from xattn.structures import IGNORE_INDEX, identity_mean


def patches_of(level, patch):
    """Return (B, K, N, Q) by unfolding, of a map whose sides the patch divides."""
    channels = level.shape[1]
    return F.unfold(level, patch, stride=patch).unflatten(1, (channels, -1)).transpose(2, 3)


def test_attention_and_correction_are_those_of_the_literal_steps():
    torch.manual_seed(0)
    afma = AFMA(6, 3, patch=2, stride=8).double()
    batch, level, logits = (
        normal(2, 3, 16, 32),
        normal(2, 6, 2, 4, seed=1),
        normal(2, 3, 4, 8, seed=2),
    )
    corrected, attention = afma(batch, level, logits)

    def lifted(maps):
        return F.relu(afma.narrow(afma.widen(patches_of(maps, 2))))

    own = lifted(afma.image(batch)) @ lifted(afma.level(level) / 64).transpose(2, 3) / 4
    assert own.shape == (2, 3, 8 * 16, 1 * 2)
    torch.testing.assert_close(attention, own)

    guess = F.one_hot(logits.argmax(1), 3).permute(0, 3, 1, 2).double()
    rows = own / (own != 0).sum(3, keepdim=True).clamp(min=1)
    mixed = rows @ patches_of(F.avg_pool2d(guess, 2), 2)
    full = F.fold(mixed.transpose(2, 3).flatten(1, 2), (16, 32), 2, stride=2)
    torch.testing.assert_close(corrected, logits + logits * F.avg_pool2d(full, 4))


def test_gold_attention_is_that_of_the_one_hot_label_map():
    target = torch.randint(0, 4, (2, 16, 32), generator=torch.Generator().manual_seed(0))
    target[target == 3] = IGNORE_INDEX
    hot = F.one_hot(target.clamp(max=3), 4)[..., :3].permute(0, 3, 1, 2).float()
    pooled = F.avg_pool2d(hot, 8)
    torch.testing.assert_close(class_shares(target, 3, 8).permute(0, 3, 1, 2), pooled)
    gold = gold_attention(target, 3, patch=2, stride=8)
    literal = patches_of(hot, 2) @ patches_of(pooled, 2).transpose(2, 3) / 4
    torch.testing.assert_close(gold, literal)


def test_what_lies_beyond_the_image_is_of_no_class():
    target = torch.zeros(1, 5, 7, dtype=torch.int64)
    shares = class_shares(target, 2, 4)
    assert shares[0, ..., 0].tolist() == [[1.0, 0.75], [0.25, 0.1875]]
    assert shares[..., 1].sum() == 0
    gold = gold_attention(target, 2, patch=4, stride=4)
    assert gold.shape == (1, 2, 4, 1)
    assert gold[0, 0, 3, 0] == pytest.approx((1 + 0.75) / 16)  # 3 pixels, the third on no cell


@pytest.fixture(scope="module")
def recipe():
    torch.manual_seed(0)
    return create_recipe("afma_segformer_b0", INFO, dropout=0.0, drop_path=0.0, head_width=32)


def test_loss_is_five_times_the_cross_entropy_and_the_attention_s_error(recipe):
    target = torch.randint(0, 3, (2, 64, 96))
    outputs = recipe.model.train()(images(2, 3, 64, 96))
    assert isinstance(outputs, AFMAOutputs)
    assert outputs.logits.shape == (2, 3, 16, 24)
    assert outputs.attention.shape == (2, 3, 7 * 10, 1)
    losses = recipe.loss(outputs, target, identity_mean)
    main = F.cross_entropy(F.interpolate(outputs.logits, (64, 96), mode="bilinear"), target)
    error = F.mse_loss(outputs.attention, gold_attention(target, 3))
    torch.testing.assert_close(losses["loss"], 5 * main + error)
    logits = recipe.model.eval()(images(1, 3, 64, 96))
    assert isinstance(logits, torch.Tensor)
    assert recipe.decode(logits, (64, 96)).shape == (1, 3, 64, 96)
    torch.testing.assert_close(recipe.loss(outputs.logits, target, identity_mean)["loss"], 5 * main)


@pytest.mark.parametrize("name", ["afma_segformer_b0", "cla_segformer_b0", "cla_segformer_b1"])
def test_overfits_one_batch(name):
    torch.manual_seed(0)
    tuned = create_recipe(name, INFO, dropout=0.0, drop_path=0.0, head_width=32)
    target = (torch.arange(64 * 64).reshape(1, 64, 64) // 700).clamp(max=2).repeat(2, 1, 1)
    batch = F.one_hot(target, 3).permute(0, 3, 1, 2).float()
    optimizer = torch.optim.AdamW(tuned.model.train().parameters(), lr=1e-3)
    losses = []
    for _ in range(14):
        loss = tuned.loss(tuned.model(batch), target, identity_mean)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_compiles_whole_while_training():
    model = create_model("afma_segformer_b0", num_classes=5, drop_path=0.0, dropout=0.0).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    batch = images(2, 3, 65, 97)
    for one, other in zip(compiled(batch), model(batch), strict=True):
        torch.testing.assert_close(one, other)
