"""dvc.yaml tells DVC the truth: what a stage imports are its deps, what it reads are its params."""

import ast
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.conftest import PROJECT
from xattn.config import Config, list_presets, load_config, preset_path, read_yaml

STAGES: dict[str, Any] = YAML(typ="safe").load((PROJECT / "dvc.yaml").read_text())["stages"]
PACKAGES = ("xattn", "pipelines")
# DVC tracks the values that config.py reads as params, and the package's door has no behaviour.
NOT_FOLLOWED = {"xattn/config.py", "xattn/__init__.py", "pipelines/__init__.py"}


def body(stage: str) -> dict[str, Any]:
    return STAGES[stage].get("do", STAGES[stage])


def script(stage: str) -> Path:
    module = body(stage)["cmd"].split()[2]
    return Path(*module.split(".")).with_suffix(".py")


def module_file(name: str) -> Path | None:
    path = Path(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (PROJECT / candidate).exists():
            return candidate
    return None


def imported_files(source: Path) -> set[Path]:
    """Return the project's files that one file imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((PROJECT / source).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    found = {module_file(name) for name in names if name.split(".")[0] in PACKAGES}
    return {file for file in found if file is not None}


def reached(start: Path) -> set[Path]:
    """Return every file that `start` imports, directly or through others."""
    seen, waiting = set(), [start]
    while waiting:
        file = waiting.pop()
        if file in seen or str(file) in NOT_FOLLOWED:
            continue
        seen.add(file)
        waiting += imported_files(file)
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_deps_cover_what_the_stage_imports(stage: str) -> None:
    deps = [Path(dep) for dep in body(stage)["deps"] if "${" not in dep]
    needed = reached(script(stage))
    uncovered = {
        str(file) for file in needed if not any(dep == file or dep in file.parents for dep in deps)
    }
    assert not uncovered, f"{stage}: DVC would not notice a change of these"
    idle = {
        str(dep)
        for dep in deps
        if dep.parts[0] in PACKAGES and not any(dep == f or dep in f.parents for f in needed)
    }
    assert not idle, f"{stage}: these would rerun it for nothing"


def sections_read(stage: str) -> set[str]:
    """Return the sections that the stage's code touches as config.<section>."""
    sections = set(Config.model_fields)
    read = set()
    for file in reached(script(stage)):
        tree = ast.parse((PROJECT / file).read_text())
        read |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr in sections
            and isinstance(node.value, ast.Name)
            and node.value.id == "config"
        }
    return read


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_what_the_stage_reads(stage: str) -> None:
    declared = {param.split(".")[0] for param in body(stage)["params"]}
    if stage == "report":  # shows the whole file
        assert declared == set(Config.model_fields)
        return
    # Both training stages share the code that picks its recipe by the stage's name.
    other = {"pretrain": {"runs", "finetune"}, "finetune": {"pretrain_runs", "pretrain"}}
    assert sections_read(stage) - other.get(stage, set()) == declared


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_loads(name: str) -> None:
    load_config(preset_path(name))


def test_active_params_are_the_demo() -> None:
    assert read_yaml(PROJECT / "params.yaml") == read_yaml(preset_path("demo"))
