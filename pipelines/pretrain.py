"""Stage `pretrain`: a classifier is trained; fine-tuning starts from its backbone.

Run by DVC: python -m pipelines.pretrain RUN
"""

import sys
from pathlib import Path

from pipelines.edge import progress_bar, run_to_exit
from xattn.config import load_config
from xattn.experiment import run_training
from xattn.places import results_dir
from xattn.results import register_result, write_training_results
from xattn.train.distributed import is_first_process


def pretrain(run: str, base: Path) -> Path:
    """Train a run of params.yaml to its end, from wherever an earlier attempt left it.

    Returns:
        The model folder.
    """
    config = load_config(base / "params.yaml")
    with progress_bar(f"pretrain {run}", "step") as show:
        job = run_training(config, "pretrain", run, base, show)
    out = results_dir(base, "pretrain", run)
    if is_first_process():
        write_training_results(job, out)
        register_result(job, config.tracking, base, out)
    return out


if __name__ == "__main__":
    run_to_exit(lambda: pretrain(sys.argv[1], Path.cwd()))
