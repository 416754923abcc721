"""What a training stage leaves for git, DVC and the report: a model folder with its numbers."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from xattn.config import Config
from xattn.data.index import ShardIndex
from xattn.data.loader import check_has_objects
from xattn.errors import ConfigError
from xattn.evaluate.cost import count_macs, count_params
from xattn.evaluate.inference import HEADLINE
from xattn.experiment import run_training
from xattn.job import Stage, TrainJob, plan_job
from xattn.models.zoo import create_recipe
from xattn.places import results_dir
from xattn.storage import copy_atomic, read_json, sha256_file, write_json, write_text
from xattn.structures import DatasetInfo, Progress
from xattn.tracking import TrackedRun, TrackingConfig, register_model, tracking_uri
from xattn.train.distributed import is_first_process
from xattn.train.history import curve_csv, read_history


def train_run(
    config: Config, stage: Stage, run: str, base: Path, on_progress: Callable[[Progress], None]
) -> Path:
    """Train a run to its end, from wherever an earlier attempt left it, and publish it.

    Args:
        config: the whole configuration.
        stage: "pretrain" or "finetune".
        run: a key of the stage's runs.
        base: the project's folder.
        on_progress: called now and then with the steps taken.

    Returns:
        The model folder.

    Raises:
        ConfigError, DataError: what would otherwise fail after hours, before anything is started.
    """
    job, _ = plan_job(config, stage, run, base)
    _check_beforehand(job)
    job = run_training(config, stage, run, base, on_progress)
    out = results_dir(base, stage, run)
    if is_first_process():
        write_training_results(job, out)
        register_result(job, config.tracking, base, out)
    return out


def _check_beforehand(job: TrainJob) -> None:
    """Find now what a worker would stumble over later, and forget a result that was damaged."""
    index = ShardIndex.open(job.shards)
    for key, split in (
        ("train_split", job.recipe.train_split),
        ("validate_on.split", job.recipe.validate_on.split),
    ):
        index.split(split)
        if job.recipe.task == "detection" and "detection" in index.info.tasks:
            check_has_objects(index, split, f"{job.stage}.{key}")
    spec = job.spec
    section = "pretrain_runs" if job.stage == "pretrain" else "runs"
    with torch.device("meta"):
        try:
            create_recipe(spec.model, index.info, job.recipe.loss, **spec.overrides)
        except ConfigError as error:
            place = job.stage if str(error).startswith("loss.") else f"{section}.{job.run}"
            raise ConfigError(f"{place}.{error}") from None
    summary, weights = job.final_dir / "summary.json", job.final_dir / "model.safetensors"
    if summary.exists() and (
        not weights.exists() or sha256_file(weights) != read_json(summary)["weights_sha256"]
    ):
        summary.unlink()  # the run goes on from its last checkpoint


def write_training_results(job: TrainJob, out: Path) -> None:
    """Publish a finished job: the model folder, its final numbers and its curves."""
    summary = read_json(job.final_dir / "summary.json")
    record = read_json(job.run_dir / "job.json")
    index = ShardIndex.open(job.shards)
    rows = read_history(job.run_dir / "history.jsonl")
    copy_atomic(job.final_dir / "model.safetensors", out / "model.safetensors")
    write_text(out / "curve.csv", curve_csv(rows))
    metric = HEADLINE[job.recipe.task]
    losses = [row["loss"] for row in rows if "loss" in row]
    metrics = {
        "loss": losses[-1] if losses else None,
        "val_metric": summary["scores"][metric],
        "metric_name": metric,
        "steps": summary["steps"],
    }
    write_json(out / "metrics.json", metrics)
    write_json(out / "model.json", _card(job, index.info, summary, record, rows))


def _card(
    job: TrainJob,
    info: DatasetInfo,
    summary: dict[str, Any],
    record: dict[str, Any],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """Describe a trained model so that it can be rebuilt, compared and traced."""
    recipe = create_recipe(job.spec.model, info, job.recipe.loss, **job.spec.overrides)
    rates = [row["images_per_s"] for row in rows if "images_per_s" in row]
    return {
        "run": job.run,
        "stage": job.stage,
        "model": job.spec.model,
        "task": job.recipe.task,
        "overrides": job.spec.overrides,
        "dataset": job.spec.dataset,
        "num_classes": info.num_classes,
        "class_names": list(info.class_names),
        "palette": [list(colour) for colour in info.palette],
        "transform": job.recipe.validate_on.transform.model_dump(mode="json"),
        "weights": "model.safetensors",
        "weights_sha256": summary["weights_sha256"],
        "fingerprint": job.fingerprint,
        "data_fingerprint": record["covers"]["data"],
        "init": None if job.init_weights is None else job.spec.init,
        "params": count_params(recipe.model),
        "macs": count_macs(recipe.model, (3, *job.recipe.input_size), counting=recipe.counting),
        "macs_input": [3, *job.recipe.input_size],
        "steps": summary["steps"],
        "global_batch": job.recipe.fit.global_batch,
        "workers": record["workers"],
        "wall_s": summary["wall_s"],
        "images_per_s": round(median(rates), 2) if rates else None,
        "git_commit": record["git_commit"],
        "mlflow_run_id": record["mlflow_run_id"],
    }


def register_result(job: TrainJob, config: TrackingConfig, base: Path, folder: Path) -> None:
    """Enter a finished job's model folder into MLflow's registry, once."""
    record_path = job.run_dir / "job.json"
    record = read_json(record_path)
    if not (config.enabled and config.register_models and record["mlflow_run_id"]):
        return
    if "registered_version" in record:
        return
    run = TrackedRun(
        uri=tracking_uri(config, base), run_id=record["mlflow_run_id"], system_metrics=False
    )
    scores = read_json(job.final_dir / "summary.json")["scores"]
    version = register_model(run, job.run, folder, scores)
    write_json(record_path, {**record, "registered_version": version})
