"""Where things lie in a project's folder.

data/shards/<dataset>/      what the shard stage leaves
results/<stage>/<run>/      model.json model.safetensors metrics.json curve.csv
results/evaluate/<run>/     metrics.json per_class.csv pictures/
results/report/             report.html results.json
runs/<run>-<fingerprint>/   progress of a training, outside of what DVC deletes
"""

from collections.abc import Sequence
from pathlib import Path

from xattn.errors import DataError

STAGES = ("finetune", "pretrain")


def shards_dir(base: Path, dataset: str) -> Path:
    """Return the shard folder of a data set of params.yaml."""
    return base / "data" / "shards" / dataset


def results_dir(base: Path, stage: str, run: str) -> Path:
    """Return the folder of one run of one stage."""
    return base / "results" / stage / run


def run_dir(base: Path, run: str, fingerprint: str) -> Path:
    """Return where the progress of a training lies."""
    return base / "runs" / f"{run}-{fingerprint[:12]}"


def find_model_dir(base: Path, run: str, stages: Sequence[str] = STAGES) -> Path:
    """Return the model folder of a run, of the first of `stages` that trained it.

    Raises:
        DataError: no stage has trained it yet.
    """
    for stage in stages:
        folder = results_dir(base, stage, run)
        if (folder / "model.json").exists():
            return folder
    raise DataError(f"results: no trained run '{run}'; `dvc repro` trains the runs of params.yaml")
