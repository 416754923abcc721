"""MLflow as a user finds it afterwards: one run, whole curves, a model that predicts."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from pipelines.finetune import finetune
from tests.conftest import small_params, write_params
from xattn.config import load_config
from xattn.predictor import load_predictor
from xattn.tracking import RunLogger, TrackingConfig, TrackingError, open_run

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own, on import and on logging


def test_a_training_is_one_run_with_its_model(project: Path) -> None:
    import mlflow

    params = small_params()
    params["tracking"] = {"experiment": "unit tests \u00e9", "system_metrics": False}
    write_params(project, params)
    folder = finetune("segmenter", project)
    finetune("segmenter", project)  # finished: neither a second run nor a second model

    uri = f"sqlite:///{project / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("unit tests \u00e9")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["recipe.fit.steps"] == "6"
    assert run.data.params["model"] == "segformer_b0"
    assert {"fingerprint", "data_fingerprint", "git_commit"} <= set(run.data.tags)
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in history] == [1, 2, 3, 4, 5, 6]
    assert [p.step for p in client.get_metric_history(run.info.run_id, "val_mIoU")] == [3, 6]

    (version,) = client.search_model_versions("name='segmenter'")
    mlflow.set_tracking_uri(uri)
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    loaded = mlflow.pyfunc.load_model(f"models:/segmenter/{version.version}")
    expected = load_predictor(folder, "cpu").predict(image)
    assert np.array_equal(loaded.predict(image[None])[0], expected)


def test_a_resumed_run_logs_no_step_twice(tmp_path: Path) -> None:
    import mlflow

    config = TrackingConfig(experiment="resume", system_metrics=False)
    first = open_run(config, tmp_path, "job", {"a": {"b": 1}}, {}, None)
    logger = RunLogger(first)
    for step in (1, 2, 3):
        logger.log(step, {"loss": float(step)})
    logger.close()
    again = open_run(config, tmp_path, "job", {"a": {"b": 1}}, {}, first.run_id)
    assert again.run_id == first.run_id
    logger = RunLogger(again)
    for step in (2, 3, 4):
        logger.log(step, {"loss": float(step)})
    logger.close()
    client = mlflow.MlflowClient(tracking_uri=first.uri)
    history = client.get_metric_history(first.run_id, "loss")
    assert [point.step for point in history] == [1, 2, 3, 4]
    assert client.get_run(first.run_id).data.params == {"a.b": "1"}


def test_a_server_that_does_not_answer_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = TrackingConfig(experiment="none", uri="http://127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"tracking\.uri: http://127\.0\.0\.1:9") as caught:
        open_run(config, tmp_path, "job", {}, {}, None)
    assert "\n" not in str(caught.value)


def test_tracking_can_be_left_out(project: Path) -> None:
    assert not load_config(project / "params.yaml").tracking.enabled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finetune("segmenter", project)
    assert not (project / "mlflow.db").exists()
