"""Runs a work function on the workers of a Ray Train V2 job, or in this process.

The work function keeps its own state in its run folder and goes on from it, so that a worker group
that Ray restarts, and a driver that is started again, both continue by themselves. Ray carries only
processes, the process group and small messages: progress, and a fault that the user has to mend.
"""

import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from xattn.cluster.local import python_path, ray_environment, shared_cluster
from xattn.cluster.preflight import check_capacity, check_this_machine, is_remote
from xattn.cluster.settings import ClusterConfig
from xattn.errors import MissingPackageError, XattnError
from xattn.storage import read_json, write_atomic, write_json
from xattn.structures import Progress

Post = Callable[[Progress], None]
Work = Callable[[Any, Post], None]

_POLL_S = 0.5


def launch(
    work: Work,
    job: Any,
    config: ClusterConfig,
    folder: Path,
    base: Path,
    on_progress: Post,
) -> None:
    """Run `work(job, post)` on every worker and return when all are done.

    Args:
        work: a module's function; finds its rank in the environment, as under torchrun.
        job: its argument, a dataclass with a field `device`; must pickle.
        config: backend and size.
        folder: the job's own, seen by every worker under this path; its name names the Ray run.
        base: the project's folder.
        on_progress: called in this process with what rank 0 posts.

    Raises:
        CapacityError: the cluster has less than was asked for.
        XattnError: what the work function raised, on whichever worker.
        MissingPackageError: the backend is "ray" and Ray is not installed.
    """
    if config.backend == "process":
        work(job, on_progress)
        return
    check_this_machine(config)
    word = _Word(folder)
    word.clear()
    with _attached(config, base) as ray, _watched(word, on_progress):
        # Pickled here: the controller of the training would import torch only to pass it on.
        use_gpu = _uses_gpu(config, ray.cluster_resources())
        # Decided once for all workers: each by itself would take what GPUs it happens to see.
        placed = replace(job, device="cuda" if use_gpu else "cpu")
        failure = _fit(pickle.dumps((work, placed)), config, folder, base, use_gpu)
    fault = word.fault()
    if fault is not None:
        raise fault
    if failure is not None:
        raise XattnError(
            f"training '{folder.name}' failed after {config.max_failures} retries: {failure}"
        )


def _fit(
    payload: bytes, config: ClusterConfig, folder: Path, base: Path, use_gpu: bool
) -> str | None:
    """Run the job under Ray Train; return the last failure's text, or None."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415
    from ray.train.torch import TorchTrainer  # noqa: PLC0415
    from ray.train.v2.api.exceptions import TrainingFailedError  # noqa: PLC0415

    resources: dict[str, float] = {"CPU": config.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = 1
    # The workers of a local cluster inherit this project's path from its holder, and need no
    # environment of their own, which would cost a fresh process each.
    environment = {"env_vars": {"PYTHONPATH": python_path(base)}} if is_remote() else None
    trainer = TorchTrainer(
        _work_on_worker,
        train_loop_config={"payload": payload, "folder": str(folder)},
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str((base / "runs" / "ray").resolve()),
            failure_config=FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=1
            ),
            worker_runtime_env=environment,
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        return " ".join(str(error).split())[:2000]
    return None


def _work_on_worker(config: dict[str, Any]) -> None:
    """Run the work function; a fault that the user must mend is left as a word for the driver.

    It is raised too, so that Ray ends the other ranks: they wait in a collective for this one, and
    leaving the process group frees them only when the last object that holds it is gone. The
    workers that Ray then starts again find the word and have nothing to do.
    """
    word = _Word(Path(config["folder"]))
    if word.fault() is not None:
        return
    work, job = pickle.loads(config["payload"])
    try:
        work(job, word.post)
    except XattnError as error:
        word.report(error)
        raise


class _Word:
    """What workers leave for the driver, as small files in the job's folder.

    Args:
        folder: seen by all under this path.
    """

    def __init__(self, folder: Path) -> None:
        self._progress, self._fault = folder / "progress.json", folder / "fault.pickle"

    def clear(self) -> None:
        """Remove what an earlier attempt left."""
        self._progress.unlink(missing_ok=True)
        self._fault.unlink(missing_ok=True)

    def post(self, progress: Progress) -> None:
        """Replace the progress."""
        write_json(self._progress, asdict(progress))

    def progress(self) -> Progress | None:
        """Return the newest progress."""
        return Progress(**read_json(self._progress)) if self._progress.exists() else None

    def report(self, fault: XattnError) -> None:
        """Leave a fault; the first one stays."""
        if not self._fault.exists():
            write_atomic(self._fault, lambda partial: partial.write_bytes(pickle.dumps(fault)))

    def fault(self) -> XattnError | None:
        """Return the fault that a worker left."""
        if not self._fault.exists():
            return None
        fault: XattnError = pickle.loads(self._fault.read_bytes())
        return fault


@contextmanager
def _watched(word: _Word, on_progress: Post) -> Iterator[None]:
    """Pass the newest progress on while the body waits for the training to end."""
    ended = threading.Event()

    def poll() -> None:
        last = None
        while not ended.wait(_POLL_S):
            progress = word.progress()
            if progress is not None and progress != last:
                on_progress(progress)
                last = progress

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        final = word.progress()
        if final is not None:
            on_progress(final)


@contextmanager
def _attached(config: ClusterConfig, base: Path) -> Iterator[Any]:
    """Attach to RAY_ADDRESS, or to the local cluster, and leave it as it was."""
    if is_remote():
        address = os.environ["RAY_ADDRESS"]
    else:
        cluster = shared_cluster(base)
        address = cluster.address
        os.environ.update(ray_environment(cluster.token_path))
    try:
        import ray  # noqa: PLC0415
    except ImportError:
        raise MissingPackageError(
            "cluster.backend: Ray is not installed; install ray[train], or set it to 'process'"
        ) from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise XattnError(f"RAY_ADDRESS: no Ray cluster answers at {address} ({error})") from None
    try:
        check_capacity(config, ray.cluster_resources(), address)
        yield ray
    finally:
        ray.shutdown()


def _uses_gpu(config: ClusterConfig, available: Mapping[str, float]) -> bool:
    enough = available.get("GPU", 0) >= config.workers
    return config.device == "cuda" or (config.device == "auto" and enough)
