"""A Ray cluster on this machine that the stages of one `dvc repro` share.

Starting Ray takes 7 to 15 s, so the first stage that needs a cluster starts a holder process and
the later stages attach to it. The holder watches the process that owns the cluster (`dvc repro`, or
the command itself) and takes the cluster down when that process is gone, however it went.

Run as a program: python -m xattn.cluster.local STATE_FILE OWNER_PID
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from xattn.errors import CapacityError, DataError
from xattn.storage import read_json, refused_disk, write_json

_START_TIMEOUT_S = 120.0
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A running local cluster.

    Args:
        address: host:port to attach to.
        token_path: file with the token without which Ray refuses a client.
        holder_pid: the process that holds the cluster.
        holder_started: when that process started, seconds since the epoch; tells apart a reused id.
        owner_pid: the process after whose end the cluster ends.
    """

    address: str
    token_path: str
    holder_pid: int
    holder_started: float
    owner_pid: int


def shared_cluster(base: Path) -> LocalCluster:
    """Return the cluster of the running `dvc repro` (or of this process), starting it if need be.

    Args:
        base: the project's folder; the cluster's state lies in its `.xattn`.

    Raises:
        CapacityError: Ray did not start in two minutes; the message names its log.
    """
    owner = _owner()
    state_path = base / ".xattn" / f"ray-{owner.pid}.json"
    running = _running(state_path)
    if running is not None:
        return running
    log_path = state_path.with_suffix(".log")
    with refused_disk(log_path):
        state_path.unlink(missing_ok=True)
        log_path.parent.mkdir(exist_ok=True)
        log_path.touch()
    with log_path.open("wb") as log:
        holder = subprocess.Popen(
            [sys.executable, "-m", "xattn.cluster.local", str(state_path), str(owner.pid)],
            cwd=base,
            env={**os.environ, "PYTHONPATH": python_path(base)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and holder.poll() is None:
        running = _running(state_path)
        if running is not None:
            return running
        time.sleep(0.1)
    holder.kill()
    raise CapacityError(f"cluster: Ray did not start on this machine; its log is {log_path}")


def python_path(base: Path) -> str:
    """Return the PYTHONPATH with which a worker finds this very package."""
    here = [str(Path(__file__).parents[2]), str(base.resolve())]
    inherited = [path for path in (os.environ.get("PYTHONPATH"),) if path]
    return os.pathsep.join(dict.fromkeys([*here, *inherited]))


def _owner() -> psutil.Process:
    """Return the process whose end ends the cluster: the outermost dvc above us, else ourselves."""
    me = psutil.Process()
    if "DVC_ROOT" not in os.environ:
        return me
    above = [process for process in me.parents() if "dvc" in Path(_program(process)).name]
    return above[-1] if above else me


def _program(process: psutil.Process) -> str:
    """Return the script that a Python process runs, or its program."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    scripts: list[str] = [word for word in words[1:2] if "python" in Path(words[0]).name]
    return (scripts or words[:1] or [""])[0]


def _running(state_path: Path) -> LocalCluster | None:
    """Return the cluster that the state file names if its holder still lives."""
    try:
        state = LocalCluster(**read_json(state_path))
        holder = psutil.Process(state.holder_pid)
        alive = abs(holder.create_time() - state.holder_started) < 1.0
    except (DataError, TypeError, psutil.Error):
        return None
    return state if alive else None


def _hold(state_path: Path, owner_pid: int) -> None:
    """Start a cluster, publish its state, and keep it until the owner is gone."""
    owner = psutil.Process(owner_pid)
    token_path = state_path.with_suffix(".token")
    # Readable by nobody else, from the first moment on.
    with os.fdopen(os.open(token_path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    os.environ.update(ray_environment(str(token_path)))
    import ray  # noqa: PLC0415 (reads the variables above when it is imported)

    context = ray.init(
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        _node_ip_address="127.0.0.1",
    )
    me = psutil.Process()
    address = context.address_info["gcs_address"]
    state = LocalCluster(address, str(token_path), me.pid, me.create_time(), owner_pid)
    write_json(state_path, asdict(state))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner; we follow it
    while _lives(owner):
        time.sleep(_POLL_S)
    for path in (state_path, token_path, state_path.with_suffix(".log")):
        path.unlink(missing_ok=True)
    ray.shutdown()


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def ray_environment(token_path: str) -> dict[str, str]:
    """Return the variables under which a client or a holder of a local cluster runs Ray.

    Token authentication is on for clusters that `ray.init()` starts, but off by default in a client
    that attaches to one. The state API needs the dashboard, which a local cluster does without.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": token_path,
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


if __name__ == "__main__":
    _hold(Path(sys.argv[1]), int(sys.argv[2]))
