import csv
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xattn.errors import DataError
from xattn.models.zoo import list_models
from xattn.report import attention_maps, box_pictures, figures, overlay, page, pictures, tables
from xattn.structures import AttentionMap, TokenAttention

NAMES = ["sky", "road & <b>kerb</b>", "caf\u00e9 \u6a39 $x$"]
PALETTE = [[10, 20, 30], [200, 0, 0], [0, 0, 250]]


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def add_run(root, run, stage="finetune", model="segformer_b0", task="segmentation", **changes):
    """Write what a training leaves."""
    folder = root / stage / run
    folder.mkdir(parents=True)
    card = {
        "run": run,
        "stage": stage,
        "model": model,
        "task": task,
        "overrides": {"patch": 4, "share": True},
        "dataset": "toy",
        "num_classes": len(NAMES),
        "class_names": NAMES,
        "palette": PALETTE,
        "weights": f"store/{run}.safetensors",
        "weights_sha256": "ab" * 32,
        "fingerprint": "cd" * 32,
        "data_fingerprint": "ef" * 32,
        "init": None,
        "params": 3_716_459,
        "macs": 5_600_000_000,
        "macs_input": [3, 360, 480],
        "steps": 40,
        "global_batch": 8,
        "workers": 2,
        "wall_s": 90.0,
        "images_per_s": 12.34,
        "git_commit": "12" * 20,
        "mlflow_run_id": None,
        **changes,
    }
    (folder / "model.json").write_text(json.dumps(card), encoding="utf-8")
    header = ["step", "samples", "epoch", "loss", "lr", "images_per_s", "val_metric", "extra"]
    rows = [
        [s, 8 * s, s / 10, "nan" if s == 3 else 2 / s, 1e-3, "", 0.01 * s if s % 10 == 0 else "", 1]
        for s in range(1, 41)
    ]
    rows[39][1:4] = ["", "", ""]  # validated, not logged
    write_csv(folder / "curve.csv", [header, *rows])
    metric = tables.HEADLINE[task]
    training = {"loss": 0.05, "val_metric": 0.4, "metric_name": metric, "steps": 40}
    (folder / "metrics.json").write_text(json.dumps(training))
    return folder


def add_evaluation(root, run, value, task="segmentation"):
    """Write what an evaluation leaves; segmentation with one picture of 24 x 32 pixels."""
    folder = root / "evaluate" / run
    (folder / "pictures").mkdir(parents=True)
    card = {
        "run": run,
        "dataset": "toy",
        "split": "val",
        "images": 7,
        "protocol": "whole",
        tables.HEADLINE[task]: value,
        "images_per_s": 5.0,
        "device": "cpu",
    }
    (folder / "metrics.json").write_text(json.dumps(card))
    if task == "classification":
        rows = [[name, i, 0.5, 3] for i, name in enumerate(NAMES)]
        write_csv(folder / "per_class.csv", [["class", "id", "accuracy", "images"], *rows])
        return folder
    rows = [[NAMES[0], 0, value, 0.9, 100], [NAMES[1], 1, 0.25, 0.5, 300], [NAMES[2], 2, "", "", 0]]
    write_csv(folder / "per_class.csv", [["class", "id", "score", "accuracy", "pixels"], *rows])
    truth = np.zeros((24, 32), np.uint8)
    truth[:, 16:] = 1
    prediction = truth.copy()
    prediction[:12] = 0
    truth[0] = 255
    pictures = folder / "pictures"
    Image.new("RGB", (32, 24), (90, 120, 60)).save(pictures / "key-1.image.jpg")
    Image.fromarray(truth).save(pictures / "key-1.truth.png")
    Image.fromarray(prediction).save(pictures / "key-1.prediction.png")
    return folder


BOX = {"class_id": 0, "box": [2.0, 3.0, 12.0, 13.0]}
TRUTH = [
    {**BOX, "difficult": False, "crowd": False},
    {"class_id": 1, "box": [20.0, 2.0, 30.0, 20.0], "difficult": False, "crowd": False},
    {"class_id": 1, "box": [0.0, 14.0, 9.0, 24.0], "difficult": True, "crowd": False},
]
PREDICTION = [
    {**BOX, "score": 0.9},  # right
    {**BOX, "score": 0.8},  # a second time
    {"class_id": 1, "box": [0.0, 14.0, 9.0, 24.0], "score": 0.7},  # difficult: counts neither way
    {
        "class_id": 1,
        "box": [20.0, 2.0, 30.0, 20.0],
        "score": 0.29,
    },  # right, but below what is shown
]


def add_detector(root, run, value, model="ssd300", **figures):
    """Write what the training and the evaluation of a detector leave."""
    add_run(root, run, model=model, task="detection")
    folder = root / "evaluate" / run
    (folder / "pictures").mkdir(parents=True)
    card = {
        "run": run,
        "dataset": "toy",
        "split": "val",
        "images": 7,
        "protocol": {"iou": 0.5},
        "mAP_50": value,
        "mAP_50_11": value - 0.01,
        "images_per_s": 5.0,
        "device": "cpu",
        **figures,
    }
    (folder / "metrics.json").write_text(json.dumps(card))
    rows = [[NAMES[0], 0, value, value, 20], [NAMES[1], 1, 0.25, 0.3, 5], [NAMES[2], 2, "", "", 0]]
    write_csv(folder / "per_class.csv", [["class", "id", "score", "ap_11", "objects"], *rows])
    pictures = folder / "pictures"
    Image.new("RGB", (32, 24), (90, 120, 60)).save(pictures / "key-1.image.jpg")
    (pictures / "key-1.truth.json").write_text(json.dumps(TRUTH))
    (pictures / "key-1.prediction.json").write_text(json.dumps(PREDICTION))
    return folder


def make_tree(root):
    add_run(root, "plain")
    add_evaluation(root, "plain", 0.512)
    add_run(root, "hila_<s3>", model="hila_segformer_b0_s3", params=4_142_123)
    add_evaluation(root, "hila_<s3>", 0.634)
    add_run(root, "first", stage="pretrain", model="mit_b0", task="classification")


@pytest.fixture
def tree(tmp_path):
    make_tree(tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of an untouched tree."""
    folder = tmp_path_factory.mktemp("report")
    make_tree(folder / "results")
    return page.write_report(folder / "results", folder / "out", "A & <i>B</i>", "seed: 1 # <x>")


def edit_json(path, key, value):
    document = json.loads(path.read_text())
    document[key] = value
    path.write_text(json.dumps(document))


def test_collect_reads_every_run_fine_tuned_ones_first(tree):
    runs = tables.collect(tree).runs
    assert [(run.stage, run.name) for run in runs] == [
        ("finetune", "hila_<s3>"),
        ("finetune", "plain"),
        ("pretrain", "first"),
    ]
    plain = runs[1]
    assert plain.headline == 0.512
    assert plain.curve.loss[2] is None  # nan
    assert plain.curve.val_metric[9] == pytest.approx(0.1)
    assert plain.curve.samples[-2:] == (312, 320)
    assert plain.evaluation.classes[2].score is None
    assert [picture.key for picture in plain.evaluation.pictures] == ["key-1"]
    assert runs[2].headline is None


def test_a_name_in_both_stages_is_evaluated_as_the_fine_tuned_one(tree):
    add_run(tree, "plain", stage="pretrain", model="mit_b0", task="classification")
    runs = {(run.stage, run.name): run for run in tables.collect(tree).runs}
    assert runs["finetune", "plain"].headline == 0.512
    assert runs["pretrain", "plain"].evaluation is None


def test_an_empty_tree_says_what_to_run(tmp_path):
    with pytest.raises(DataError, match=r"no runs in .*, run `dvc repro`"):
        tables.collect(tmp_path)


FAULTS = {
    "no key": ("finetune/plain/model.json", lambda p: edit_without(p, "macs"), "'macs' is missing"),
    "type": ("finetune/plain/model.json", lambda p: edit_json(p, "steps", "9"), "'steps' is '9'"),
    "bool": ("finetune/plain/model.json", lambda p: edit_json(p, "params", True), "'params'"),
    "task": ("finetune/plain/model.json", lambda p: edit_json(p, "task", "sing"), "task is 'sing'"),
    "names": ("finetune/plain/model.json", lambda p: edit_json(p, "class_names", ["a"]), "1 entr"),
    "json": ("finetune/plain/metrics.json", lambda p: p.write_text("{"), "not valid JSON"),
    "list": ("finetune/plain/metrics.json", lambda p: p.write_text("[]"), "holds list"),
    "gone": ("finetune/plain/curve.csv", lambda p: p.unlink(), "not found"),
    "column": ("finetune/plain/curve.csv", lambda p: p.write_text("step,loss\n"), "'samples'"),
    "cell": (
        "finetune/plain/curve.csv",
        lambda p: p.write_text(p.read_text().replace("2.0", "two")),
        "line 2: loss is 'two'",
    ),
    "range": ("evaluate/plain/metrics.json", lambda p: edit_json(p, "mIoU", 51.2), "0..1"),
    "blank id": (
        "evaluate/plain/per_class.csv",
        lambda p: p.write_text("class,id,score,pixels\nsky,,0.5,3\n"),
        "line 2: id is ''",
    ),
    "picture": (
        "evaluate/plain/pictures/key-1.prediction.png",
        lambda p: p.unlink(),
        "key-1.image.jpg is there",
    ),
}


def edit_without(path, key):
    document = json.loads(path.read_text())
    del document[key]
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_file_is_named(tree, fault):
    name, spoil, message = FAULTS[fault]
    spoil(tree / name)
    with pytest.raises(DataError) as error:
        tables.collect(tree)
    assert str(tree / name) in str(error.value)
    assert message in str(error.value)


def test_only_the_named_runs_are_shown(tree):
    everything = tables.collect(tree)
    chosen = everything.runs[0].name
    assert len(everything.runs) > 1
    assert {run.name for run in tables.collect(tree, [chosen]).runs} == {chosen}
    with pytest.raises(DataError, match=r"no runs in .*dvc repro"):
        tables.collect(tree, ["another"])


@pytest.mark.parametrize(
    ("size", "mode", "message"), [((8, 8), "L", "its truth has 24 x 32"), ((32, 24), "RGB", "RGB")]
)
def test_a_wrong_prediction_is_named(tree, tmp_path, size, mode, message):
    Image.new(mode, size).save(tree / "evaluate/plain/pictures/key-1.prediction.png")
    with pytest.raises(DataError, match=message):
        page.write_report(tree, tmp_path / "out", "T")
    assert not (tmp_path / "out").exists()


def test_results_json_is_strict_json_with_a_version(tree):
    edit_json(tree / "finetune/plain/metrics.json", "loss", float("nan"))
    document = tables.results_json(tables.collect(tree))
    assert document["schema_version"] == tables.SCHEMA_VERSION
    json.dumps(document, allow_nan=False)
    plain = document["runs"][1]
    assert next(iter(plain)) == "run"
    assert plain["training"]["loss"] is None
    assert plain["evaluation"]["metrics"] == {"mIoU": 0.512}
    assert plain["evaluation"]["pictures"] == ["key-1"]
    assert document["runs"][2]["evaluation"] is None


def test_summary_table_lines_up(tree):
    lines = tables.summary_table(tables.collect(tree)).splitlines()
    assert lines[0].split()[:2] == ["run", "model"]
    assert re.search(r"plain +segformer_b0 +toy +mIoU 51\.2 % +3\.72 +5\.60 +12\.3 +40$", lines[3])
    assert "(top1 40.0 %)" in lines[4]
    assert lines[5].startswith("(in brackets")
    assert len({len(line) for line in lines[:4]}) == 1


def test_paper_numbers_hold_the_printed_rows_of_models_that_are_here():
    papers = {paper["key"]: paper for paper in tables.paper_numbers()}
    hila, cla, segvit, cfsam = (papers[key] for key in ("hila", "cla", "segvit", "cfsam"))
    rows = {(r["model"], r["dataset"], r["hila_pretraining"]): r for r in hila["rows"]}
    assert len(rows) == len(hila["rows"]) == 22
    best = rows["hila_segformer_b0_s3", "ade20k", True]
    assert (best["params_m"], best["flops_g"], best["miou_ss"], best["f3"]) == (
        4.2,
        9.8,
        40.3,
        69.4,
    )
    assert rows["segformer_b0", "cityscapes", None]["miou_ms"] == 78.1
    small = {row["model"]: row for row in cla["rows"]}
    assert small["cla_segformer_b0"]["miou_small"] - small["segformer_b0"]["miou_small"] == (
        pytest.approx(7.02)
    )
    assert small["cla_segformer_b1"]["miou_ss"] == 43.12
    of_segvit = {(row["model"], row["dataset"]): row for row in segvit["rows"]}
    assert len(of_segvit) == len(segvit["rows"]) == 11
    full = of_segvit["segvit_l", "ade20k"]
    assert (full["flops_g"], full["miou_ss"], full["miou_ms"]) == (637.9, 54.6, 55.2)
    assert of_segvit["segvit_shrunk_l", "pascal_context"]["miou_ms"] == 57.4
    on_voc = {row["model"]: row for row in cfsam["rows"] if row["dataset"] == "voc0712"}
    full = on_voc["ssd300_cfsam"]
    assert (full["params_m"], full["flops_g"], full["fps"]) == (45.16, 45.22, 57)
    assert on_voc["ssd300_cfsam_deep"]["ap"] == {"bird": 73.5, "bus": 85.0, "cow": 84.7}
    on_coco = {row["model"]: row["ap50"] for row in cfsam["rows"] if row["dataset"] == "coco"}
    assert on_coco["ssd300_cfsam"] - on_coco["ssd300"] == pytest.approx(10.9)
    assert all(set(row.get("ap", {})) <= set(cfsam["classes"]) for row in cfsam["rows"])
    assert {name: row["map_50"] for name, row in on_voc.items() if "map_50" in row} == {
        "ssd300": 75.5,
        "ssd300_se": 77.2,
        "ssd300_cfam": 77.6,
        "ssd300_mvit": 78.1,
        "ssd300_cfsam": 78.6,
    }
    for row in (*hila["rows"], *cla["rows"], *segvit["rows"], *cfsam["rows"]):
        assert row["model"] in list_models()


def test_small_classes_stand_beside_the_printed_ones(tree, tmp_path):
    edit_json(tree / "finetune/plain/model.json", "model", "cla_segformer_b0")
    edit_json(tree / "evaluate/plain/metrics.json", "mIoU_small", 0.2875)
    text = page.write_report(tree, tmp_path / "out", "T").read_text()
    table = text[text.index('id="papers"') :]
    table = table[table.index("Chung, Lu, Cho, Yu") :]
    assert "small classes, %" in table
    assert '<td class="n">28.7</td>' in table
    assert '<td class="n">29.66</td>' in table
    assert '<td class="n">None</td>' not in text
    edit_json(tree / "finetune/plain/model.json", "model", "hila_segformer_b0_s3")
    text = page.write_report(tree, tmp_path / "out", "T").read_text()
    assert "small classes, %" not in text[text.index('id="papers"') :]


def test_report_holds_every_run_and_escapes_every_name(report):
    text = report.read_text(encoding="utf-8")
    for name in ("plain", "_<wbr>&lt;s3&gt;", "first", "A &amp; &lt;i&gt;B", "seed: 1 # &lt;x&gt;"):
        assert name in text
    for raw in ("<s3>", "<b>kerb", "<i>B", "<x>"):
        assert raw not in text
    assert NAMES[2] in text
    assert "63.4" in text
    # 23 rows count; 11 of class 1 were called class 0: (23/34 + 12/23) / 2 and (23 + 12) / 46.
    assert "mIoU 59.9, right 76.1 %" in text


def test_report_needs_nothing_from_elsewhere(report):
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"https?://", text)
    assert not re.search(r"<(script|link|iframe|object)\b|@import", text)
    sources = re.findall(r'(?:src|href)="([^"]{0,16})', text)
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert set(targets) <= set(ids)


def test_report_is_byte_identical_twice(report, tree, tmp_path):
    again = page.write_report(tree, tmp_path / "out", "A & <i>B</i>", "seed: 1 # <x>")
    assert [path.name for path in sorted(again.parent.iterdir())] == ["report.html", "results.json"]
    for path in again.parent.iterdir():
        assert path.read_bytes() == (report.parent / path.name).read_bytes()


def test_report_says_that_another_data_set_is_not_comparable(report, tree, tmp_path):
    text = report.read_text(encoding="utf-8")
    assert "Measured on toy, which the paper does not use: the metrics are not comparable" in text
    for folder in (tree / "finetune").iterdir():
        edit_json(folder / "model.json", "dataset", "ade20k")
    text = page.write_report(tree, tmp_path / "out", "T").read_text(encoding="utf-8")
    assert "which the paper does not use" not in text


def test_report_on_a_reconstruction_says_so(tmp_path):
    add_run(tmp_path, "strips", model="scaseg_mit_b0")
    add_evaluation(tmp_path, "strips", 0.3)
    text = page.write_report(tmp_path, tmp_path / "out", "T").read_text(encoding="utf-8")
    assert "These models are a reconstruction" in text
    assert "would confirm or correct" in text
    assert "which the paper does not use" not in text
    (scaseg,) = (paper for paper in tables.paper_numbers() if paper["key"] == "scaseg")
    assert scaseg["models"] == list_models(system="SCASeg")


def test_report_of_pretraining_alone(tmp_path):
    add_run(
        tmp_path,
        "first",
        stage="pretrain",
        model="mit_b0",
        task="classification",
        images_per_s=None,
    )
    add_evaluation(tmp_path, "first", 0.7, task="classification")
    text = page.write_report(tmp_path, tmp_path / "out", "T").read_text(encoding="utf-8")
    assert "1 model pretrained." in " ".join(text.split())
    assert "top-1 accuracy" in text
    assert 'id="pictures"' not in text
    assert 'id="papers"' not in text


def test_every_picture_has_a_text_and_every_header_a_scope(report):
    text = report.read_text(encoding="utf-8")
    pictures = re.findall(r"<img [^>]*>", text)
    assert len(pictures) == 4  # image, truth, two predictions
    assert all(re.search(r'alt="[^"]+"', picture) for picture in pictures)
    assert all("scope=" in header for header in re.findall(r"<th\b[^>]*>", text))
    assert all('aria-label="' in svg for svg in re.findall(r"<svg [^>]*>", text))


def test_picture_scores_by_hand():
    truth = np.array([[0, 0, 1, 255]], np.uint8)
    prediction = np.array([[0, 1, 1, 2]], np.uint8)
    iou, right = pictures.picture_scores(prediction, truth)
    assert iou == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert right == pytest.approx(2 / 3)
    assert pictures.picture_scores(prediction, np.full_like(truth, 255)) == (None, None)


def test_colourise_paints_each_id_and_refuses_others():
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    picture = overlay.colourise(mask, PALETTE)
    assert picture.shape == (2, 2, 3)
    assert picture[1, 0].tolist() == PALETTE[2]
    assert tuple(picture[1, 1]) == overlay.IGNORE_COLOUR
    with pytest.raises(DataError, match=r"class id 3, but there are only 3 colours"):
        overlay.colourise(np.array([[3]], np.uint8), PALETTE)


def test_areas_are_fractions_of_all_pixels_largest_first():
    mask = np.array([[0, 1, 1, 1], [255, 255, 2, 1]], np.uint8)
    assert overlay.areas(mask, 3) == [(1, 0.5), (0, 0.125), (2, 0.125)]


def test_overlay_blends_and_keeps_ignored_pixels():
    image = np.full((500, 600, 3), 100, np.uint8)
    mask = np.zeros((500, 600), np.uint8)
    mask[:, 300:] = 1
    mask[400:] = 255
    picture = np.asarray(overlay.draw_overlay(image, mask, NAMES, PALETTE, legend=False))
    assert picture.shape == (500, 600, 3)
    assert (picture[400:] == 100).all()
    assert picture[0, 0].tolist() == [55, 60, 65]
    assert picture[0, 299].tolist() == [27, 30, 32]  # a border: half as bright


def test_overlay_puts_the_legend_below_and_enlarges_small_pictures():
    image = np.full((30, 40, 3), 100, np.uint8)
    mask = np.zeros((30, 40), np.uint8)
    plain = overlay.draw_overlay(image, mask, NAMES, PALETTE, legend=False)
    full = overlay.draw_overlay(image, mask, NAMES, PALETTE)
    assert plain.size == (480, 360)
    assert full.width == plain.width
    assert full.height > plain.height
    assert full.crop((0, 0, *plain.size)).tobytes() == plain.tobytes()
    assert np.asarray(full)[plain.height :].min() < 60  # the text


def test_overlay_with_150_long_class_names():
    mask = np.arange(150, dtype=np.uint8).repeat(4).reshape(20, 30)
    names = [f"wall; partition; {'very ' * i}long \u6a39" for i in range(150)]
    palette = [[i, 255 - i, i // 2] for i in range(150)]
    picture = overlay.draw_overlay(np.zeros((20, 30, 3), np.uint8), mask, names, palette)
    assert picture.width == 480
    assert picture.height > 320 + 22 * 75


def test_overlay_refuses_a_mask_of_another_size():
    with pytest.raises(DataError, match=r"mask is 2 x 2 pixels, its image 4 x 4"):
        overlay.draw_overlay(
            np.zeros((4, 4, 3), np.uint8), np.zeros((2, 2), np.uint8), NAMES, PALETTE
        )


def test_label_bars_are_as_long_as_the_probability():
    picture = np.asarray(
        overlay.draw_label(np.zeros((480, 480, 3), np.uint8), [("cat", 0.75), ("dog", 0.25)])
    )
    bars = (picture == overlay.BAR_COLOUR).all(axis=2).sum(axis=1)
    lengths = bars[np.flatnonzero(bars)]
    assert lengths[0] == pytest.approx(3 * lengths[-1], abs=3)


def test_smoothing_keeps_a_constant_and_the_length():
    assert figures.smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    assert len(figures.smoothed([1.0])) == 1


def test_class_bars_split_150_classes_and_name_each():
    names = [f"class{i}" for i in range(150)]
    bars = [figures.Bars("run", 0, [0.5] * 149 + [None])]
    drawn = figures.class_bars(names, bars, "IoU", "bars", "about")
    assert len(drawn) > 1
    assert all(f">{name}<" in "".join(drawn) for name in names)


def test_figures_take_the_colours_of_the_page():
    line = figures.Line("a <run> $x$", 1, [0, 8, 16], [1.0, None, 0.5])
    svg = figures.loss_curves([line], "fig", 'says "so" & more')
    assert svg.startswith("<svg ")
    assert "var(--run-1, #" in svg
    assert "currentColor" in svg
    assert "a &lt;run&gt; $x$" in svg
    assert "says &quot;so&quot; &amp; more" in svg


def test_each_run_colour_has_contrast_on_its_page():
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    template = Path(page.__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    light, dark = re.findall(r"--paper: (#\w+)", template)
    assert light == "#fff"
    for on_white, on_black in figures.RUN_COLOURS:
        assert 1.05 / (luminance(on_white) + 0.05) >= 4.5
        assert (luminance(on_black) + 0.05) / (luminance(dark) + 0.05) >= 4.5


def one_cell(cell, side=4, box=(16.0, 8.0, 32.0, 24.0)):
    """Attention that is all in one cell of a map over `box`."""
    values = [[float((row, column) == cell) for column in range(side)] for row in range(side)]
    level = AttentionMap((4,), box, tuple(map(tuple, values)))
    return TokenAttention((20.0, 10.0), box, (level,))


@pytest.mark.parametrize("cell", [(1, 2), (3, 0)])
def test_attention_is_coloured_where_it_is_and_nowhere_else(cell):
    image = np.full((48, 64, 3), 100, np.uint8)
    token = one_cell(cell)
    (panel,) = attention_maps.draw_maps(image, token)
    assert panel.size == (320, 240)  # 5 px a pixel: three boxes of 16 are the image's height
    picture = np.asarray(panel).astype(int)
    middle = [round(5 * (start + 4 * part + 2)) for start, part in zip((8, 16), cell, strict=True)]
    assert np.ptp(picture[tuple(middle)]) > 60, "coloured"
    assert (picture[:35, :70] == 100).all(), "as the photograph"
    coloured = np.argwhere(np.ptp(picture[45:115, 85:155], axis=2) > 25).mean(axis=0)
    np.testing.assert_allclose(coloured, np.subtract(middle, (45, 85)), atol=6)
    assert picture[40, 100].tolist() == [255, 45, 45], "the box's edge"


def test_attention_in_a_large_image_is_enlarged():
    image = np.zeros((300, 400, 3), np.uint8)
    image[10:20, 20:30] = 200
    whole = attention_maps.draw_token(image, one_cell((0, 0)))
    (part,) = attention_maps.draw_maps(image, one_cell((0, 0)))
    assert whole.size == part.size == (320, 240)
    # 48 of 300 rows at the upper left corner: 5 px a pixel, moved into the image.
    grey = np.asarray(part)[5 * 15, 5 * 28]
    assert grey.min() > 100
    assert np.asarray(part)[5 * 40, 5 * 55].max() < 60


def test_the_sheet_has_a_row_a_map_and_a_column_a_token():
    image = np.full((48, 64, 3), 100, np.uint8)
    one = attention_maps.draw_sheet(image, [one_cell((0, 0))])
    two, three = (attention_maps.draw_sheet(image, [one_cell((0, 0))] * n) for n in (2, 3))
    assert three.height == two.height == one.height > 2 * 240
    assert three.width == two.width + 330
    assert attention_maps.describe(one_cell((0, 0)).maps[0]) == "largest of 16 cells: 1"


def test_attention_stands_in_the_report_where_there_is_some(tree, tmp_path):
    def text():
        return page.write_report(tree, tmp_path / "out", "T").read_text(encoding="utf-8")

    assert 'id="attention"' not in text()
    place = tree / "evaluate" / "hila_<s3>" / "pictures" / "key-1.attention.json"
    place.write_text(json.dumps(asdict(one_cell((1, 2)))))
    found = text()
    assert found.count('id="attention"') == 1
    assert found.count('alt="Attention of stage 4 in key-1, hila_&lt;s3&gt;"') == 1
    assert 'href="#attention"' in found
    assert "largest of 16 cells: 1" in found
    assert not re.search(r"https?://", found)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: entry.pop("point"),
        lambda entry: entry["maps"][0].update(values=[[1, 2], [3]]),
        lambda entry: entry["maps"][0].update(values=[[-1.0]]),
        lambda entry: entry.update(box=[1, 2, 3]),
    ],
)
def test_a_broken_attention_file_is_named(tree, tmp_path, spoil):
    place = tree / "evaluate" / "plain" / "pictures" / "key-1.attention.json"
    entry = json.loads(json.dumps(asdict(one_cell((1, 2)))))
    spoil(entry)
    place.write_text(json.dumps(entry))
    with pytest.raises(DataError, match=r"key-1\.attention\.json: not an attention file"):
        page.write_report(tree, tmp_path / "out", "T")


def test_probe_curves_are_a_png():
    lines = [figures.ProbeLine("a $x$", 0, [0.1, 0.2, 0.3], 2)]
    picture = figures.probe_curves({2: lines, 3: lines, 4: lines}, "mIoU")
    assert picture.startswith(b"\x89PNG")
    assert picture == figures.probe_curves({2: lines, 3: lines, 4: lines}, "mIoU")


def test_boundary_f_is_a_column_where_it_was_measured(tree, tmp_path):
    def header():
        place = page.write_report(tree, tmp_path / "out", "title")
        return re.search(r"<thead>.*?</thead>", place.read_text(), flags=re.DOTALL).group()

    assert "boundary F" not in header()
    for run in ("plain", "hila_<s3>"):
        edit_json(tree / "evaluate" / run / "metrics.json", "boundary_F", 0.7)
    assert "boundary F<small>" in header()
    assert tables.collect(tree).runs[1].evaluation.metrics["boundary_F"] == 0.7


def test_detectors_have_their_rows_classes_and_pictures(tmp_path):
    tree = tmp_path / "results"
    add_detector(tree, "plain", 0.512, AP=0.301, AR_100=0.402)
    add_detector(tree, "cross", 0.634, model="ssd300_cfsam", AP=0.312, AR_100=0.403)
    add_run(tree, "masks")
    add_evaluation(tree, "masks", 0.5)
    text = page.write_report(tree, tmp_path / "out", "T").read_text(encoding="utf-8")
    assert "best mAP at IoU 0.5 <strong>63.4 %</strong> by cross" in text
    first = text[text.index("toy, val split") :]
    for words in ("mAP at IoU 0.5<small>", "mAP at IoU 0.5, 11 points<small>", ">62.4<"):
        assert words in first[: first.index("COCO&#39;s figures")]
    coco = first[first.index("COCO&#39;s figures") :]
    assert re.search(r"AR<br>100 boxes<small>.*>31\.2</td>.*>40\.3</td>", coco, flags=re.DOTALL)
    assert "AP at IoU 0.5 of all 3 classes" in text
    assert re.search(r"<td class=\"n quiet\">80\.0</td>", text), "share of the objects"
    assert text.count("3 boxes, 1 right of 2") == 2
    assert "Boxes of score 0.3 or more" in text
    assert "Light grey pixels are ignored" in text
    pictures_of = text[text.index('id="pictures"') : text.index('id="papers"')]
    assert pictures_of.count("<img ") == 4 + 3
    assert "78.6" in text[text.index('id="papers"') :]
    assert "not comparable" in text


def test_detectors_stand_beside_the_printed_ones(tmp_path):
    tree = tmp_path / "results"
    folder = add_detector(tree, "shallow", 0.512, model="ssd300_cfsam_shallow", AP50=0.499)
    add_run(tree, "unseen", model="ssd300", task="detection")
    edit_json(tree / "finetune/shallow/model.json", "dataset", "voc0712")
    rows = [["bird", 0, 0.123, 0.1, 4], ["cow", 1, "", "", 0]]
    write_csv(folder / "per_class.csv", [["class", "id", "score", "ap_11", "objects"], *rows])
    text = page.write_report(tree, tmp_path / "out", "T").read_text(encoding="utf-8")
    table = text[text.index('id="papers"') : text.index('id="provenance"')]
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in table.split("<tr")]
    measured = [row[1:] for row in cells if "VOC 07+12 val" in row]
    assert measured == [["3.72", "5.60", "51.2", "50.2", "49.9", "12.3", "-", "-", "5.0"]]
    printed = [row[1:] for row in cells if "74.8" in row]
    assert printed == [["-", "-", "-", "-", "74.8", "84.6", "83.2", "-"]]
    assert "BoundConvNet" in table
    assert "EfficientDet-D0" in table
    assert "mIoU" not in table


def test_loss_curves_of_several_detectors_share_a_figure(tmp_path):
    for name in ("one", "two", "three"):
        add_detector(tmp_path / "results", name, 0.5)
    text = page.write_report(tmp_path / "results", tmp_path / "out", "T").read_text()
    figure = re.search(
        r"<svg [^>]*Training loss of the fine-tuned models.*?</svg>", text, re.DOTALL
    )
    assert all(f">{name}</text>" in figure[0] for name in ("one", "two", "three"))
    assert "Validation mAP at IoU 0.5" in text


def entry_without(entries, key):
    return [{name: value for name, value in entry.items() if name != key} for entry in entries]


BOX_FAULTS = {
    "no list": ("truth", {"a": 1}, "TypeError"),
    "no flag": ("truth", entry_without(TRUTH, "crowd"), "KeyError: 'crowd'"),
    "no score": ("prediction", entry_without(PREDICTION, "score"), "KeyError: 'score'"),
    "corners": ("prediction", [{**PREDICTION[0], "box": [1, 2, 3]}], "ValueError"),
    "nan": ("prediction", [{**PREDICTION[0], "box": [1, 2, 3, float("nan")]}], "a corner is not"),
    "class": ("truth", [{**TRUTH[0], "class_id": 3}], "class_id is 3, expected 0..2"),
}


@pytest.mark.parametrize("fault", BOX_FAULTS)
def test_a_broken_file_of_boxes_is_named(tmp_path, fault):
    name, entries, message = BOX_FAULTS[fault]
    folder = add_detector(tmp_path / "results", "plain", 0.5)
    place = folder / "pictures" / f"key-1.{name}.json"
    place.write_text(json.dumps(entries))
    with pytest.raises(DataError, match=re.escape(message)) as error:
        page.write_report(tmp_path / "results", tmp_path / "out", "T")
    assert str(place) in str(error.value)
    assert "\n" not in str(error.value)


def test_detections_are_counted_by_hand(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(TRUTH))
    (tmp_path / "p.json").write_text(json.dumps(PREDICTION))
    truth = box_pictures.read_truth(tmp_path / "t.json", 3)
    prediction = box_pictures.read_prediction(tmp_path / "p.json", 3)
    assert truth.faint.tolist() == [False, False, True]
    assert prediction.scores.tolist() == [0.9, 0.8, 0.7]
    assert box_pictures.count_right(prediction, truth) == (1, 2)
    (tmp_path / "p.json").write_text("[]")
    nothing = box_pictures.read_prediction(tmp_path / "p.json", 3)
    assert box_pictures.count_right(nothing, truth) == (0, 2)


@pytest.mark.parametrize(("shift", "right"), [(0.0, 1), (3.3, 1), (3.4, 0), (20.0, 0)])
def test_a_box_is_right_from_iou_one_half(shift, right):
    boxes = np.array([[0.0, 0.0, 10.0, 10.0]])  # (10 - s) / (10 + s) is 1 / 2 at 10 / 3
    truth = box_pictures.PictureBoxes(boxes, np.array([1]), faint=np.array([False]))
    moved = boxes + np.array([shift, 0, shift, 0])
    for label in (0, 1):
        found = box_pictures.PictureBoxes(moved, np.array([label]), scores=np.array([0.5]))
        assert box_pictures.count_right(found, truth) == (right if label else 0, 1)


def test_a_loss_that_falls_far_has_a_logarithmic_axis():
    def ticks(last):
        line = figures.Line("a", 0, range(100), [20.0, *np.linspace(19, last, 99)])
        svg = figures.loss_curves([line], "fig", "about")
        return [float(t) for t in re.findall(r">([\d.]+)</text>", svg)]

    assert {5.0, 10.0, 20.0} <= set(ticks(2.0))
    assert 15.0 not in ticks(2.0)
    assert 15.0 in ticks(5.0) or 16.0 in ticks(5.0)
