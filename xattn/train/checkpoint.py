"""Training state on disk: whole or absent, checked by its hash, the newest found by itself.

A checkpoint is `step_00000120.pt` and, written after it, `step_00000120.json` with size, SHA-256
and the fingerprint of its run. Only a pair that agrees counts as a checkpoint, so a kill at any
moment leaves the previous one in force.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xattn.errors import CheckpointError, DataError
from xattn.storage import read_json, sha256_file, write_atomic, write_json

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk: its file and the number of steps that were taken."""

    path: Path
    step: int


def save_checkpoint(
    folder: Path, step: int, fingerprint: str, payload: dict[str, Any], keep: int = 2
) -> Checkpoint:
    """Write `payload` as the checkpoint of `step` and drop all but the newest `keep`.

    Args:
        folder: where the checkpoints of one run lie.
        step: steps taken so far; names the file.
        fingerprint: of the run; checked when it is read back.
        payload: tensors, numbers, strings, lists and dicts (what weights-only loading admits).
        keep: number of checkpoints that stay.
    """
    path = folder / f"step_{step:08d}.pt"
    write_atomic(path, lambda partial: torch.save(payload, partial))
    marker = {
        "step": step,
        "fingerprint": fingerprint,
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
    }
    write_json(path.with_suffix(".json"), marker)
    for old in sorted(folder.glob("step_*.json"))[:-keep]:
        old.unlink()
        old.with_suffix(".pt").unlink(missing_ok=True)
    return Checkpoint(path, step)


def newest_checkpoint(folder: Path, fingerprint: str) -> Checkpoint | None:
    """Return the newest complete checkpoint of the run, or None when there is none.

    A damaged one is reported and passed over.

    Raises:
        CheckpointError: a checkpoint of another run lies in the folder.
    """
    for marker_path in sorted(folder.glob("step_*.json"), reverse=True):
        path = marker_path.with_suffix(".pt")
        try:
            marker = read_json(marker_path)
        except DataError as error:
            _log.warning("%s; passed over", error)
            continue
        if marker.get("fingerprint") != fingerprint:
            raise CheckpointError(
                f"{path}: belongs to the run {str(marker.get('fingerprint'))[:12]}, not to "
                f"{fingerprint[:12]}; move it away"
            )
        if path.exists() and sha256_file(path) == marker.get("sha256"):
            return Checkpoint(path, int(marker["step"]))
        _log.warning("%s: missing or not what its marker says; passed over", path)
    return None


def load_checkpoint(checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint's payload onto `device`."""
    payload: dict[str, Any] = torch.load(checkpoint.path, map_location=device, weights_only=True)
    return payload
