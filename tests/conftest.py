"""What several tests share: one small drawn data set, sharded once a session."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Must be set before torch or Ray are imported anywhere.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads only get in each other's way
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

PROJECT = Path(__file__).parent.parent

SCENES = {
    "reader": "synthetic",
    "root": "data/raw/scenes",
    "settings": {"image_size": [64, 96], "train": 24, "val": 6, "test": 7, "seed": 3},
}
LABELS = {
    "reader": "synthetic",
    "root": "data/raw/labels",
    "settings": {
        "task": "classification",
        "image_size": [64, 64],
        "train": 24,
        "val": 6,
        "test": 6,
        "seed": 4,
    },
}


def small_params() -> dict[str, Any]:
    """Return a params file whose stages take seconds, without dropout or drop-path."""
    fit = {"steps": 6, "global_batch": 4, "log_every_steps": 1, "checkpoint_every_steps": 2}
    optim = {"lr": 1e-3, "warmup_steps": 2, "head_lr_multiplier": 2.0}
    scratch = str(PROJECT / "pipelines" / "scratch.json")
    still = {"drop_path": 0.0}
    params = {
        "seed": 5,
        "datasets": {"scenes": SCENES, "labels": LABELS},
        "pretrain": {
            "augment": {"size": 32},
            "fit": fit,
            "optim": optim,
            "validate_on": {
                "split": "val",
                "every_steps": 3,
                "transform": {"size": 32, "resize": 32},
            },
        },
        "pretrain_runs": {
            "classifier": {
                "model": "mit_b0",
                "dataset": "labels",
                "init": scratch,
                "overrides": still,
            }
        },
        "finetune": {
            "augment": {"base": [64, 96], "crop": [64, 64]},
            "loss": {"normalise": "valid"},
            "fit": fit,
            "optim": optim,
            "validate_on": {"split": "val", "every_steps": 3, "transform": {}},
        },
        "runs": {
            "segmenter": {
                "model": "segformer_b0",
                "dataset": "scenes",
                "init": scratch,
                "overrides": {**still, "dropout": 0.0},
            }
        },
        "evaluate": {
            "split": "test",
            "segmentation": {},
            "classification": {"size": 32, "resize": 32},
            "device": "cpu",
            "pictures": 2,
        },
        "cluster": {"backend": "process", "workers": 1, "device": "cpu"},
        "tracking": {"enabled": False, "experiment": "tests"},
        "report": {"title": "Small"},
    }
    copied: dict[str, Any] = json.loads(json.dumps(params))  # no part is shared with another
    return copied


def write_params(folder: Path, params: dict[str, Any]) -> Path:
    """Write params.yaml (JSON is YAML) into a project folder."""
    path = folder / "params.yaml"
    path.write_text(json.dumps(params, indent=1))
    return path


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard the two small data sets once; gives the folder that holds both shard folders."""
    from pipelines.shard import shard

    project = tmp_path_factory.mktemp("shards")
    write_params(project, small_params())
    for name in ("scenes", "labels"):
        shard(name, project)
    return project / "data" / "shards"


@pytest.fixture
def project(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a project folder of its own with params.yaml and the small shards, as working folder."""
    write_params(tmp_path, small_params())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shards").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    return tmp_path
