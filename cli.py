"""The command line: `xattn ...`, the same as `python cli.py ...`.

Imports nothing heavy at the top, so that --help answers at once; each command imports what it
needs.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from benchmarks.commands import AsJson, bench_app
from pipelines.terminal import print_json, print_table
from xattn.structures import Task

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # rich takes longer to import than all the rest
    pretty_exceptions_enable=False,
    help="Cross-layer-attention vision models: trained, compared and served from one pipeline.",
)

Name = Annotated[str, typer.Argument(help="A name from params.yaml.", show_default=False)]
Model = Annotated[str, typer.Argument(help="A run of params.yaml, or a model folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]

app.add_typer(bench_app, name="bench", help="Measure ourselves beside peers, in one run.")


def main() -> None:
    """Run the command line; faults that the user can mend are one line and an exit code."""
    from pipelines.edge import run_to_exit

    run_to_exit(app)


@app.command()
def models(
    task: Annotated[Task | None, typer.Option(help="Only models for this task.")] = None,
    system: Annotated[str | None, typer.Option(help="Only models of this system.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the models with parameters and multiply-adds, ours beside the paper's."""
    from dataclasses import asdict

    from xattn.errors import UnknownNameError
    from xattn.models.zoo import list_models, model_card

    systems = {model_card(name).system for name in list_models()} if system else {}
    if system is not None and system not in systems:
        raise UnknownNameError("system", system, systems)
    cards = [model_card(name) for name in list_models(task, system)]
    if as_json:
        print_json([asdict(card) for card in cards])
        return
    rows = [("model", "system", "task", "classes", "input", "params", "MACs G", "paper", "source")]
    for card in cards:
        paper = "-" if card.paper_params is None else f"{card.paper_params / 1e6:.1f} M"
        if card.paper_macs is not None:
            paper += f", {card.paper_macs / 1e9:.1f} G"
        size = "x".join(str(side) for side in card.input[1:])
        counts = (f"{card.params:,}", f"{card.macs / 1e9:.2f}")
        rows.append(
            (
                card.name,
                card.system,
                card.task,
                str(card.num_classes),
                size,
                *counts,
                paper,
                card.source,
            )
        )
    print_table(rows)


@app.command()
def datasets(
    name: Annotated[str | None, typer.Argument(help="One reader, in full.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the data set readers, or say what one expects on disk."""
    from xattn.data.datasets import list_readers, load_reader

    if name is None:
        readers = [
            {
                "name": reader,
                "about": _first_line(load_reader(reader).__doc__),
                "url": load_reader(reader).URL,
            }
            for reader in list_readers()
        ]
        if as_json:
            print_json(readers)
        else:
            print_table([(reader["name"], reader["about"]) for reader in readers])
        return
    reader = load_reader(name)
    fields = {key: str(field.default) for key, field in reader.Settings.model_fields.items()}
    if as_json:
        about = {"name": name, "about": reader.__doc__, "url": reader.URL}
        print_json({**about, "settings": fields, "layout": reader.LAYOUT})
        return
    print((reader.__doc__ or "").strip(), "\n")
    print(f"from: {reader.URL}\n" if reader.URL else "")
    print(f"on disk:\n{reader.LAYOUT}\nsettings and their defaults:")
    print_table([(f"  {key}", value) for key, value in fields.items()])


@app.command()
def weights(
    model: Annotated[str, typer.Argument(help="A name from `xattn models`.", show_default=False)],
    file: Annotated[
        Path, typer.Argument(help="A .safetensors, .pt, .pth or .bin file.", show_default=False)
    ],
    classes: Annotated[int | None, typer.Option(min=1, help="Outputs, else the paper's.")] = None,
    partial: Annotated[bool, typer.Option(help="Leave out what has another shape.")] = False,
    as_json: AsJson = False,
) -> None:
    """Try a weights file on a model: what loads, what stays missing, what is left over."""
    from dataclasses import asdict

    from xattn.models.weights import load_weights
    from xattn.models.zoo import create_model, model_card

    built = create_model(model, num_classes=classes or model_card(model).num_classes)
    report = load_weights(built, file, partial=partial)
    if as_json:
        print_json(asdict(report))
    else:
        print(report.listing())


preset_app = typer.Typer(no_args_is_help=False, invoke_without_command=True)
app.add_typer(
    preset_app, name="preset", help="List the complete params files, or make one the active."
)


@preset_app.callback()
def preset(context: typer.Context) -> None:
    """List the presets."""
    if context.invoked_subcommand is None:
        from xattn.config import list_presets, preset_path

        about = [(name, _about(preset_path(name))) for name in list_presets()]
        print_table(about)


@preset_app.command("use")
def preset_use(
    name: Annotated[str, typer.Argument(help="A preset.", show_default=False)],
    force: Annotated[
        bool, typer.Option(help="Overwrite a params.yaml with changes of yours.")
    ] = False,
) -> None:
    """Make a preset the params.yaml of this folder."""
    from xattn.config import list_presets, preset_path
    from xattn.errors import ConfigError
    from xattn.storage import copy_atomic

    source, target = preset_path(name), Path("params.yaml")
    known = {preset_path(other).read_bytes() for other in list_presets()}
    if target.exists() and target.read_bytes() not in known and not force:
        raise ConfigError("params.yaml: has changes of yours; keep a copy, then `--force`")
    copy_atomic(source, target)
    print(f"params.yaml is now the preset '{name}'; `dvc repro` runs it")


@app.command()
def shard(
    name: Annotated[str, typer.Argument(help="A data set of params.yaml, or a reader.")],
    root: Annotated[Path | None, typer.Option(help="The raw files, for a reader.")] = None,
    out: Annotated[
        str | None, typer.Option(help="The shard folder or s3://..., for a reader.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one a core.")
    ] = None,
    repair: Annotated[bool, typer.Option(help="Make only what is damaged anew.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a raw data set into WebDataset shards with an index."""
    from pipelines.shard import shard as shard_configured
    from pipelines.shard import write_dataset
    from xattn.data.datasets import DatasetConfig
    from xattn.errors import ConfigError

    base = Path.cwd()
    if out is None and root is not None:
        raise ConfigError("--root: goes with --out, which names the shard folder")
    if out is None:
        index = shard_configured(name, base, jobs, repair)
    else:
        dataset = DatasetConfig(reader=name, root=None if root is None else str(root.resolve()))
        index = write_dataset(name, dataset, base, out, jobs, repair)
    counts = {split: summary.count for split, summary in index.splits.items()}
    if as_json:
        print_json({"path": index.place, "samples": counts, "fingerprint": index.fingerprint})
    else:
        print(f"{index.place}: {counts}, fingerprint {index.fingerprint[:12]}")


@app.command()
def verify(
    path: Annotated[
        str, typer.Argument(help="A shard folder, or s3://bucket/folder.", show_default=False)
    ],
    deep: Annotated[
        bool, typer.Option(help="Check every field's bytes, not the shards alone.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare shards with their index; exit 3 when something is damaged."""
    from dataclasses import asdict

    from pipelines.edge import progress_bar
    from xattn.data.verify import verify as find_damage
    from xattn.structures import Progress

    with progress_bar("verify", "shard") as show:
        findings = find_damage(path, deep, lambda done, total: show(Progress(done, total)))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            key = f", key {finding.key}" if finding.key else ""
            key += f", offset {finding.offset}" if finding.offset is not None else ""
            print(f"{finding.shard}{key}: {finding.problem}; {finding.fix}")
        sound = "sound" if deep else "sizes and index agree; --deep reads every byte"
        print(f"{path}: {len(findings)} faults" if findings else f"{path}: {sound}")
    if findings:
        raise typer.Exit(3)


@app.command("small-classes")
def small_classes(
    dataset: Annotated[
        str,
        typer.Argument(help="A data set of params.yaml, or a shard folder.", show_default=False),
    ],
    split: Annotated[str, typer.Option(help="The split that is counted.")] = "val",
    unit: Annotated[
        Literal["image", "component"],
        typer.Option(help="One appearance: a class in an image, or a connected part of it."),
    ] = "image",
    measure: Annotated[
        Literal["area", "box"], typer.Option(help="Below 1024 px, or both sides below 32 px.")
    ] = "area",
    share: Annotated[
        float, typer.Option(min=0, max=0.999, help="Listed are classes more of which is small.")
    ] = 0.6,
    min_pixels: Annotated[int, typer.Option(min=1, help="Smaller parts do not count.")] = 1,
    as_evaluated: Annotated[
        bool, typer.Option("--as-evaluated", help="In the size of params.yaml's evaluate.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The list, for evaluate.small_classes.")] = Path(
        "small_classes.txt"
    ),
    as_json: AsJson = False,
) -> None:
    """List the classes that are mostly small, over which mIoU_small is the mean."""
    from pipelines.small_classes import list_small_classes
    from xattn.config import load_config
    from xattn.evaluate.small_classes import SmallClassOptions, as_records

    resize = load_config().evaluate.segmentation if as_evaluated else None
    options = SmallClassOptions(
        unit=unit, measure=measure, share=share, min_pixels=min_pixels, resize=resize
    )
    classes = list_small_classes(dataset, split, Path.cwd(), options, out)
    if as_json:
        print_json(as_records(classes))
        return
    listed = [entry for entry in classes if entry.is_listed]
    print_table([(c.name, f"{c.small} of {c.appearances} are small") for c in listed])
    print(f"{out}: {len(listed)} of {len(classes)} classes")


@app.command()
def train(name: Name) -> None:
    """Train one run of params.yaml, from wherever an earlier attempt left it."""
    from pipelines.finetune import finetune
    from pipelines.pretrain import pretrain
    from xattn.config import load_config

    base = Path.cwd()
    is_pretraining = name in load_config(base / "params.yaml").pretrain_runs
    print((pretrain if is_pretraining else finetune)(name, base))


@app.command()
def evaluate(
    name: Name,
    detections: Annotated[
        Path | None,
        typer.Option(help="Folder for what a detector found, in COCO's and VOC's files."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a trained run by the protocol of params.yaml."""
    from pipelines.evaluate import evaluate as evaluate_run
    from pipelines.evaluate import headline

    metrics = evaluate_run(name, Path.cwd(), detections=detections)
    if as_json:
        print_json(metrics)
    else:
        print(headline(metrics))


@app.command()
def predict(
    model: Model,
    image: Annotated[Path, typer.Argument(help="An image, or a folder of images.")],
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("predictions"),
    device: Device = "auto",
) -> None:
    """Draw what a trained model sees: an overlay with a legend for each image."""
    from pipelines.predict import predict_images

    count = predict_images(_model_dir(model), image, out, device)
    print(f"{count} pictures in {out}")


@app.command()
def attention(
    model: Model,
    image: Annotated[Path, typer.Argument(help="An image.")],
    point: Annotated[
        list[str] | None,
        typer.Option(help="X,Y in px from the upper left corner; may be repeated."),
    ] = None,
    normalise: Annotated[
        Literal["sum", "max"],
        typer.Option(help="What a map is divided by: its sum (the paper) or its maximum."),
    ] = "sum",
    as_evaluated: Annotated[
        bool,
        typer.Option("--as-evaluated", help="In the size and windows of params.yaml's evaluate."),
    ] = False,
    out: Annotated[Path, typer.Option(help="The PNG.")] = Path("attention.png"),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Draw what the coarse tokens of a HILA model attend to, stage by stage."""
    points = [_point(text) for text in point or []]
    from dataclasses import asdict

    from pipelines.attention import draw_attention
    from xattn.config import load_config

    transform = load_config().evaluate.segmentation if as_evaluated else None
    tokens = draw_attention(_model_dir(model), image, points, out, normalise, device, transform)
    if as_json:
        print_json([asdict(token) for token in tokens])
    else:
        stages = " and ".join(f"'{level.title}'" for level in tokens[0].maps)
        print(f"{out}: {stages}")


@app.command()
def cam(
    model: Model,
    image: Annotated[Path, typer.Argument(help="An image.")],
    method: Annotated[
        Literal["eigencam", "gradcam++"],
        typer.Option(help="What stands out (eigencam), or what raised one score (gradcam++)."),
    ] = "eigencam",
    levels: Annotated[
        str | None,
        typer.Option(help="Numbers of levels, 1 the finest; 1,2,3, or gradcam++'s own one."),
    ] = None,
    detection: Annotated[
        int | None,
        typer.Option(help="Which detection gradcam++ explains, by score; 1 if not given."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The PNG.")] = Path("cam.png"),
    device: Device = "auto",
) -> None:
    """Draw class activation maps of a detector, level by level."""
    numbers = None if levels is None else _levels(levels)
    from pipelines.cam import draw_cam

    words = draw_cam(_model_dir(model), image, out, method, numbers, detection, device)
    print(f"{out}: {words}")


@app.command()
def probe(
    models: Annotated[
        list[str], typer.Argument(help="Runs of params.yaml, or model folders.", show_default=False)
    ],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of training; by default those of finetune.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where probes.json and probes.png go.")] = Path(
        "probes"
    ),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a head on each stage and iteration of frozen models: mIoU over the iterations."""
    from pipelines.probe import probe_models

    document = probe_models([_model_dir(model) for model in models], Path.cwd(), out, steps, device)
    if as_json:
        print_json(document)
        return
    for entry in document["runs"]:
        rows = [
            (f"  stage {at['stage']}", str(at["iteration"]), at["after"], f"{at['mIoU']:.4f}")
            for at in entry["probes"]
        ]
        print(f"{entry['run']}, mIoU on {entry['dataset']}/{entry['split']}:")
        print_table(rows)
    print(f"{out / 'probes.png'}")


@app.command()
def report(
    show: Annotated[
        bool, typer.Option(help="Only print the last report's table and place.")
    ] = False,
) -> None:
    """Write the report of everything under results/."""
    from pipelines.report import print_summary
    from pipelines.report import report as write_report

    base = Path.cwd()
    if not show:
        write_report(base)
    print_summary(base)


def _model_dir(model: str) -> Path:
    """Return the model folder that a name or a path stands for."""
    from xattn.places import find_model_dir

    folder = Path(model)
    return folder if (folder / "model.json").exists() else find_model_dir(Path.cwd(), model)


def _point(text: str) -> tuple[float, float]:
    """Return the numbers of "X,Y"."""
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--point: found '{text}', expected X,Y, e.g. 120,80") from None
    return x, y


def _levels(text: str) -> list[int]:
    """Return the numbers of "1,2,3"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--levels: found '{text}', expected numbers, e.g. 1,2,3"
        ) from None


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]


def _about(preset: Path) -> str:
    """Return the sentence that a preset's head comment starts its last paragraph with."""
    comments = [
        line[1:].strip() for line in preset.read_text().splitlines() if line.startswith("#")
    ]
    return comments[-1] if comments else ""


if __name__ == "__main__":
    main()
