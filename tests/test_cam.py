"""Class activation maps against numpy's SVD and sums done by hand, and the command `cam`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from cli import app
from pipelines.cam import cam_picture, draw_cam
from xattn.data.augment_detection import DetectionEval
from xattn.data.transforms import ClassificationEval
from xattn.errors import ConfigError, DataError
from xattn.evaluate.cam import _score, activation_maps, eigen_cam, grad_cam_pp
from xattn.models.multibox import BOXES_PER_CELL, default_boxes, to_corners
from xattn.models.ssd import SSD
from xattn.models.weights import save_weights
from xattn.models.zoo import create_recipe, list_models
from xattn.predictor import Predictor
from xattn.report.cam_sheet import Detections, draw_cam_sheet
from xattn.storage import sha256_file
from xattn.structures import DatasetInfo, Recipe

SIZE = (90, 120)
NAMES = ("cell", "dot", "line")
PALETTE = ((128, 0, 0), (0, 128, 0), (0, 0, 128))
CARD = {"model": "ssd300", "class_names": list(NAMES), "palette": [list(c) for c in PALETTE]}


def detector(model: str = "ssd300") -> Recipe:
    info = DatasetInfo("toy", ("detection",), NAMES, PALETTE, (), (), "", "", "", "")
    torch.manual_seed(1)
    recipe = create_recipe(model, info, width=8)
    recipe.model.eval()
    return recipe


def photo() -> np.ndarray:
    generator = np.random.default_rng(3)
    return generator.integers(0, 256, (*SIZE, 3), np.uint8)


def shown() -> Tensor:
    return DetectionEval(size=300).prepare(torch.from_numpy(photo()).permute(2, 0, 1).contiguous())


def by_full_svd(activation: np.ndarray) -> np.ndarray:
    """EigenCAM as the paper has it."""
    cells = activation.reshape(len(activation), -1).T
    cells = cells - cells.mean(0)
    projection = cells @ np.linalg.svd(cells, full_matrices=True)[2][0]
    projection = projection if projection.max() >= -projection.min() else -projection
    projection = projection.clip(0).reshape(activation.shape[1:])
    return (projection - projection.min()) / np.ptp(projection)


@pytest.mark.parametrize("shape", [(5, 4, 6), (40, 3, 4), (12, 3, 4), (2, 1, 9)])
def test_eigen_cam_is_the_full_svd(shape: tuple[int, int, int]) -> None:
    activation = np.random.default_rng(sum(shape)).normal(2, 1, shape)
    ours = eigen_cam(torch.from_numpy(activation))
    np.testing.assert_allclose(ours.numpy(), by_full_svd(activation), atol=1e-6)
    np.testing.assert_allclose(eigen_cam(torch.from_numpy(-activation)), ours, atol=1e-6)
    np.testing.assert_allclose(eigen_cam(1e-9 * torch.from_numpy(activation)), ours, atol=1e-5)


def test_eigen_cam_finds_the_odd_part() -> None:
    activation = torch.ones(6, 5, 5)
    activation[:3, 1:3, 3] = 4
    expected = torch.zeros(5, 5)
    expected[1:3, 3] = 1
    torch.testing.assert_close(eigen_cam(activation), expected)


@pytest.mark.parametrize("shape", [(5, 3, 4), (40, 3, 4), (7, 1, 1)])
@pytest.mark.parametrize("value", [0.0, 0.1, -3e7])
def test_where_all_is_alike_nothing_stands_out(shape: tuple[int, int, int], value: float) -> None:
    flat = torch.full(shape, value) * torch.arange(1, shape[0] + 1)[:, None, None]
    assert not eigen_cam(flat).any()
    assert not grad_cam_pp(flat, torch.ones(shape)).any()
    assert not grad_cam_pp(flat, torch.zeros(shape)).any()


def test_grad_cam_pp_by_hand() -> None:
    activation = torch.tensor([[[1.0, 3, 0]], [[2, 0, 0]]])
    gradient = torch.tensor([[[0.5, 0, 0]], [[-1, 1, 0]]])
    # alpha: .25 / (2 * .25 + 4 * .125) = 1/4, and 1 / (2 * 1 + 2 * 1) = 1/4;
    # weights: 1/4 * .5 = 1/8 and 1/4 * 1; map: 1/8 + 2/4, 3/8, 0.
    expected = torch.tensor([[1.0, 0.375 / 0.625, 0]])
    torch.testing.assert_close(grad_cam_pp(activation, gradient), expected)
    assert not grad_cam_pp(activation, -gradient.abs()).any()


def test_grad_cam_pp_is_the_formula_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    activation = torch.rand(6, 4, 5, generator=generator, dtype=torch.float64)
    gradient = torch.randn(6, 4, 5, generator=generator, dtype=torch.float64)
    sums = activation.sum((1, 2), keepdim=True)
    alpha = gradient**2 / (2 * gradient**2 + sums * gradient**3)
    weights = (alpha * gradient.relu()).sum((1, 2))
    raw = (weights[:, None, None] * activation).sum(0).relu()
    expected = (raw - raw.min()) / (raw.max() - raw.min())
    torch.testing.assert_close(grad_cam_pp(activation, gradient), expected.float())


@pytest.mark.parametrize("model", list_models("detection"))
def test_every_detector_has_maps(model: str) -> None:
    recipe, image = detector(model), shown()
    for method in ("eigencam", "gradcam++"):
        found = activation_maps(recipe, image, SIZE, method=method, levels=range(1, 7))
        assert found.levels == (1, 2, 3, 4, 5, 6)
        assert found.cells == ((38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1))
        assert found.maps.shape == (6, *SIZE)
        assert found.mean.shape == SIZE
        for part in (found.maps, found.mean):
            assert part.isfinite().all()
            assert part.min() >= 0
            assert part.max() <= 1
        lit = found.maps.flatten(1).any(1).tolist()
        # One cell is all there is to the last level, and one score comes of one level.
        assert lit == [True] * 5 + [False] if method == "eigencam" else sum(lit) <= 1
        assert found.mean.any() or method == "gradcam++"
    assert all(parameter.grad is None for parameter in recipe.model.parameters())


def test_the_maps_are_those_that_enter_the_heads() -> None:
    recipe, image = detector("ssd300_cfsam"), shown()
    found = activation_maps(recipe, image, SIZE, levels=[2])
    assert activation_maps(recipe, image, SIZE).levels == (1, 2, 3)
    with torch.no_grad():
        level = recipe.model.neck(recipe.model.backbone(image[None]))[1]
    own = eigen_cam(level[0])[None, None]
    expected = F.interpolate(own, SIZE, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found.maps, expected)
    torch.testing.assert_close(found.mean, expected[0] / expected.max(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", [1, 4])
def test_grad_cam_pp_explains_the_detection_at_its_level(number: int) -> None:
    recipe, image = detector(), shown()
    found = activation_maps(recipe, image, SIZE, method="gradcam++", detection=number)
    with torch.no_grad():
        outputs = recipe.model(image[None])
    (plain,) = recipe.decode(outputs, SIZE)
    torch.testing.assert_close(found.found["scores"], plain["scores"])
    assert found.explained == number - 1
    scores = outputs.logits[0].softmax(-1)[:, int(plain["labels"][number - 1]) + 1]
    place = int((scores - plain["scores"][number - 1]).abs().argmin())
    counts = [n * n * per for n, per in zip((38, 19, 10, 5, 3, 1), BOXES_PER_CELL, strict=True)]
    level = int(np.searchsorted(np.cumsum(counts), place, "right")) + 1
    assert found.levels == (level,)


def test_of_equal_scores_the_box_tells_which_is_explained() -> None:
    recipe, image = detector(), shown()
    model = recipe.model
    assert isinstance(model, SSD)
    for conv in model.head.classes:
        assert isinstance(conv, nn.Conv2d)
        conv.weight.data.zero_()  # the same score everywhere
        assert conv.bias is not None
        conv.bias.data.view(-1, 4)[:, 1] = 1.0
    for conv in model.head.boxes:
        assert isinstance(conv, nn.Conv2d)
        conv.weight.data.zero_()
    boxes = to_corners(default_boxes()).clamp(0, 300) * torch.tensor([SIZE[1], SIZE[0]] * 2) / 300
    with torch.no_grad():
        outputs = model(image[None])
    (found,) = recipe.decode(outputs, SIZE)
    logits = outputs.logits[0].clone().requires_grad_()
    for number in range(0, len(found["scores"]), 7):
        (gradient,) = torch.autograd.grad(_score(outputs, logits, found, number, SIZE), logits)
        (place,) = gradient.any(1).nonzero()[:, 0].tolist()
        torch.testing.assert_close(boxes[place], found["boxes"][number], rtol=0, atol=1e-3)


def test_what_cannot_be_shown_is_named() -> None:
    recipe, image = detector(), shown()

    def message(**options: object) -> str:
        with pytest.raises((ConfigError, DataError)) as error:
            activation_maps(recipe, image, SIZE, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "levels: found [0, 2], expected numbers of 1..6" in message(levels=[0, 2])
    assert "each at most once" in message(levels=[2, 2])
    assert "levels: found []" in message(levels=[])
    assert "explains none; expected method gradcam++" in message(detection=1)
    assert "detection: found 0, expected 1..200" in message(method="gradcam++", detection=0)
    assert "gradcam" in message(method="gradcam")
    with torch.no_grad():
        for conv in recipe.model.head.classes:
            conv.bias.view(-1, len(NAMES) + 1)[:, 0] += 50  # all is background
    assert "finds nothing in this image" in message(method="gradcam++")


def test_the_sheet_has_a_panel_a_level_and_one_for_their_mean() -> None:
    predictor = Predictor(detector(), CARD, DetectionEval(size=300), torch.device("cpu"))
    two, words = cam_picture(predictor, photo(), levels=[1, 2])
    assert words == "ssd300, EigenCAM, levels 1, 2"
    five, _ = cam_picture(predictor, photo(), levels=[1, 2, 3])
    one, words = cam_picture(predictor, photo(), levels=[1])
    assert two.size == five.size
    assert two.width - one.width == 492, "rows of three; of one level the mean is itself"
    assert two.height - one.height == 360 + 20 + 12, "a second row: image, words, gap"
    assert words == "ssd300, EigenCAM, level 1"
    _, words = cam_picture(predictor, photo(), "gradcam++", detection=2)
    assert words.startswith("ssd300, Grad-CAM++, level ")
    assert ", detection 2: " in words


def test_a_sheet_of_a_narrow_image_is_no_higher_than_others() -> None:
    image = np.full((1200, 4, 3), 100, np.uint8)
    detections = Detections(np.array([[0.0, 0, 4, 600]]), np.array([1]), np.ones(1), NAMES, PALETTE)
    values = np.ones((1200, 4), np.float32)
    sheet = draw_cam_sheet(image, detections, [("level 1", values)], ["about"])
    assert sheet.width < 1000
    assert sheet.height < 1200


def test_panels_are_grey_where_the_map_is_zero_and_boxes_stand_on_the_image() -> None:
    image = np.full((480, 480, 3), 100, np.uint8)
    values = np.zeros((480, 480), np.float32)
    values[:, 300:] = 1
    box = np.array([[100.0, 100, 200, 200]])
    detections = Detections(box, np.array([1]), np.array([0.9]), NAMES, PALETTE)
    sheet = np.asarray(draw_cam_sheet(image, detections, [("level 1", values)], ["about"]))
    drawn, panel = (sheet[52:532, left : left + 480] for left in (12, 504))
    assert drawn[150, 100].tolist() == [0, 128, 0]
    assert (panel[:, :298] == 100).all()
    assert np.ptp(panel[:, 302:].astype(int), axis=2).min() > 50


def model_folder(folder: Path, model: str = "ssd300") -> Path:
    """Write what a training leaves."""
    folder.mkdir(parents=True)
    recipe = detector(model)
    save_weights(recipe.model, folder / "model.safetensors")
    card = {
        **CARD,
        "model": model,
        "overrides": {"width": 8},
        "dataset": "toy",
        "task": "detection",
        "transform": {"size": 300},
        "weights": "model.safetensors",
        "weights_sha256": sha256_file(folder / "model.safetensors"),
    }
    (folder / "model.json").write_text(json.dumps(card))
    return folder


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "results" / "finetune" / "cells", "ssd300_cfsam")
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    words = ["cam", "cells", "photo.png", "--out", "seen/cam.png", "--levels", "3,1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.output == "seen/cam.png: ssd300_cfsam, EigenCAM, levels 3, 1\n"
    with Image.open(tmp_path / "seen" / "cam.png") as sheet:
        assert sheet.height > 2 * 360
    photograph = tmp_path / "photo.png"
    told = CliRunner().invoke(app, ["cam", str(folder), str(photograph), "--levels", "a"])
    assert told.exit_code == 2
    assert "--levels: found 'a', expected numbers" in told.output
    with pytest.raises(ConfigError, match=r"levels: found \[7\], expected numbers of 1..6"):
        draw_cam(folder, photograph, tmp_path / "cam.png", levels=[7])
    assert not (tmp_path / "cam.png").exists()
    with pytest.raises(DataError, match="would overwrite the image"):
        draw_cam(folder, photograph, photograph)


def test_a_model_that_is_no_detector_is_refused() -> None:
    info = DatasetInfo("toy", ("classification",), NAMES, PALETTE, (), (), "", "", "", "")
    recipe = create_recipe("mit_b0", info)
    transform = ClassificationEval(size=64, resize=64)
    predictor = Predictor(recipe, {**CARD, "model": "mit_b0"}, transform, torch.device("cpu"))
    with pytest.raises(ConfigError, match="'mit_b0' is for classification, expected a detector"):
        cam_picture(predictor, photo())
