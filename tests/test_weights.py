"""Weights under everybody's names: what loads where, and that the outputs are then the authors'."""

import re
from functools import cache

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from xattn.errors import CheckpointError
from xattn.models.weights import SOURCES, load_weights
from xattn.models.weights_names import from_timm_pvt
from xattn.models.zoo import create_model, list_models

CLASSES = 5


def images(height, width):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def perturb(model):
    """Move what starts at 0 or 1 and widen what starts small, so that any mix-up shows."""
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.ndim == 1:
            tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator))
        elif tensor.ndim > 1:
            tensor.mul_(3)
    return model.eval()


def fresh(name, seed=1, **overrides):
    torch.manual_seed(seed)
    return create_model(name, num_classes=CLASSES, **overrides).eval()


def assert_same_weights(model, other):
    state = other.state_dict()
    assert model.state_dict().keys() == state.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def assert_complete(report, source):
    assert report.source == source
    assert len(report.listing().splitlines()) == 1, report.listing()


def test_no_mark_is_found_in_names_of_ours():
    *others, own = SOURCES
    assert own.name == "xattn"
    for name in list_models():
        with torch.device("meta"):
            keys = list(create_model(name, num_classes=2).state_dict())
        assert not [key for known in others for key in keys if known.mark.search(key)], name


# ---- Hugging Face


@cache
def hugging_face(name):
    """Build theirs; the import takes seconds, which only these tests should."""
    import transformers

    kinds = {"mit_b0": "SegformerForImageClassification"}
    kind = getattr(transformers, kinds.get(name, "SegformerForSemanticSegmentation"))
    torch.manual_seed(0)
    return perturb(kind(transformers.SegformerConfig(num_labels=CLASSES)))


@pytest.mark.parametrize("name", ["mit_b0", "segformer_b0"])
@torch.no_grad()
def test_hugging_face_gives_the_same_logits(name):
    theirs, model = hugging_face(name), fresh(name)
    assert_complete(load_weights(model, theirs.state_dict()), "hugging_face")
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5  # theirs in every norm
    for height, width in ((96, 128), (65, 97)):
        expected = theirs(images(height, width)).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(model(images(height, width)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mit_b0", "segformer_b0"])
def test_hugging_faces_older_names_are_the_same_weights(name, tmp_path):
    theirs, old, new = hugging_face(name), fresh(name), fresh(name, seed=2)
    theirs.save_pretrained(tmp_path)  # writes the names of transformers 4
    path = tmp_path / "model.safetensors"
    assert any(key.startswith("segformer.encoder.block.") for key in load_file(path))
    assert_complete(load_weights(old, path), "hugging_face")
    load_weights(new, theirs.state_dict())
    assert_same_weights(old, new)


HUGGING_FACE_NAMES = {
    "backbone.stages.1.embed.conv.weight": "encoder.patch_embeddings.1.proj.weight",
    "backbone.stages.1.embed.norm.bias": "encoder.patch_embeddings.1.layer_norm.bias",
    "backbone.stages.2.blocks.1.norm1.weight": "encoder.block.2.1.layer_norm_1.weight",
    "backbone.stages.2.blocks.1.norm2.weight": "encoder.block.2.1.layer_norm_2.weight",
    "backbone.stages.2.blocks.0.attention.query.bias": (
        "encoder.block.2.0.attention.self.query.bias"
    ),
    "backbone.stages.2.blocks.0.attention.output.bias": (
        "encoder.block.2.0.attention.output.dense.bias"
    ),
    "backbone.stages.2.blocks.0.attention.reduce.bias": "encoder.block.2.0.attention.self.sr.bias",
    "backbone.stages.2.blocks.0.attention.reduce_norm.bias": (
        "encoder.block.2.0.attention.self.layer_norm.bias"
    ),
    "backbone.stages.3.blocks.0.ffn.expand.bias": "encoder.block.3.0.mlp.dense1.bias",
    "backbone.stages.3.blocks.0.ffn.depthwise.bias": "encoder.block.3.0.mlp.dwconv.dwconv.bias",
    "backbone.stages.3.blocks.0.ffn.contract.bias": "encoder.block.3.0.mlp.dense2.bias",
    "backbone.stages.3.norm.weight": "encoder.layer_norm.3.weight",
    "head.linears.2.weight": "decode_head.linear_c.2.proj.weight",
    "head.fuse.weight": "decode_head.linear_fuse.weight",
    "head.bn.running_var": "decode_head.batch_norm.running_var",
    "head.classifier.bias": "decode_head.classifier.bias",
}


@pytest.mark.parametrize("prefix", ["segformer.", ""])
def test_hugging_faces_older_names_one_by_one(prefix):
    model = fresh("segformer_b0")
    own = model.state_dict()
    given = {
        theirs if theirs.startswith("decode_head") else prefix + theirs: torch.full_like(
            own[key], 7
        )
        for key, theirs in HUGGING_FACE_NAMES.items()
    }
    attention = f"{prefix}encoder.block.0.1.attention.self"
    given[f"{attention}.value.bias"] = torch.full((32,), 2.0)
    given[f"{attention}.key.bias"] = torch.full((32,), 1.0)
    report = load_weights(model, given)
    both = "backbone.stages.0.blocks.1.attention.key_value.bias"
    assert set(report.loaded) == {*HUGGING_FACE_NAMES, both}
    assert not report.unexpected
    assert all((model.state_dict()[key] == 7).all() for key in HUGGING_FACE_NAMES)
    assert model.state_dict()[both].tolist() == 32 * [1.0] + 32 * [2.0]


def test_a_key_without_its_value_is_left_over():
    name = "segformer.encoder.block.0.1.attention.self.key.bias"
    norm = {"segformer.encoder.layer_norm.0.bias": torch.ones(32)}
    report = load_weights(fresh("segformer_b0"), {name: torch.ones(32), **norm})
    assert report.unexpected == ("backbone.stages.0.blocks.1.attention.key.bias",)


# ---- timm's PVTv2


@torch.no_grad()
def test_timms_pvt_with_mits_ratios_gives_the_same_logits():
    torch.manual_seed(0)
    theirs = timm.create_model("pvt_v2_b0", mlp_ratios=(4, 4, 4, 4), num_classes=CLASSES)
    perturb(theirs)
    model = fresh("mit_b0")
    assert_complete(load_weights(model, theirs.state_dict()), "timm_pvt")
    expected = theirs(images(96, 128))
    assert expected.std() > 0.1
    torch.testing.assert_close(model(images(96, 128)), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_of_timms_own_pvt_b0_only_the_ffns_of_stages_1_and_2_do_not_fit():
    torch.manual_seed(0)
    theirs, model = perturb(timm.create_model("pvt_v2_b0")), fresh("segformer_b0")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    first = r"stages\.0\.blocks\.0\.ffn\.expand\.weight has shape \(256, 32\), .*\(128, 32\)"
    with pytest.raises(CheckpointError, match=first):
        load_weights(model, theirs.state_dict())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    report = load_weights(model, theirs.state_dict(), partial=True)
    assert set(report.other_shape) == {
        f"backbone.stages.{stage}.blocks.{block}.ffn.{part}"
        for stage in (0, 1)
        for block in (0, 1)
        for part in (
            *("expand.weight", "expand.bias", "depthwise.weight", "depthwise.bias"),
            "contract.weight",
        )
    }
    assert set(report.other_shape) <= set(report.missing)
    assert "other shape: backbone.stages.0.blocks.0.ffn.expand.weight (256, 32) for (128, 32)" in (
        report.listing().splitlines()
    )
    low = torch.randn(2, 64, 12, 16)
    ours = low.permute(0, 2, 3, 1)
    for stage, twin in zip(model.backbone.stages[2:], theirs.stages[2:], strict=True):
        low, ours = twin(low), stage.norm(stage(ours))
        torch.testing.assert_close(ours.permute(0, 3, 1, 2), low, rtol=0, atol=1e-4)


def test_timms_pvt_b5_is_mit_b5():
    with torch.device("meta"):
        theirs = timm.create_model("pvt_v2_b5", num_classes=CLASSES).state_dict()
        own = create_model("mit_b5", num_classes=CLASSES).state_dict()
    shapes = {key.removeprefix("backbone."): tensor.shape for key, tensor in own.items()}
    assert {key: tensor.shape for key, tensor in from_timm_pvt(theirs).items()} == shapes


# ---- HILA's release

TO_HILA = (  # ours to theirs, in this order
    (r"^(backbone\.)stages\.(\d)\.embed\.conv", lambda m: f"{m[1]}patch_embed{int(m[2]) + 1}.proj"),
    (r"^(backbone\.)stages\.(\d)\.embed\.norm", lambda m: f"{m[1]}patch_embed{int(m[2]) + 1}.norm"),
    (r"^(backbone\.)stages\.(\d)\.blocks", lambda m: f"{m[1]}block{int(m[2]) + 1}"),
    (r"^(backbone\.)stages\.(\d)\.norm", lambda m: f"{m[1]}norm{int(m[2]) + 1}"),
    (r"^head\.linears\.(\d)", lambda m: f"decode_head.linear_c{int(m[1]) + 1}.proj"),
    (r"^head\.fuse", "decode_head.linear_fuse.conv"),
    (r"^head\.bn", "decode_head.linear_fuse.bn"),
    (r"^head\.classifier", "decode_head.linear_pred"),
    (r"exchanges\.(\d)\.top_down\.(?!\d)", r"exchanges.\1.top_down.0."),
    (r"exchanges\.(\d)\.bottom_up\.(?!\d)", r"exchanges.\1.bottom_up.0."),
    (r"exchanges\.(\d)\.low_block\.(?!\d)", r"exchanges.\1.low_block.0."),
    (r"(top_down\.\d)\.attention\.", r"\1.topdown_attn."),
    (r"(bottom_up\.\d)\.attention\.", r"\1.bottomup_attn."),
    (r"\.attention\.", ".attn."),
    (r"attn\.query\.", "attn.q."),
    (r"attn\.key_value\.", "attn.kv."),
    (r"attn\.output\.", "attn.proj."),
    (r"attn\.reduce\.", "attn.sr."),
    (r"attn\.reduce_norm\.", "attn.norm."),
    (r"(top_down\.\d)\.ffn\.", r"\1.bottom_mlp."),
    (r"(bottom_up\.\d)\.ffn\.", r"\1.top_mlp."),
    (r"\.ffn\.", ".mlp."),
    (r"mlp\.expand\.", "mlp.fc1."),
    (r"mlp\.depthwise\.", "mlp.dwconv.dwconv."),
    (r"mlp\.contract\.", "mlp.fc2."),
    (r"(top_down\.\d)\.norm_target\.", r"\1.norm1."),
    (r"(top_down\.\d)\.norm_source\.", r"\1.norm2."),
    (r"(top_down\.\d)\.norm_ffn\.", r"\1.norm3."),
    (r"(bottom_up\.\d)\.norm_target\.", r"\1.norm4."),
    (r"(bottom_up\.\d)\.norm_source\.", r"\1.norm5."),
    (r"(bottom_up\.\d)\.norm_ffn\.", r"\1.norm6."),
    (r"exchanges\.(\d)\.top_down\.", lambda m: f"topdown.{int(m[1]) - 1}{m[1]}."),
    (r"exchanges\.(\d)\.bottom_up\.", lambda m: f"bottomup.{int(m[1]) - 1}{m[1]}."),
    (r"exchanges\.(\d)\.low_block\.", lambda m: f"prevblock.{int(m[1]) - 1}{m[1]}."),
    (r"exchanges\.(\d)\.low_norm\.", lambda m: f"prevnorm.{int(m[1]) - 1}{m[1]}."),
)


def as_released(model):
    """Return a model's weights as HILA's authors would have saved them."""
    given = {
        "backbone.reuse_bottomsa_pretraining_flag": torch.ones(1),
        "decode_head.conv_seg.weight": torch.zeros(CLASSES, 128, 1, 1),
    }
    for key, tensor in model.state_dict().items():
        name = key
        for pattern, replacement in TO_HILA:
            name = re.sub(pattern, replacement, name)
        if name.endswith("position_bias"):
            stem = name.removesuffix("position_bias")
            given[f"{stem}relative_position_init"] = (0.25 * tensor).view(1, -1)
            given[f"{stem}relative_position_bias_table"] = (0.75 * tensor).view(-1, 1)
        else:
            given[name] = tensor
    return given


@pytest.mark.parametrize("share", [True, "bu"])
@pytest.mark.parametrize("name", ["hila_mit_b0_s3", "hila_segformer_b0_s3"])
def test_hilas_release_loads_whole(name, share):
    overrides = {"stages": (2, 3, 4), "share": share}
    released = perturb(fresh(name, seed=0, **overrides))
    with torch.no_grad():
        for key, parameter in released.named_parameters():
            if key.endswith("position_bias"):
                parameter.copy_(torch.arange(16))  # of which a quarter and three are exact
    given = as_released(released)
    assert {
        "backbone.topdown.23.0.topdown_attn.relative_position_init",
        "backbone.bottomup.34.0.bottomup_attn.kv.weight",
        "backbone.bottomup.12.0.norm5.weight",
        "backbone.prevblock.23.0.mlp.dwconv.dwconv.bias",
        "backbone.prevnorm.12.weight",
        "backbone.patch_embed1.proj.weight",
    } <= set(given)
    model = fresh(name, **overrides)
    assert_complete(load_weights(model, given), "hila")
    assert_same_weights(model, released)


def test_hilas_names_are_read_without_prefix_and_with_one_position_vector():
    norm, bias = torch.full((64,), 7.0), torch.arange(16.0)
    given = {
        "prevnorm.23.0.weight": norm,
        "topdown.23.0.topdown_attn.relative_position_bias_table": bias.view(4, 4),
        "head.bias": torch.ones(CLASSES),
    }
    model = fresh("hila_mit_b0_s3")
    report = load_weights(model, given)
    exchange = model.backbone.exchanges["3"]
    assert len(report.loaded) == 3
    assert torch.equal(exchange.low_norm.weight, norm)
    assert torch.equal(exchange.top_down.attention.position_bias, bias)


def test_mit_b2_in_hilas_shorter_one_keeps_its_first_blocks():
    plain, model = fresh("mit_b2").backbone, fresh("hila_mit_b2_s234").backbone
    report = load_weights(model, plain.state_dict())
    surplus = (
        "stages.0.blocks.2.",
        "stages.1.blocks.2.",
        "stages.1.blocks.3.",
        "stages.3.blocks.2.",
    )
    assert all(key.startswith(surplus) for key in report.unexpected)
    assert all(key.startswith("exchanges.") for key in report.missing)
    for number, exchange in model.exchanges.items():
        source = plain.stages[int(number) - 2].blocks[5 if number == "4" else 1].state_dict()
        for key, tensor in exchange.low_block.state_dict().items():
            assert torch.equal(tensor, source[key]), (number, key)


def test_a_head_alone_leaves_the_low_blocks_as_they_are():
    model = fresh("hila_segformer_b0_s3")
    with torch.no_grad():
        model.backbone.exchanges["3"].low_block.norm1.weight.fill_(3.0)
    load_weights(model, {"head.bn.bias": torch.ones(256)})
    assert (model.backbone.exchanges["3"].low_block.norm1.weight == 3.0).all()


def test_parts_beside_backbone_and_head_keep_their_names():
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "auxiliary": nn.Linear(2, 3)})
    report = load_weights(model, {"weight": torch.ones(2, 2), "auxiliary.bias": torch.ones(3)})
    assert report.loaded == ("backbone.weight", "auxiliary.bias")


# ---- what does not fit


def test_strangers_are_described():
    model = fresh("mit_b0")
    stranger = {"conv1.weight": torch.ones(3), "layer1.0.bn1.bias": torch.ones(3)}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, stranger)
    assert "its keys begin with conv1, layer1: it looks like none of the sources" in str(
        caught.value
    )
    assert "(hila, mscan, nvlabs, hugging_face, timm_pvt" in str(caught.value)
    theirs = {"segformer.encoder.layer_norm.0.bias": torch.ones(32)}
    theirs["segformer.encoder.block.0.0.layer_norm_1.bias"] = torch.ones(32)
    with pytest.raises(CheckpointError, match=r"read as 'nvlabs'.*looks like 'hugging_face'"):
        load_weights(model, theirs, source="nvlabs")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_weights(model, {})
    with pytest.raises(CheckpointError, match=r"head.bias has shape \(9,\).* 1 of 1 tensors"):
        load_weights(model, {"head.bias": torch.ones(9)})


def test_a_linear_fits_a_1x1_convolution():
    model = fresh("segformer_b0")
    report = load_weights(model, {"head.classifier.weight": torch.ones(CLASSES, 256)})
    assert report.loaded == ("head.classifier.weight",)
    assert (model.head.classifier.weight == 1).all()
