"""SCASeg: the spec's table, what must hold whatever the paper's truth is, and strip attention."""

import pytest
import torch
from torch.nn import functional as F

from xattn.errors import ConfigError
from xattn.evaluate.cost import ShapesOnly, count_macs, count_params
from xattn.losses import segmentation_cross_entropy
from xattn.models import scaseg
from xattn.models.mit import MiT
from xattn.models.mscan import Mscan
from xattn.models.scaseg import Blend, ScasegConfig, ScasegHead, strip_attention
from xattn.models.segformer import Segmenter
from xattn.models.weights import load_weights
from xattn.models.zoo import create_model, list_models, model_card
from xattn.structures import identity_mean

DIMS = (4, 6, 10, 16)
SIZES = ((18, 26), (9, 13), (5, 7), (3, 4))
SWITCHES = [
    {},
    {"local": "off"},
    {"local": "feature"},
    {"local": "attended", "gate": False},
    {"merge": "concat"},
    {"residual": "normed", "scale": "width"},
]
NAMES = [name for name in list_models() if name.startswith("scaseg_")]


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels(dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, dim, *size, dtype=dtype, generator=generator, requires_grad=True)
        for dim, size in zip(DIMS, SIZES, strict=True)
    ]


def build_head(**config):
    torch.manual_seed(0)
    given = {"heads": (1, 2, 5, 8), "drop_path": 0.0, **config}
    head = ScasegHead(DIMS, 12, 3, dropout=0.0, config=ScasegConfig(**given))
    with torch.no_grad():  # starting values would hide a swapped norm or a missing bias
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return head.double()


# ---- the table of the reconstruction (150 classes, 512 x 512, with the final enlargement)

FINAL_RESIZE = 4 * 150 * 512 * 512
TABLE = {  # million parameters, 10^9 multiply-adds; without local perception
    "mit_b0": (4.90, 6.09, 4.70, 5.93),
    "mit_b1": (19.17, 17.60, 18.39, None),
    "mit_b2": (30.97, 39.77, 30.19, 39.14),
    "mit_b3": (50.85, None, 50.06, None),
    "mit_b4": (67.62, None, 66.84, None),
    "mit_b5": (88.22, None, 87.44, None),
    "mscan_t": (5.48, 7.51, 5.28, 7.35),
    "mscan_s": (19.47, 20.52, 18.69, 19.89),
    "mscan_b": (32.30, 33.71, 31.52, 33.08),
    "mscan_l": (50.66, None, 49.88, None),
}


def near(value):
    """Two decimals, of which the table's sums round the final enlargement first."""
    return pytest.approx(value, abs=0.006)


@pytest.mark.parametrize("backbone", TABLE)
def test_parameters_and_multiply_adds_of_the_table(backbone):
    params, gmacs, params_alone, gmacs_alone = TABLE[backbone]
    card = model_card(f"scaseg_{backbone}")
    assert card.params / 1e6 == near(params)
    with ShapesOnly():
        alone = create_model(f"scaseg_{backbone}", num_classes=150, local="off")
    assert count_params(alone) / 1e6 == near(params_alone)
    if gmacs is not None:
        assert (card.macs + FINAL_RESIZE) / 1e9 == near(gmacs)
    if gmacs_alone is not None:
        counted = count_macs(alone, (3, 512, 512), counting="fvcore")
        assert (counted + FINAL_RESIZE) / 1e9 == near(gmacs_alone)


def test_every_table_row_is_a_model_and_says_what_it_is():
    assert [f"scaseg_{backbone}" for backbone in TABLE] == NAMES == list_models(system="SCASeg")
    for name in NAMES:
        card = model_card(name)
        assert "reconstruction" in card.notes
        assert "reconstruction" in card.source
        assert card.paper_params is None
        assert card.paper_macs is None
        assert card.counting == "fvcore"


# ---- strip attention


def plain_attention(query, key, value):
    return (query.unsqueeze(3) * key.unsqueeze(2)).softmax(3) @ value


def strips(tokens=37, cells=11, dtype=torch.float64, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, tokens), (2, 3, cells), (2, 3, cells, 4))
    return [
        (spread * torch.randn(shape, dtype=dtype, generator=generator)).requires_grad_()
        for shape in shapes
    ]


@pytest.fixture
def in_blocks(monkeypatch):
    """Take the smallest attention for a large one."""
    monkeypatch.setattr(scaseg, "_FEW", 0)


def test_few_logits_are_kept(monkeypatch):
    monkeypatch.setattr(scaseg, "_StripAttention", None)
    inputs = strips()
    torch.testing.assert_close(strip_attention(*inputs), plain_attention(*inputs))


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("block", [1, 5 * 2 * 3 * 11, 10**6])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_strip_attention_is_the_plain_one_forward_and_backward(block, spread, monkeypatch):
    monkeypatch.setattr(scaseg, "_BLOCK_ON_CPU", block)
    inputs = strips(spread=spread)
    fast, plain = strip_attention(*inputs), plain_attention(*inputs)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-10)
    slope = torch.randn_like(fast)
    for one, other in zip(
        torch.autograd.grad(fast, inputs, slope),
        torch.autograd.grad(plain, inputs, slope),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-10)


@pytest.mark.usefixtures("in_blocks")
def test_no_tensor_as_large_as_all_logits_is_kept_or_made(monkeypatch):
    inputs = strips(tokens=400, cells=50)
    logits = 2 * 3 * 400 * 50
    monkeypatch.setattr(scaseg, "_BLOCK_ON_CPU", logits // 10)
    made = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                made.append(result.numel())
            return result

    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
        ),
        Sizes(),
    ):
        out = strip_attention(*inputs)
        out.sum().backward()
    largest = max(tensor.numel() for tensor in (*inputs, out))
    assert max(kept) <= largest
    assert max(made) <= max(largest, logits // 10)
    assert largest < logits // 10


@pytest.mark.usefixtures("in_blocks")
def test_strip_attention_in_half_precision_is_near():
    inputs = strips(dtype=torch.float32, spread=2.0)
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    expected = plain_attention(*(half.float() for half in halves))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = strip_attention(*halves)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.05)
    slope = torch.randn_like(expected)
    wide = [half.detach().float().requires_grad_() for half in halves]
    wanted = torch.autograd.grad(plain_attention(*wide), wide, slope)
    for one, other in zip(torch.autograd.grad(out, halves, slope.bfloat16()), wanted, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.05 * other.abs().max())


# ---- the decoder


def by_hand(head, config, maps):
    """Compute the logits as the spec's steps read, with plain loops and every map at full size."""
    maps, decoded = list(maps), {}
    for i in (3, 2, 1, 0):
        block, dim = head.blocks[i], DIMS[i]
        parts = []
        for j in range(4):
            level = maps[j] if j <= i else decoded[j]
            side = 2 ** (3 - j)
            level = F.avg_pool2d(level, side, side, ceil_mode=True)
            parts.append(block.blend.convs[j](level) if j < 3 else level)
        source = F.gelu(block.blend.after(torch.cat(parts, 1).flatten(2).mT))
        tokens = maps[i].flatten(2).mT
        normed = block.before_update(tokens)
        att, out = block.attention, []
        query, key, value = att.query(normed), att.key(source), att.value(source)
        scale = 1.0 if config.scale == "one" else (dim / att.heads) ** -0.5
        for h in range(att.heads):
            shares = (query[:, :, h : h + 1] @ key[:, :, h : h + 1].mT * scale).softmax(2)
            out.append(shares @ value[:, :, h * dim // att.heads : (h + 1) * dim // att.heads])
        update = attended = att.output(torch.cat(out, 2))
        if config.local != "off":
            read = {"normed": normed, "feature": tokens, "attended": attended}[config.local]
            entered = F.gelu(block.local.enter(read.mT.unflatten(2, SIZES[i])))
            seen = block.local.depthwise(entered)
            seen = torch.sigmoid(seen) * entered if config.gate else F.gelu(seen)
            local = block.local.leave(seen).flatten(2).mT
            both = torch.cat([attended, local], 2)
            update = attended + local if config.merge == "sum" else block.merge(both)
        z = (normed if config.residual == "normed" else tokens) + update
        normed = block.before_ffn(z)
        hidden = block.ffn.expand(normed).mT.unflatten(2, SIZES[i])
        hidden = F.gelu(block.ffn.depthwise(hidden)).flatten(2).mT
        z = (normed if config.residual == "normed" else z) + block.ffn.contract(hidden)
        decoded[i] = z.mT.unflatten(2, SIZES[i])
    joined = [
        F.interpolate(decoded[i], SIZES[0], mode="bilinear", align_corners=False) for i in range(4)
    ]
    return head.logits(F.relu(head.fuse.bn(head.fuse.conv(torch.cat(joined, 1)))))


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("switches", SWITCHES)
def test_the_decoder_is_the_written_one_forward_and_backward(switches):
    head, maps = build_head(**switches), levels()
    inputs = [*maps, *head.parameters()]
    fast, literal = head(maps), by_hand(head, ScasegConfig(**switches), maps)
    assert fast.shape == (2, 3, *SIZES[0])
    torch.testing.assert_close(fast, literal, rtol=0, atol=1e-10)
    torch.testing.assert_close(head.as_written(maps), literal, rtol=0, atol=1e-10)
    slope = torch.randn_like(fast)
    for one, other in zip(
        torch.autograd.grad(fast, inputs, slope),
        torch.autograd.grad(literal, inputs, slope),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_what_each_level_sees():
    """The coarsest blend holds encoder levels only; the finest level 1 and decoded 2 to 4."""
    head, maps = build_head().eval(), levels()
    seen = {}
    for index, block in enumerate(head.blocks):
        block.register_forward_pre_hook(
            lambda _, inputs, index=index: seen.update({index: [*inputs[1]]})
        )
    outputs = {}
    for index, block in enumerate(head.blocks):
        block.register_forward_hook(
            lambda _, __, output, index=index: outputs.update({index: output})
        )
    with torch.no_grad():
        head(maps)
    average = [
        F.avg_pool2d(level, 2 ** (3 - index), 2 ** (3 - index), ceil_mode=True).permute(0, 2, 3, 1)
        for index, level in enumerate(maps)
    ]
    for level, pooled in enumerate(seen[3]):
        torch.testing.assert_close(pooled, average[level])
    torch.testing.assert_close(seen[0][0], average[0])
    for level in (1, 2, 3):
        assert (seen[0][level] - average[level]).abs().max() > 0.01
        decoded = outputs[level].permute(0, 3, 1, 2)
        side = 2 ** (3 - level)
        expected = F.avg_pool2d(decoded, side, side, ceil_mode=True).permute(0, 2, 3, 1)
        torch.testing.assert_close(seen[0][level], expected)


@torch.no_grad()
def test_without_queries_attention_is_the_mean_of_the_values():
    attention = build_head().blocks[1].attention
    attention.query.weight.zero_()
    tokens, source = torch.randn(2, 9, 13, 6).double(), torch.randn(2, 12, sum(DIMS)).double()
    mean = attention.output(attention.value(source).mean(1))
    expected = mean[:, None, None].expand(2, 9, 13, 6)
    torch.testing.assert_close(attention(tokens, source), expected, rtol=0, atol=1e-12)


def test_logits_grow_as_heads_by_tokens_by_cells(monkeypatch):
    """At 512 x 512, stage 1: one head, 16384 tokens, 256 cells."""
    sizes = []
    whole = scaseg.strip_attention
    monkeypatch.setattr(
        scaseg,
        "strip_attention",
        lambda q, k, v: sizes.append((q.shape, k.shape)) or whole(q, k, v),
    )
    with torch.no_grad(), ShapesOnly():
        create_model("scaseg_mit_b0", num_classes=2).eval()(torch.zeros(1, 3, 512, 512))
    stages = [(8, 256), (5, 1024), (2, 4096), (1, 16384)]
    assert sizes == [((1, heads, tokens), (1, heads, 256)) for heads, tokens in stages]


def test_a_cut_square_counts_in_full():
    blend = Blend((1, 1)).double()
    level = torch.arange(15.0).double().reshape(1, 1, 3, 5).permute(0, 2, 3, 1)
    pooled = scaseg._average(level, 2)[0, :, :, 0]
    assert pooled.tolist() == [[3, 5, 6.5], [10.5, 12.5, 14]]
    assert blend([pooled[None, :, :, None]] * 2).shape == (1, 6, 2)


# ---- whole models


@pytest.fixture(scope="module", params=["scaseg_mit_b0", "scaseg_mscan_t"])
def small(request):
    torch.manual_seed(0)
    return create_model(request.param, num_classes=5).eval()


@pytest.mark.parametrize(("height", "width"), [(72, 104), (65, 97)])
@torch.no_grad()
def test_shapes_at_odd_sizes(small, height, width):
    logits = small(images(1, 3, height, width))
    assert logits.shape == (1, 5, -(-height // 4), -(-width // 4))
    assert logits.isfinite().all()


@torch.no_grad()
def test_batch_of_two_is_two_of_one(small):
    pair = images(2, 3, 65, 97)
    both = small(pair)
    for index in range(2):
        one = small(pair[index : index + 1])[0]
        torch.testing.assert_close(both[index], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "switches"),
    [*(("scaseg_mit_b0", switches) for switches in SWITCHES), ("scaseg_mscan_t", {})],
)
def test_every_trainable_parameter_gets_a_finite_gradient(name, switches):
    torch.manual_seed(0)
    rates = {"drop_path": 0.0, "decoder_drop_path": 0.0}
    model = create_model(name, num_classes=5, **rates, **switches).train()
    model(images(2, 3, 64, 96)).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad, key
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


def tiny(kind):
    """Build a model of one block a stage for three classes."""
    torch.manual_seed(0)
    dims, depths = (8, 16, 40, 64), (1, 1, 1, 1)
    if kind == "mit":
        backbone = MiT(dims, depths, (1, 2, 5, 8), (8, 4, 2, 1), drop_path=0.0)
    else:
        backbone = Mscan(dims, depths, drop_path=0.0)
    head = ScasegHead(dims, 16, 3, dropout=0.0, config=ScasegConfig(drop_path=0.0))
    return Segmenter(backbone, head)


@pytest.mark.parametrize("kind", ["mit", "mscan"])
def test_overfits_a_batch(kind):
    model = tiny(kind).train()
    target = (torch.arange(64 * 64).reshape(1, 64, 64) // 700).clamp(max=2).repeat(2, 1, 1)
    batch = F.one_hot(target, 3).permute(0, 3, 1, 2).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        logits = model(batch)
        loss = segmentation_cross_entropy(logits, target, "all", identity_mean)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


# Torch's compiler makes such a thing itself.
@pytest.mark.usefixtures("in_blocks")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["mit", "mscan"])
def test_compiles_without_a_graph_break_and_has_the_same_gradient(kind, monkeypatch):
    monkeypatch.setattr(scaseg, "_BLOCK_ON_CPU", 4000)  # of 5100 logits in stage 1
    model = tiny(kind).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    batch = images(1, 3, 65, 97)
    plain, found = model(batch), compiled(batch)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    weight = model.head.blocks[0].attention.query.weight
    torch.testing.assert_close(
        *(torch.autograd.grad(logits.square().mean(), weight) for logits in (found, plain)),
        rtol=1e-4,
        atol=1e-7,
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch), plain.detach(), rtol=1e-5, atol=1e-5)


def test_exports_for_any_size():
    """Two levels of the head; a whole model does so too, in about a minute (min=33 pixels)."""
    torch.manual_seed(0)
    config = ScasegConfig(heads=(1, 2))
    head = ScasegHead((4, 6), 5, 3, dropout=0.0, config=config).eval()
    rows, columns = torch.export.Dim("rows", min=2), torch.export.Dim("columns", min=2)
    maps = [images(1, 4, 10, 14), images(1, 6, 5, 7)]
    shapes = ([{2: 2 * rows, 3: 2 * columns}, {2: rows, 3: columns}],)
    exported = torch.export.export(head, (maps,), dynamic_shapes=shapes).module()
    maps = [images(1, 4, 24, 6), images(1, 6, 12, 3)]
    with torch.no_grad():
        torch.testing.assert_close(exported(maps), head(maps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"local": "norm"}, r"overrides\.local: .* did you mean 'normed'"),
        ({"merge": "add"}, r"overrides\.merge: unknown value 'add'; known: concat, sum"),
        ({"scale": "inner"}, r"overrides\.scale: unknown value 'inner'"),
        ({"residual": "featur"}, r"overrides\.residual: .* did you mean 'feature'"),
        ({"local": "off", "merge": "concat"}, "merge: found 'concat' beside local 'off'"),
        ({"local": "off", "gate": False}, "gate: found False beside local 'off'"),
        ({"heads": [1, 2, 3, 8]}, r"heads: found \[1, 2, 3, 8\], .* \[32, 64, 160, 256\]"),
        ({"heads": [1, 2, 5]}, r"heads: found \[1, 2, 5\], expected 4 numbers"),
        ({"heads": [0, 2, 5, 8]}, r"heads: found \[0, 2, 5, 8\]"),
        ({"gate": 1}, "gate: found 1, expected true or false"),
    ],
)
def test_wrong_settings_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        create_model("scaseg_mit_b0", num_classes=5, **overrides)


# ---- weights


def test_mit_weights_start_the_backbone_and_leave_the_head():
    names = {
        "backbone.stages.1.blocks.0.attention.query.weight": "block2.0.attn.q.weight",
        "backbone.stages.0.embed.conv.weight": "patch_embed1.proj.weight",
    }
    model = create_model("scaseg_mit_b0", num_classes=5)
    ours = model.state_dict()
    given = {theirs: torch.full_like(ours[key], 7.0) for key, theirs in names.items()}
    report = load_weights(model, given)
    assert report.source == "nvlabs"
    assert set(report.loaded) == set(names)

    segformer = create_model("segformer_b0", num_classes=5)
    report = load_weights(model, segformer.state_dict())
    backbone = segformer.backbone.state_dict()
    assert set(report.loaded) == {f"backbone.{key}" for key in backbone}
    for key, tensor in backbone.items():
        assert torch.equal(model.backbone.state_dict()[key], tensor), key
