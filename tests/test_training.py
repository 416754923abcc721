"""The loop on real models and shards: resume, ranks, curves, divergence."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import small_params, write_params
from xattn.config import load_config
from xattn.data.index import ShardIndex
from xattn.errors import CapacityError, CheckpointError, ConfigError, DamageError, XattnError
from xattn.experiment import run_training
from xattn.job import TrainJob, plan_job
from xattn.memory import memory_in_words
from xattn.structures import Progress
from xattn.train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from xattn.train.distributed import resolve_device
from xattn.train.engine import DivergedError
from xattn.train.history import read_history


def train(project: Path, run: str = "segmenter") -> TrainJob:
    stage = "finetune" if run == "segmenter" else "pretrain"
    return run_training(load_config(project / "params.yaml"), stage, run, project, lambda _p: None)


def losses(job: TrainJob) -> list[float]:
    return [row["loss"] for row in read_history(job.run_dir / "history.jsonl") if "loss" in row]


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


def test_stopped_run_is_the_run_that_never_stopped(project: Path) -> None:
    config = load_config(project / "params.yaml")
    straight = train(project)
    weights = load_file(straight.final_dir / "model.safetensors")
    expected = losses(straight)
    straight.run_dir.rename(project / "elsewhere")

    def kill_at_five(progress: Progress) -> None:
        if progress.done == 5:
            raise Killed

    with pytest.raises(Killed):
        run_training(config, "finetune", "segmenter", project, kill_at_five)
    job, _ = plan_job(config, "finetune", "segmenter", project)
    assert newest_checkpoint(job.run_dir / "checkpoints", job.fingerprint).step == 4
    seen: list[int] = []
    run_training(config, "finetune", "segmenter", project, lambda p: seen.append(p.done))

    assert seen[0] == 4, "the second attempt goes on from the checkpoint"
    assert losses(job) == expected
    resumed = load_file(job.final_dir / "model.safetensors")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_finished_job_is_not_trained_again(project: Path) -> None:
    train(project)
    seen: list[Progress] = []
    run_training(
        load_config(project / "params.yaml"), "finetune", "segmenter", project, seen.append
    )
    assert seen == []


def test_damaged_samples_stop_a_run_or_are_counted(project: Path) -> None:
    shared = (project / "data/shards").resolve()
    (project / "data/shards").unlink()
    folder = Path(shutil.copytree(shared / "scenes", project / "data/shards/scenes"))
    index = ShardIndex.open(folder)
    for position in (3, 9, 17):
        offset = index.records("train")[position]["image"]["offset"].item()
        with (folder / "train-000000.tar").open("r+b") as shard:
            shard.seek(offset + 100)
            shard.write(b"????")
    with pytest.raises(DamageError, match=r"shard train-000000\.tar, key \w+, offset \d+"):
        train(project)
    params = small_params()
    params["finetune"]["skip_damaged"] = 1
    write_params(project, params)
    with pytest.raises(DamageError, match=r"finetune\.skip_damaged: 2 samples are damaged, 1 may"):
        train(project)
    params["finetune"]["skip_damaged"] = 9
    write_params(project, params)
    rows = read_history(train(project).run_dir / "history.jsonl")
    assert [row["damaged"] for row in rows if "damaged" in row][-1] == 3


def test_changed_setting_is_another_job(project: Path) -> None:
    first, _ = plan_job(load_config(), "finetune", "segmenter", project)
    params = small_params()
    params["finetune"]["optim"]["lr"] = 2e-3
    second, _ = plan_job(
        load_config(write_params(project, params)), "finetune", "segmenter", project
    )
    params["cluster"]["workers"] = 3
    third, _ = plan_job(
        load_config(write_params(project, params)), "finetune", "segmenter", project
    )
    assert first.run_dir != second.run_dir
    assert second.run_dir == third.run_dir, "the cluster's size does not change what is trained"


@pytest.mark.parametrize("run", ["segmenter", "classifier"])
def test_two_ranks_train_as_one(project: Path, run: str) -> None:
    alone = train(project, run)
    expected, curve = losses(alone), read_history(alone.run_dir / "history.jsonl")
    alone.run_dir.rename(project / "alone")
    run_ranks(project, run, world=2)
    together = read_history(alone.run_dir / "history.jsonl")

    assert losses(alone) == pytest.approx(expected, abs=1e-5)
    validated = [row["val_metric"] for row in curve if "val_metric" in row]
    # The weights differ by rounding, so a few pixels may fall to another class.
    assert [row["val_metric"] for row in together if "val_metric" in row] == pytest.approx(
        validated, abs=1e-3
    )


def run_ranks(project: Path, run: str, world: int) -> None:
    """Start the same command once a rank, with the environment that torchrun gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    script = f"from cli import app; app(['train', '{run}'])"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script],
            cwd=project,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0] * world


def test_diverging_run_stops_and_says_where(project: Path) -> None:
    params = small_params()
    params["finetune"]["optim"] |= {"lr": 1e30, "warmup_steps": 0}
    write_params(project, params)
    with pytest.raises(DivergedError, match=r"between steps \d and \d at a learning rate of"):
        train(project)


def test_a_checkpoint_holds_numbers(project: Path) -> None:
    params = small_params()
    params["finetune"]["optim"] |= {"lr": 1e30, "warmup_steps": 0}
    params["finetune"]["fit"] |= {"log_every_steps": 6, "checkpoint_every_steps": 2}
    config = load_config(write_params(project, params))
    with pytest.raises(DivergedError, match=r"^weights became infinite or no numbers by step 2"):
        train(project)
    job, _ = plan_job(config, "finetune", "segmenter", project)
    assert newest_checkpoint(job.run_dir / "checkpoints", job.fingerprint) is None


def test_one_image_for_a_batchnorm_behind_one_cell(project: Path) -> None:
    params = small_params()
    params["finetune"]["fit"]["global_batch"] = 1
    params["runs"]["segmenter"] |= {"model": "upernet_swin_t", "overrides": {"head_width": 8}}
    write_params(project, params)
    with pytest.raises(
        ConfigError, match=r"^fit\.global_batch: found 1, 1 on a worker, expected 2"
    ):
        train(project)


def test_more_than_the_memory_holds_is_one_line() -> None:
    message = r"^evaluate\.batch: found 8: does not fit the memory; lower it \(.*bytes"
    with pytest.raises(CapacityError, match=message), memory_in_words("evaluate.batch: found 8"):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shapes"), memory_in_words("evaluate.batch: found 8"):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_global_batch_that_workers_cannot_share(project: Path) -> None:
    params = small_params()
    params["cluster"] |= {"backend": "ray", "workers": 3}
    config = load_config(write_params(project, params))
    with pytest.raises(ConfigError, match=r"global batch.* 4 .*3"):
        plan_job(config, "finetune", "segmenter", project)


def test_models_of_another_task_are_refused(project: Path) -> None:
    params = small_params()
    params["runs"]["segmenter"] |= {"model": "ssd300_cfsam", "overrides": {}}
    params["pretrain_runs"]["classifier"] |= {"model": "ssd300", "overrides": {}}
    config = load_config(write_params(project, params))
    message = (
        r"runs\.segmenter\.model: found 'ssd300_cfsam', expected a model for segmentation, e\.g"
    )
    with pytest.raises(ConfigError, match=message):
        plan_job(config, "finetune", "segmenter", project)
    with pytest.raises(ConfigError, match=r"expected a model for classification, e\.g\. mit"):
        plan_job(config, "pretrain", "classifier", project)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("weights.txt", r"runs\.segmenter\.init: found weights\.txt, expected a model\.json"),
        ("gone.pt", r"runs\.segmenter\.init: .*gone\.pt: no such weights file"),
        ("empty.json", r"names no weights; for random ones write pipelines/scratch\.json"),
        ("lost.json", r"lost\.safetensors: no such weights file"),
        ("other.json", r"other\.pt: not the weights that .*other\.json vouches for"),
    ],
)
def test_initial_weights_that_are_none(project: Path, init: str, message: str) -> None:
    (project / "empty.json").write_text("{}")
    (project / "lost.json").write_text('{"weights": "lost.safetensors"}')
    (project / "other.json").write_text('{"weights": "other.pt", "weights_sha256": "0"}')
    (project / "other.pt").write_bytes(b"anything")
    params = small_params()
    params["runs"]["segmenter"] |= {"init": init}
    config = load_config(write_params(project, params))
    with pytest.raises(XattnError, match=message):
        plan_job(config, "finetune", "segmenter", project)


def test_ranks_of_a_machine_never_mix_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _number: None)
    assert resolve_device("auto", 0, 1).type == "cuda"
    assert [resolve_device("auto", rank, 2).type for rank in (0, 1)] == ["cpu", "cpu"]
    with pytest.raises(CapacityError, match=r"cluster\.device: 'cuda' asks for 2 GPUs .* sees 1"):
        resolve_device("cuda", 0, 2, "cluster.device")
    with pytest.raises(ConfigError, match=r"device: found 'gpu', expected one of auto, cpu, cuda"):
        resolve_device("gpu")


def test_checkpoints_survive_damage_and_refuse_strangers(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, "mine", {"x": torch.tensor(step)})
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "step_00000002.pt",
        "step_00000003.pt",
    ]
    newest = newest_checkpoint(tmp_path, "mine")
    assert newest is not None
    assert load_checkpoint(newest, torch.device("cpu"))["x"].item() == 3
    damaged = bytearray(newest.path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.path.write_bytes(damaged)
    previous = newest_checkpoint(tmp_path, "mine")
    assert previous is not None
    assert previous.step == 2
    with pytest.raises(CheckpointError, match="belongs to the run mine"):
        newest_checkpoint(tmp_path, "another")


def test_both_losses_of_a_segmenter_with_an_auxiliary_head_are_curves(project: Path) -> None:
    params = small_params()
    still = {"drop_path": 0.0, "dropout": 0.0, "head_width": 8}
    params["runs"]["segmenter"] |= {"model": "upernet_swin_t", "overrides": still}
    params["finetune"]["fit"] |= {"steps": 2, "checkpoint_every_steps": 2}
    params["finetune"]["validate_on"]["every_steps"] = 2
    write_params(project, params)
    rows = list(read_history(train(project).run_dir / "history.jsonl"))
    curves = [row for row in rows if "loss" in row]
    assert [row["step"] for row in curves] == [1, 2]
    for row in curves:
        expected = row["loss_main"] + 0.4 * row["loss_auxiliary"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert [row["step"] for row in rows if "val_metric" in row] == [2]
