"""`xattn bench ...`: every comparison with a peer. Each command imports what it needs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.terminal import print_json, print_table

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]

bench_app = typer.Typer(no_args_is_help=True)


@bench_app.command("engine")
def bench_engine(
    steps: Annotated[int, typer.Option(min=1, help="Steps of each turn.")] = 10,
    turns: Annotated[int, typer.Option(min=1, help="Interleaved turns of each loop.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Compare a training step of ours with the same step in a bare torch loop."""
    from benchmarks.engine import measure

    result = measure(steps, turns)
    if as_json:
        print_json(result)
    else:
        print_table([(key, str(value)) for key, value in result.items()])


@bench_app.command("loader")
def bench_loader(
    images: Annotated[int, typer.Option(min=32, help="Images of an epoch.")] = 400,
    turns: Annotated[int, typer.Option(min=1, help="Interleaved turns of each loop.")] = 3,
    camvid: Annotated[
        Path | None, typer.Option(help="CamVid's raw folder, for the segmentation loops.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare reading, decoding and augmenting images with what others use."""
    from benchmarks.loader import measure

    result = measure(images, turns, camvid)
    if as_json:
        print_json(result)
    else:
        print_table([(name, str(rate)) for name, rate in result["images_per_s"].items()])
        print_table([(name, str(ratio)) for name, ratio in result["ratios"].items()])
        print_table([(f"resume, {name}", f"{s} s") for name, s in result["resume_s"].items()])


@bench_app.command("metrics")
def bench_metrics(
    turns: Annotated[int, typer.Option(min=1, help="Interleaved turns of each.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Compare the boundary F of 19 classes at 1024x2048 with its definition, class by class."""
    from benchmarks.metrics import measure

    result = measure(turns)
    if as_json:
        print_json(result)
    else:
        print_table([(key, str(value)) for key, value in result.items()])


@bench_app.command("attention")
def bench_attention(
    sides: Annotated[
        list[int] | None, typer.Option("--side", min=64, help="Side of the image in pixels.")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Interleaved turns of each form.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Ours under torch.compile too; takes minutes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare HILA's inter-level attention with the listing of its paper, forward and backward."""
    from benchmarks.attention import measure

    result = measure(sides or [512, 1024], turns, threads, compiled)
    if as_json:
        print_json(result)
        return
    for side, parts in result["sides"].items():
        for part, figures in parts.items():
            print_table([(f"{side}, {part}, {key}", str(value)) for key, value in figures.items()])


@bench_app.command("cla")
def bench_cla(
    side: Annotated[int, typer.Option(min=64, help="Side of the image in pixels.")] = 512,
    turns: Annotated[int, typer.Option(min=1, help="Interleaved turns of each form.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare CLA's two orders of products, forward and backward, and its memory with AFMA's."""
    from benchmarks.cla import measure

    result = measure(side, turns, threads)
    if as_json:
        print_json(result)
        return
    for part, figures in result.items():
        if isinstance(figures, dict):
            print_table([(f"{part}, {key}", str(value)) for key, value in figures.items()])
        else:
            print_table([(part, str(figures))])


@bench_app.command("train-step")
def bench_train_step(
    batch: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 2,
    side: Annotated[int, typer.Option(min=64, help="Side of the image in pixels.")] = 512,
    turns: Annotated[int, typer.Option(min=1, help="Interleaved turns of each model.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each turn.")] = 1,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    as_json: AsJson = False,
) -> None:
    """Compare training steps: SegFormer with Hugging Face's, HILA with SegFormer."""
    from benchmarks.train_step import measure

    result = measure(batch, side, turns, steps, precision)
    if as_json:
        print_json(result)
        return
    print_table([(f"{name}, best ms", str(ms)) for name, ms in result["best_ms"].items()])
    for key in ("times_faster", "times_faster_same_allocator"):
        print_table([(f"{size}, {key}", str(ratio)) for size, ratio in result[key].items()])
    for name in ("hila", "segvit"):
        print_table([(f"{name}, {key}", str(value)) for key, value in result[name].items()])


@bench_app.command("detection")
def bench_detection(
    batch: Annotated[int, typer.Option(min=1, help="Images of a call of the loss.")] = 32,
    step_batch: Annotated[int, typer.Option(min=1, help="Images of a whole step.")] = 4,
    turns: Annotated[int, typer.Option(min=1, help="Interleaved turns of each peer.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Compare SSD300's loss and training step with torchvision's, CFSAM's step with SSD300's."""
    from benchmarks.detection import measure

    result = measure(batch, step_batch, turns)
    if as_json:
        print_json(result)
    else:
        print_table(list(_flatten(result)))


@bench_app.command("detectors")
def bench_detectors(
    runs: Annotated[int, typer.Option(min=1, help="Images that each model sees.")] = 200,
    as_json: AsJson = False,
) -> None:
    """Time CFSAM, its rivals and SSD300 on single images, with and without decoding and NMS."""
    from benchmarks.detection import measure_speed

    result = measure_speed(runs)
    if as_json:
        print_json(result)
        return
    typer.echo(f"{result['device']}, batch 1, median of {runs}")
    rows = [("model", "FPS", "FPS with NMS")]
    for name, figures in result["models"].items():
        rows.append((name, str(figures["fps"]), str(figures["fps_with_nms"])))
    print_table(rows)


def _flatten(result: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield the figures of nested results with their keys joined."""
    for key, value in result.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{above}{key}, ")
        else:
            yield f"{above}{key}", str(value)
