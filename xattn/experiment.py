"""The composition root: a configuration becomes a job, a job becomes a trained model.

A job's progress lies in `runs/<run>-<fingerprint>/`, outside of what DVC deletes, so that the same
job goes on where it was and a changed job never meets old state:

    job.json            what the fingerprint covers, the MLflow run
    init.txt            which of the initial weights were loaded, which not and why
    checkpoints/        training state, the newest two
    history.jsonl       the curves
    final/              model.safetensors and summary.json, once all steps are taken
"""

import logging
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from xattn.cluster.trainer import launch
from xattn.config import Config, PretrainConfig
from xattn.data.index import ShardIndex
from xattn.data.loader import build_eval_loader, build_train_loader
from xattn.errors import ConfigError, DamageError
from xattn.evaluate.inference import (
    HEADLINE,
    Scores,
    metrics_of,
    score_classification,
    score_detection,
    score_segmentation,
)
from xattn.job import Stage, TrainJob, plan_job
from xattn.memory import keep_freed_memory, memory_in_words
from xattn.models.weights import load_weights, save_weights
from xattn.models.zoo import create_recipe
from xattn.storage import read_json, refused_disk, sha256_file, write_json, write_text
from xattn.structures import Batch, Progress, Recipe
from xattn.tracking import RunLogger, close_run, open_run
from xattn.train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from xattn.train.distributed import (
    Ranks,
    apply_ddp,
    apply_sync_batchnorm,
    gather_over_ranks,
    is_first_process,
    join_ranks,
    sum_over_ranks,
    to_device,
    wait_for_all,
)
from xattn.train.engine import State, StepLog, check_finite, fit
from xattn.train.history import History
from xattn.train.optim import build_optimizer

_GPU_LOADER_THREADS = 6
_log = logging.getLogger(__name__)


def run_training(
    config: Config, stage: Stage, run: str, base: Path, on_progress: Callable[[Progress], None]
) -> TrainJob:
    """Train one run to its end, from wherever an earlier attempt left it.

    Args:
        config: the whole configuration.
        stage: "pretrain" or "finetune".
        run: a key of the stage's runs.
        base: the project's folder.
        on_progress: called now and then with the steps taken.

    Returns:
        The job; its `final_dir` holds the model.

    Raises:
        XattnError: whatever the user has to mend.
    """
    job, covered = plan_job(config, stage, run, base)
    if (job.final_dir / "summary.json").exists():
        return job
    if not is_first_process():
        # Under torchrun rank 0 keeps the lock, the records and the tracking.
        launch(work, job, config.cluster, job.run_dir, base, on_progress)
        return job
    with refused_disk(job.run_dir):
        job.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(job.run_dir / ".lock", timeout=0):
            _train_tracked(job, covered, config, base, on_progress)
    except Timeout:
        raise ConfigError(f"{job.run_dir}: another process is training this very job") from None
    return job


def _train_tracked(
    job: TrainJob,
    covered: dict[str, Any],
    config: Config,
    base: Path,
    on_progress: Callable[[Progress], None],
) -> None:
    record = job.run_dir / "job.json"
    known = read_json(record) if record.exists() else {}
    tracked = None
    if config.tracking.enabled:
        tags = {
            "stage": job.stage,
            "fingerprint": job.fingerprint,
            "data_fingerprint": str(covered["data"]),
            "git_commit": git_commit(base),
        }
        params = {key: covered[key] for key in ("model", "overrides", "recipe", "seed", "init")}
        params |= {"dataset": job.spec.dataset, "workers": config.cluster.workers}
        run_id = known.get("mlflow_run_id")
        tracked = open_run(config.tracking, base, job.run, params, tags, run_id)
    write_json(
        record,
        {
            "fingerprint": job.fingerprint,
            "covers": covered,
            "git_commit": git_commit(base),
            "workers": config.cluster.workers,
            "mlflow_run_id": tracked.run_id if tracked else None,
        },
    )
    tracked_job = replace(job, tracked=tracked)
    try:
        launch(work, tracked_job, config.cluster, job.run_dir, base, on_progress)
    except BaseException:
        if tracked:
            close_run(tracked, failed=True)
        raise
    if tracked:
        close_run(tracked, failed=False)


def work(job: TrainJob, post: Callable[[Progress], None]) -> None:
    """Train a job on this process's rank; every rank of the job runs this.

    Args:
        job: what to train.
        post: takes the progress; called on rank 0.
    """
    ranks = join_ranks(job.device)
    if ranks.device.type == "cpu":
        keep_freed_memory()
    index = ShardIndex.open(job.shards)
    recipe = build_recipe(job, index, ranks)
    state = _build_state(job, recipe, ranks)
    batches = build_train_loader(
        index,
        job.recipe.train_split,
        recipe.task,
        job.recipe.augment,
        seed=job.seed,
        global_batch=job.recipe.fit.global_batch,
        steps=job.recipe.fit.steps - state.step,
        start_step=state.step,
        rank=ranks.rank,
        world=ranks.world,
        threads=loader_threads(job.loader_threads, ranks.device),
        pin_memory=ranks.device.type == "cuda",
        order=job.recipe.order,
        skip_damaged=job.recipe.skip_damaged,
        mix=job.recipe.mix if isinstance(job.recipe, PretrainConfig) else None,
    )
    observer = _Observer(job, index, recipe, ranks, state.step, post)
    started = time.perf_counter()
    try:
        fit(
            state,
            observer.watched(batches),
            recipe,
            job.recipe.fit,
            job.recipe.optim,
            ranks,
            seed=job.seed,
            on_log=observer.on_log,
            after_step=observer.after_step,
        )
    finally:
        observer.close()
    if ranks.is_first:
        _publish(job, state, observer.scores, time.perf_counter() - started)
    wait_for_all()


def build_recipe(job: TrainJob, index: ShardIndex, ranks: Ranks) -> Recipe:
    """Build the job's recipe with its initial weights on this rank's device."""
    torch.manual_seed(job.seed)  # every rank draws the same initial weights
    recipe = create_recipe(job.spec.model, index.info, job.recipe.loss, **job.spec.overrides)
    if job.init_weights is not None:
        report = load_weights(recipe.model, job.init_weights)
        if ranks.is_first:
            write_text(job.run_dir / "init.txt", f"{job.init_weights}: {report.listing()}\n")
    apply_sync_batchnorm(recipe.model, ranks)
    to_device(recipe.model, ranks, job.recipe.fit.channels_last)
    return recipe


def _build_state(job: TrainJob, recipe: Recipe, ranks: Ranks) -> State:
    """Build the training state, from the newest checkpoint if there is one."""
    optimizer = build_optimizer(recipe.model, job.recipe.optim)
    checkpoint = newest_checkpoint(job.run_dir / "checkpoints", job.fingerprint)
    step = 0
    if checkpoint is not None:
        payload = load_checkpoint(checkpoint, ranks.device)
        recipe.model.load_state_dict(payload["model"])
        optimizer.load_state_dict(payload["optimizer"])
        step = checkpoint.step
    forward = apply_ddp(recipe.model, ranks)
    if job.recipe.fit.compile:
        forward.compile()
    return State(recipe.model, forward, optimizer, step)


class _Observer:
    """Logs, validates and saves while `fit` trains; only rank 0 writes."""

    def __init__(
        self,
        job: TrainJob,
        index: ShardIndex,
        recipe: Recipe,
        ranks: Ranks,
        step: int,
        post: Callable[[Progress], None],
    ) -> None:
        self._job, self._index, self._recipe, self._ranks = job, index, recipe, ranks
        self._post = post
        self._shown: dict[str, float] = {}
        self._damaged: list[str] = []
        self.scores: dict[str, float] = {}
        self._history: History | None = None
        self._logger: RunLogger | None = None
        if ranks.is_first:
            self._history = History(job.run_dir / "history.jsonl", step)
            self._logger = RunLogger(job.tracked) if job.tracked else None
            post(Progress(step, job.recipe.fit.steps))

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on, and note what was damaged in them.

        Raises:
            DamageError: this rank alone met more than may be skipped.
        """
        for batch in batches:
            for problem in batch.damaged:
                _log.warning("skipped a damaged sample: %s", problem)
                self._damaged.append(problem)
            self._check_damaged(len(self._damaged))
            yield batch

    def _check_damaged(self, count: int) -> None:
        limit = self._job.recipe.skip_damaged
        if count > limit:
            last = f"; the last: {self._damaged[-1]}" if self._damaged else ""
            raise DamageError(
                f"{self._job.stage}.skip_damaged: {count} samples are damaged, {limit} may be{last}"
            )

    def on_log(self, log: StepLog) -> None:
        epoch = log.samples / self._index.split(self._job.recipe.train_split).count
        rates = {"lr": log.lr, "images_per_s": log.images_per_s}
        row = {"step": log.step, "samples": log.samples, "epoch": epoch, **log.losses, **rates}
        if self._job.recipe.skip_damaged:
            own = torch.tensor(len(self._damaged), device=self._ranks.device)
            row["damaged"] = damaged = int(sum_over_ranks(own))
            self._check_damaged(damaged)
        named = {key: value for key, value in row.items() if key not in ("step", "samples")}
        self._record(log.step, row, named)
        self._shown |= {"loss": log.losses["loss"], "img/s": log.images_per_s}
        if self._ranks.is_first:
            self._post(Progress(log.step, self._job.recipe.fit.steps, dict(self._shown)))

    def after_step(self, state: State) -> None:
        fit_config = self._job.recipe.fit
        is_last = state.step == fit_config.steps
        is_due = is_last or state.step % fit_config.checkpoint_every_steps == 0
        if is_due:  # on every rank, so that none waits for one that has stopped
            check_finite(state)
        if is_last or state.step % self._job.recipe.validate_on.every_steps == 0:
            self._validate(state)
        if self._ranks.is_first and is_due and not is_last:
            self._save(state)

    def close(self) -> None:
        """Write out what was gathered, also when training failed."""
        if self._history is not None:
            self._history.close()
        if self._logger is not None:
            self._logger.close()

    def _validate(self, state: State) -> None:
        batch = self._job.recipe.validate_on.batch
        with memory_in_words(f"{self._job.stage}.validate_on.batch: found {batch}"):
            scores = validate(self._job, self._index, self._recipe, self._ranks)
        state.model.train()
        self.scores = dict(metrics_of(scores))
        name = HEADLINE[self._recipe.task]
        value = self.scores[name]
        named = {f"val_{key}": number for key, number in self.scores.items()}
        self._record(state.step, {"step": state.step, "val_metric": value}, named)
        self._shown[name] = value

    def _save(self, state: State) -> None:
        if self._history is not None:
            self._history.sync()
        payload = {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}
        save_checkpoint(
            self._job.run_dir / "checkpoints", state.step, self._job.fingerprint, payload
        )

    def _record(self, step: int, row: dict[str, Any], metrics: dict[str, float]) -> None:
        if self._history is not None:
            self._history.append(row)
        if self._logger is not None:
            self._logger.log(step, metrics)


def validate(job: TrainJob, index: ShardIndex, recipe: Recipe, ranks: Ranks) -> Scores:
    """Score the model on the validation split, each image once over all ranks."""
    protocol = job.recipe.validate_on
    loader = build_eval_loader(
        index,
        protocol.split,
        recipe.task,
        protocol.transform,
        batch=protocol.batch,
        rank=ranks.rank,
        world=ranks.world,
        threads=loader_threads(job.loader_threads, ranks.device),
    )
    common = recipe, loader, index.info.num_classes, ranks.device
    if recipe.task == "detection":
        return score_detection(*common, gather_over_ranks)
    if recipe.task == "segmentation":
        return score_segmentation(*common, sum_over_ranks)
    return score_classification(*common, sum_over_ranks)


def loader_threads(configured: int | None, device: torch.device) -> int:
    """Return how many threads decode for one process: those configured, or what suits a device."""
    if configured is not None:
        return configured
    return _GPU_LOADER_THREADS if device.type == "cuda" else 0


def _publish(job: TrainJob, state: State, scores: dict[str, float], wall_s: float) -> None:
    """Leave the trained model in the final folder; the summary, written last, vouches for it."""
    weights = job.final_dir / "model.safetensors"
    save_weights(state.model, weights)
    summary = {
        "steps": state.step,
        "scores": scores,
        "wall_s": round(wall_s, 1),
        "weights_sha256": sha256_file(weights),
    }
    write_json(job.final_dir / "summary.json", summary)


def git_commit(base: Path) -> str:
    """Return the folder's commit, with "-dirty" when files differ; without git "unknown"."""
    # Without a tag that fits, --always gives the commit.
    describe = ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    command = ["git", "-C", str(base), *describe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
