"""A real local Ray, and what befalls its workers: kill -9, and damage that a user must mend."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import PROJECT, small_params, write_params
from xattn.config import load_config
from xattn.job import plan_job
from xattn.train.history import read_history

pytestmark = pytest.mark.cluster


def test_a_killed_worker_and_a_damaged_sample(project: Path, shards: Path) -> None:
    """One training does for both: starting Ray and its workers takes a minute on two cores."""
    (project / "data" / "shards").unlink()
    raw = small_params()
    raw["finetune"]["fit"] |= {"steps": 100_000, "checkpoint_every_steps": 40}
    raw["finetune"]["validate_on"]["every_steps"] = 100_000
    raw["cluster"] = {"backend": "ray", "workers": 2, "device": "cpu"}
    write_params(project, raw)
    shutil.copytree(shards, project / "data" / "shards")
    job, _ = plan_job(load_config(project / "params.yaml"), "finetune", "segmenter", project)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [sys.executable, str(PROJECT / "cli.py"), "train", "segmenter"],
        cwd=project,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        before = wait_for(driver, lambda: rows_up_to(job.run_dir, 60))
        kill_a_worker(project)
        wait_for(driver, lambda: restarted_up_to(job.run_dir, before, 70))
        # One rank alone meets it, and the other waits for it in a collective.
        damage_a_sample(project / "data" / "shards" / "scenes" / "train-000000.tar")
        _, stderr = driver.communicate(timeout=120)
    finally:
        driver.kill()

    rows = read_history(job.run_dir / "history.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "none lost, none twice"
    redone = [row["loss"] for row in rows[: len(before)]]
    assert redone == [row["loss"] for row in before], "what was done again came out the same"
    assert driver.returncode == 3
    (fault,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "train-000000.tar" in fault
    assert "crc" in fault
    wait_until(lambda: not list((project / ".xattn").glob("ray-*.json")))


def rows_up_to(run_dir: Path, step: int) -> list[dict[str, Any]] | None:
    rows = read_history(run_dir / "history.jsonl")
    return rows if rows and rows[-1]["step"] >= step else None


def restarted_up_to(run_dir: Path, before: list[dict[str, Any]], step: int) -> bool:
    """Whether the second attempt has passed `step`: its rows hold other rates than the first's."""
    rows = read_history(run_dir / "history.jsonl")
    if len(rows) < max(step, len(before)):
        return False
    return rows[len(before) - 1]["images_per_s"] != before[-1]["images_per_s"]


def wait_for(driver: subprocess.Popen[str], look: Callable[[], Any], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert driver.poll() is None, driver.stderr.read() if driver.stderr else ""
        if found := look():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come about in time")


def wait_until(look: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def kill_a_worker(project: Path) -> None:
    """End rank 1's process, a descendant of the cluster's holder, without a word."""
    (state,) = (project / ".xattn").glob("ray-*.json")
    holder = psutil.Process(json.loads(state.read_text())["holder_pid"])
    workers = [
        process
        for process in holder.children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    assert len(workers) == 2
    os.kill(workers[1].pid, signal.SIGKILL)


def damage_a_sample(tar: Path) -> None:
    """Flip a bit in the middle of the shard's first image, in place."""
    with tarfile.open(tar) as members:
        image = next(member for member in members if member.name.endswith((".png", ".jpg")))
    with tar.open("r+b") as stream:
        stream.seek(image.offset_data + image.size // 2)
        (byte,) = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
