"""A real local Ray: two workers train as one does, through the death of one of them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.conftest import PROJECT, small_params, write_params
from xattn.config import load_config
from xattn.experiment import plan_job, run_training
from xattn.train.history import read_history

pytestmark = pytest.mark.cluster


def test_workers_of_ray(project: Path) -> None:
    """One cluster for all of it: starting Ray takes long."""
    params = small_params()
    params["finetune"]["fit"]["steps"] = 40
    params["finetune"]["validate_on"]["every_steps"] = 40
    config = load_config(write_params(project, params))
    alone = run_training(config, "finetune", "segmenter", project, lambda _p: None)
    expected = [
        row["loss"] for row in read_history(alone.run_dir / "history.jsonl") if "loss" in row
    ]
    alone.run_dir.rename(project / "alone")

    params["cluster"] = {"backend": "ray", "workers": 2, "device": "cpu"}
    write_params(project, params)
    script = (
        "from pathlib import Path\n"
        "from cli import app\n"
        "try: app(['train', 'segmenter'])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "from xattn.errors import XattnError\n"
        "import json\n"
        "params = json.loads(Path('params.yaml').read_text())\n"
        "params['finetune']['optim'].update(lr=1e30, warmup_steps=0)\n"
        "Path('params.yaml').write_text(json.dumps(params))\n"
        "try: app(['train', 'segmenter'])\n"
        "except XattnError as error: print('FAULT', type(error).__name__, error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    environment.pop("RAY_ADDRESS", None)
    driver = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    job, _ = plan_job(load_config(project / "params.yaml"), "finetune", "segmenter", project)
    killer = threading.Thread(target=kill_a_worker_at, args=(job.run_dir, 10, driver))
    killer.start()
    output, _ = driver.communicate(timeout=400)
    killer.join()
    assert driver.returncode == 0, output

    rows = [row for row in read_history(job.run_dir / "history.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 41)), "no step lost, none twice"
    assert [row["loss"] for row in rows] == pytest.approx(expected, abs=1e-4)
    one = load_file(project / "alone" / "final" / "model.safetensors")
    two = load_file(job.final_dir / "model.safetensors")
    assert set(one) == set(two)
    assert "FAULT DivergedError the loss became" in output, "a fault to mend is told, not retried"
    assert holder_is_gone(project), "the cluster ends with the process that started it"


def kill_a_worker_at(run_dir: Path, step: int, driver: subprocess.Popen[str]) -> None:
    """Kill rank 1 with SIGKILL once rank 0 has logged `step`."""
    while driver.poll() is None:
        rows = read_history(run_dir / "history.jsonl")
        if rows and rows[-1]["step"] >= step:
            break
        time.sleep(0.1)
    (state,) = (run_dir.parents[1] / ".xattn").glob("ray-*.json")
    holder = psutil.Process(json.loads(state.read_text())["holder_pid"])
    ours = holder.children(recursive=True)
    workers = [process for process in ours if "RayTrainWorker" in " ".join(process.cmdline())]
    os.kill(workers[-1].pid, signal.SIGKILL)


def holder_is_gone(project: Path) -> bool:
    for _ in range(100):
        if not list((project / ".xattn").glob("ray-*.json")):
            return True
        time.sleep(0.2)
    return False
