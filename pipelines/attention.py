"""Command `attention`: what a HILA model's coarse tokens attend to. No stage depends on it."""

from collections.abc import Sequence
from pathlib import Path

import torch

from xattn.data.transforms import SegmentationEval
from xattn.errors import ConfigError, DataError
from xattn.evaluate.hierarchy import Normalise, attend_from_points, nothing_to_show
from xattn.predictor import load_predictor, read_image
from xattn.report.attention_maps import draw_sheet
from xattn.storage import write_atomic
from xattn.structures import TokenAttention


def draw_attention(
    model_dir: Path,
    image_path: Path,
    points: Sequence[tuple[float, float]],
    out: Path,
    normalise: Normalise = "sum",
    device: str = "auto",
    transform: SegmentationEval | None = None,
) -> list[TokenAttention]:
    """Write one PNG: a column a point, a row a stage.

    Args:
        model_dir: a model folder.
        image_path: any image.
        points: (x, y) in px from the upper left corner; without any, the image's middle.
        out: the PNG.
        normalise: what a map is divided by, see `evaluate.hierarchy`.
        device: "auto", "cpu" or "cuda".
        transform: how the image is shown; None as in the model's validation.

    Returns:
        What is drawn.

    Raises:
        ConfigError: the model has nothing to show.
        DataError: the image cannot be read, a point lies outside, or `out` is the image itself.
    """
    if out.resolve() == image_path.resolve():
        raise DataError(f"--out {out}: would overwrite the image; name another file")
    predictor = load_predictor(model_dir, device, transform)
    if reason := nothing_to_show(predictor.recipe):
        raise ConfigError(f"model: '{predictor.card['model']}' {reason}")
    assert isinstance(predictor.transform, SegmentationEval)
    image = read_image(image_path)
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    tokens = attend_from_points(
        predictor.recipe.model,
        pixels,
        points or [(image.shape[1] // 2, image.shape[0] // 2)],
        predictor.transform,
        normalise,
    )
    picture = draw_sheet(image, tokens)
    write_atomic(out, lambda path: picture.save(path, format="PNG"))
    return tokens
