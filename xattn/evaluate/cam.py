"""Class activation maps of a detector: what stands out in the maps that enter its heads.

EigenCAM (Muhammad and Yeasin 2020, arXiv 2008.00299) knows neither class nor gradient: a map's
cells, less their mean, along the direction in which they differ most. Grad-CAM++ (Chattopadhay et
al. 2018, arXiv 1710.11063) asks what raised one score. Xie et al. show EigenCAM for CFSAM and its
rivals without naming the layer; ours are the maps behind the neck, or the backbone's own where
there is none, F1 to F3 in SSD300 and R1 to R3 in CFSAM unless others are named.

SSD's heads see one map each, so that a score has a gradient at one level; Grad-CAM++ gives zeros
for the others. A map of a single cell, SSD's last one, has nothing that stands out: zeros too.

The package grad-cam is not used: it needs OpenCV and scikit-learn, takes the full singular value
decomposition (of a square matrix with a row a cell), and fails on models that return tuples.

Shape suffixes: C channels, H W rows and columns of a map or of the image, N cells, L levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from xattn.data.pixels import Size
from xattn.errors import ConfigError, DataError, check_choice
from xattn.models.multibox import INPUT_SIDE_PX, MultiBoxOutputs, decode_boxes
from xattn.models.ssd import SSD
from xattn.structures import Recipe

Method = Literal["eigencam", "gradcam++"]

_LEVELS = (1, 2, 3)
_NOISE = 1e-6  # of the largest activation: what single precision leaves of a constant map
_SCORE_NOISE = 1e-6


@dataclass(frozen=True, slots=True)
class ActivationMaps:
    """What a detector's levels say of one image.

    Args:
        levels: their numbers, from 1, the finest.
        cells: (rows, columns) of each level's map.
        maps: (L, H, W) float32 in [0, 1], the image's size; zero where nothing stands out.
        mean: (H, W) their mean, from 0 to 1 again.
        found: the model's detections, see `decode_detections`.
        explained: index of the detection that Grad-CAM++ explains; None of EigenCAM.
    """

    levels: tuple[int, ...]
    cells: tuple[Size, ...]
    maps: Tensor
    mean: Tensor
    found: dict[str, Tensor]
    explained: int | None


def eigen_cam(activation_CHW: Tensor) -> Tensor:
    """Return (H, W) in [0, 1]: the first principal component of a map's cells.

    Its sign, which is arbitrary, is the one that makes the largest magnitude positive; what is then
    negative is 0. A map whose cells are all alike gives zeros.
    """
    cells_NC = activation_CHW.double().flatten(1).T
    cells_NC = cells_NC - cells_NC.mean(0)
    # The smaller of both covariances: with A = u s v', the projection A v is u s.
    if cells_NC.shape[1] <= cells_NC.shape[0]:
        projection_N = cells_NC @ torch.linalg.eigh(cells_NC.T @ cells_NC).eigenvectors[:, -1]
    else:
        values, vectors = torch.linalg.eigh(cells_NC @ cells_NC.T)  # ascending
        projection_N = vectors[:, -1] * values[-1].clamp(min=0).sqrt()
    if -projection_N.min() > projection_N.max():
        projection_N = -projection_N
    noise = _NOISE * activation_CHW.abs().max().double()
    return _scaled(projection_N.view(activation_CHW.shape[1:]).clamp(min=0), noise).float()


def grad_cam_pp(activation_CHW: Tensor, gradient_CHW: Tensor) -> Tensor:
    """Return (H, W) in [0, 1]: the channels, weighted by how they raise a score, summed.

    Equations 10 and 19: w = sum over cells of alpha relu(g), with alpha = g^2 / (2 g^2 + g^3 sum
    over cells of A), which for g > 0 is 1 / (2 + g sum A). The paper's maps come out of a ReLU; of
    ours, which may not, the sum takes what is positive, so that alpha stays within (0, 1/2].

    Args:
        activation_CHW: A.
        gradient_CHW: g, of the score by A.
    """
    activation, gradient = activation_CHW.double(), gradient_CHW.double().clamp(min=0)
    sums_C11 = activation.clamp(min=0).sum((1, 2), keepdim=True)
    weights_C = (gradient / (2 + gradient * sums_C11)).sum((1, 2))
    map_HW = torch.einsum("c,chw->hw", weights_C, activation).clamp(min=0)
    return _scaled(map_HW, _NOISE * map_HW.max()).float()


def _scaled(map_HW: Tensor, noise: Tensor) -> Tensor:
    """Return a map moved and stretched to 0..1; zeros where it spans no more than `noise`."""
    low, high = map_HW.min(), map_HW.max()
    return torch.where(high - low > noise, (map_HW - low) / (high - low), 0.0)


def nothing_to_show(recipe: Recipe) -> str | None:
    """Say why a model has no levels to show; None for one that has."""
    return None if isinstance(recipe.model, SSD) else f"is for {recipe.task}, expected a detector"


def activation_maps(
    recipe: Recipe,
    image: Tensor,
    size: Size,
    *,
    method: Method = "eigencam",
    levels: Sequence[int] | None = None,
    detection: int | None = None,
) -> ActivationMaps:
    """Map one image.

    Args:
        recipe: a detector's, its model in eval mode.
        image: (3, 300, 300) as the model takes it, on its device.
        size: (height, width) of the stored image.
        method: "eigencam" or "gradcam++".
        levels: numbers from 1; None means 1, 2 and 3, of Grad-CAM++ the one that has a gradient.
        detection: number, from 1 by descending score, of the detection that Grad-CAM++ explains,
            by its score before the suppression; None means the first.

    Raises:
        ConfigError: an unknown level, or a detection that there is not.
        DataError: nothing was found that Grad-CAM++ could explain.
    """
    check_choice("method", method, get_args(Method))
    model = recipe.model
    assert isinstance(model, SSD)
    if method == "eigencam" and detection is not None:
        raise ConfigError(
            f"detection: found {detection} with method eigencam, which explains none; expected "
            "method gradcam++"
        )
    with torch.no_grad():
        maps = [level.detach() for level in model.neck(model.backbone(image[None]))]
    _check_levels(levels, len(maps))
    for level in maps:
        level.requires_grad_(method == "gradcam++")
    offsets, logits = model.head(maps)
    outputs = MultiBoxOutputs(offsets.detach(), logits.detach(), model.defaults)
    (found,) = recipe.decode(outputs, size)
    activations = [level.detach()[0] for level in maps]
    explained = None
    if method == "eigencam":
        shown = tuple(levels or _LEVELS)
        own = [eigen_cam(activations[level - 1]) for level in shown]
    else:
        explained = _chosen(found, detection)
        score = _score(outputs, logits[0], found, explained, size)
        gradients = [gradient[0] for gradient in torch.autograd.grad(score, maps)]
        strongest = max(range(len(maps)), key=lambda level: float(gradients[level].abs().max()))
        shown = tuple(levels or [strongest + 1])
        own = [grad_cam_pp(activations[level - 1], gradients[level - 1]) for level in shown]
    large = [
        F.interpolate(map_HW[None, None], size, mode="bilinear", align_corners=False)[0, 0].cpu()
        for map_HW in own
    ]
    maps_LHW = torch.stack(large)
    return ActivationMaps(
        levels=shown,
        cells=tuple((map_HW.shape[0], map_HW.shape[1]) for map_HW in own),
        maps=maps_LHW,
        mean=_scaled(mean := maps_LHW.mean(0), _NOISE * mean.max()),
        found={name: column.cpu() for name, column in found.items()},
        explained=explained,
    )


def _check_levels(levels: Sequence[int] | None, count: int) -> None:
    if levels is None:
        return
    if not levels or len(set(levels)) < len(levels) or not set(levels) <= set(range(1, count + 1)):
        raise ConfigError(
            f"levels: found {list(levels)}, expected numbers of 1..{count}, each at most once"
        )


def _chosen(found: dict[str, Tensor], detection: int | None) -> int:
    """Return the index of the detection with this number."""
    count = len(found["scores"])
    if not count:
        raise DataError("the model finds nothing in this image that gradcam++ could explain")
    number = 1 if detection is None else detection
    if not 1 <= number <= count:
        raise ConfigError(f"detection: found {number}, expected 1..{count} in this image")
    return number - 1


def _score(
    outputs: MultiBoxOutputs,
    logits_PK: Tensor,
    found: dict[str, Tensor],
    explained: int,
    size: Size,
) -> Tensor:
    """Return the score, with its gradient, of the default box that a detection came from.

    Scores alone do not tell it: many are equal where an image is flat or a model sure of all. In
    double precision: a score of nearly 1 hardly changes.
    """
    label, score = int(found["labels"][explained]), found["scores"][explained]
    scores_P = outputs.logits[0].float().softmax(-1)[:, label + 1]
    boxes_P4 = decode_boxes(outputs)[0]
    scale = boxes_P4.new_tensor([size[1], size[0]]).repeat(2) / INPUT_SIDE_PX
    distances_P = (boxes_P4 * scale - found["boxes"][explained]).abs().amax(1)
    is_candidate = (scores_P - score).abs() <= _SCORE_NOISE
    place = distances_P.where(is_candidate, torch.inf).argmin()
    return logits_PK[place].double().softmax(-1)[label + 1]
