"""Every line that knows MLflow: one run a job, made by the driver, logged to by rank 0.

MLflow takes two seconds to import, so it is imported when a run is tracked. Places are absolute:
Ray changes the working folder of its workers, and MLflow's defaults are relative to it.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from xattn.errors import MissingPackageError, XattnError

_FLUSH_S = 5.0
_log = logging.getLogger(__name__)


class TrackingConfig(BaseModel):
    """The `tracking` section of params.yaml.

    Args:
        enabled: whether runs are tracked at all.
        uri: an MLflow tracking server or database; null keeps `mlflow.db` in the project's folder.
        experiment: the experiment that the runs belong to.
        system_metrics: whether cores, memory and GPUs are sampled too.
        register_models: whether each final model enters the registry under its run's name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = True
    uri: str | None = None
    experiment: str
    system_metrics: bool = True
    register_models: bool = True


class TrackedRun(BaseModel):
    """Where a job logs: enough for a worker on another machine to go on with it."""

    model_config = ConfigDict(frozen=True)

    uri: str
    run_id: str
    system_metrics: bool


class TrackingError(XattnError):
    """The tracking server does not answer or refuses; the message names it."""


def tracking_uri(config: TrackingConfig, base: Path) -> str:
    """Return the absolute place of the tracking store; a database beside params.yaml by default."""
    return config.uri or f"sqlite:///{base.resolve() / 'mlflow.db'}"


def open_run(
    config: TrackingConfig,
    base: Path,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    run_id: str | None,
) -> TrackedRun:
    """Create the job's run, or reopen the one it had before it was interrupted.

    Args:
        config: where and under which experiment.
        base: the project's folder, for the default database.
        name: the run's name.
        params: nested settings; logged under dotted keys.
        tags: fingerprints, git commit.
        run_id: the run of an earlier attempt at the very same job, if any.

    Raises:
        TrackingError: the server does not answer or refuses.
        MissingPackageError: MLflow is not installed.
    """
    uri = tracking_uri(config, base)
    mlflow = _mlflow()
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        if run_id is not None and _exists(client, run_id):
            client.update_run(run_id, status="RUNNING")
            return TrackedRun(uri=uri, run_id=run_id, system_metrics=config.system_metrics)
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            # A server knows its own place; a plain database would take the working folder's.
            is_server = uri.startswith(("http://", "https://", "databricks"))
            place = None if is_server else (base.resolve() / "mlartifacts").as_uri()
            experiment_id = client.create_experiment(config.experiment, artifact_location=place)
        else:
            experiment_id = experiment.experiment_id
        run = client.create_run(experiment_id, run_name=name, tags=dict(tags))
        run_id = run.info.run_id
        entities = mlflow.entities
        flat = [entities.Param(key, value[:6000]) for key, value in _flatten(params)]
        for start in range(0, len(flat), 100):
            client.log_batch(run_id, params=flat[start : start + 100])
    except mlflow.exceptions.MlflowException as error:
        raise TrackingError(f"tracking.uri: {uri}: {_first_line(error)}") from None
    return TrackedRun(uri=uri, run_id=run_id, system_metrics=config.system_metrics)


def close_run(run: TrackedRun, failed: bool) -> None:
    """Mark the run as finished or failed."""
    mlflow = _mlflow()
    try:
        client = mlflow.MlflowClient(tracking_uri=run.uri)
        client.set_terminated(run.run_id, status="FAILED" if failed else "FINISHED")
    except mlflow.exceptions.MlflowException as error:
        # The model is trained, or its fault is on its way to the user: neither may get lost here.
        _log.warning("MLflow did not close run %s (%s)", run.run_id, _first_line(error))


def register_model(run: TrackedRun, name: str, folder: Path, scores: Mapping[str, float]) -> str:
    """Log a trained model as a pyfunc with its code, and register it.

    `mlflow.pyfunc.load_model(uri).predict(images)` takes (N, H, W, 3) uint8 RGB and gives what
    `Predictor.predict` does: stacked class ids or probabilities, of a detector a list.

    Args:
        run: the training's run.
        name: of the registered model.
        folder: holds model.json and model.safetensors.
        scores: logged with the model.

    Returns:
        The registered model's version.
    """
    mlflow = _mlflow()
    os.environ["MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK"] = "true"  # it would run pip
    mlflow.set_tracking_uri(run.uri)
    with mlflow.start_run(run_id=run.run_id, log_system_metrics=False):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=_saved_model_class()(),
            artifacts={"folder": str(folder)},
            code_paths=[str(Path(__file__).parent)],
            pip_requirements=["torch", "torchvision", "timm", "numpy", "pydantic", "safetensors"],
            registered_model_name=name,
        )
        client = mlflow.MlflowClient(tracking_uri=run.uri)
        version = str(logged.registered_model_version)
        client.set_registered_model_alias(name, "latest_trained", version)
        for key, value in scores.items():
            client.set_model_version_tag(name, version, key, f"{value:.6f}")
    return version


class RunLogger:
    """Rank 0's pen: gathers points and sends them a few times a minute in one call.

    Points at or before the last one that the server holds are dropped, because MLflow would append
    them a second time after a resume.

    Args:
        run: where to log.
    """

    def __init__(self, run: TrackedRun) -> None:
        mlflow = _mlflow()
        self._metric = mlflow.entities.Metric
        self._fault = mlflow.exceptions.MlflowException
        self._client = mlflow.MlflowClient(tracking_uri=run.uri)
        self._run_id = run.run_id
        self._points: list[Any] = []
        self._last: dict[str, int] = {}
        self._sent = time.monotonic()
        self._monitor: Any = None
        if run.system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import (  # noqa: PLC0415
                SystemMetricsMonitor,
            )

            mlflow.set_tracking_uri(run.uri)
            self._monitor = SystemMetricsMonitor(run.run_id, resume_logging=True)
            self._monitor.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take one point of each metric."""
        now = int(time.time() * 1000)
        for key, value in metrics.items():
            if step > self._last_step(key):
                self._points.append(self._metric(key, value, now, step))
                self._last[key] = step
        if time.monotonic() - self._sent > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Send what was gathered; what the server does not take now is kept for the next time."""
        self._sent = time.monotonic()
        while self._points:
            try:
                self._client.log_batch(self._run_id, metrics=self._points[:1000])
            except self._fault as error:
                # A tracking server that is away for a while must not end a training of days.
                _log.warning("MLflow took no metrics (%s); kept for later", _first_line(error))
                return
            del self._points[:1000]

    def close(self) -> None:
        """Send the rest and stop sampling the machine."""
        self.flush()
        if self._points:
            _log.warning(
                "%d points did not reach MLflow run %s; the run folder's history.jsonl has them",
                len(self._points),
                self._run_id,
            )
        if self._monitor is not None:
            self._monitor.finish()

    def _last_step(self, key: str) -> int:
        if key not in self._last:
            try:
                history = self._client.get_metric_history(self._run_id, key)
            except self._fault as error:
                _log.warning("MLflow did not tell the last step of %s (%s)", key, error)
                history = []
            self._last[key] = max((point.step for point in history), default=-1)
        return self._last[key]


def _mlflow() -> Any:
    try:
        import mlflow  # noqa: PLC0415
        import mlflow.pyfunc  # noqa: PLC0415
    except ImportError:
        raise MissingPackageError(
            "tracking: MLflow is not installed; install mlflow, or set tracking.enabled to false"
        ) from None
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return mlflow


def _exists(client: Any, run_id: str) -> bool:
    try:
        found = client.get_run(run_id)
    except Exception as error:
        if type(error).__name__ == "MlflowException" and "not found" in str(error):
            return False
        raise
    return bool(found.info.lifecycle_stage == "active")  # not one that the user deleted


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Turn nested settings into sorted (dotted key, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in sorted(settings.items()):
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return pairs


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _saved_model_class() -> type[Any]:
    """Return the class that MLflow pickles; defined here because its base is MLflow's."""
    import mlflow.pyfunc  # noqa: PLC0415

    class SavedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
        """A trained recipe behind MLflow's predict."""

        def load_context(self, context: Any) -> None:
            from xattn.predictor import load_predictor  # noqa: PLC0415

            self.predictor = load_predictor(Path(context.artifacts["folder"]), "auto")

        def predict(self, model_input: Any) -> Any:
            import numpy as np  # noqa: PLC0415

            found = [self.predictor.predict(image) for image in np.asarray(model_input)]
            return found if self.predictor.recipe.task == "detection" else np.stack(found)

    return SavedModel
