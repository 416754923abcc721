import dataclasses
import itertools

import pytest
import torch
from torch.nn import functional as F
from torchvision.models import vgg16
from torchvision.models.detection import ssd300_vgg16
from torchvision.ops import box_iou

from tests.test_models import INFO
from xattn.data.pixels import MEAN, STD
from xattn.errors import CheckpointError, ConfigError
from xattn.evaluate.cost import ShapesOnly, count_macs, count_params
from xattn.models.multibox import (
    MultiBoxOutputs,
    decode,
    decode_detections,
    default_boxes,
    encode,
    match,
    multibox_loss,
    to_corners,
)
from xattn.models.weights import load_weights
from xattn.models.zoo import create_backbone, create_model, create_recipe, list_models
from xattn.structures import BoxTarget, identity_mean

BOXES = dataclasses.replace(INFO, tasks=("detection",))


def random_target(batch, most, seed, side=300.0):
    """Draw objects of many sizes; the first image has none, the second as many as fit."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 4 + torch.rand(batch, most, 2, generator=generator).square() * (side - 8)
    corners = torch.rand(batch, most, 2, generator=generator) * (side - sizes)
    labels = torch.randint(0, 3, (batch, most), generator=generator)
    counts = torch.randint(0, most + 1, (batch,), generator=generator)
    counts[:2] = torch.tensor([0, most])
    labels[torch.arange(most) >= counts[:, None]] = -1
    boxes = torch.cat([corners, corners + sizes], -1)
    return BoxTarget(boxes.where(labels[..., None] >= 0, 0), labels)


def random_outputs(batch, classes, seed, sizes="coco", spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randn(batch, 8732, 4, generator=generator) * spread
    logits = torch.randn(batch, 8732, classes + 1, generator=generator) * 3 * spread
    return MultiBoxOutputs(offsets, logits, default_boxes(sizes))


# ---- counts


@pytest.mark.parametrize(("classes", "params"), [(20, 26_285_486), (80, 34_305_206)])
def test_counts_of_ssd300(classes, params):
    with ShapesOnly():
        model = create_model("ssd300", num_classes=classes)
    assert count_params(model) == params
    if classes == 20:
        macs = count_macs(model, (3, 300, 300), counting="products")
        assert macs / 1e9 == pytest.approx(31.3735, abs=5e-5)


# ---- default boxes and their code


def test_default_boxes_are_the_papers():
    boxes = default_boxes()
    assert boxes.shape == (8732, 4)
    # First cell: squares of 30 and sqrt(30 * 60), then 2:1 and 1:2.
    root = 2**0.5
    expected = [[4, 4, 30, 30], [4, 4, 30 * root, 30 * root]]
    expected += [[4, 4, 30 * root, 30 / root], [4, 4, 30 / root, 30 * root]]
    torch.testing.assert_close(boxes[:4], torch.tensor(expected))
    assert boxes[4, :2].tolist() == [12, 4]  # to the right before down
    assert boxes[-4:, :2].unique().tolist() == [150]
    assert boxes[-4, 2] == 264
    assert boxes[:, 2:].max() == 300  # 264 * sqrt(2) is cut
    assert len(boxes[: 38 * 38 * 4 + 19 * 19 * 6].unique(dim=0)) == 38 * 38 * 4 + 19 * 19 * 6


def test_decoding_undoes_encoding():
    defaults = default_boxes()
    boxes = random_target(2, 8732, 0).boxes[1:]
    offsets = encode(boxes.double(), defaults.double())
    torch.testing.assert_close(decode(offsets, defaults.double()), boxes.double())
    own = encode(to_corners(defaults)[None], defaults)
    assert own.abs().max() < 1e-4
    one = encode(
        torch.tensor([[[10.0, 20.0, 30.0, 60.0]]]), torch.tensor([[22.0, 38.0, 10.0, 20.0]])
    )
    log2 = torch.tensor(2.0).log().item() / 0.2
    assert one.flatten().tolist() == pytest.approx([-2.0, 1.0, log2, log2], abs=1e-5)
    huge = decode(torch.full((1, 8732, 4), 1e4), defaults)
    assert huge.isfinite().all()


def slow_match(boxes, labels, defaults):
    """Match one image, object by object."""
    matched = torch.full((len(defaults),), -1)
    own = [number for number, label in enumerate(labels.tolist()) if label >= 0]
    if not own:
        return matched
    overlap = box_iou(boxes[own], to_corners(defaults))
    for place, column in enumerate(overlap.T.tolist()):
        best = max(range(len(own)), key=lambda number: (column[number], -number))
        if column[best] >= 0.5:
            matched[place] = own[best]
    for number, row in zip(own, overlap, strict=True):
        matched[row.argmax()] = number
    return matched


def test_matching_is_the_slow_reference():
    defaults = default_boxes()
    target = random_target(6, 9, 1)
    matched = match(*target, defaults)
    assert matched.shape == (6, 8732)
    for image in range(6):
        expected = slow_match(target.boxes[image], target.labels[image], defaults)
        assert torch.equal(matched[image], expected), image
    assert (matched[0] == -1).all()
    assert set(range(9)) <= set(matched[1].unique().tolist())  # none goes without


def test_matching_by_hand():
    defaults = torch.tensor([[10.0, 10, 20, 20], [40, 10, 20, 20], [70, 10, 20, 20]])
    boxes = torch.tensor(
        [
            [[0.0, 0, 20, 10], [30, 0, 32, 2], [0, 0, 0, 0]],  # half of the first; a speck
            [[1.0, 0, 21, 20], [0, 0, 20, 20], [50, 5, 50, 9]],  # both want one; no area
        ]
    )
    labels = torch.tensor([[0, 1, -1], [2, 1, 0]])
    assert match(boxes, labels, defaults).tolist() == [[0, 1, -1], [1, -1, -1]]
    padded = F.pad(boxes, (0, 0, 0, 5)), F.pad(labels, (0, 5), value=-1)
    assert torch.equal(match(*padded, defaults), match(boxes, labels, defaults))


# ---- loss


def test_loss_by_hand():
    defaults = torch.tensor([[10.0 + 30 * n, 10, 20, 20] for n in range(6)])
    target = BoxTarget(torch.tensor([[[2.0, 0, 22, 20]]]), torch.tensor([[1]]))
    logits = torch.zeros(1, 6, 3)
    logits[0, :, 1] = torch.tensor([0.0, 5, 1, 2, 4, 3])  # how wrong each background is
    outputs = MultiBoxOutputs(torch.zeros(1, 6, 4), logits, defaults)
    losses = multibox_loss(outputs, target, identity_mean, negatives=3)
    assert losses["loss_boxes"].item() == pytest.approx(0.5)  # one shift of 2 / 20 / 0.1 = 1
    wrong = [
        F.cross_entropy(torch.tensor([0.0, x, 0.0]), torch.tensor(0)).item() for x in (5, 4, 3)
    ]
    expected = torch.tensor(3.0).log().item() + sum(wrong)
    assert losses["loss_classes"].item() == pytest.approx(expected)
    assert losses["loss"].item() == pytest.approx(0.5 + expected)
    # Ranks with 1 and 3 matched boxes divide by 2.
    halved = multibox_loss(outputs, target, lambda count: (count + 3) / 2, negatives=3)
    assert halved["loss"].item() == pytest.approx((0.5 + expected) / 2)


def test_images_without_objects_cost_nothing_and_harm_nothing():
    outputs = random_outputs(2, 3, 0)
    leaves = [tensor.requires_grad_() for tensor in outputs[:2]]
    for most in (0, 4):
        target = BoxTarget(torch.zeros(2, most, 4), torch.full((2, most), -1))
        loss = multibox_loss(outputs, target, identity_mean, negatives=3)["loss"]
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, leaves):
            assert (gradient == 0).all()
    one = random_target(2, 5, 3)
    loss = multibox_loss(outputs, one, identity_mean, negatives=3)["loss"]
    for gradient in torch.autograd.grad(loss, leaves):
        assert gradient.isfinite().all()
        assert (gradient[0] == 0).all()
        assert (gradient[1] != 0).any()


def test_a_single_match_of_many_ranks_counts_as_alone():
    outputs = random_outputs(1, 3, 0)
    target = BoxTarget(torch.tensor([[[10.0, 10, 12, 12]]]), torch.tensor([[0]]))
    assert (match(*target, outputs.defaults_cxcywh) >= 0).sum() == 1
    alone, eighth = (
        multibox_loss(outputs, target, lambda count, by=ranks: count / by, negatives=3)["loss"]
        for ranks in (1, 8)
    )
    assert eighth.item() / 8 == pytest.approx(alone.item(), rel=1e-6)


def test_loss_in_half_precision_is_computed_in_single():
    outputs = random_outputs(2, 3, 0)
    target = random_target(2, 5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = multibox_loss(
            outputs._replace(logits=outputs.logits.bfloat16()), target, identity_mean, negatives=3
        )["loss"]
    assert half.dtype == torch.float32
    whole = multibox_loss(outputs, target, identity_mean, negatives=3)["loss"]
    assert half.item() == pytest.approx(whole.item(), rel=5e-3)


def slow_loss(outputs, target, negatives):
    """Return the loss, image by image, of all default boxes' losses sorted."""
    offsets, logits, defaults = outputs
    of_boxes = of_classes = matched_ones = 0
    for image, (boxes, labels) in enumerate(zip(*target, strict=True)):
        matched = slow_match(boxes, labels, defaults)
        classes = torch.zeros(len(defaults), dtype=torch.int64)
        positives = (matched >= 0).nonzero().flatten().tolist()
        for place in positives:
            classes[place] = labels[matched[place]] + 1
            own = encode(boxes[matched[place]].expand(1, 1, 4), defaults[place : place + 1])
            difference = (offsets[image, place] - own.flatten()).abs()
            of_boxes += (difference - 0.5).where(difference >= 1, difference.square() / 2).sum()
        losses = -logits[image].log_softmax(1).gather(1, classes[:, None]).flatten()
        others = sorted(
            set(range(len(defaults))) - set(positives),
            key=lambda place, losses=losses: (-losses[place].item(), place),
        )
        of_classes += losses[positives + others[: negatives * len(positives)]].sum()
        matched_ones += len(positives)
    return of_boxes / max(matched_ones, 1), of_classes / max(matched_ones, 1)


@pytest.mark.parametrize("negatives", [0, 3, 10_000])
def test_loss_and_its_gradients_are_those_of_the_slow_reference(negatives):
    outputs, target = random_outputs(4, 3, 2), random_target(4, 6, 4)
    with torch.no_grad():  # rounded: many are equal, and of those the first ones count
        outputs = outputs._replace(logits=outputs.logits.round())
    leaves = [tensor.requires_grad_() for tensor in outputs[:2]]
    losses = multibox_loss(outputs, target, identity_mean, negatives=negatives)
    of_boxes, of_classes = slow_loss(outputs, target, negatives)
    torch.testing.assert_close(losses["loss_boxes"], of_boxes)
    torch.testing.assert_close(losses["loss_classes"], of_classes)
    given = torch.autograd.grad(losses["loss"], leaves)
    expected = torch.autograd.grad(of_boxes + of_classes, leaves)
    for one, other in zip(given, expected, strict=True):
        assert torch.equal(one != 0, other != 0)
        torch.testing.assert_close(one, other)


def test_of_equal_ones_the_first_count_and_none_that_is_matched():
    target = random_target(2, 3, 3)
    is_matched = match(*target, default_boxes())[1] >= 0
    logits = torch.zeros(2, 8732, 4, requires_grad=True)
    outputs = MultiBoxOutputs(torch.zeros(2, 8732, 4), logits, default_boxes())
    loss = multibox_loss(outputs, target, identity_mean, negatives=3)["loss_classes"]
    assert loss.item() == pytest.approx(4 * torch.tensor(4.0).log().item())
    (gradient,) = torch.autograd.grad(loss, logits)
    counted = (gradient[1] != 0).any(1)
    first = (~is_matched).nonzero().flatten()[: 3 * is_matched.sum()]
    assert torch.equal((counted & ~is_matched).nonzero().flatten(), first)
    # Where the background is certain, the others cost 0 (or -0) and the matched ones 500 each.
    certain = outputs._replace(logits=torch.tensor([500.0, 0, 0, 0]).expand(2, 8732, 4))
    loss = multibox_loss(certain, target, identity_mean, negatives=3)["loss_classes"]
    assert loss.item() == pytest.approx(500)


def test_loss_compiles_whole(monkeypatch):
    for name in ("capture_dynamic_output_shape_ops", "capture_scalar_outputs"):
        monkeypatch.setattr(torch._dynamo.config, name, True)
    outputs, target = random_outputs(2, 3, 0), random_target(2, 5, 3)
    compiled = torch.compile(multibox_loss, backend="eager", fullgraph=True)
    one = compiled(outputs, target, identity_mean, negatives=3)["loss"]
    torch.testing.assert_close(
        one, multibox_loss(outputs, target, identity_mean, negatives=3)["loss"]
    )


# ---- detections


def test_detections_by_hand():
    defaults = torch.tensor(
        [[50.0, 50, 40, 40], [52, 50, 40, 40], [200, 200, 40, 40], [300, 0, 40, 40]]
    )
    logits = torch.full((1, 4, 3), -20.0)
    logits[0, 0, 1], logits[0, 1, 1], logits[0, 2, 2], logits[0, 3, 0] = 1.0, 2.0, 0.0, 9.0
    logits[0, :3, 0] = 0.0
    outputs = MultiBoxOutputs(torch.zeros(1, 4, 4), logits, defaults)
    (found,) = decode_detections(outputs, (150, 600))
    assert found["labels"].tolist() == [0, 1]  # of two that overlap the better one
    assert found["scores"].tolist() == pytest.approx([torch.tensor(2.0).sigmoid().item(), 0.5])
    assert found["boxes"].tolist() == [[64, 15, 144, 35], [360, 90, 440, 110]]
    assert found["labels"].dtype == torch.int64


def test_detections_are_cut_at_the_border_and_few():
    found = decode_detections(random_outputs(2, 3, 0, spread=2.0), (300, 300))
    for image in found:
        assert len(image["scores"]) == 200
        assert (image["scores"].diff() <= 0).all()
        assert image["boxes"].min() >= 0
        assert image["boxes"].max() <= 300
    quiet = random_outputs(1, 3, 0)._replace(logits=torch.tensor([9.0, 0, 0, 0]).expand(1, 8732, 4))
    (nothing,) = decode_detections(quiet, (300, 300))
    assert nothing["boxes"].shape == (0, 4)


# ---- beside torchvision


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return ssd300_vgg16(weights=None, weights_backbone=None, num_classes=4).eval()


def test_outputs_are_torchvisions_with_its_weights(theirs):
    ours = create_model("ssd300", num_classes=3, box_sizes="coco").eval()
    report = load_weights(ours, theirs.state_dict())
    assert (report.source, report.missing, report.unexpected) == ("torchvision_ssd", (), ())
    pixels = torch.rand(1, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    with torch.no_grad():
        outputs = ours((pixels * 255 - mean) / std)
        images, _ = theirs.transform(list(pixels))
        maps = list(theirs.backbone(images.tensors).values())
        head = theirs.head(maps)
    (anchors,) = theirs.anchor_generator(images, maps)
    torch.testing.assert_close(to_corners(outputs.defaults_cxcywh), anchors, rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.offsets, head["bbox_regression"], rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.logits, head["cls_logits"], rtol=0, atol=1e-4)
    assert outputs.logits.abs().max() > 1


def test_decoded_boxes_and_detections_are_torchvisions(theirs):
    outputs = random_outputs(2, 3, 5, spread=0.4)  # few scores that are equal
    corners = to_corners(outputs.defaults_cxcywh)
    boxes = decode(outputs.offsets, outputs.defaults_cxcywh)
    for one, offsets in zip(boxes, outputs.offsets, strict=True):
        expected = theirs.box_coder.decode_single(offsets, corners)
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-3)
    head = {"bbox_regression": outputs.offsets, "cls_logits": outputs.logits}
    expected = theirs.postprocess_detections(head, [corners] * 2, [(300, 300)] * 2)
    for one, other in zip(decode_detections(outputs, (300, 300)), expected, strict=True):
        assert torch.equal(one["labels"] + 1, other["labels"])
        torch.testing.assert_close(one["scores"], other["scores"])
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=0, atol=1e-3)


def test_matching_and_loss_are_torchvisions(theirs):
    outputs, target = random_outputs(5, 3, 6), random_target(5, 8, 7)
    corners = to_corners(outputs.defaults_cxcywh)
    matched = match(*target, outputs.defaults_cxcywh)
    targets, indices = [], []
    for boxes, labels in zip(*target, strict=True):
        own = {"boxes": boxes[labels >= 0], "labels": labels[labels >= 0] + 1}
        targets.append(own)
        none = torch.full((8732,), -1)
        overlap = box_iou(own["boxes"], corners)
        indices.append(theirs.proposal_matcher(overlap) if len(overlap) else none)
    assert torch.equal(matched, torch.stack(indices).clamp(min=-1))
    head = {"bbox_regression": outputs.offsets, "cls_logits": outputs.logits}
    expected = theirs.compute_loss(targets, head, [corners] * 5, indices)
    losses = multibox_loss(outputs, target, identity_mean, negatives=3)
    torch.testing.assert_close(losses["loss_boxes"], expected["bbox_regression"])
    torch.testing.assert_close(losses["loss_classes"], expected["classification"])


# ---- the model


def test_other_sizes_are_refused():
    with pytest.raises(ConfigError, match="found 300 x 320 pixels, expected 300 x 300"):
        create_model("ssd300", num_classes=2, width=4)(torch.zeros(1, 3, 300, 320))


def test_recipe_of_a_detection_set_descends():
    torch.manual_seed(0)
    recipe = create_recipe("ssd300_cfsam", BOXES, {"negatives": 2}, width=4)
    assert recipe.task == "detection"
    images = torch.randn(2, 3, 300, 300)
    target = random_target(2, 3, 0)
    optimizer = torch.optim.Adam(recipe.model.parameters(), lr=1e-3)
    losses = []
    for _ in range(7):
        loss = recipe.loss(recipe.model(images), target, identity_mean)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        found = recipe.decode(recipe.model.eval()(images), (60, 90))
    assert [set(image) for image in found] == [{"boxes", "scores", "labels"}] * 2
    with pytest.raises(ConfigError, match=r"'ssd300' is for detection, but data set 'tiny' trains"):
        create_recipe("ssd300", INFO)


@pytest.mark.parametrize("name", list_models("detection"))
def test_every_detector_trains_all_its_parameters(name):
    torch.manual_seed(0)
    recipe = create_recipe(name, BOXES, width=4)
    model = recipe.model.to(memory_format=torch.channels_last).train()
    images = torch.randn(2, 3, 300, 300).to(memory_format=torch.channels_last)
    recipe.loss(model(images), random_target(2, 4, 0), identity_mean)["loss"].backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images[:1])
    assert outputs.offsets.shape == (1, 8732, 4)
    assert outputs.logits.shape == (1, 8732, 4)


@pytest.mark.parametrize("name", ["ssd300_cfsam_shallow", "ssd300_cfam", "ssd300_mvit"])
def test_detectors_compile_whole(name):
    torch._dynamo.reset()  # it gives up on a function that it has seen with many models
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, width=4).eval()
    images = torch.randn(1, 3, 300, 300)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(images)
        torch.testing.assert_close(compiled.logits, model(images).logits, rtol=1e-3, atol=1e-4)


def test_a_batch_of_two_is_two_of_one():
    torch.manual_seed(0)
    model = create_model("ssd300_cfsam", num_classes=3, width=4).eval()
    images = torch.randn(2, 3, 300, 300)
    with torch.no_grad():
        both = model(images)
        for index in range(2):
            one = model(images[index : index + 1])
            torch.testing.assert_close(one.logits[0], both.logits[index], rtol=1e-3, atol=1e-4)


# ---- weights


VGG_LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def amdegroot_names(model):
    """Return the state of a model of ours under amdegroot's names."""
    state = model.state_dict()
    convs = [
        f"backbone.blocks.{block}.{number}"
        for block, depth in enumerate((2, 2, 3, 3, 3))
        for number in range(depth)
    ]
    names = dict(zip(convs, (f"vgg.{layer}" for layer in VGG_LAYERS), strict=True))
    names |= {"backbone.fc6": "vgg.31", "backbone.fc7": "vgg.33"}
    pairs = itertools.product(range(4), range(2))
    names |= {f"backbone.extras.{a}.{b}": f"extras.{2 * a + b}" for a, b in pairs}
    names |= {f"head.boxes.{n}": f"loc.{n}" for n in range(6)}
    names |= {f"head.classes.{n}": f"conf.{n}" for n in range(6)}
    given = {
        f"{other}.{kind}": state[f"{own}.{kind}"].clone()
        for own, other in names.items()
        for kind in ("weight", "bias")
    }
    return given | {"L2Norm.weight": state["backbone.scale"].clone()}


def test_amdegroots_names():
    torch.manual_seed(1)
    source = create_model("ssd300", num_classes=3, width=4)
    torch.nn.init.uniform_(source.backbone.scale)
    given = amdegroot_names(source)
    model = create_model("ssd300", num_classes=3, width=4)
    report = load_weights(model, given)
    assert (report.source, report.missing, report.unexpected) == ("amdegroot_ssd", (), ())
    for key, tensor in source.state_dict().items():
        if "input_" not in key:
            assert torch.equal(model.state_dict()[key], tensor), key
    black = (torch.zeros(3) - torch.tensor(MEAN)) / torch.tensor(STD)
    backbone = model.backbone
    seen = black * backbone.input_scale + backbone.input_shift
    torch.testing.assert_close(seen, torch.tensor([-123.0, -117.0, -104.0]), rtol=0, atol=1e-4)
    # The VGG16 that its training starts from: bare numbers, no extras, no heads.
    reduced = {key.removeprefix("vgg."): t for key, t in given.items() if key.startswith("vgg.")}
    start = create_model("ssd300_cfsam", num_classes=5, width=4)
    report = load_weights(start, reduced)
    assert report.source == "amdegroot_ssd"
    assert len(report.loaded) == 32
    assert not report.unexpected
    assert torch.equal(start.backbone.fc7.weight, source.backbone.fc7.weight)


def test_detector_weights_start_one_with_a_neck_and_other_classes():
    source = create_model("ssd300", num_classes=3, width=4)
    model = create_model("ssd300_cfsam", num_classes=5, width=4)
    report = load_weights(model, source.state_dict())
    assert report.source == "xattn"
    assert all(key.startswith(("neck.", "head.classes.")) for key in report.missing)
    assert "head.boxes.0.weight" in report.loaded


def vgg_state(fill=None):
    """Return torchvision's VGG16 names and shapes; what memory holds, or `fill`, as classifier."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in vgg16(weights=None).state_dict().items()}
    # As large as theirs, but only the numbers that are looked at take memory.
    return {
        key: torch.full((), 0.5 if fill is None or "features" in key else fill).expand(shape)
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize("normalised", [True, False])
def test_torchvisions_vgg16(normalised):
    given = vgg_state(None if normalised else float("nan"))
    with ShapesOnly():
        model = create_backbone("ssd300")
    if normalised:
        plane = torch.arange(49.0).view(1, 1, 7, 7).expand(4096, 512, 7, 7)
        given["classifier.0.weight"] = plane.flatten(1)
        given["classifier.3.bias"] = torch.arange(4096.0)
    before = model.fc6.weight.clone()
    report = load_weights(model, given)
    assert report.source == "torchvision_vgg"
    assert (model.blocks[4][2].weight == 0.5).all()
    assert all(key.startswith(("extras.", "scale", "fc")) for key in report.missing)
    if normalised:
        assert model.fc6.weight[5, 7].tolist() == [[0, 3, 6], [21, 24, 27], [42, 45, 48]]
        assert model.fc7.bias[:3].tolist() == [0, 4, 8]
        assert model.input_scale.tolist() == [1, 1, 1]
        assert "classifier.6.weight" not in report.unexpected
    else:
        assert torch.equal(model.fc6.weight, before)
        torch.testing.assert_close(model.input_scale, torch.tensor(STD))


def test_another_vgg_is_refused():
    given = vgg_state()
    given["features.5.weight"] = torch.zeros(128)  # a BatchNorm's
    with ShapesOnly():
        model = create_backbone("ssd300")
    with pytest.raises(CheckpointError, match="another variant"):
        load_weights(model, given)
