"""The house rules that a reader can rely on: imports point down, one library has one owner."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.test_stages import imported_files
from xattn.config import Config

FILES = sorted(
    file.relative_to(PROJECT)
    for folder in ("xattn", "pipelines")
    for file in (PROJECT / folder).rglob("*.py")
)

# A room may import from its own row and from the rows above it.
LAYERS = [
    {"xattn/errors.py", "xattn/structures.py", "xattn/memory.py"},
    {"xattn/storage.py", "xattn/remote.py"},
    {"xattn/places.py"},
    {"xattn/data", "xattn/nn", "xattn/losses.py"},
    {"xattn/models"},
    {"xattn/train", "xattn/evaluate"},
    {"xattn/cluster", "xattn/tracking.py", "xattn/report"},
    {"xattn/config.py"},
    {"xattn/predictor.py"},
    {"xattn/job.py"},
    {"xattn/experiment.py", "xattn/scoring.py"},
    {"xattn/results.py"},
    {"pipelines"},
]
# The models are priced by evaluate/cost.py, which knows no model; MLflow's saved models predict.
ALLOWED = {
    ("xattn/models/zoo.py", "xattn/evaluate/cost.py"),
    ("xattn/tracking.py", "xattn/predictor.py"),
}

OWNERS = {
    "ray": ("xattn/cluster/",),
    "mlflow": ("xattn/tracking.py",),
    "webdataset": ("xattn/data/pack.py",),
    "boto3": ("xattn/remote.py",),
    "botocore": ("xattn/remote.py",),
    "ruamel": ("xattn/config.py", "xattn/report/tables.py"),
    "timm": ("xattn/models/timm_",),
    "faster_coco_eval": ("xattn/evaluate/detection.py",),
    "typer": (),
    "dvc": (),
    "torch.distributed": ("xattn/train/distributed.py", "xattn/cluster/trainer.py"),
}


def layer(file: Path) -> int | None:
    for number, rooms in enumerate(LAYERS):
        if any(str(file) == room or str(file).startswith(f"{room}/") for room in rooms):
            return number
    return None


def test_every_file_has_a_layer() -> None:
    homeless = [str(file) for file in FILES if layer(file) is None]
    assert homeless == ["xattn/__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_down(file: Path) -> None:
    own = layer(file)
    if own is None:
        return
    upward = [
        str(other)
        for other in imported_files(file)
        if (above := layer(other)) is not None
        and above > own
        and (str(file), str(other)) not in ALLOWED
    ]
    assert not upward


@pytest.mark.parametrize("library", OWNERS)
def test_one_library_has_one_owner(library: str) -> None:
    for file in FILES:
        for node in ast.walk(ast.parse((PROJECT / file).read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            if any(name == library or name.startswith(f"{library}.") for name in names):
                assert str(file).startswith(OWNERS[library]), f"{file} imports {library}"


def test_importing_the_package_and_help_cost_nothing() -> None:
    script = (
        "import sys, xattn, cli\n"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'timm', 'dvc', 'boto3'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=PROJECT)


def test_training_needs_neither_ray_nor_mlflow() -> None:
    script = (
        "import sys\n"
        "for name in ('ray', 'mlflow', 'dvc'): sys.modules[name] = None\n"
        "import xattn.experiment, xattn.scoring, xattn.results\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=PROJECT)


def test_every_setting_is_read_somewhere() -> None:
    """A setting that no code reads would be accepted and do nothing."""
    read = {
        node.attr
        for file in FILES
        for node in ast.walk(ast.parse((PROJECT / file).read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert not [name for name in setting_names(Config) if name not in read]


def setting_names(model: type) -> set[str]:
    names: set[str] = set()
    waiting, seen = [model], set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for name, field in current.model_fields.items():
            names.add(name)
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            waiting += [kind for kind in kinds if hasattr(kind, "model_fields")]
    return names
