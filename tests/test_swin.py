import pytest
import timm
import torch
from torch.nn import functional as F

from xattn.models.hila import ExchangeConfig
from xattn.models.hila_swin import HilaSwin
from xattn.models.swin import PatchMerge, Swin, WindowAttention
from xattn.models.swin_weights import from_mmseg_swin
from xattn.models.weights import load_weights
from xattn.models.zoo import create_model

SMALL = {"dims": (8, 16, 32, 64), "depths": (2, 2, 6, 2), "heads": (1, 2, 4, 8), "window": 3}


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def perturb(model):
    """Move every weight: starting values would hide swapped norms and unread biases."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def theirs():
    return perturb(timm.create_model("swin_tiny_patch4_window7_224", num_classes=9)).eval()


@torch.no_grad()
def naive_attention(attention, tokens, is_shifted):
    """Compare every pair of tokens of the filled and rolled map."""
    side, heads = attention.window, attention.heads
    height, width, dim = tokens.shape
    filled = [-(-length // side) * side for length in (height, width)]
    shifts = [
        side // 2 if is_shifted and (length > side or attention.shifts_lone_window) else 0
        for length in filled
    ]
    cells = torch.zeros(*filled, dim, dtype=tokens.dtype)
    cells[:height, :width] = tokens
    places = [(y, x) for y in range(filled[0]) for x in range(filled[1])]
    rolled = [[(p - s) % n for p, s, n in zip(at, shifts, filled, strict=True)] for at in places]
    parts = [  # window, and which side of the roll's seam
        [
            (at // side, at >= n - s > 0 and s > 0)
            for at, s, n in zip(r, shifts, filled, strict=True)
        ]
        for r in rolled
    ]
    query, key, value = attention.query_key_value(cells.flatten(0, 1)).chunk(3, dim=1)
    out = torch.zeros_like(value)
    head_dim = dim // heads
    for q in range(len(places)):
        keys = [k for k in range(len(places)) if parts[k] == parts[q]]
        offsets = [
            (rolled[q][0] - rolled[k][0] + side - 1) * (2 * side - 1)
            + rolled[q][1] - rolled[k][1] + side - 1
            for k in keys
        ]  # fmt: skip
        for head in range(heads):
            own = slice(head * head_dim, (head + 1) * head_dim)
            logits = key[keys, own] @ query[q, own] * head_dim**-0.5
            weights = (logits + attention.relative_position_bias[offsets, head]).softmax(0)
            out[q, own] = weights @ value[keys, own]
    return attention.output(out).unflatten(0, filled)[:height, :width]


@pytest.mark.parametrize("size", [(5, 7), (3, 8), (6, 6), (2, 3)])
@pytest.mark.parametrize("shifts_lone_window", [False, True])
@pytest.mark.parametrize("is_shifted", [False, True])
def test_window_attention_is_the_loop_over_pairs(size, shifts_lone_window, is_shifted):
    attention = perturb(WindowAttention(6, 2, 3, shifts_lone_window)).double()
    batch = images(2, *size, 6).double()
    out = attention(batch, is_shifted)
    for tokens, attended in zip(batch, out, strict=True):
        expected = naive_attention(attention, tokens, is_shifted)
        torch.testing.assert_close(attended, expected, rtol=0, atol=1e-12)


def test_windows_in_half_precision_are_near():
    attention = perturb(WindowAttention(6, 2, 3, shifts_lone_window=True))
    batch = images(2, 5, 7, 6)
    expected = attention(batch, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attention(batch, True)
    torch.testing.assert_close(mixed.float(), expected, rtol=0.05, atol=0.05)
    mixed.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


# ---- weights


@pytest.mark.parametrize("source", ["auto", "timm_swin"])
@torch.no_grad()
def test_classifier_agrees_with_timm(theirs, source):
    ours = create_model("swin_t", num_classes=9).eval()
    report = load_weights(ours, theirs.state_dict(), source)
    assert report.unexpected == ()
    # timm has no norms for a decoder.
    norms = {f"backbone.stages.{stage}.norm" for stage in range(3)}
    assert {key.rpartition(".")[0] for key in report.missing} == norms
    batch = images(2, 3, 224, 224)
    torch.testing.assert_close(ours(batch), theirs(batch), rtol=0, atol=1e-4)


@torch.no_grad()
def test_maps_agree_with_timm_where_windows_fit(theirs):
    ours = Swin((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24)).eval()
    load_weights(ours, theirs.state_dict())
    wide = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=448, features_only=True, num_classes=0
    ).eval()
    state = theirs.state_dict()
    wide.load_state_dict(
        {key.replace("layers.", "layers_"): value for key, value in state.items()}, strict=False
    )
    batch = images(1, 3, 448, 448)
    plain = wide(batch)
    for stage, level in zip(ours.stages, plain, strict=True):
        stage.norm = torch.nn.Identity()
        assert level.abs().max() > 1
    for level, expected in zip(ours(batch), plain, strict=True):
        torch.testing.assert_close(level.permute(0, 2, 3, 1), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_authors_names(theirs):
    """In the authors' files patch merging ends a stage, and the head is one Linear."""
    given = {}
    for key, tensor in theirs.state_dict().items():
        parts = key.replace("head.fc.", "head.").split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        given[".".join(parts)] = tensor
    given["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    given["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(49, 49)
    ours = create_model("swin_t", num_classes=9).eval()
    assert load_weights(ours, given).unexpected == ()
    batch = images(1, 3, 224, 224)
    torch.testing.assert_close(ours(batch), theirs(batch), rtol=0, atol=1e-4)


class UnfoldMerge(torch.nn.Module):
    """Patch merging in mmsegmentation's order: neighbours of one channel side by side."""

    def __init__(self, dim):
        super().__init__()
        self.norm = torch.nn.LayerNorm(4 * dim)
        self.reduction = torch.nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, map_BCHW):
        cells = F.unfold(map_BCHW, kernel_size=2, stride=2).transpose(1, 2)
        return self.reduction(self.norm(cells))


@torch.no_grad()
def test_merging_of_mmseg_is_ours_after_conversion():
    slow = perturb(UnfoldMerge(3))
    given = {
        f"backbone.stages.1.downsample.{key}": value for key, value in slow.state_dict().items()
    }
    ours = PatchMerge(3)
    converted = from_mmseg_swin(given)
    ours.load_state_dict(
        {key.removeprefix("stages.2.embed."): value for key, value in converted.items()}
    )
    batch = images(2, 3, 6, 8)
    expected = slow(batch).unflatten(1, (3, 4))
    torch.testing.assert_close(ours(batch.permute(0, 2, 3, 1)), expected, rtol=0, atol=1e-6)


def mmseg_names(prefix):
    """Return theirs -> ours for every tensor of Swin-T with UPerNet."""
    pairs = {
        f"{prefix}patch_embed.projection": "backbone.stages.0.embed.conv",
        f"{prefix}patch_embed.norm": "backbone.stages.0.embed.norm",
        "decode_head.bottleneck.conv": "head.main.context.conv",
        "decode_head.bottleneck.bn": "head.main.context.bn",
        "decode_head.fpn_bottleneck.conv": "head.main.fuse.conv",
        "decode_head.fpn_bottleneck.bn": "head.main.fuse.bn",
        "decode_head.conv_seg": "head.main.classifier",
        "auxiliary_head.convs.0.conv": "head.auxiliary.conv.conv",
        "auxiliary_head.convs.0.bn": "head.auxiliary.conv.bn",
        "auxiliary_head.conv_seg": "head.auxiliary.classifier",
    }
    parts = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.w_msa.qkv": "attention.query_key_value",
        "attn.w_msa.proj": "attention.output",
        "ffn.layers.0.0": "ffn.expand",
        "ffn.layers.1": "ffn.contract",
    }
    for stage, depth in enumerate((2, 2, 6, 2)):
        pairs[f"{prefix}norm{stage}"] = f"backbone.stages.{stage}.norm"
        if stage < 3:
            pairs[f"{prefix}stages.{stage}.downsample.norm"] = (
                f"backbone.stages.{stage + 1}.embed.norm"
            )
            pairs[f"{prefix}stages.{stage}.downsample.reduction"] = (
                f"backbone.stages.{stage + 1}.embed.reduce"
            )
        for block in range(depth):
            for their_part, our_part in parts.items():
                pairs[f"{prefix}stages.{stage}.blocks.{block}.{their_part}"] = (
                    f"backbone.stages.{stage}.blocks.{block}.{our_part}"
                )
    for level, kind in ((level, kind) for level in range(4) for kind in ("conv", "bn")):
        pairs[f"decode_head.psp_modules.{level}.1.{kind}"] = f"head.main.pooled.{level}.{kind}"
        if level < 3:
            pairs[f"decode_head.lateral_convs.{level}.{kind}"] = (
                f"head.main.laterals.{level}.{kind}"
            )
            pairs[f"decode_head.fpn_convs.{level}.{kind}"] = f"head.main.smooths.{level}.{kind}"
    return pairs


@pytest.mark.parametrize("source", ["auto", "mmseg_swin"])
@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_every_name_of_mmseg(source, prefix):
    model = create_model("upernet_swin_t", num_classes=5, head_width=16)
    ours = model.state_dict()
    torch.manual_seed(2)
    given, expected = {}, {}
    for their_module, our_module in mmseg_names(prefix).items():
        for key in ours:
            module, _, leaf = key.rpartition(".")
            if module == our_module:
                expected[key] = torch.randn(ours[key].shape)
                given[f"{their_module}.{leaf}"] = expected[key]
    for key in ours:
        if key.endswith(".relative_position_bias"):
            expected[key] = torch.randn(ours[key].shape)
            block = key.removeprefix("backbone.").removesuffix(".attention.relative_position_bias")
            theirs = f"{prefix}{block}.attn.w_msa.relative_position"
            given[f"{theirs}_bias_table"] = expected[key]
            given[f"{theirs}_index"] = torch.zeros(49, 49)
    report = load_weights(model, given, source)
    assert report.missing == ()
    assert report.unexpected == ()
    for key, tensor in expected.items():
        loaded = model.state_dict()[key]
        if ".embed." in key and "stages.0" not in key:  # four neighbours in another order
            assert sorted(loaded.flatten().tolist()) == sorted(tensor.flatten().tolist()), key
        else:
            assert torch.equal(loaded, tensor.to(loaded.dtype)), key


# ---- HILA


def small_hila(**numbers):
    torch.manual_seed(0)
    return perturb(HilaSwin(**SMALL, **numbers)).eval()


@torch.no_grad()
def test_without_its_exchanges_hila_is_swin():
    model = small_hila(stages=(3,), stride=2, exchange=ExchangeConfig(alpha=1.0, beta=0.0))
    for update in (model.exchanges["3"].bottom_up, model.exchanges["3"].top_down):
        update.attention.output.weight.zero_()
        update.attention.output.bias.zero_()
    plain = Swin(**SMALL).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    batch = images(2, 3, 70, 101)
    same = [torch.equal(*pair) for pair in zip(model(batch), plain(batch), strict=True)]
    assert same == [True, False, True, True]


@torch.no_grad()
def test_without_top_down_decoders_get_normed_maps():
    model = small_hila(stages=(2, 3, 4), exchange=ExchangeConfig(top_down=False))
    plain = Swin(**SMALL).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    batch = images(1, 3, 64, 64)
    assert torch.equal(model(batch)[0], plain(batch)[0])
    assert all(stage.norm.weight.requires_grad for stage in model.stages)


@pytest.mark.parametrize("share", [True, False])
@torch.no_grad()
def test_low_blocks_alternate_within_a_forward_pass(share):
    model = small_hila(exchange=ExchangeConfig(share=share))
    turns = []
    for number, exchange in model.exchanges.items():
        blocks = exchange.low_block
        for block in [blocks] if share else blocks:
            assert block.is_shifted
            block.attention.register_forward_hook(
                lambda _, inputs, __, number=number: turns.append((number, inputs[1]))
            )
    batch = images(1, 3, 64, 64)
    first = model(batch)
    assert turns == [("2", True), ("3", True), ("3", False), ("4", True)]
    again = model(batch)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@torch.no_grad()
def test_low_maps_are_normed_once_and_exchanges_read_maps_before_norms():
    model = small_hila()
    calls = []
    for module in (model.exchanges["3"].low_norm, model.stages[1].norm):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    maps = model(images(1, 3, 64, 64))
    assert calls.count(model.exchanges["3"].low_norm) == 1
    changed = small_hila()
    for stage in changed.stages[:3]:
        stage.norm.weight.fill_(100.0)
    for one, other in zip(maps, changed(images(1, 3, 64, 64)), strict=True):
        assert torch.equal(one, other)


def test_drop_path_rates_of_updates_and_low_blocks():
    exchanges = create_model("hila_upernet_swin_t_s234", num_classes=2, head_width=8)
    exchanges = exchanges.backbone.exchanges.values()
    updates = [part.drop_path.rate for one in exchanges for part in (one.bottom_up, one.top_down)]
    expected = [0.3 * first / 11 for first in (2, 4, 10) for _ in range(2)]
    assert updates == pytest.approx(expected)
    rates = [one.low_block.drop_path.rate for one in exchanges]
    assert rates == pytest.approx([0.3 * last / 11 for last in (1, 3, 9)])
    assert all(one.top_down.ffn.expand.out_features == 2 * dim for one, dim in zip(
        exchanges, (96, 192, 384), strict=True
    ))  # fmt: skip


def test_update_branches_are_dropped_together_with_the_stream_kept():
    model = small_hila(drop_path=0.9, exchange=ExchangeConfig(alpha=1.0, beta=1.0))
    update = model.exchanges["4"].bottom_up.train()
    assert update.drop_path.rate == pytest.approx(0.9 * 10 / 11)
    torch.manual_seed(0)
    high, low = images(64, 2, 2, 64), images(64, 4, 4, 32)
    kept = (update(high, low) == high).flatten(1).all(1)
    assert 0.5 < kept.float().mean() < 0.9


def test_plain_swin_weights_in_hila_are_copied_to_the_low_blocks(theirs):
    model = create_model("hila_upernet_swin_t_s234", num_classes=2, head_width=8)
    load_weights(model, theirs.state_dict())
    source = theirs.layers[2].blocks[5].attn.qkv.weight
    assert torch.equal(
        model.backbone.exchanges["4"].low_block.attention.query_key_value.weight, source
    )
