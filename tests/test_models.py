import dataclasses
import re

import pytest
import torch
from safetensors.torch import load_file
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from torch.nn import functional as F

from xattn.errors import CheckpointError, ConfigError, DataError, UnknownNameError
from xattn.models.segformer import SegFormerHead
from xattn.models.weights import load_weights, save_weights
from xattn.models.zoo import create_model, create_recipe, list_models, model_card
from xattn.structures import DatasetInfo, identity_mean

INFO = DatasetInfo(
    name="tiny",
    tasks=("segmentation",),
    class_names=("a", "b", "c"),
    palette=((0, 0, 0), (1, 1, 1), (2, 2, 2)),
    splits=("train", "val"),
    ignore_ids=(),
    licence="none",
    url="",
    citation="",
    layout="",
)


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def segformer():
    torch.manual_seed(0)
    return create_model("segformer_b0", num_classes=5).eval()


# The larger sizes have the same code: one small size or two of each family run forward and back.
# SegViT's are in test_segvit.
QUICK = [
    name
    for name in list_models()
    if re.search(r"_b[01]|swin", name) and not name.startswith("segvit")
]


@pytest.mark.parametrize("name", [name for name in QUICK if name in list_models("segmentation")])
@pytest.mark.parametrize(("height", "width"), [(72, 104), (65, 97)])
def test_segmenter_shapes_at_odd_sizes(name, height, width):
    model = create_model(name, num_classes=5).eval()
    with torch.no_grad():
        logits = model(images(2, 3, height, width))
    assert logits.shape == (2, 5, -(-height // 4), -(-width // 4))
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", [name for name in QUICK if name in list_models("classification")])
def test_classifier_shape(name):
    with torch.no_grad():
        logits = create_model(name, num_classes=7).eval()(images(2, 3, 65, 97))
    assert logits.shape == (2, 7)


UNUSUAL = [
    ("hila_mit_b0_s3", {"share": False, "stages": (2, 3, 4)}),
    ("hila_mit_b0_s3", {"bottom_up": False}),
    ("hila_mit_b0_s3", {"top_down": False}),
    ("hila_segformer_b0_s3", {"share": "bu", "stages": (2, 4)}),
    ("hila_segformer_b0_s3", {"bottom_up": False}),
    ("hila_segformer_b0_s3", {"top_down": False, "stride": 2}),
]


@pytest.mark.parametrize(("name", "overrides"), [*((name, {}) for name in QUICK), *UNUSUAL])
def test_every_trainable_parameter_gets_a_finite_gradient(name, overrides):
    model = create_model(name, num_classes=5, drop_path=0.0, **overrides).train()
    outputs = model(images(2, 3, 64, 96))
    every = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(logits.square().mean() for logits in every).backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", QUICK)
def test_batch_of_two_is_two_of_one_and_eval_repeats(name):
    model = create_model(name, num_classes=5).eval()
    pair = images(2, 3, 72, 104)
    with torch.no_grad():
        both = model(pair)
        assert torch.equal(both, model(pair))
        for index in range(2):
            one = model(pair[index : index + 1])[0]
            torch.testing.assert_close(both[index], one, rtol=1e-4, atol=1e-5)


def test_images_below_the_coarsest_stride_are_refused(segformer):
    with pytest.raises(ConfigError, match="found 31 x 64 pixels, expected at least 32"):
        segformer(images(1, 3, 31, 64))


def test_image_memory_format_does_not_matter(segformer):
    plain = images(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(
            segformer(plain), segformer(plain.to(memory_format=torch.channels_last))
        )


def timm_twin(backbone):
    """Build timm's PVTv2 with MiT's numbers and the weights of `backbone`."""
    twin = PyramidVisionTransformerV2(
        depths=(2, 2, 2, 2),
        embed_dims=(32, 64, 160, 256),
        num_heads=(1, 2, 5, 8),
        sr_ratios=(8, 4, 2, 1),
        mlp_ratios=(4, 4, 4, 4),
        num_classes=0,
        drop_path_rate=0.1,
    ).eval()
    renames = {
        ".attention.query.": ".attn.q.",
        ".attention.key_value.": ".attn.kv.",
        ".attention.output.": ".attn.proj.",
        ".attention.reduce.": ".attn.sr.",
        ".attention.reduce_norm.": ".attn.norm.",
        ".ffn.expand.": ".mlp.fc1.",
        ".ffn.depthwise.": ".mlp.dwconv.",
        ".ffn.contract.": ".mlp.fc2.",
        ".embed.conv.": ".downsample.proj.",
        ".embed.norm.": ".downsample.norm.",
        "stages.0.downsample.": "patch_embed.",
    }
    state = {}
    for key, tensor in backbone.state_dict().items():
        for ours, theirs in renames.items():
            key = key.replace(ours, theirs)  # noqa: PLW2901
        state[key] = tensor
    twin.load_state_dict(state)
    return twin


@torch.no_grad()
def test_mit_agrees_with_timm():
    torch.manual_seed(0)
    backbone = create_model("mit_b0", num_classes=3).backbone.eval()
    for key, parameter in backbone.named_parameters():
        if "norm" in key or "bias" in key:  # starting values would hide a swapped norm
            parameter.add_(0.1 * torch.randn_like(parameter))
    twin = timm_twin(backbone)
    batch = images(2, 3, 96, 128)
    theirs = batch
    theirs = twin.patch_embed(theirs)
    for ours, stage in zip(backbone(batch), twin.stages, strict=True):
        theirs = stage(theirs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_drop_path_rates_rise_over_all_blocks(segformer):
    rates = [block.drop_path.rate for stage in segformer.backbone.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * index / 7 for index in range(8)])


def test_drop_path_keeps_the_mean():
    block = create_model("mit_b0", num_classes=2, drop_path=0.4).backbone.stages[3].blocks[1]
    torch.manual_seed(0)
    dropped = block.drop_path.train()(torch.ones(4000, 2, 1))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)


def literal_head(head, maps):
    """Upsample every level's Linear, concatenate coarsest first, then fuse: as the paper says."""
    levels = []
    for level, linear in zip(maps, head.linears, strict=True):
        out = linear(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        levels.append(F.interpolate(out, maps[0].shape[2:], mode="bilinear", align_corners=False))
    fused = F.relu(head.bn(head.fuse(torch.cat(levels[::-1], dim=1))))
    return head.classifier(fused)


def test_fast_head_is_the_literal_head_forward_and_backward():
    torch.manual_seed(0)
    dims = (4, 6, 8, 10)
    head = SegFormerHead(dims, width=12, num_classes=3, dropout=0.0).double()
    sizes = ((9, 13), (5, 7), (3, 4), (2, 2))
    maps = [
        torch.randn(2, dim, *size, dtype=torch.float64, requires_grad=True)
        for dim, size in zip(dims, sizes, strict=True)
    ]
    inputs = [*maps, *head.parameters()]
    fast, literal = head(maps), literal_head(head, maps)
    torch.testing.assert_close(fast, literal, rtol=0, atol=1e-10)
    weight = torch.randn_like(fast)
    fast_gradients = torch.autograd.grad((fast * weight).sum(), inputs)
    literal_gradients = torch.autograd.grad((literal * weight).sum(), inputs)
    for one, other in zip(fast_gradients, literal_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@torch.no_grad()
def test_decode_resizes_the_logits():
    recipe = create_recipe("segformer_b0", INFO)
    logits = images(2, 3, 9, 13)
    decoded = recipe.decode(logits, (36, 50))
    torch.testing.assert_close(decoded, F.interpolate(logits, (36, 50), mode="bilinear"))


def test_recipe_descends():
    torch.manual_seed(0)
    recipe = create_recipe("segformer_b0", INFO, dropout=0.0, drop_path=0.0)
    target = (torch.arange(64 * 64).reshape(1, 64, 64) // 700).clamp(max=2).repeat(2, 1, 1)
    batch = F.one_hot(target, 3).permute(0, 3, 1, 2).float()
    optimizer = torch.optim.AdamW(recipe.model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = recipe.loss(recipe.model(batch), target, identity_mean)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_lists_filter_by_task_and_system():
    sizes, rows = ["b0", "b1", "b2", "b3", "b4", "b5"], ["b0_s3", "b1_s3", "b1_s234", "b2_s234"]
    assert list_models(system="SegFormer") == [
        *(f"mit_{size}" for size in sizes),
        *(f"segformer_{size}" for size in sizes),
    ]
    assert list_models("segmentation", "HILA") == [
        *(f"hila_segformer_{row}" for row in rows),
        "hila_upernet_swin_t_s234",
    ]
    assert list_models("classification", "HILA") == [
        *(f"hila_mit_{row}" for row in rows),
        "hila_swin_t_s234",
    ]
    assert list_models(system="Swin") == ["swin_t", "upernet_swin_t"]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("segformer_b9", {}, "unknown model 'segformer_b9'; did you mean 'segformer_b"),
        ("segformer_b0", {"drop_pth": 0}, "drop_pth: .* did you mean 'drop_path'"),
        ("segformer_b0", {"stages": (3,)}, "stages: 'segformer_b0' has no such setting"),
        ("mit_b0", {"dropout": 0.1}, "dropout: 'mit_b0' has no such setting"),
        ("segformer_b0", {"drop_path": 1.0}, r"drop_path: found 1.0, expected a number in \[0, 1"),
        ("segformer_b0", {"dropout": "no"}, "dropout: found 'no'"),
        ("segformer_b0", {"head_width": 0}, "head_width: found 0, expected a whole number above 0"),
        ("mit_b0", {"head_width": 128}, "head_width: 'mit_b0' has no such setting"),
        ("hila_segformer_b0_s3", {"patch": 3}, "patch: found 3, expected an even number"),
        ("hila_segformer_b0_s3", {"share": "up"}, "share: found 'up', expected true, false or bu"),
        ("hila_segformer_b0_s3", {"share": 1}, "share: found 1, expected true"),
        ("hila_segformer_b0_s3", {"top_down": 0}, "top_down: found 0, expected true or false"),
        ("hila_segformer_b0_s3", {"scale": "inne"}, r"overrides\.scale: .* did you mean 'inner'"),
        ("hila_segformer_b0_s3", {"border": "masks"}, "border: .* did you mean 'mask'"),
        ("hila_segformer_b0_s3", {"schedule": "codes"}, "schedule: .* did you mean 'code'"),
        (
            "hila_segformer_b0_s3",
            {"top_down": False, "bottom_up": False},
            "top_down: found False beside bottom_up False",
        ),
        ("hila_segformer_b0_s3", {"stages": [1]}, r"stages: found \[1\]"),
        ("hila_segformer_b0_s3", {"stages": 3}, "stages: found 3, expected a list"),
        ("hila_segformer_b0_s3", {"stride": 2}, "no top-down update"),
        ("upernet_swin_t", {"head_width": 0}, "head_width: found 0, expected a whole number"),
        ("hila_segformer_b0_s3", {"stride": [1, 1]}, "stride: found 2 numbers for 1 stages"),
    ],
)
def test_wrong_names_and_numbers_are_named(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        create_model(name, num_classes=5, **overrides)


def test_the_head_can_be_narrower_as_hila_has_it_on_faces():
    model = create_model("hila_segformer_b2_s234", num_classes=19, head_width=128)
    # Linears, fuse convolution, batch norm, classifier.
    head = (64 + 128 + 320 + 512 + 4) * 128 + 4 * 128 * 128 + 2 * 128 + (128 + 1) * 19
    assert sum(parameter.numel() for parameter in model.head.parameters()) == head
    # What the authors' code counts, less the second position vectors of six attentions.
    assert sum(p.numel() for p in model.backbone.parameters()) == 27_668_608 - 6 * 16


def test_recipe_errors():
    with pytest.raises(ConfigError, match=r"'mit_b0' is for classification.*try one of segformer"):
        create_recipe("mit_b0", INFO)
    with pytest.raises(
        ConfigError, match=r"loss\.normalise: unknown value 'valdi'; did you mean 'valid'"
    ):
        create_recipe("segformer_b0", INFO, {"normalise": "valdi"})
    classes = dataclasses.replace(INFO, tasks=("classification",))
    recipe = create_recipe("mit_b0", classes, {"label_smoothing": 0.2})
    assert recipe.task == "classification"
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    loss = recipe.loss(logits, torch.tensor([0]), identity_mean)["loss"]
    assert loss.item() == pytest.approx(F.cross_entropy(logits, torch.tensor([0])) + 0.2 * 5 / 3)
    assert recipe.decode(logits, (8, 8)) is logits


def test_cards_carry_the_paper_numbers():
    card = model_card("segformer_b0")
    assert (card.num_classes, card.input) == (150, (3, 512, 512))
    assert (card.paper_params, card.paper_macs) == (3.7e6, 8.4e9)
    assert model_card("mit_b0").params == 3_319_392 + 257_000
    with pytest.raises(UnknownNameError):
        model_card("segformer")


def test_cards_say_what_the_authors_code_counts():
    assert "counts 3,772,044, with 19,350 of" in model_card("segformer_b0").notes
    notes = model_card("hila_segformer_b1_s234").notes
    assert "counts 21,627,052, with 19,350 of" in notes
    assert "and 96 of second position vectors" in notes


def test_large_sizes_build_and_run():
    model = create_model("hila_segformer_b2_s234", num_classes=3).eval()
    with torch.no_grad():
        assert model(images(1, 3, 64, 64)).shape == (1, 3, 16, 16)


# ---- weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_weights_round_trip(tmp_path, segformer, suffix):
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_weights(segformer, path)
    else:
        torch.save({"state_dict": segformer.state_dict(), "epoch": 3}, path)
    fresh = create_model("segformer_b0", num_classes=5)
    report = load_weights(fresh, path)
    assert not report.missing
    assert not report.unexpected
    for key, tensor in segformer.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], tensor), key
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_failed_save_leaves_no_file(tmp_path, segformer):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(DataError, match=r"model\.safetensors: cannot be written"):
        save_weights(segformer, tmp_path / "model.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_classifier_weights_start_a_segmenter(tmp_path):
    classifier = create_model("mit_b0", num_classes=9)
    save_weights(classifier, tmp_path / "mit.safetensors")
    model = create_model("segformer_b0", num_classes=5)
    report = load_weights(model, tmp_path / "mit.safetensors")
    assert set(report.unexpected) == {"head.weight", "head.bias"}
    assert all(key.startswith("head.") for key in report.missing)
    assert "176 of 192 tensors loaded (xattn names); missing: head." in report.summary()
    for key, tensor in classifier.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[key], tensor), key


def test_head_of_other_classes_is_left_out(segformer):
    model = create_model("segformer_b0", num_classes=3)
    report = load_weights(model, segformer.state_dict())
    assert set(report.missing) == {"head.classifier.weight", "head.classifier.bias"}
    assert "head.fuse.weight" in report.loaded


def test_bare_backbone_takes_and_gives(segformer):
    bare = create_model("mit_b0", num_classes=2).backbone
    assert not load_weights(bare, segformer.state_dict()).missing
    model = create_model("segformer_b0", num_classes=5)
    report = load_weights(model, bare.state_dict())
    assert len(report.loaded) == len(bare.state_dict())


def test_plain_weights_in_hila_are_copied_to_the_low_block():
    plain = create_model("mit_b0", num_classes=2)
    model = create_model("hila_segformer_b0_s3", num_classes=5)
    load_weights(model, plain.state_dict())
    source = plain.backbone.stages[1].blocks[1].state_dict()
    copied = model.backbone.exchanges["3"].low_block.state_dict()
    for key, tensor in source.items():
        assert torch.equal(copied[key], tensor), key


def test_hila_weights_keep_their_own_low_block():
    pretrained = create_model("hila_mit_b0_s3", num_classes=2)
    with torch.no_grad():
        pretrained.backbone.exchanges["3"].low_block.norm1.weight.fill_(3.0)
    model = create_model("hila_segformer_b0_s3", num_classes=5)
    load_weights(model, pretrained.state_dict())
    assert (model.backbone.exchanges["3"].low_block.norm1.weight == 3.0).all()


NVLABS_NAMES = {
    "backbone.stages.0.embed.conv.weight": "backbone.patch_embed1.proj.weight",
    "backbone.stages.3.embed.norm.bias": "backbone.patch_embed4.norm.bias",
    "backbone.stages.1.blocks.0.attention.query.weight": "backbone.block2.0.attn.q.weight",
    "backbone.stages.1.blocks.0.attention.key_value.bias": "backbone.block2.0.attn.kv.bias",
    "backbone.stages.1.blocks.1.attention.output.weight": "backbone.block2.1.attn.proj.weight",
    "backbone.stages.1.blocks.1.attention.reduce.weight": "backbone.block2.1.attn.sr.weight",
    "backbone.stages.2.blocks.1.attention.reduce_norm.bias": "backbone.block3.1.attn.norm.bias",
    "backbone.stages.2.blocks.1.norm1.weight": "backbone.block3.1.norm1.weight",
    "backbone.stages.2.blocks.1.ffn.expand.weight": "backbone.block3.1.mlp.fc1.weight",
    "backbone.stages.2.blocks.1.ffn.depthwise.bias": "backbone.block3.1.mlp.dwconv.dwconv.bias",
    "backbone.stages.2.blocks.1.ffn.contract.bias": "backbone.block3.1.mlp.fc2.bias",
    "backbone.stages.3.norm.weight": "backbone.norm4.weight",
    "head.linears.0.weight": "decode_head.linear_c1.proj.weight",
    "head.linears.3.bias": "decode_head.linear_c4.proj.bias",
    "head.fuse.weight": "decode_head.linear_fuse.conv.weight",
    "head.bn.running_var": "decode_head.linear_fuse.bn.running_var",
    "head.classifier.bias": "decode_head.linear_pred.bias",
}


@pytest.mark.parametrize("source", ["auto", "nvlabs"])
def test_original_key_names(segformer, source):
    ours = segformer.state_dict()
    given = {theirs: torch.full_like(ours[key], 7.0) for key, theirs in NVLABS_NAMES.items()}
    given["decode_head.conv_seg.weight"] = torch.zeros(5, 128, 1, 1)
    model = create_model("segformer_b0", num_classes=5)
    report = load_weights(model, given, source=source)
    assert set(report.loaded) == set(NVLABS_NAMES)
    assert report.unexpected == ()
    for key in NVLABS_NAMES:
        assert (model.state_dict()[key] == 7.0).all(), key


def test_original_imagenet_names_without_prefix():
    model = create_model("mit_b0", num_classes=1000)
    given = {"patch_embed1.norm.weight": torch.full((32,), 7.0), "head.bias": torch.ones(1000)}
    report = load_weights(model, given)
    assert report.loaded == ("backbone.stages.0.embed.norm.weight", "head.bias")


def test_weights_errors(tmp_path, segformer):
    other_shape = {"backbone.stages.0.norm.weight": torch.ones(64)}
    with pytest.raises(CheckpointError, match=r"stages.0.norm.weight has shape \(64,\).*\(32,\)"):
        load_weights(segformer, other_shape)
    with pytest.raises(CheckpointError, match="none of its 1 tensors, read as 'xattn', fits"):
        load_weights(segformer, {"conv1.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match="no such weights file"):
        load_weights(segformer, tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"found '.onnx', expected .safetensors"):
        load_weights(segformer, tmp_path / "weights.onnx")
    for name in ("bad.safetensors", "bad.pt"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(CheckpointError, match="cannot be read as weights"):
            load_weights(segformer, tmp_path / name)
    with pytest.raises(UnknownNameError, match="unknown weights source 'nvlab'"):
        load_weights(segformer, {}, source="nvlab")


def test_saved_file_is_plain_safetensors(tmp_path, segformer):
    save_weights(segformer, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors").keys() == segformer.state_dict().keys()
