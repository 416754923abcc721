"""What is to be trained: a run of params.yaml becomes a job, which a fingerprint tells from others.

The fingerprint covers everything that can change the result: settings, data, initial weights, and
the code of the training path.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xattn.config import Config, FinetuneConfig, FinetuneDetectors, PretrainConfig, RunConfig
from xattn.data.index import ShardIndex
from xattn.data.order import check_divides
from xattn.errors import CheckpointError, ConfigError, UnknownNameError
from xattn.models.multibox import check_input_side
from xattn.models.weights import WEIGHTS_SUFFIXES
from xattn.models.zoo import list_models
from xattn.places import run_dir, shards_dir
from xattn.storage import read_json, sha256_file, sha256_json
from xattn.tracking import TrackedRun

Stage = Literal["pretrain", "finetune"]

SCRATCH = "pipelines/scratch.json"
"""What `init` names for random weights; a file, since it stands among a stage's dependencies."""

_CODE = (
    *("structures.py", "losses.py", "job.py", "experiment.py", "nn", "models", "train", "evaluate"),
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
        check_input_side("finetune.augment.size", recipe.augment.size)
        size = recipe.validate_on.transform.size
        check_input_side("finetune.validate_on.transform.size", size)
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
