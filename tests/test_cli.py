"""The command line as a user meets it: output, exit codes, one line for what can be mended."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cli
from tests.conftest import PROJECT, small_params, write_params


def spawn(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does."""
    command = [sys.executable, str(PROJECT / "cli.py"), *words]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=cwd, timeout=300
    )


def xattn(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, to the same end: a new one takes seconds to import torch."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", ["xattn", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return subprocess.CompletedProcess(
        ["xattn", *words], int(end.value.code or 0), stdout.getvalue(), stderr.getvalue()
    )


def fault(*words: str, cwd: Path) -> str:
    """Run a command that must fail; return its one line."""
    done = xattn(*words, cwd=cwd)
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_models_state_the_numbers_of_the_spec() -> None:
    cards = {card["name"]: card for card in json.loads(spawn("models", "--json").stdout)}
    assert cards["segformer_b0"]["params"] == 3_752_694
    # 4,178,102 in the reference, which keeps two position vectors of 16 in each of two attentions
    assert cards["hila_segformer_b0_s3"]["params"] == 4_178_102 - 2 * 16
    assert cards["segformer_b0"]["macs"] == pytest.approx(8.42e9, rel=5e-3)
    assert cards["hila_segformer_b0_s3"]["macs"] == pytest.approx(9.76e9, rel=5e-3)
    wanted = (
        "name system task num_classes input params macs counting paper_params paper_macs source"
    )
    assert set(cards["segformer_b0"]) == {*wanted.split(), "notes"}


def test_bench_attention_reports_both_forms() -> None:
    done = xattn("bench", "attention", "--side", "64", "--turns", "1", "--json")
    assert done.returncode == 0, done.stderr
    both = json.loads(done.stdout)["sides"]["64"]["both"]
    assert both["listing_ms"] > 0
    assert both["ours_times_faster"] == pytest.approx(
        both["listing_ms"] / both["ours_ms"], abs=0.01
    )


def test_listings(project: Path) -> None:
    assert "camvid" in xattn("datasets").stdout
    assert "trainannot" in xattn("datasets", "camvid").stdout
    assert "trashnet" in xattn("preset").stdout
    assert xattn("models", "--task", "nonsense").returncode == 2


def test_initial_weights_tell_what_became_of_them(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from xattn.config import load_config
    from xattn.experiment import run_training
    from xattn.models.weights import save_weights
    from xattn.models.zoo import create_model

    save_weights(create_model("mit_b0", num_classes=7), project / "mit.safetensors")
    cli.weights("segformer_b0", Path("mit.safetensors"), classes=3)
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "176 of 192 tensors loaded (xattn names)"
    assert "left over: head.weight" in others
    assert sum(line.startswith("missing: head.") for line in others) == 16
    cli.weights("mit_b0", Path("mit.safetensors"), as_json=True)
    assert json.loads(capsys.readouterr().out)["other_shape"]["head.bias"] == [[7], [1000]]

    params = small_params()
    params["runs"]["segmenter"]["init"] = "mit.safetensors"
    config = load_config(write_params(project, params))
    job = run_training(config, "finetune", "segmenter", project, lambda _: None)
    told = (job.run_dir / "init.txt").read_text().splitlines()
    assert told[0].endswith(f"mit.safetensors: {first}")
    assert set(told[1:]) == set(others)


def test_shard_verify_and_damage(tmp_path: Path) -> None:
    params = small_params()
    write_params(tmp_path, params)
    done = xattn("shard", "scenes", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["samples"] == {"train": 24, "val": 6, "test": 7}
    shards = tmp_path / "data" / "shards" / "scenes"
    assert xattn("verify", str(shards)).returncode == 0
    tar = shards / "train-000000.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[5000] ^= 1
    tar.write_bytes(damaged)
    done = xattn("verify", str(shards), "--deep", "--json")
    assert done.returncode == 3
    assert "train-000000.tar" in done.stdout


def test_train_evaluate_predict_report(project: Path) -> None:
    assert xattn("train", "segmenter", cwd=project).returncode == 0
    metrics = json.loads(xattn("evaluate", "segmenter", "--json", cwd=project).stdout)
    assert metrics["images"] == 7
    assert 0 <= metrics["mIoU"] <= 1
    assert len(list((project / "results/evaluate/segmenter/pictures").iterdir())) == 6

    photos = project / "photos \u00e9"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a", (70, 90)), ("b", (33, 41))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(photos / f"{name}.png")
    done = spawn("predict", "segmenter", str(photos), "--out", "seen", cwd=project)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "quiet where nobody looks"
    assert "would overwrite" in fault(
        "predict", "segmenter", "photos \u00e9", "--out", "photos \u00e9", cwd=project
    )
    assert sorted(path.name for path in (project / "seen").iterdir()) == ["a.png", "b.png"]

    (photos / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\x04IHDR\0\0\0\x08....")
    broken = fault("predict", "segmenter", str(photos), "--out", "seen", cwd=project)
    assert "cut.png: cannot be read as an image (Truncated IHDR chunk)" in broken

    done = xattn("report", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "segmenter" in done.stdout
    page = (project / "results/report/report.html").read_text()
    assert "segmenter" in page


def test_ctrl_c_is_one_word(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xattn.scoring._score", press)
    assert xattn("train", "segmenter", cwd=project).returncode == 0
    done = xattn("evaluate", "segmenter", cwd=project)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert not list((project / "results/evaluate").glob(".*.partial"))


def test_attention_and_probe(project: Path) -> None:
    params = small_params()
    spec = params["runs"]["segmenter"]
    overrides = {**spec["overrides"], "stages": [3, 4]}
    params["runs"]["hila"] = {**spec, "model": "hila_segformer_b0_s3", "overrides": overrides}
    write_params(project, params)
    for run in ("segmenter", "hila"):
        assert xattn("train", run, cwd=project).returncode == 0
    assert xattn("evaluate", "hila", cwd=project).returncode == 0
    pictures = project / "results/evaluate/hila/pictures"
    assert len(list(pictures.glob("*.attention.json"))) == 2
    photo = str(next(pictures.glob("*.image.jpg")))  # 96 x 64 px
    draw = ("attention", "hila", photo, "--point", "40,20")
    done = xattn(*draw, "--point", "95,63", "--normalise", "max", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert first["box"] == [16, 0, 80, 48]  # the patch of row 0, column 1: 4 cells of 16 px
    assert second["box"] == [48, 16, 96, 64]
    assert [level["stages"] for level in first["maps"]] == [[4], [3, 4]]
    assert max(map(max, first["maps"][0]["values"])) == 1
    with Image.open(project / "attention.png") as sheet:
        assert sheet.height > 3 * 213
    params["evaluate"]["segmentation"] = {"window": {"crop": [64, 64], "stride": [32, 32]}}
    write_params(project, params)
    done = xattn(*draw, "--as-evaluated", "--json", cwd=project)
    # Windows begin at x = 0 and 32; the point is nearer to the middle of the first.
    assert json.loads(done.stdout)[0]["box"] == [16, 0, 64, 48]

    outside = fault("attention", "hila", photo, "--point", "96,3", cwd=project)
    assert "point 96,3: outside of the image" in outside
    refused = fault("attention", "segmenter", photo, cwd=project)
    assert "'segformer_b0' has no inter-level attention" in refused
    assert xattn("attention", "hila", photo, "--point", "40", cwd=project).returncode == 2

    done = xattn("probe", "segmenter", "hila", "--steps", "2", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["runs"][1]["probes"]) == 8 + 2
    assert (project / "probes" / "probes.png").exists()


def test_faults_are_one_line(project: Path) -> None:
    mistyped = fault("train", "segmentr", cwd=project)
    assert "unknown run 'segmentr'; did you mean 'segmenter'" in mistyped
    alone = spawn("train", "segmentr", cwd=project)
    assert (alone.returncode, alone.stderr.strip()) == (1, mistyped), "as in a process of its own"
    assert "no trained run 'segmenter'" in fault("evaluate", "segmenter", cwd=project)
    assert "did you mean 'demo'" in fault("preset", "use", "dmo", cwd=project)
    assert "has changes of yours" in fault("preset", "use", "demo", cwd=project)
    params = small_params()
    params["datasets"]["camvid"] = {"reader": "camvid", "root": "nowhere"}
    params["runs"]["segmenter"]["model"] = "segformer_b00"
    write_params(project, params)
    missing = fault("shard", "camvid", cwd=project)
    assert "nowhere" in missing
    assert "XATTN_DATA" in missing
    assert "did you mean 'segformer_b0'" in fault("train", "segmenter", cwd=project)


def test_what_a_worker_would_stumble_over_is_told_before(project: Path) -> None:
    for section, value, message in (
        ("validate_on", {"split": "vall", "every_steps": 3, "transform": {}}, "vall"),
        ("loss", {"normalise": "vaild"}, "vaild"),
        ("train_split", "trian", "trian"),
    ):
        params = small_params()
        params["finetune"][section] = value
        write_params(project, params)
        assert message in fault("train", "segmenter", cwd=project)
    params = small_params()
    params["runs"]["segmenter"]["overrides"] = {"normalise": "valid"}
    write_params(project, params)
    assert "normalise" in fault("train", "segmenter", cwd=project)
    params["runs"]["segmenter"] |= {"overrides": {}, "init": "other.json"}
    write_params(project, params)
    (project / "other.json").write_text("{}")
    assert "names no weights" in fault("train", "segmenter", cwd=project)
    assert not (project / "runs").exists(), "nothing was started"


def test_a_failed_evaluation_keeps_the_last_one(project: Path) -> None:
    assert xattn("train", "segmenter", cwd=project).returncode == 0
    assert xattn("evaluate", "segmenter", cwd=project).returncode == 0
    params = small_params()
    params["evaluate"]["split"] = "tset"
    write_params(project, params)
    assert "tset" in fault("evaluate", "segmenter", cwd=project)
    assert (project / "results/evaluate/segmenter/metrics.json").exists()


def test_gpu_where_there_is_none(project: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    params = small_params()
    params["cluster"]["device"] = "cuda"
    write_params(project, params)
    assert "torch sees 0" in fault("train", "segmenter", cwd=project)
    params["cluster"] = {"backend": "ray", "workers": 1, "device": "cuda"}
    write_params(project, params)
    assert "1 worker asks for 1 GPU, this machine has 0" in fault("train", "segmenter", cwd=project)


def test_more_workers_than_cores_are_refused_at_once(project: Path) -> None:
    params = small_params()
    params["cluster"] = {"backend": "ray", "workers": 4, "cpus_per_worker": 1000}
    write_params(project, params)
    refused = fault("train", "segmenter", cwd=project)
    assert "4 workers ask for 4000 CPUs, this machine has" in refused
    assert not (project / ".xattn").exists(), "no cluster was started for it"


def test_wrong_usage_is_exit_2() -> None:
    assert xattn("shard").returncode == 2
    assert xattn("nonsense").returncode == 2


def test_preset_use_keeps_presets_apart(tmp_path: Path) -> None:
    assert xattn("preset", "use", "camvid", cwd=tmp_path).returncode == 0
    preset = PROJECT / "pipelines" / "presets" / "camvid.yaml"
    before = preset.read_bytes()
    assert (tmp_path / "params.yaml").read_bytes() == before
    with (tmp_path / "params.yaml").open("a") as params:
        params.write("# mine\n")
    assert preset.read_bytes() == before
