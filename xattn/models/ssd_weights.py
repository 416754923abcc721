"""What published weights of VGG16 and SSD300 call their tensors, and which of ours each one is.

A function a source: dict of theirs to dict of ours, without the model. Backbone keys come out bare,
head keys under "head."; what is not known keeps its name. Every source also says which input its
first convolution wants, see `ssd`. Names are facts about published files; no code was taken.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from xattn.data.pixels import MAX_VALUE, MEAN, STD
from xattn.models.ssd import CAFFE_MEAN
from xattn.models.weights_names import Rule, rename

_TORCHVISION_MEAN = tuple(share * MAX_VALUE for share in (0.48235, 0.45882, 0.40784))

_PLACES = {  # of VGG16's convolutions among its layers: block, number in it
    layer: f"blocks.{block}.{number}."
    for block, layers in enumerate(
        ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    )
    for number, layer in enumerate(layers)
} | {31: "fc6.", 33: "fc7."}  # fmt: skip


def _place(match: re.Match[str]) -> str:
    return _PLACES.get(int(match[1]), match[0])


_TORCHVISION_SSD: tuple[Rule, ...] = (
    (r"^backbone\.", ""),
    (r"^scale_weight$", "scale"),
    (r"^features\.(\d+)\.", _place),
    (r"^extra\.0\.7\.1\.", "fc6."),
    (r"^extra\.0\.7\.3\.", "fc7."),
    (r"^extra\.0\.(\d)\.", lambda match: f"blocks.4.{int(match[1]) // 2}."),
    (r"^extra\.(\d)\.([02])\.", lambda m: f"extras.{int(m[1]) - 1}.{int(m[2]) // 2}."),
    (r"^head\.regression_head\.module_list\.", "head.boxes."),
    (r"^head\.classification_head\.module_list\.", "head.classes."),
)
_AMDEGROOT: tuple[Rule, ...] = (
    (r"^(?:vgg\.)?(\d+)\.(?=weight$|bias$)", _place),
    (r"^L2Norm\.weight$", "scale"),
    (r"^extras\.(\d)\.(?=weight$|bias$)", lambda m: f"extras.{int(m[1]) // 2}.{int(m[1]) % 2}."),
    (r"^loc\.", "head.boxes."),
    (r"^conf\.", "head.classes."),
)
_TORCHVISION_VGG: tuple[Rule, ...] = ((r"^features\.(\d+)\.", _place),)


def _wants(mean: Sequence[float]) -> dict[str, Tensor]:
    """Return the input's affine map for weights that want 0..255 less a mean."""
    shift = torch.tensor(MEAN, dtype=torch.float64) - torch.tensor(mean, dtype=torch.float64)
    return {"input_scale": torch.tensor(STD), "input_shift": shift.float()}


def from_torchvision_ssd(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert torchvision's ssd300_vgg16; its COCO weights have 90 foreground classes."""
    return rename(given, _TORCHVISION_SSD) | _wants(_TORCHVISION_MEAN)


def from_amdegroot(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert amdegroot/ssd.pytorch's SSD300, and the VGG16 with small fc6 and fc7 that it uses."""
    return rename(given, _AMDEGROOT) | _wants(CAFFE_MEAN)


def from_torchvision_vgg(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert torchvision's VGG16 classifier.

    The classifier's first two layers become fc6 and fc7: every fourth channel, and of the 7 x 7
    window every third row and column, which are the dilated 3 x 3 (SSD, section 3; DeepLab). One
    that holds no numbers (NaN) is that of the weights made for SSD (IMAGENET1K_FEATURES), which
    want 0..255 less a mean; it is left out, as is the last layer.
    """
    converted = rename(
        {key: tensor for key, tensor in given.items() if not key.startswith("classifier.")},
        _TORCHVISION_VGG,
    )
    first, second = (f"classifier.{layer}." for layer in (0, 3))
    window = given.get(f"{first}weight")
    if window is None or not window.isfinite().all():
        mean = _TORCHVISION_MEAN if window is not None else None
        return converted | (_wants(mean) if mean else _normalised())
    converted["fc6.weight"] = window.unflatten(1, (-1, 7, 7))[::4, :, ::3, ::3]
    converted["fc7.weight"] = given[f"{second}weight"][::4, ::4, None, None]
    for name, layer in (("fc6", first), ("fc7", second)):
        converted[f"{name}.bias"] = given[f"{layer}bias"][::4]
    return converted | _normalised()


def _normalised() -> dict[str, Tensor]:
    """Return the input's affine map for weights that want what comes."""
    return {"input_scale": torch.ones(3), "input_shift": torch.zeros(3)}


SSD_SOURCES = {
    "torchvision_ssd": (
        re.compile(
            r"^backbone\.scale_weight$|^head\.(classification|regression)_head\.module_list\."
        ),
        from_torchvision_ssd,
    ),
    "amdegroot_ssd": (
        re.compile(r"^L2Norm\.weight$|^vgg\.\d+\.weight$|^33\.weight$"),
        from_amdegroot,
    ),
    "torchvision_vgg": (re.compile(r"^features\.28\.weight$"), from_torchvision_vgg),
}
"""A pattern found in some key of a source, of which the first that fits counts; its function."""
