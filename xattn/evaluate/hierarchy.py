"""Hierarchical attention: how a coarse token divides itself among ever finer cells.

Leung et al., arXiv 2207.02126, section 4.4 and appendix A.3. M_l, the weights of stage l's last
top-down update, says what each cell of stage l - 1 takes of each token of stage l. From token t,
A43 = M_4[t] on the cells of t's patch; A42 = sum over those cells z of A43[z] M_3[z], added up
where patches overlap; A41 likewise. Equations 14 and 15 then divide a map by its own sum.

Differences from the authors' script (fidler-lab/hila, 572d62f; numbers and behaviour only):
- It divides by the maximum, which is `normalise="max"` here, and spreads the map of stages 3 and 4
  over stage 1 by factors of one, where we keep it on the cells of stage 2.
- Cells outside a map count nothing; there they wrap around.
- Of sliding windows it shows the last one, we the one in whose middle the point is.
- A model that exchanges in fewer stages is shown as far as they go without a gap, from the
  coarsest down.

Shape suffixes: H W rows and columns of the high map, h w of the low map, P cells of a patch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from xattn.data.pixels import Size
from xattn.data.transforms import SegmentationEval
from xattn.errors import DataError, check_choice
from xattn.evaluate.inference import SegmentationProtocol
from xattn.models.hila import Hila
from xattn.nn.interlevel import TopDownAttention, patch_cells
from xattn.structures import AttentionMap, BoxXyxyPx, Recipe, TokenAttention

Normalise = Literal["sum", "max"]


@dataclass(frozen=True, slots=True)
class TopDownWeights:
    """M of one stage for one image.

    Args:
        weights: (H, W, P) as of `TopDownAttention.weights`.
        low_size: (h, w) of the stage below.
        patch: side p of a patch; P is p * p.
    """

    weights: Tensor
    low_size: Size
    patch: int

    def descend(self, map_HW: Tensor) -> Tensor:
        """Spread what each high token holds over the cells of its patch: (H, W) to (h, w)."""
        high_size = map_HW.shape[0], map_HW.shape[1]
        index_HWP, _ = patch_cells(self.patch, high_size, self.low_size)
        shares = (map_HW[..., None] * self.weights).flatten()  # 0 for cells outside the map
        spread = shares.new_zeros(self.low_size[0] * self.low_size[1])
        return spread.scatter_add(0, index_HWP.flatten(), shares).view(self.low_size)

    def reach(self, rows: slice, columns: slice) -> tuple[slice, slice]:
        """Return the low rows and columns that the patches of a box of high tokens cover."""
        pad = self.patch // 2 - 1
        low_rows, low_columns = (
            slice(max(2 * side.start - pad, 0), min(2 * side.stop - 2 - pad + self.patch, limit))
            for side, limit in zip((rows, columns), self.low_size, strict=True)
        )
        return low_rows, low_columns


def nothing_to_show(recipe: Recipe) -> str | None:
    """Say why a model has no hierarchical attention to show; None for one that has."""
    backbone = getattr(recipe.model, "backbone", None)
    if not isinstance(backbone, Hila):
        return "has no inter-level attention; HILA's models have"
    if recipe.task != "segmentation":
        return f"is for {recipe.task}; only the attention of segmenters is drawn"
    if not any(_attentions(backbone).values()):
        return "was built with top_down false; only top-down attention is drawn"
    return None


@torch.inference_mode()
def top_down_weights(model: nn.Module, images: Tensor) -> dict[int, TopDownWeights]:
    """Run a model and return the weights of each stage's last top-down update.

    Args:
        model: one with something to show, in eval mode.
        images: (1, 3, H, W) normalised, on the model's device.

    Returns:
        By the number of the coarser stage; on the CPU, float32.
    """
    with _recorded(model.backbone) as calls:
        model(images)
    return {
        number: TopDownWeights(
            attention.weights(low, high)[0].float().cpu(),
            (low.shape[1], low.shape[2]),
            attention.patch,
        )
        for number, (attention, low, high) in calls.items()
    }


def attend(
    weights: Mapping[int, TopDownWeights], token: Size, normalise: Normalise = "sum"
) -> list[tuple[tuple[int, ...], tuple[slice, slice], Tensor]]:
    """Follow a token of the coarsest stage down to the finest.

    Args:
        weights: as of `top_down_weights`.
        token: (row, column).
        normalise: "sum": a map's cells add up to 1 (the paper); "max": the largest is 1.

    Returns:
        For each stage reached: the stages multiplied, finest first; the rows and columns that
        patches cover; the whole map, (h, w), 0 beyond them.

    Raises:
        ConfigError: `normalise` is neither.
    """
    check_choice("normalise", normalise, get_args(Normalise))
    stage = max(weights)
    spread = weights[stage].weights.new_zeros(weights[stage].weights.shape[:2])
    spread[token] = 1
    area = slice(token[0], token[0] + 1), slice(token[1], token[1] + 1)
    stages: tuple[int, ...] = ()
    found = []
    while stage in weights:
        spread, area = weights[stage].descend(spread), weights[stage].reach(*area)
        stages = (stage, *stages)
        whole = spread.sum() if normalise == "sum" else spread.max()
        found.append((stages, area, spread / whole.clamp(min=torch.finfo(whole.dtype).tiny)))
        stage -= 1
    return found


def attend_from_points(
    model: nn.Module,
    pixels: Tensor,
    points: Sequence[tuple[float, float]],
    transform: SegmentationEval,
    normalise: Normalise = "sum",
) -> list[TokenAttention]:
    """Return the attention of the tokens that some points of an image lie in.

    A cell of a map of h rows counts as H / h pixels of the image that the model saw, as where its
    output is resized. A protocol of several views shows the one nearest to scale 1, not mirrored.

    Args:
        model: one with something to show, in eval mode.
        pixels: (3, H, W) uint8 RGB as stored.
        points: (x, y) in px of `pixels`, from its upper left corner.
        transform: how the image is shown to the model; a protocol with windows shows the window in
            whose middle the point is.
        normalise: see `attend`.

    Raises:
        DataError: a point lies outside the image.
    """
    height, width = pixels.shape[1:]
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise DataError(
                f"point {x:g},{y:g}: outside of the image, whose x go from 0 to {width - 1} and "
                f"y from 0 to {height - 1}"
            )
    device = next(model.parameters()).device
    view = _prepare(pixels, transform).to(device)
    weights_of: dict[tuple[int, int], dict[int, TopDownWeights]] = {}
    found = []
    for x, y in points:
        scale = view.shape[1] / height, view.shape[2] / width
        at = y * scale[0], x * scale[1]
        rows, columns = _window(transform, (view.shape[1], view.shape[2]), at)
        corner = rows.start, columns.start
        part = view[:, rows, columns]
        if corner not in weights_of:
            weights_of[corner] = top_down_weights(model, part[None])
        frame = _Frame(corner, (part.shape[1], part.shape[2]), scale)
        found.append(_token_attention(weights_of[corner], (x, y), frame, normalise))
    return found


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where a model's input lies in the stored image.

    Args:
        corner: (row, column) of the input's upper left corner in the resized image, px.
        size: (height, width) of the input, px.
        scale: (vertical, horizontal) pixels of the resized image per pixel of the stored one.
    """

    corner: Size
    size: Size
    scale: tuple[float, float]

    def token_at(self, point: tuple[float, float], map_size: Size) -> Size:
        """Return the (row, column) of the cell of a map that (x, y) of the stored image is in."""
        row, column = (
            min(int((at * scale - corner) / side * count), count - 1)
            for at, scale, corner, side, count in zip(
                reversed(point), self.scale, self.corner, self.size, map_size, strict=True
            )
        )
        return row, column

    def box(self, area: tuple[slice, slice], map_size: Size) -> BoxXyxyPx:
        """Return what rows and columns of a map cover."""
        (top, bottom), (left, right) = (
            tuple((corner + end * side / count) / scale for end in (part.start, part.stop))
            for part, corner, side, count, scale in zip(
                area, self.corner, self.size, map_size, self.scale, strict=True
            )
        )
        return left, top, right, bottom


def _token_attention(
    weights: Mapping[int, TopDownWeights],
    point: tuple[float, float],
    frame: _Frame,
    normalise: Normalise,
) -> TokenAttention:
    coarsest = weights[max(weights)].weights
    token = frame.token_at(point, (coarsest.shape[0], coarsest.shape[1]))
    maps = tuple(
        AttentionMap(
            stages,
            frame.box(area, (spread.shape[0], spread.shape[1])),
            tuple(tuple(row) for row in spread[area].tolist()),
        )
        for stages, area, spread in attend(weights, token, normalise)
    )
    return TokenAttention(point, maps[0].box, maps)


def _prepare(pixels: Tensor, transform: SegmentationEval) -> Tensor:
    """Return the image as a model is shown it."""
    if not isinstance(transform, SegmentationProtocol):
        return transform.prepare(pixels)
    return transform.prepare(pixels, min(transform.ratios, key=lambda ratio: abs(ratio - 1)))


def _window(
    transform: SegmentationEval, size: Size, at: tuple[float, float]
) -> tuple[slice, slice]:
    """Return the rows and columns of the window in whose middle a point, (row, column), is."""
    window = transform.window if isinstance(transform, SegmentationProtocol) else None
    if window is None:
        return slice(0, size[0]), slice(0, size[1])

    crop = window.crop

    def distance(place: tuple[slice, slice]) -> float:
        offsets: list[float] = [
            abs(where - part.start - side / 2) / side
            for where, part, side in zip(at, place, crop, strict=True)
        ]
        return max(offsets)

    # All windows are equally large, beyond the image too: the nearest middle is that of a window
    # that holds the point.
    return min(window.places(size), key=distance)


def _attentions(backbone: Hila) -> dict[int, list[TopDownAttention]]:
    """Return the top-down attentions of each exchanging stage by its number."""
    return {
        int(number): [part for part in exchange.modules() if isinstance(part, TopDownAttention)]
        for number, exchange in backbone.exchanges.items()
    }


_Calls = dict[int, tuple[TopDownAttention, Tensor, Tensor]]


@contextmanager
def _recorded(backbone: Any) -> Iterator[_Calls]:
    """Give the last call of each stage's top-down attention: itself, low map, high map."""
    calls: _Calls = {}

    def note(number: int, attention: TopDownAttention, maps: Any, _output: Tensor) -> None:
        calls[number] = (attention, *maps)

    handles = [
        attention.register_forward_hook(partial(note, number))
        for number, attentions in _attentions(backbone).items()
        for attention in attentions
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
