"""Runs a work function on the workers of a Ray Train V2 job, or in this process.

The work function keeps its own state in its run folder and goes on from it, so that a worker group
that Ray restarts, and a driver that is started again, both continue by themselves. Ray carries only
processes, the process group and small messages: progress, and a fault that the user has to mend.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xattn.cluster.local import ray_environment, shared_cluster
from xattn.cluster.preflight import check_capacity, check_this_machine
from xattn.cluster.settings import ClusterConfig
from xattn.errors import MissingPackageError, XattnError
from xattn.structures import Progress

Post = Callable[[Progress], None]
Work = Callable[[Any, Post], None]

_POLL_S = 0.5


def launch(
    work: Work, job: Any, config: ClusterConfig, name: str, base: Path, on_progress: Post
) -> None:
    """Run `work(job, post)` on every worker and return when all are done.

    Args:
        work: an importable function; finds its rank in the environment, as under torchrun.
        job: its argument; must pickle.
        config: backend and size.
        name: of the Ray Train run; the same name continues the same run.
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
    with _attached(config, base) as ray:
        board = ray.remote(num_cpus=0)(_Board).remote()
        with _watched(ray, board, on_progress):
            failure = _fit(work, job, config, name, base, board)
        fault = ray.get(board.fault.remote())
    if fault is not None:
        raise fault
    if failure is not None:
        raise XattnError(f"training '{name}' failed after {config.max_failures} retries: {failure}")


def _fit(
    work: Work, job: Any, config: ClusterConfig, name: str, base: Path, board: Any
) -> str | None:
    """Run the job under Ray Train; return the last failure's first line, or None."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415
    from ray.train.torch import TorchTrainer  # noqa: PLC0415
    from ray.train.v2.api.exceptions import TrainingFailedError  # noqa: PLC0415

    use_gpu = _uses_gpu(config)
    resources: dict[str, float] = {"CPU": config.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = 1
    trainer = TorchTrainer(
        _work_on_worker,
        train_loop_config={"work": work, "job": job, "board": board},
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str((base / "runs" / "ray").resolve()),
            failure_config=FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=1
            ),
            worker_runtime_env={"env_vars": {"PYTHONPATH": _python_path(base)}},
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        return " ".join(str(error).split())[:2000]
    return None


def _work_on_worker(config: dict[str, Any]) -> None:
    """Run the work function; hand a fault that the user must mend to the board instead of Ray.

    Ray would retry it. The process group is closed so that the other ranks, waiting in a
    collective, come back with an error of their own, find the fault on the board and end quietly
    too.
    """
    import ray  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    board = config["board"]

    def post(progress: Progress) -> None:
        board.post.remote(progress)

    try:
        config["work"](config["job"], post)
    except XattnError as error:
        ray.get(board.report.remote(error))
        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception:
        if ray.get(board.fault.remote()) is None:
            raise


class _Board:
    """An actor without a core of its own: where workers leave word for the driver."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._fault: XattnError | None = None

    def post(self, progress: Progress) -> None:
        self._progress = progress

    def progress(self) -> Progress | None:
        return self._progress

    def report(self, fault: XattnError) -> None:
        self._fault = self._fault or fault

    def fault(self) -> XattnError | None:
        return self._fault


@contextmanager
def _watched(ray: Any, board: Any, on_progress: Post) -> Iterator[None]:
    """Pass the board's newest progress on while the body waits for the training to end."""
    ended = threading.Event()

    def poll() -> None:
        last = None
        while not ended.wait(_POLL_S):
            progress = ray.get(board.progress.remote())
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
        final = ray.get(board.progress.remote())
        if final is not None:
            on_progress(final)


@contextmanager
def _attached(config: ClusterConfig, base: Path) -> Iterator[Any]:
    """Attach to RAY_ADDRESS, or to the local cluster, and leave it as it was."""
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
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
    except ConnectionError as error:
        raise XattnError(f"RAY_ADDRESS: no Ray cluster answers at {address} ({error})") from None
    try:
        check_capacity(config, ray.cluster_resources(), address)
        yield ray
    finally:
        ray.shutdown()


def _uses_gpu(config: ClusterConfig) -> bool:
    import ray  # noqa: PLC0415

    gpus = ray.cluster_resources().get("GPU", 0)
    return config.device == "cuda" or (config.device == "auto" and gpus >= config.workers)


def _python_path(base: Path) -> str:
    """Return the PYTHONPATH with which a worker finds this very project."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(base.resolve()), *([inherited] if inherited else [])])
