import subprocess
import sys

import pytest
import torch

from tests.conftest import PROJECT

BODY = """
model = timm.create_model("hila_mit_b1_s234", features_only=True, out_indices=(1, 2, -1)).eval()
assert model.feature_info.channels() == [128, 320, 512], model.feature_info.channels()
assert model.feature_info.reduction() == [8, 16, 32]
import torch
with torch.no_grad():
    shapes = [tuple(level.shape) for level in model(torch.zeros(1, 3, 64, 96))]
assert shapes == [(1, 128, 8, 12), (1, 320, 4, 6), (1, 512, 2, 3)], shapes
assert len(timm.list_models("hila_mit_*")) == 4
assert {"swin_t", "hila_swin_t_s234"} <= set(timm.list_models())
"""


OURS_FIRST = """
import sys, xattn.models
assert not {"torch", "timm"} & set(sys.modules)
import timm
"""


@pytest.mark.parametrize("imports", [OURS_FIRST, "import timm, xattn.models"])
def test_timm_knows_our_backbones_whichever_is_imported_first(imports):
    subprocess.run([sys.executable, "-c", f"{imports}\n{BODY}"], check=True, cwd=PROJECT)


def test_overrides_and_classifiers_through_timm():
    import timm

    import xattn.models  # noqa: F401
    from xattn.errors import ConfigError

    model = timm.create_model("hila_mit_b0_s3", num_classes=3, share="bu", drop_path_rate=0.2)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert model.backbone.stages[3].blocks[1].drop_path.rate == pytest.approx(0.2)
    with pytest.raises(ConfigError, match="out_indices: found 4, expected 0 to 3"):
        timm.create_model("mit_b0", features_only=True, out_indices=(0, 4))
    with pytest.raises(ConfigError, match="pretrained: found True"):
        timm.create_model("mit_b0", pretrained=True)


def test_drop_path_is_the_published_one_unless_told_otherwise():
    import timm

    import xattn.models  # noqa: F401

    for given, rate in (({}, 0.2), ({"drop_path_rate": 0.05}, 0.05)):
        backbone = timm.create_model("swin_t", num_classes=2, **given).backbone
        assert backbone.stages[3].blocks[1].drop_path.rate == pytest.approx(rate)


def test_timms_pvt_joins_as_a_backbone():
    import timm

    from xattn.models.hila import ExchangeConfig
    from xattn.models.timm_stages import HilaPVT

    torch.manual_seed(0)
    model = HilaPVT(timm.create_model("pvt_v2_b0"), stages=(2, 3, 4))
    assert model.dims == (32, 64, 160, 256)
    maps = model(torch.randn(2, 3, 70, 97))
    assert [tuple(level.shape[1:]) for level in maps] == [
        (32, 18, 25),
        (64, 9, 13),
        (160, 5, 7),
        (256, 3, 4),
    ]
    sum(level.square().mean() for level in maps).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key

    pvt = timm.create_model("pvt_v2_b0").eval()
    silent = HilaPVT(pvt, stages=(2, 4), exchange=ExchangeConfig(alpha=1.0, beta=0.0)).eval()
    with torch.no_grad():
        for exchange in silent.exchanges.values():
            for update in (exchange.bottom_up, exchange.top_down):
                update.attention.output.weight.zero_()
                update.attention.output.bias.zero_()
        batch = torch.randn(1, 3, 64, 96)
        ours, plain = silent(batch), pvt.forward_intermediates(batch, intermediates_only=True)
    for level, refined in enumerate((True, False, True, False)):
        assert torch.allclose(ours[level], plain[level], rtol=0, atol=1e-5) is not refined


@pytest.mark.parametrize("name", ["hila_mit_b0_s3", "swin_t"])
def test_levels_that_are_read_are_trained(name):
    import timm

    levels = timm.create_model(name, features_only=True)
    assert all(parameter.requires_grad for parameter in levels.parameters())
    sum(level.sum() for level in levels(torch.randn(1, 3, 32, 32))).backward()
    assert all(parameter.grad is not None for parameter in levels.parameters())
    last = timm.create_model(name, features_only=True, out_indices=(-1,))
    assert not all(parameter.requires_grad for parameter in last.parameters())
