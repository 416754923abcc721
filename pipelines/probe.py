"""Command `probe`: how good the features of each stage and iteration are. No stage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.edge import progress_bar
from xattn.config import Config, load_config
from xattn.data.index import ShardIndex
from xattn.data.loader import build_eval_loader, build_train_loader
from xattn.errors import ConfigError, DataError
from xattn.evaluate.probing import ProbeScore, train_probes
from xattn.experiment import loader_threads
from xattn.memory import keep_freed_memory
from xattn.places import shards_dir
from xattn.predictor import load_predictor
from xattn.report.figures import ProbeLine, probe_curves
from xattn.storage import write_atomic, write_json
from xattn.structures import Progress


def probe_models(
    model_dirs: Sequence[Path], base: Path, out: Path, steps: int | None, device: str
) -> dict[str, Any]:
    """Probe trained models by the recipe of `finetune`, and draw them beside each other.

    Args:
        model_dirs: model folders, each probed on the data set that it was trained on.
        base: the project's folder.
        out: gets probes.json and probes.png.
        steps: of training; None takes those of `finetune`.
        device: "auto", "cpu" or "cuda".

    Returns:
        What probes.json holds.

    Raises:
        ConfigError: a model has no stages to probe.
        DataError: the shards are missing, or have other classes than the model.
    """
    config = load_config(base / "params.yaml")
    document = {"runs": [_probe(folder, config, base, steps, device) for folder in model_dirs]}
    write_json(out / "probes.json", document)
    picture = probe_curves(_lines(document["runs"]), "mIoU")
    write_atomic(out / "probes.png", lambda path: path.write_bytes(picture))
    return document


def _probe(
    folder: Path, config: Config, base: Path, steps: int | None, device: str
) -> dict[str, Any]:
    recipe = config.finetune
    predictor = load_predictor(folder, device, loss=recipe.loss)
    card = predictor.card
    if predictor.recipe.task != "segmentation":
        raise ConfigError(f"model: '{card['run']}' is for {card['task']}; probes segment")
    index = ShardIndex.open(shards_dir(base, card["dataset"]))
    if list(index.info.class_names) != card["class_names"]:
        raise DataError(f"{index.place}: its classes are not those of '{card['run']}'")
    if predictor.device.type == "cpu":
        keep_freed_memory()
    fit = recipe.fit if steps is None else recipe.fit.model_copy(update={"steps": steps})
    threads = loader_threads(config.cluster.loader_threads, predictor.device)
    batches = build_train_loader(
        index,
        recipe.train_split,
        "segmentation",
        recipe.augment,
        seed=config.seed,
        global_batch=fit.global_batch,
        steps=fit.steps,
        threads=threads,
        order=recipe.order,
        skip_damaged=recipe.skip_damaged,
    )
    validation = recipe.validate_on
    held_out = build_eval_loader(
        index,
        validation.split,
        "segmentation",
        validation.transform,
        batch=validation.batch,
        threads=threads,
    )
    with progress_bar(f"probe {card['run']}", "step") as show:
        scores = train_probes(
            predictor.recipe,
            batches,
            held_out,
            fit,
            recipe.optim,
            seed=config.seed,
            device=predictor.device,
            on_log=lambda log: show(Progress(log.step, fit.steps, {"sum": log.losses["loss"]})),
        )
    return {
        "run": card["run"],
        "model": card["model"],
        "weights_sha256": card["weights_sha256"],
        "dataset": card["dataset"],
        "split": validation.split,
        "steps": fit.steps,
        "global_batch": fit.global_batch,
        "seed": config.seed,
        "probes": [_entry(score) for score in scores],
    }


def _entry(score: ProbeScore) -> dict[str, Any]:
    return {
        "stage": score.feature.stage,
        "iteration": score.feature.iteration,
        "after": score.feature.after,
        "channels": score.channels,
        "first_loss": round(score.first_loss, 6),
        "last_loss": round(score.last_loss, 6),
        "mIoU": round(score.mean_iou, 6),
    }


def _lines(runs: Sequence[dict[str, Any]]) -> dict[int, list[ProbeLine]]:
    """Return each stage's lines."""
    stages: dict[int, list[ProbeLine]] = {}
    for index, run in enumerate(runs):
        for stage in sorted({entry["stage"] for entry in run["probes"]}):
            entries = [entry for entry in run["probes"] if entry["stage"] == stage]
            blocks = sum(entry["after"] == "block" for entry in entries)
            line = ProbeLine(run["run"], index, [entry["mIoU"] for entry in entries], blocks)
            stages.setdefault(stage, []).append(line)
    return stages
