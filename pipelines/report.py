"""Stage `report`: everything under results/ becomes one page that needs no network.

Run by DVC: python -m pipelines.report
"""

from pathlib import Path

from pipelines.edge import run_to_exit
from xattn.config import load_config
from xattn.report.page import write_report
from xattn.report.tables import collect, summary_table


def report(base: Path) -> Path:
    """Write report.html and results.json; return the page's path."""
    config = load_config(base / "params.yaml")
    params_text = (base / "params.yaml").read_text(encoding="utf-8")
    results = base / "results"
    names = [*config.pretrain_runs, *config.runs]
    return write_report(results, results / "report", config.report.title, params_text, names)


def print_summary(base: Path) -> None:
    """Print the table of the runs and where the report lies."""
    config = load_config(base / "params.yaml")
    print(summary_table(collect(base / "results", [*config.pretrain_runs, *config.runs])))
    print(f"report: {base / 'results' / 'report' / 'report.html'}")


if __name__ == "__main__":
    run_to_exit(lambda: report(Path.cwd()))
