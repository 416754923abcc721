"""MSCAN: its published size, and its function by the names of published weights."""

import pytest
import torch
from torch.nn import functional as F

from xattn.evaluate.cost import ShapesOnly, count_params
from xattn.models.mscan import Mscan
from xattn.models.weights import load_weights
from xattn.models.zoo import create_backbone, create_model
from xattn.nn.blocks import DropPath

DIMS, DEPTHS, RATIOS = (4, 6, 8, 10), (1, 2, 1, 1), (8, 8, 4, 4)


def published_names(dims, depths):
    """Return the shape of every tensor of mmsegmentation's MSCAN."""
    shapes = {}

    def conv(name, out_dim, in_dim, height, width):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (
            (out_dim, in_dim, height, width),
            (out_dim,),
        )

    def norm(name, dim, is_batch=True):
        for part in ("weight", "bias", *(("running_mean", "running_var") if is_batch else ())):
            shapes[f"{name}.{part}"] = (dim,)

    for index, dim in enumerate(dims):
        embed = f"backbone.patch_embed{index + 1}"
        if index:
            conv(f"{embed}.proj", dim, dims[index - 1], 3, 3)
            norm(f"{embed}.norm", dim)
        else:
            conv(f"{embed}.proj.0", dim // 2, 3, 3, 3)
            norm(f"{embed}.proj.1", dim // 2)
            conv(f"{embed}.proj.3", dim, dim // 2, 3, 3)
            norm(f"{embed}.proj.4", dim)
        for number in range(depths[index]):
            block = f"backbone.block{index + 1}.{number}"
            norm(f"{block}.norm1", dim)
            norm(f"{block}.norm2", dim)
            shapes[f"{block}.layer_scale_1"] = shapes[f"{block}.layer_scale_2"] = (dim,)
            conv(f"{block}.attn.proj_1", dim, dim, 1, 1)
            conv(f"{block}.attn.proj_2", dim, dim, 1, 1)
            unit = f"{block}.attn.spatial_gating_unit"
            conv(f"{unit}.conv0", dim, 1, 5, 5)
            for strip, length in enumerate((7, 11, 21)):
                conv(f"{unit}.conv{strip}_1", dim, 1, 1, length)
                conv(f"{unit}.conv{strip}_2", dim, 1, length, 1)
            conv(f"{unit}.conv3", dim, dim, 1, 1)
            hidden = RATIOS[index] * dim
            conv(f"{block}.mlp.fc1", hidden, dim, 1, 1)
            conv(f"{block}.mlp.dwconv.dwconv", hidden, 1, 3, 3)
            conv(f"{block}.mlp.fc2", dim, hidden, 1, 1)
        norm(f"backbone.norm{index + 1}", dim, is_batch=False)
    return shapes


def literal(state, images):
    """Compute MSCAN's maps from its published tensors, as its paper draws them."""

    def conv(name, x, stride=1):
        weight = state[f"backbone.{name}.weight"]
        padding = weight.shape[2] // 2, weight.shape[3] // 2
        groups = len(weight) if weight.shape[1] == 1 else 1
        return F.conv2d(x, weight, state[f"backbone.{name}.bias"], stride, padding, 1, groups)

    def norm(name, x):
        mean, var, weight, bias = (
            state[f"backbone.{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    maps, x = [], images
    for index, depth in enumerate(DEPTHS, 1):
        embed = f"patch_embed{index}"
        if index == 1:
            x = F.gelu(norm(f"{embed}.proj.1", conv(f"{embed}.proj.0", x, 2)))
            x = norm(f"{embed}.proj.4", conv(f"{embed}.proj.3", x, 2))
        else:
            x = norm(f"{embed}.norm", conv(f"{embed}.proj", x, 2))
        for number in range(depth):
            block = f"block{index}.{number}"
            unit = f"{block}.attn.spatial_gating_unit"
            scales = [state[f"backbone.{block}.layer_scale_{n}"][:, None, None] for n in (1, 2)]
            normed = norm(f"{block}.norm1", x)
            gated = F.gelu(conv(f"{block}.attn.proj_1", normed))
            near = conv(f"{unit}.conv0", gated)
            strips = [conv(f"{unit}.conv{n}_2", conv(f"{unit}.conv{n}_1", near)) for n in range(3)]
            gate = conv(f"{unit}.conv3", near + strips[0] + strips[1] + strips[2])
            x = x + scales[0] * (conv(f"{block}.attn.proj_2", gate * gated) + normed)
            hidden = conv(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))
            hidden = F.gelu(conv(f"{block}.mlp.dwconv.dwconv", hidden))
            x = x + scales[1] * conv(f"{block}.mlp.fc2", hidden)
        weight, bias = (state[f"backbone.norm{index}.{part}"] for part in ("weight", "bias"))
        x = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias).permute(0, 3, 1, 2)
        maps.append(x)
    return maps


@torch.no_grad()
def test_published_tensors_give_the_maps_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(shape, generator=generator) - (0.0 if len(shape) == 1 else 0.5)
        for name, shape in published_names(DIMS, DEPTHS).items()
    }
    state["decode_head.conv_seg.bias"] = torch.zeros(3)
    backbone = Mscan(DIMS, DEPTHS).eval()
    report = load_weights(backbone, state)
    assert report.source == "mscan"
    assert report.unexpected == ("decode_head.conv_seg.bias",)
    assert all(key.endswith("num_batches_tracked") for key in report.missing)
    images = torch.randn(2, 3, 65, 97, generator=generator)
    for ours, theirs in zip(backbone(images), literal(state, images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "millions"), [("t", 3.90), ("s", 13.45), ("b", 26.28), ("l", 44.64)]
)
def test_the_published_parameters(size, millions):
    with ShapesOnly():
        backbone = create_backbone(f"scaseg_mscan_{size}")
    assert count_params(backbone) / 1e6 == pytest.approx(millions, abs=0.005)


def test_names_of_published_weights_fit_every_size():
    for size, dims, depths in (
        ("t", (32, 64, 160, 256), (3, 3, 5, 2)),
        ("l", (64, 128, 320, 512), (3, 5, 27, 3)),
    ):
        with torch.device("meta"):
            model = create_model(f"scaseg_mscan_{size}", num_classes=3)
        state = {n: torch.zeros(()).expand(s) for n, s in published_names(dims, depths).items()}
        report = load_weights(model.to_empty(device="cpu"), state)
        assert not report.unexpected
        missing = [key for key in report.missing if not key.endswith("num_batches_tracked")]
        assert all(key.startswith("head.") for key in missing)


def test_drop_path_is_the_papers():
    for size, last in (("t", 0.1), ("s", 0.1), ("b", 0.1), ("l", 0.3)):
        with torch.device("meta"):
            backbone = create_backbone(f"scaseg_mscan_{size}")
        rates = [module.rate for module in backbone.modules() if isinstance(module, DropPath)]
        assert rates[0] == 0.0
        assert rates[-1] == pytest.approx(last)


def test_levels_halve_from_a_quarter_of_the_sides():
    backbone = Mscan(DIMS, DEPTHS).eval()
    assert backbone.dims == DIMS
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 65, 97))
    sizes = [(17, 25), (9, 13), (5, 7), (3, 4)]
    assert [tuple(level.shape) for level in maps] == [
        (1, dim, *size) for dim, size in zip(DIMS, sizes, strict=True)
    ]
