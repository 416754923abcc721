"""Stage `evaluate`: a trained model is scored on held-out images by the stated protocol.

Run by DVC: python -m pipelines.evaluate RUN STAGE
"""

import sys
from pathlib import Path
from typing import Any

from pipelines.edge import progress_bar, run_to_exit
from xattn.config import load_config
from xattn.evaluate.inference import HEADLINE
from xattn.places import STAGES, find_model_dir, results_dir, shards_dir
from xattn.scoring import evaluate_model
from xattn.storage import read_json


def evaluate(
    run: str, base: Path, stage: str | None = None, detections: Path | None = None
) -> dict[str, Any]:
    """Score a trained run of params.yaml on its own data set.

    Args:
        run: its name.
        base: the project's folder.
        stage: the stage that trained it; None takes whichever did.
        detections: folder for what a detector found, in COCO's and VOC's files.

    Returns:
        What its metrics.json holds.
    """
    config = load_config(base / "params.yaml")
    # The place says which stage trained it, so that the two kinds of evaluation cannot mix.
    model_dir = find_model_dir(base, run, [stage] if stage else STAGES)
    shards = shards_dir(base, read_json(model_dir / "model.json")["dataset"])
    with progress_bar(f"evaluate {run}", "img") as show:
        out = results_dir(base, "evaluate", run)
        return evaluate_model(model_dir, shards, config.evaluate, out, show, detections)


def headline(metrics: dict[str, Any]) -> str:
    """Say the result in one line."""
    name = next(name for name in HEADLINE.values() if name in metrics)
    return (
        f"{metrics['run']}: {name} {metrics[name]:.4f} on {metrics['images']} images "
        f"of {metrics['dataset']}/{metrics['split']}, {metrics['images_per_s']} img/s"
    )


if __name__ == "__main__":
    run_to_exit(lambda: print(headline(evaluate(sys.argv[1], Path.cwd(), sys.argv[2]))))
