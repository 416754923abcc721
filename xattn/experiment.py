"""The composition root: a configuration becomes a job, a job becomes a trained model.

A job's fingerprint covers everything that can change its result: settings, data, initial weights,
and the code of the training path. Its progress lies in `runs/<run>-<fingerprint>/`, outside of what
DVC deletes, so that the same job goes on where it was and a changed job never meets old state:

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from xattn.cluster.trainer import launch
from xattn.config import Config, FinetuneConfig, FinetuneDetectors, PretrainConfig, RunConfig
from xattn.data.index import ShardIndex
from xattn.data.loader import build_eval_loader, build_train_loader
from xattn.data.order import check_divides
from xattn.errors import CheckpointError, ConfigError, DamageError, UnknownNameError
from xattn.evaluate.inference import (
    HEADLINE,
    Scores,
    metrics_of,
    score_classification,
    score_detection,
    score_segmentation,
)
from xattn.memory import keep_freed_memory, memory_in_words
from xattn.models.multibox import INPUT_SIDE_PX
from xattn.models.weights import WEIGHTS_SUFFIXES, load_weights, save_weights
from xattn.models.zoo import create_recipe, list_models
from xattn.places import run_dir, shards_dir
from xattn.storage import read_json, refused_disk, sha256_file, sha256_json, write_json, write_text
from xattn.structures import Batch, Progress, Recipe
from xattn.tracking import RunLogger, TrackedRun, close_run, open_run
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
from xattn.train.engine import State, StepLog, fit
from xattn.train.history import History
from xattn.train.optim import build_optimizer

_GPU_LOADER_THREADS = 6
_log = logging.getLogger(__name__)

Stage = Literal["pretrain", "finetune"]

SCRATCH = "pipelines/scratch.json"
"""What `init` names for random weights; a file, since it stands among a stage's dependencies."""

_CODE = (
    *("structures.py", "losses.py", "experiment.py", "nn", "models", "train", "evaluate"),
    *("data/index.py", "data/order.py", "data/transforms.py", "data/loader.py"),
    *("data/pixels.py", "data/colour.py", "data/rand_augment.py", "data/mixing.py"),
    "data/augment_detection.py",
)
"""What decides a trained model and its validation beside settings and data, in the package."""


@dataclass(frozen=True, slots=True)
class TrainJob:
    """One model to train, with every place absolute: a worker needs nothing else.

    Args:
        stage: which recipe it follows.
        run: its name.
        spec: model, data set, overrides.
        recipe: augmentation, optimiser, length.
        seed: of the order, the augmentation, the initial weights and the dropout.
        shards: the data set's shard folder.
        init_weights: weights to start from, or None for random ones.
        fingerprint: sha256 of all that can change the result.
        run_dir: where progress lies.
        device: "auto", "cpu" or "cuda".
        loader_threads: decoding threads of each worker; None chooses by the device.
        tracked: where rank 0 logs, or None.
    """

    stage: Stage
    run: str
    spec: RunConfig
    recipe: PretrainConfig | FinetuneConfig
    seed: int
    shards: Path
    init_weights: Path | None
    fingerprint: str
    run_dir: Path
    device: str
    loader_threads: int | None
    tracked: TrackedRun | None = None

    @property
    def final_dir(self) -> Path:
        """Where the trained model lies when all steps are taken."""
        return self.run_dir / "final"


def plan_job(config: Config, stage: Stage, run: str, base: Path) -> tuple[TrainJob, dict[str, Any]]:
    """Make the job of one run, and the document that its fingerprint is the hash of.

    Raises:
        ConfigError: no run of that name in the section, a model for another task, a size of images
            that detectors do not take, a global batch that the workers cannot share evenly, an
            `init` that names no weights.
        DataError: the shards are missing.
        CheckpointError: the initial weights are missing or damaged.
    """
    runs = config.pretrain_runs if stage == "pretrain" else config.runs
    section = "pretrain_runs" if stage == "pretrain" else "runs"
    if run not in runs:
        raise ConfigError(f"{section}: {UnknownNameError('run', run, runs)}")
    spec, recipe = runs[run], config.pretrain if stage == "pretrain" else config.finetune
    recipe = recipe.model_copy(update={"loss": {**recipe.loss, **spec.loss}})
    models = list_models(recipe.task)
    if spec.model not in models and spec.model in list_models():
        hint = "" if stage == "pretrain" else "; finetune.task says what the runs are for"
        raise ConfigError(
            f"{section}.{run}.model: found '{spec.model}', expected a model for {recipe.task}, "
            f"e.g. {models[0]}{hint}"
        )
    if spec.model not in models:
        near = UnknownNameError(f"{recipe.task} model", spec.model, models)
        raise ConfigError(f"{section}.{run}.model: {near}")
    if isinstance(recipe, FinetuneDetectors):
        _check_sizes(recipe)
    if config.cluster.backend == "ray":
        check_divides(recipe.fit.global_batch, config.cluster.workers)
    shards = shards_dir(base, spec.dataset).resolve()
    init_weights = _resolve_init(spec.init, base, f"{section}.{run}.init")
    covered = {
        "stage": stage,
        "model": spec.model,
        "overrides": spec.overrides,
        "recipe": recipe.model_dump(mode="json"),
        "seed": config.seed,
        "data": ShardIndex.open(shards).fingerprint,
        "init": sha256_file(init_weights) if init_weights else None,
        "code": code_fingerprint(),
    }
    fingerprint = sha256_json(covered)
    job = TrainJob(
        stage=stage,
        run=run,
        spec=spec,
        recipe=recipe,
        seed=config.seed,
        shards=shards,
        init_weights=init_weights,
        fingerprint=fingerprint,
        run_dir=run_dir(base, run, fingerprint).resolve(),
        device=config.cluster.device,
        loader_threads=config.cluster.loader_threads,
    )
    return job, covered


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
    tracked_job = _with_tracking(job, tracked)
    try:
        launch(work, tracked_job, config.cluster, job.run_dir, base, on_progress)
    except BaseException:
        if tracked:
            close_run(tracked, failed=True)
        raise
    if tracked:
        close_run(tracked, failed=False)


def _with_tracking(job: TrainJob, tracked: TrackedRun | None) -> TrainJob:
    values = {name: getattr(job, name) for name in TrainJob.__slots__}
    return TrainJob(**{**values, "tracked": tracked})


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
        if is_last or state.step % self._job.recipe.validate_on.every_steps == 0:
            self._validate(state)
        is_due = state.step % fit_config.checkpoint_every_steps == 0
        if self._ranks.is_first and is_due and not is_last:
            self._save(state)

    def close(self) -> None:
        """Write out what was gathered, also when training failed."""
        if self._history is not None:
            self._history.close()
        if self._logger is not None:
            self._logger.close()

    def _validate(self, state: State) -> None:
        with memory_in_words(f"validate_on.batch: found {self._job.recipe.validate_on.batch}"):
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


def _check_sizes(recipe: FinetuneDetectors) -> None:
    """Raise a ConfigError for what the first step, or only the first validation, would stop at."""
    sizes = {
        "augment.size": recipe.augment.size,
        "validate_on.transform.size": recipe.validate_on.transform.size,
    }
    for key, size in sizes.items():
        if size != INPUT_SIDE_PX:
            raise ConfigError(
                f"finetune.{key}: found {size}, expected {INPUT_SIDE_PX}, which the default boxes "
                "are made for"
            )


def _resolve_init(init: str, base: Path, key: str) -> Path | None:
    """Return the weights file that `init` leads to: itself, or what a model.json points at."""
    if init.endswith(SCRATCH):  # also by its absolute path
        return None
    path = base / init
    if path.suffix in WEIGHTS_SUFFIXES:
        weights, expected = path, None
    elif path.suffix == ".json":
        card = read_json(path)
        if not card.get("weights"):
            raise ConfigError(f"{key}: {init} names no weights; for random ones write {SCRATCH}")
        weights, expected = path.parent / str(card["weights"]), card.get("weights_sha256")
    else:
        raise ConfigError(
            f"{key}: found {init}, expected a model.json or weights "
            f"({', '.join(WEIGHTS_SUFFIXES)}); for random ones write {SCRATCH}"
        )
    if not weights.is_file():
        raise CheckpointError(f"{key}: {weights}: no such weights file; `dvc pull` or train it")
    if expected is not None and sha256_file(weights) != expected:
        raise CheckpointError(f"{key}: {weights}: not the weights that {path} vouches for")
    return weights.resolve()


def code_fingerprint() -> str:
    """Return the sha256 of the source files that decide a trained model."""
    package = Path(__file__).parent
    files = sorted(
        file
        for name in _CODE
        for file in ([package / name] if name.endswith(".py") else (package / name).glob("*.py"))
    )
    return sha256_json({str(file.relative_to(package)): sha256_file(file) for file in files})


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
