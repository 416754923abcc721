"""The curves of a run: one JSON object a line, cut back to the checkpoint when a run goes on."""

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xattn.storage import write_text

COLUMNS = ("step", "samples", "epoch", "loss", "lr", "images_per_s", "val_metric")


class History:
    """Rank 0's record of a run.

    Args:
        path: the file of rows.
        step: rows after this step are dropped: they belong to work that is done again.
    """

    def __init__(self, path: Path, step: int) -> None:
        rows = [row for row in read_history(path) if row["step"] <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._stream = path.open("a", encoding="utf-8", buffering=1)  # a row at a time

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; it must hold `step`."""
        self._stream.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Bring every row to the disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Bring every row to the disk and close the file."""
        self.sync()
        self._stream.close()


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the rows in order; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def curve_csv(rows: list[dict[str, Any]]) -> str:
    """Return the curves as CSV: one line a step, the columns COLUMNS and any further losses."""
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {}).update(row)
    further = sorted({name for row in steps.values() for name in row} - set(COLUMNS))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *further], restval="", lineterminator="\n")
    writer.writeheader()
    for _, row in sorted(steps.items()):
        writer.writerow({name: _rounded(value) for name, value in row.items()})
    return text.getvalue()


def _rounded(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
