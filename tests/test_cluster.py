"""A real local Ray, and what befalls its workers: kill -9, and damage that a user must mend."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from tests.conftest import PROJECT, small_params, write_params
from xattn.cluster.settings import ClusterConfig
from xattn.cluster.trainer import Post, launch
from xattn.config import load_config
from xattn.errors import DamageError
from xattn.experiment import plan_job
from xattn.train.distributed import apply_ddp, join_ranks
from xattn.train.history import read_history

pytestmark = pytest.mark.cluster


def test_a_killed_worker_and_a_damaged_shard(project: Path, shards: Path) -> None:
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
        damage(project / "data" / "shards" / "scenes" / "train-000000.tar")
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


def test_a_fault_of_one_rank_ends_the_other_that_waits_for_it(tmp_path: Path) -> None:
    """Its process group lives on in the frames of the error; waiting for it would take 30 min."""
    program = (
        "import sys; from tests.test_cluster import launch_a_fault; launch_a_fault(sys.argv[1])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], cwd=PROJECT, env=environment
    )
    try:
        assert driver.wait(timeout=180) == 3
    finally:
        driver.kill()
    wait_until(lambda: not list((tmp_path / ".xattn").glob("ray-*.json")))


def launch_a_fault(folder: str) -> None:
    """Run the work below on two workers; exit with 3 when its fault arrives."""
    base = Path(folder)
    (base / "runs").mkdir()
    config = ClusterConfig(backend="ray", workers=2, device="cpu", max_failures=0)
    try:
        launch(fail_on_rank_1, _Job("cpu"), config, base / "runs", base, lambda _: None)
    except DamageError:
        sys.exit(3)


@dataclass(frozen=True, slots=True)
class _Job:
    device: str


def fail_on_rank_1(_job: _Job, _post: Post) -> None:
    ranks = join_ranks("cpu")
    model = apply_ddp(nn.Linear(8, 8), ranks)
    for step in range(10):
        if ranks.rank == 1 and step == 5:
            raise DamageError("a record that rank 1 alone reads")
        model(torch.ones(2, 8)).sum().backward()


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


def damage(tar: Path) -> None:
    """Flip bits all over a shard, in place."""
    data = bytearray(tar.read_bytes())
    for place in range(1024, len(data), 1024):
        data[place] ^= 0xFF
    with tar.open("r+b") as stream:
        stream.write(data)
