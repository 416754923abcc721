import pytest
import timm
import torch
from torch.nn import functional as F

from tests.test_models import INFO, images
from xattn.errors import CheckpointError, ConfigError
from xattn.evaluate.cost import ShapesOnly, count_macs
from xattn.models.segvit import CascadeHead, LoneATM, Masks, score_map
from xattn.models.segvit_loss import mask_loss
from xattn.models.vit import ShrinkingBlock, ViT
from xattn.models.weights import load_weights
from xattn.models.zoo import create_backbone, create_model, create_recipe, list_models, model_card
from xattn.structures import identity_mean

SMALL = {"dim": 64, "depth": 3, "heads": 2, "head_width": 32}
TINY = {
    "segvit_b": {**SMALL, "crop": [64, 96], "taps": [1, 2, 3]},
    "segvit_l": {**SMALL, "crop": [64, 64], "taps": [1, 2, 3]},
    "segvit_shrunk_b": {**SMALL, "crop": [64, 96], "shrink_after": 1},
    "segvit_shrunk_l": {**SMALL, "crop": [64, 64], "shrink_after": 1},
    "segvit_naive_shrunk_b": {**SMALL, "crop": [64, 96], "shrink_after": 1},
    "segvit_swin_t": {"head_width": 32},
    "setr_naive_b": {**SMALL, "crop": [64, 96]},
}
"""Every model of the paper, small."""
SMALLER = [name for name in TINY if not name.endswith("_l")]
"""Without those that differ in nothing but numbers."""
STILL = {"drop_path": 0.0, "dropout": 0.0}
MASKED = [name for name in TINY if name != "setr_naive_b"]


def tiny(name, **overrides):
    torch.manual_seed(0)
    still = {"drop_path": 0.0} if name == "setr_naive_b" else STILL
    return create_recipe(name, INFO, **{**TINY[name], **still, **overrides})


# ---- sizes and costs ----------------------------------------------------------------------------


def numel(module):
    return sum(parameter.numel() for parameter in module.parameters())


# Spec SegViT 6: crop, classes, model's multiply-adds (10^9), backbone and head.
B512, L640, L512, L480 = 86_433_024, 304_737_280, 304_147_456, 304_020_480
ROWS = [
    ("segvit_b", {"taps": [12]}, 512, 150, 115.63, B512, 7_511_575),
    ("segvit_b", {"taps": [6, 12]}, 512, 150, 118.17, B512, 14_907_415),
    ("segvit_b", {}, 512, 150, 120.73, B512, 22_303_255),
    ("segvit_b", {"taps": [3, 6, 9, 12]}, 512, 150, 123.28, B512, 29_699_095),
    ("segvit_naive_shrunk_b", {}, 512, 150, 73.96, B512, 7_511_575),
    ("segvit_shrunk_b", {}, 512, 150, 96.91, B512, 22_400_407),
    ("segvit_l", {}, 640, 150, 637.63, L640, 39_568_023),
    ("segvit_shrunk_l", {}, 640, 150, 373.28, L640, 39_861_399),
    ("segvit_l", {}, 512, 171, 383.72, L512, 39_589_548),
    ("segvit_shrunk_l", {}, 512, 171, 224.66, L512, 39_588_012),
    ("segvit_l", {}, 480, 60, 321.61, L480, 39_475_773),
    ("segvit_l", {}, 480, 59, 321.54, L480, 39_474_748),
    ("segvit_shrunk_l", {}, 480, 60, 186.83, L480, 39_410_749),
]


@pytest.mark.parametrize(("name", "overrides", "crop", "classes", "giga", "backbone", "head"), ROWS)
def test_sizes_and_costs_are_the_papers(name, overrides, crop, classes, giga, backbone, head):
    with ShapesOnly():
        model = create_model(name, num_classes=classes, crop=[crop, crop], **overrides)
    assert (numel(model.backbone), numel(model.head)) == (backbone, head)
    macs = count_macs(model, (3, crop, crop), counting="fvcore")
    assert macs / 1e9 == pytest.approx(giga, rel=1e-3)


def test_printed_costs_hold_one_more_resize():
    resize = 4 * 150 * 512**2
    for name in ("segvit_b", "segvit_shrunk_b", "segvit_naive_shrunk_b", "setr_naive_b"):
        card = model_card(name)
        assert card.macs + resize == pytest.approx(card.paper_macs, rel=1e-3)


def test_swin_has_the_cost_of_projecting_whole_windows():
    with ShapesOnly():
        model = create_model("segvit_swin_t", num_classes=150)
    assert numel(model) == pytest.approx(40.61e6, rel=1e-3)
    macs = count_macs(model, (3, 512, 512), counting="fvcore")
    assert macs / 1e9 == pytest.approx(47.88, rel=2e-3)


def test_vit_l_alone():
    with ShapesOnly():
        backbone = create_backbone("segvit_l")
    assert count_macs(backbone, (3, 640, 640), counting="fvcore") / 1e9 == pytest.approx(
        610.66, rel=1e-4
    )


# ---- every model --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALLER)
def test_shapes_at_odd_sizes_and_a_batch_is_its_images(name):
    recipe = tiny(name)
    model = recipe.model.eval()
    for size in ((72, 104), (65, 97)):
        pair = images(2, 3, *size)
        with torch.no_grad():
            both = recipe.decode(model(pair), size)
            ones = [recipe.decode(model(one[None]), size)[0] for one in pair]
        assert both.shape == (2, 3, *size)
        assert both.dtype == torch.float32
        torch.testing.assert_close(both, torch.stack(ones), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        *((name, {}) for name in SMALLER),
        *((name, {"checkpoint": True}) for name in SMALLER if name != "segvit_swin_t"),
    ],
)
def test_every_trainable_parameter_gets_a_finite_gradient(name, overrides):
    recipe = tiny(name, **overrides)
    target = torch.arange(2 * 64 * 96).view(2, 64, 96) // 3000 % 3
    recipe.loss(recipe.model.train()(images(2, 3, 64, 96)), target, identity_mean)[
        "loss"
    ].backward()
    for key, parameter in recipe.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key


UNUSUAL = [
    ("segvit_b", {}, {"kind": "ce"}),
    ("segvit_shrunk_b", {"sampling": "conv"}, {"ignored": "masked"}),
    ("segvit_shrunk_b", {"sampling": "nearest_qkv"}, {}),
]


@pytest.mark.parametrize(("name", "overrides", "loss"), [*((n, {}, {}) for n in SMALLER), *UNUSUAL])
def test_overfits_one_batch(name, overrides, loss):
    torch.manual_seed(0)
    still = {"drop_path": 0.0} if name == "setr_naive_b" else STILL
    recipe = create_recipe(name, INFO, loss, **TINY[name], **still, **overrides)
    target = (torch.arange(64 * 96).view(1, 64, 96) // 2100).repeat(2, 1, 1)
    target[1] = target[1].flip(0)
    batch = F.one_hot(target, 3).permute(0, 3, 1, 2).float()
    optimizer = torch.optim.AdamW(recipe.model.train().parameters(), lr=2e-3)
    losses = []
    for _ in range(8 if name == "segvit_swin_t" else 25):
        value = recipe.loss(recipe.model(batch), target, identity_mean)["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    # The cross entropy of scores in [0, 1] cannot fall below log(1 + 2 / e) of log(3).
    assert losses[-1] < (0.85 if loss.get("kind") == "ce" else 0.6) * losses[0]


@pytest.mark.parametrize("name", SMALLER)
def test_compiles_whole(name):
    model = tiny(name).model
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    batch = images(1, 3, 64, 96)
    if name in ("segvit_b", "segvit_shrunk_b"):
        torch.testing.assert_close(compiled(batch), model(batch))
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(batch), model.eval()(batch))
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["segvit_b", "segvit_shrunk_b"])
def test_exports_with_dynamic_sides(name):
    model = tiny(name).model.eval()
    step = 16 if name == "segvit_b" else 32
    sides = {2 + axis: step * torch.export.Dim(key, min=2, max=9) for axis, key in enumerate("hw")}
    exported = torch.export.export(model, (images(2, 3, 64, 96),), dynamic_shapes=(sides,))
    other = images(2, 3, 5 * step, 3 * step)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(other), model(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALLER)
def test_half_precision_and_memory_format(name):
    model = tiny(name).model.eval()
    batch = images(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(batch)
        torch.testing.assert_close(
            model(batch.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(batch).float(), expected, rtol=0.1, atol=0.1)


# ---- the head -----------------------------------------------------------------------------------


def literal_layer(layer, query, memory):
    """One image's decoder layer by explicit loops over heads; gives the mask logits too."""

    def attend(attention, query, source):
        keys, values = attention.key_value(source).chunk(2, -1)
        queries, found, logits = attention.query(query), [], []
        for head in range(attention.heads):
            part = slice(32 * head, 32 * head + 32)
            logits.append(queries[:, part] @ keys[:, part].T / 32**0.5)
            found.append(logits[-1].softmax(1) @ values[:, part])
        return attention.output(torch.cat(found, 1)), sum(logits) / len(logits)

    query = layer.after_among(query + attend(layer.among, query, query)[0])
    found, logits = attend(layer.across, query, memory)
    query = layer.after_across(query + found)
    return layer.after_ffn(query + layer.contract(layer.expand(query).relu())), logits


@torch.no_grad()
def test_cascade_adds_up_head_averaged_logits_of_each_tap():
    torch.manual_seed(0)
    head = CascadeHead((8, 8), width=64, num_classes=4, dropout=0.0).double().train()
    for parameter in head.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    maps = [torch.randn(1, 8, 3, 5, dtype=torch.float64) for _ in range(2)]
    outputs = head(maps)
    query, total = head.queries, 0
    for tap, level in enumerate(reversed(maps)):
        memory = head.memories[tap](level)[0]
        for layer in head.stacks[tap]:
            query, logits = literal_layer(layer, query, memory)
        total = total + logits.view(4, 3, 5)
        torch.testing.assert_close(outputs.masks[0, tap], total, rtol=0, atol=1e-11)
        torch.testing.assert_close(outputs.classes[0, tap], head.classify(query))
    last = head.eval()(maps)
    torch.testing.assert_close(last.masks[:, 0], outputs.masks[:, -1])
    torch.testing.assert_close(last.classes[:, 0], outputs.classes[:, -1])


@torch.no_grad()
def test_layers_of_a_lone_atm_each_have_their_own_mask():
    torch.manual_seed(0)
    atm = LoneATM(32, 4, 0.0).double().train()
    memory = torch.randn(1, 6, 32, dtype=torch.float64)
    outputs, query = atm(memory, (2, 3)), atm.queries
    for number, layer in enumerate(atm.layers):
        query, logits = literal_layer(layer, query, memory[0])
        torch.testing.assert_close(outputs.masks[0, number], logits.view(4, 2, 3))
    torch.testing.assert_close(atm.eval()(memory, (2, 3)).masks[0, 0], outputs.masks[0, -1])


def test_saturated_classes_leave_the_masks_as_scores():
    masks = images(2, 1, 3, 4, 6)
    classes = 1e4 * torch.eye(3, 4).expand(2, 1, 3, 4)
    wide = F.interpolate(masks[:, 0], (8, 12), mode="bilinear").sigmoid()
    torch.testing.assert_close(score_map(Masks(classes, masks), (8, 12)), wide)


def test_scores_sum_over_queries_without_no_object():
    outputs = Masks(images(1, 2, 3, 4), images(1, 2, 3, 2, 2, seed=1))
    shares, masks = outputs.classes[0, 1].softmax(1), outputs.masks[0, 1].sigmoid()
    expected = [sum(shares[j, c] * masks[j] for j in range(3)) for c in range(3)]
    torch.testing.assert_close(score_map(outputs, (2, 2))[0], torch.stack(expected))


@torch.no_grad()
def test_lateral_sums_change_the_finer_taps_alone():
    torch.manual_seed(0)
    head = CascadeHead((8, 8), width=32, num_classes=4, dropout=0.0, lateral=True).train()
    maps = [torch.randn(1, 8, 6, 9), torch.randn(1, 8, 3, 5)]
    summed = head(maps).masks
    head.lateral = False
    plain = head(maps).masks
    assert summed.shape == (1, 2, 4, 6, 9)
    assert torch.equal(summed[:, 0], plain[:, 0])
    assert not torch.allclose(summed[:, 1], plain[:, 1])


# ---- the backbone -------------------------------------------------------------------------------


def vit(**numbers):
    torch.manual_seed(0)
    given = {"crop": (64, 96), "taps": (1, 2, 4), "drop_path": 0.0, **numbers}
    return ViT(64, 4, 2, **given).eval()


@torch.no_grad()
def test_shrinking_after_the_last_block_is_not_shrinking():
    batch = images(1, 3, 64, 96)
    for one, other in zip(vit()(batch), vit(shrink_after=4)(batch), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_a_shrinking_block_is_the_block_with_one_query_of_four():
    torch.manual_seed(0)
    block = ShrinkingBlock(64, 2, 4, 0.0, "nearest").double()
    tokens = torch.randn(1, 5, 7, 64, dtype=torch.float64)
    out = block(tokens)
    assert out.shape == (1, 3, 4, 64)
    whole = super(ShrinkingBlock, block).forward(tokens)  # the plain block's
    for row in range(3):
        for column in range(4):
            expected = whole[0, 2 * row, 2 * column]
            torch.testing.assert_close(out[0, row, column], expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_shrinking_key_and_value_too_is_the_block_on_the_smaller_map():
    torch.manual_seed(0)
    block = ShrinkingBlock(64, 2, 4, 0.0, "nearest_qkv")
    tokens = torch.randn(1, 5, 7, 64)
    expected = super(ShrinkingBlock, block).forward(tokens[:, ::2, ::2])
    torch.testing.assert_close(block(tokens), expected)


@torch.no_grad()
def test_positions_are_resized_to_the_image_and_pixels_to_the_weights():
    model = vit(taps=(1,))
    larger = F.interpolate(model.position.weight.permute(2, 0, 1)[None], (5, 7), mode="bicubic")[
        0
    ].permute(1, 2, 0)
    torch.testing.assert_close(model.position((5, 7)), larger)
    assert model.position((4, 6)) is model.position.weight
    half = vit(taps=(1,), pixels="half")
    grey = torch.full((1, 3, 64, 96), 0.5)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    (out,) = half((grey - mean) / std)
    (zero,) = model(torch.zeros(1, 3, 64, 96))
    torch.testing.assert_close(out, zero, rtol=1e-4, atol=1e-5)


# ---- the loss -----------------------------------------------------------------------------------


def literal_loss(outputs, target, ignored):
    """The spec's section 2, image by image and class by class."""
    images, taps, classes = outputs.classes.shape[:3]
    present = [sorted(set(ids.unique().tolist()) - {255}) for ids in target]
    positives = max(1, sum(map(len, present)))
    total = 0.0
    for tap in range(taps):
        wanted = torch.full((images, classes), classes)
        for image, ids in enumerate(present):
            wanted[image, ids] = torch.tensor(ids, dtype=torch.long)
            valid = (target[image] != 255) | (ignored == "negative")
            for query in ids:
                mask = outputs.masks[image : image + 1, tap, query : query + 1]
                logits = F.interpolate(mask, target.shape[1:], mode="bilinear")[0, 0][valid]
                truth = (target[image] == query)[valid].double()
                share = logits.sigmoid()
                right = share * truth + (1 - share) * (1 - truth)
                balance = 0.25 * truth + 0.75 * (1 - truth)
                focal = (-balance * (1 - right) ** 2 * right.log()).mean()
                dice = 1 - (2 * (share * truth).sum() + 1) / (share.sum() + truth.sum() + 1)
                total += (20 * focal + dice) / positives
        weight = torch.ones(classes + 1, dtype=torch.float64)
        weight[-1] = 0.1
        total += F.cross_entropy(outputs.classes[:, tap].flatten(0, 1), wanted.flatten(), weight)
    return total


def random_outputs(*, classes=4):
    torch.manual_seed(0)
    logits = torch.randn(3, 2, classes, classes + 1, dtype=torch.float64, requires_grad=True)
    masks = torch.randn(3, 2, classes, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (3, 12, 10))
    target[target == 2] = 255
    target[2] = 255  # an image without any class
    return Masks(logits, masks), target


@pytest.mark.parametrize("ignored", ["negative", "masked"])
@pytest.mark.parametrize("block", [1, 2**20])
def test_loss_is_the_literal_one_forward_and_backward(monkeypatch, ignored, block):
    monkeypatch.setattr("xattn.models.segvit_loss._BLOCK_ON_CPU", block)
    outputs, target = random_outputs()
    losses = mask_loss(outputs, target, ignored, identity_mean)
    expected = literal_loss(outputs, target, ignored)
    torch.testing.assert_close(losses["loss"], expected)
    parts = losses["loss_class"] + losses["loss_focal"] + losses["loss_dice"]
    torch.testing.assert_close(losses["loss"].detach(), parts)
    for one, other in zip(
        torch.autograd.grad(losses["loss"], outputs),
        torch.autograd.grad(expected, outputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_loss_does_not_depend_on_the_order_of_classes():
    outputs, target = random_outputs()
    order = torch.tensor([2, 0, 3, 1])
    place = order.argsort()
    moved = Masks(
        outputs.classes[:, :, order][..., [*order.tolist(), 4]], outputs.masks[:, :, order]
    )
    renamed = torch.where(target == 255, 255, place[target.clamp(max=3)])
    torch.testing.assert_close(
        mask_loss(moved, renamed, "negative", identity_mean)["loss"],
        mask_loss(outputs, target, "negative", identity_mean)["loss"],
    )


def test_a_batch_without_classes_trains_the_classes_alone():
    outputs, target = random_outputs()
    losses = mask_loss(outputs, torch.full_like(target, 255), "negative", identity_mean)
    classes, masks = torch.autograd.grad(losses["loss"], outputs)
    assert torch.equal(losses["loss"].detach(), losses["loss_class"])
    assert not masks.any()
    assert classes.any()


def test_two_ranks_are_one():
    """The counts of both are averaged; so the mean of the two losses is that of the whole."""
    outputs, target = random_outputs()
    whole = mask_loss(outputs, target, "negative", identity_mean)["loss"]
    halves = [
        (Masks(*(part[at] for part in outputs)), target[at]) for at in (slice(1), slice(1, 3))
    ]
    counts = []
    for half in halves:
        mask_loss(*half, "negative", lambda value: counts.append(value) or value)
    means = [(counts[0] + counts[2]) / 2, (counts[1] + counts[3]) / 2]
    total = 0.0
    for half in halves:
        waiting = iter(means)
        total += mask_loss(*half, "negative", lambda _, waiting=waiting: next(waiting))["loss"] / 2
    torch.testing.assert_close(total, whole)


def test_ce_takes_scores_for_logits():
    recipe = create_recipe("segvit_b", INFO, {"kind": "ce"}, **TINY["segvit_b"])
    outputs = Masks(images(2, 2, 3, 4), images(2, 2, 3, 3, 4, seed=1))
    target = torch.randint(0, 3, (2, 12, 16))
    expected = F.cross_entropy(score_map(outputs, (12, 16)), target)
    torch.testing.assert_close(recipe.loss(outputs, target, identity_mean)["loss"], expected)


# ---- weights ------------------------------------------------------------------------------------


@torch.no_grad()
def test_backbone_agrees_with_timm():
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(
        img_size=(96, 96), embed_dim=64, depth=4, num_heads=2, num_classes=5
    ).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.cls_token.mul_(0)
    ours = vit(crop=(96, 96), taps=(1, 4))
    report = load_weights(ours, theirs.state_dict())
    assert report.source == "timm_vit"
    assert not report.missing
    assert set(report.unexpected) == {"head.weight", "head.bias"}
    batch = images(1, 3, 96, 96)
    tokens = theirs.patch_embed(batch) + theirs.pos_embed[:, 1:]
    for number, block in enumerate(theirs.blocks, start=1):
        tokens = block(tokens)
        if number in (1, 4):
            level = ours(batch)[(1, 4).index(number)]
            expected = tokens.unflatten(1, (6, 6)).permute(0, 3, 1, 2)
            torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-4)


def test_positions_of_another_grid_are_resized_when_loaded():
    table = images(1, 1 + 24 * 24, 64)
    model = create_model("segvit_b", num_classes=3, **TINY["segvit_b"])
    load_weights(model, {"pos_embed": table, "blocks.0.attn.proj.bias": torch.ones(64)})
    grid = table[:, 1:].unflatten(1, (24, 24)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (4, 6), mode="bicubic")[0].permute(1, 2, 0)
    torch.testing.assert_close(model.backbone.position.weight.data, expected)
    torch.testing.assert_close(model.backbone.class_position.data, table[0, 0])
    wrong = {"pos_embed": images(1, 12, 64), "blocks.0.attn.proj.bias": torch.ones(64)}
    with pytest.raises(CheckpointError, match=r"position\.weight has shape"):
        load_weights(model, wrong)


def release_names(model, width):
    """Return random weights of a tiny model by the release's names, by the facts of the spec."""
    dim, hidden, classes = 64, 4 * width, 3
    shapes = {
        "backbone.cls_token": (1, 1, dim),
        "backbone.pos_embed": (1, 17, dim),
        "backbone.patch_embed.projection": (dim, 3, 16, 16),
    }
    for block in range(3):
        at = f"backbone.layers.{block}"
        shapes |= {f"{at}.ln1": (dim,), f"{at}.ln2": (dim,)}
        shapes |= {
            f"{at}.attn.attn.in_proj_": (3 * dim, dim),
            f"{at}.attn.attn.out_proj": (dim, dim),
        }
        shapes |= {f"{at}.ffn.layers.0.0": (4 * dim, dim), f"{at}.ffn.layers.1": (dim, 4 * dim)}

    def layers(at, *, packed):
        for number in range(3):
            layer = f"{at}.layers.{number}"
            shapes[f"{layer}.self_attn.in_proj_"] = (3 * width, width)
            shapes[f"{layer}.self_attn.out_proj"] = (width, width)
            if packed:
                shapes[f"{layer}.multihead_attn.in_proj_"] = (3 * width, width)
                shapes[f"{layer}.multihead_attn.out_proj"] = (width, width)
            else:
                for part in ("q", "k", "v", "proj"):
                    shapes[f"{layer}.multihead_attn.{part}"] = (width, width)
            shapes[f"{layer}.linear1"] = (hidden, width)
            shapes[f"{layer}.linear2"] = (width, hidden)
            for norm in (1, 2, 3):
                shapes[f"{layer}.norm{norm}"] = (width,)

    is_shrunk = "shrunk" in model
    for tap in range(1, 3 if is_shrunk else 4):
        shapes[f"decode_head.input_proj_{tap}"] = (width, dim)
        shapes[f"decode_head.proj_norm_{tap}"] = (width,)
        layers(f"decode_head.decoder_{tap}", packed=is_shrunk)
    inner = "decode_head.atm" if is_shrunk else "decode_head"
    if is_shrunk:
        layers(f"{inner}.decoder_1", packed=False)
        shapes["decode_head.q.weight"] = (16, width)
    shapes |= {f"{inner}.q.weight": (classes, width), f"{inner}.class_embed": (classes + 1, width)}
    given = {"decode_head.loss_decode.criterion.empty_weight": torch.ones(classes + 1)}
    for seed, (key, shape) in enumerate(shapes.items()):
        if key.endswith(("token", "pos_embed", "q.weight")):
            given[key] = images(*shape, seed=seed)
            continue
        dot = "" if key.endswith("_") else "."
        given[f"{key}{dot}weight"] = images(*shape, seed=seed)
        given[f"{key}{dot}bias"] = images(shape[0], seed=seed)
    return given


@pytest.mark.parametrize("name", ["segvit_b", "segvit_shrunk_b"])
def test_release_weights_fill_the_model(name):
    model = create_model(name, num_classes=3, **{**TINY[name], "crop": [64, 64]})
    given = release_names(name, 32)
    report = load_weights(model, given)
    assert report.source == "segvit"
    assert (report.missing, report.unexpected, report.other_shape) == ((), (), {})
    ours = model.state_dict()

    def same(key, *theirs):
        assert torch.equal(ours[key], torch.cat([given[f"decode_head.{one}"] for one in theirs]))

    layer = "head.stacks.1.2"
    same("head.memories.1.linear.weight", "input_proj_2.weight")
    same(f"{layer}.after_ffn.bias", "decoder_2.layers.2.norm3.bias")
    packed = given["decode_head.decoder_2.layers.2.self_attn.in_proj_weight"]
    assert torch.equal(ours[f"{layer}.among.query.weight"], packed[:32])
    assert torch.equal(ours[f"{layer}.among.key_value.weight"], packed[32:])
    if name == "segvit_b":
        at = "decoder_2.layers.2.multihead_attn"
        same(f"{layer}.across.key_value.weight", f"{at}.k.weight", f"{at}.v.weight")
        same("head.queries", "q.weight")
    else:
        same("head.atm.queries", "atm.q.weight")
        cells = given["decode_head.q.weight"].unflatten(0, (4, 4))
        assert torch.equal(ours["head.cells.weight"], cells)


# ---- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("segvit_b", {"taps": [6, 13]}, r"overrides\.taps: found \[6, 13\], expected ascending"),
        ("segvit_b", {"taps": [6, 6]}, r"taps: found \[6, 6\]"),
        ("segvit_b", {"taps": []}, r"taps: found \[\]"),
        ("segvit_b", {"crop": [512]}, r"crop: found \[512\], expected a height and a width"),
        (
            "segvit_b",
            {"head_width": 100},
            "head_width: found 100, expected a multiple of 32, e.g. 96",
        ),
        ("segvit_b", {"heads": 5}, "heads: found 5, expected a divisor of dim, 768"),
        ("segvit_shrunk_b", {"shrink_after": 12}, "shrink_after: found 12, expected fewer than"),
        ("segvit_shrunk_b", {"sampling": "neares"}, "did you mean 'nearest'"),
    ],
)
def test_wrong_numbers_are_named(name, overrides, message):
    with pytest.raises(ConfigError, match=message), ShapesOnly():
        create_model(name, num_classes=5, **overrides)


def test_names():
    assert set(list_models(system="SegViT")) == set(MASKED)
    assert list_models(system="SETR") == ["setr_naive_b"]
