"""The README's commands, run as they stand there, on a project whose stages take seconds."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import PROJECT, small_params, write_params

README = (PROJECT / "README.md").read_text()
# Run by .ci/run, which a test cannot run inside itself.
RUN_BY_CI = {"make demo", "make test", "xattn preset use camvid"}
SERVES = {"mlflow ui --backend-store-uri sqlite:///mlflow.db"}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what git tracks to a folder with a space in its name, with small params."""
    folder = tmp_path_factory.mktemp("read me") / "xattn"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (PROJECT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name)
    params = small_params()
    classifier = params["pretrain_runs"].pop("classifier")
    segmenter = params["runs"].pop("segmenter")
    params["pretrain_runs"]["mit_b0"] = {**classifier, "init": "pipelines/scratch.json"}
    params["runs"]["segformer_b0"] = {**segmenter, "init": "results/pretrain/mit_b0/model.json"}
    hila = {**params["runs"]["segformer_b0"], "model": "hila_segformer_b0_s3"}
    params["runs"]["hila_segformer_b0_s3"] = hila
    write_params(folder, params)
    image = np.random.default_rng(0).integers(0, 256, (48, 60, 3), np.uint8)
    Image.fromarray(image).save(folder / "photo.jpg")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "start"]):
        author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *author, *words], cwd=folder, check=True)
    return folder


def run(command: str, folder: Path) -> str:
    binaries = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(folder)  # the clone's code, not the checkout's
    done = subprocess.run(
        command,
        check=False,
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_the_pipeline_and_every_command(clone: Path) -> None:
    first = run("dvc repro", clone)
    first_run = set(re.findall(r"Running stage '(.*?)'", first))
    assert first_run == {
        "shard@scenes",
        "shard@labels",
        "pretrain@mit_b0",
        "evaluate_pretrained@mit_b0",
        "finetune@segformer_b0",
        "evaluate@segformer_b0",
        "finetune@hila_segformer_b0_s3",
        "evaluate@hila_segformer_b0_s3",
        "report",
    }
    document = json.loads((clone / "results/report/results.json").read_text())
    assert {entry["run"] for entry in document["runs"]} == {
        "mit_b0",
        "segformer_b0",
        "hila_segformer_b0_s3",
    }
    assert 'id="attention"' in (clone / "results/report/report.html").read_text()
    card = json.loads((clone / "results/finetune/segformer_b0/model.json").read_text())
    assert card["init"] == "results/pretrain/mit_b0/model.json"

    for command in commands():
        if command in RUN_BY_CI | SERVES:
            continue
        output = run(command.replace("/where/raw/data/lies", shlex.quote(str(clone))), clone)
        if command == "dvc repro":
            assert "Running stage" not in output, "nothing had changed"
        if command.startswith("dvc exp run"):
            rerun = set(re.findall(r"Running stage '(.*?)'", output))
            trained = {name for name in first_run if name.startswith(("finetune@", "evaluate@"))}
            assert rerun == trained | {"report"}
    assert (clone / "seen" / "photo.png").exists()
    assert (clone / "seen" / "attention.png").exists()
    assert (clone / "probes" / "probes.png").exists()
    lines = [command.split()[0] for command in commands()]
    assert {"make", "xattn", "dvc", "mlflow", "XATTN_DATA=/where/raw/data/lies"} == set(lines)


def test_what_ci_runs_is_there() -> None:
    script = (PROJECT / ".ci" / "run").read_text()
    assert all(command in script for command in RUN_BY_CI)
    assert len(README.splitlines()) < 200


def test_committed_files_name_no_registry_and_no_machine() -> None:
    lock = (PROJECT / "requirements.lock").read_text()
    assert "://" not in lock
    assert lock.count("--hash=sha256:") > 200
