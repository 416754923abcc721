"""Stage `finetune`: a segmenter or detector is trained, from a pretrained backbone or from scratch.

Run by DVC: python -m pipelines.finetune RUN
"""

import sys
from pathlib import Path

from pipelines.edge import progress_bar, run_to_exit
from xattn.config import load_config
from xattn.results import train_run


def finetune(run: str, base: Path) -> Path:
    """Train a run of params.yaml to its end, from wherever an earlier attempt left it.

    Returns:
        The model folder.
    """
    config = load_config(base / "params.yaml")
    with progress_bar(f"finetune {run}", "step") as show:
        return train_run(config, "finetune", run, base, show)


if __name__ == "__main__":
    run_to_exit(lambda: finetune(sys.argv[1], Path.cwd()))
