"""params.yaml: each fault is one line with the dotted key and the nearest right value."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import small_params, write_params
from xattn.config import list_presets, load_config, preset_path
from xattn.errors import ConfigError


def put(params: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        params = params[section]
    params[last] = value


@pytest.mark.parametrize(
    ("dotted", "value", "message"),
    [
        ("finetune.optim.lrr", 1.0, r"finetune\.optim\.lrr: unknown key; did you mean 'lr'\?"),
        ("finetun", {}, r"finetun: unknown key; did you mean 'finetune'\?"),
        ("seed", "7", r"seed: expected a valid integer, found '7'"),
        ("seed", -1, r"seed: expected greater than or equal to 0, found -1"),
        ("finetune.fit.steps", 1.5, r"finetune\.fit\.steps: expected a valid integer"),
        ("finetune.fit.precision", "fp8", r"finetune\.fit\.precision: expected 'fp32' or 'bf16'"),
        ("finetune.augment.crop", [64], r"finetune\.augment\.crop"),
        ("runs.segmenter.dataset", "scene", r"runs\.segmenter\.dataset: .*did you mean 'scenes'\?"),
        ("datasets.scenes.reader", "camvit", r"did you mean 'camvid'\?"),
        ("datasets.scenes.settings", {"sed": 1}, r"datasets\.scenes\.settings\.sed"),
        ("datasets.scenes.settings", {"train": "6"}, r"settings\.train: expected a valid integer"),
        ("datasets.scenes.settings", {"things": [3, 1]}, r"settings: things: found \[3, 1\]"),
        ("finetune.augment.ratio", [2.0, 0.5], r"ratio: expected the lower end first, found \[2"),
        ("finetune.augment.ratio", [0.0, 0.5], r"ratio\.0: expected greater than 0, found 0\.0"),
        ("pretrain.augment.scale", [0.5, 1.5], r"scale\.1: expected less than or equal to 1"),
        ("pretrain.optim.betas", [0.9, 1.0], r"betas\.1: expected less than 1, found 1\.0"),
        ("evaluate.classification", {"size": 64, "resize": 32}, r"classification: resize is 32"),
        ("evaluate.segmentation", {"rations": [1]}, r"segmentation\.rations: .*mean 'ratios'\?"),
        (
            "evaluate.segmentation",
            {"window": {"crop": [8, 8], "stride": [9, 8]}},
            r"window: stride is \[9, 8\], expected at most crop, \[8, 8\]",
        ),
        ("evaluate.boundary", {"thresholds": "ment"}, r"evaluate\.boundary\.thresholds"),
        ("runs", {"../up": {}}, r"runs"),
        ("datasets", {"a": "!!binary"}, r"datasets\.a"),
        ("pretrain_runs.segmenter", None, r"pretrain_runs\.segmenter"),
    ],
)
def test_faults_are_named(tmp_path: Path, dotted: str, value: Any, message: str) -> None:
    params = small_params()
    put(params, dotted, value)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write_params(tmp_path, params))
    assert "\n" not in str(caught.value)


def test_missing_key_is_named(tmp_path: Path) -> None:
    params = small_params()
    del params["finetune"]["optim"]["lr"]
    with pytest.raises(ConfigError, match=r"finetune\.optim\.lr: missing"):
        load_config(write_params(tmp_path, params))


def test_a_name_in_both_stages_is_refused(tmp_path: Path) -> None:
    params = small_params()
    params["pretrain_runs"]["segmenter"] = params["pretrain_runs"]["classifier"]
    with pytest.raises(ConfigError, match=r"runs\.segmenter: pretrain_runs has a run of this name"):
        load_config(write_params(tmp_path, params))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "expected a mapping"), ("a: [", "no YAML"), ("- 1", "expected a mapping")],
)
def test_what_is_no_mapping(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="xattn preset use demo"):
        load_config(tmp_path / "params.yaml")


def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path) -> None:
    text = preset_path("demo").read_text()
    assert "1e-3" in text
    assert load_config(preset_path("demo")).pretrain.optim.lr == 1e-3


def test_unknown_preset_names_the_nearest() -> None:
    assert {"demo", "camvid", "trashnet"} <= set(list_presets())
    with pytest.raises(ConfigError, match=r"unknown preset 'camvit'; did you mean 'camvid'\?"):
        preset_path("camvit")
