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
