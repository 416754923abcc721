"""SSD300's loss and training step beside torchvision's, CFSAM's beside SSD300's, and their speed.

`loss`: matching, mining, loss and its gradient by the outputs of the head, on the same outputs and
objects; torchvision's are its matching, image by image, and `SSD.compute_loss`. `step`: the same
with the model (21 classes, fresh weights, all layers trained) before it, forward and back, without
an optimizer. torchvision's own resizing and normalising is left out: both take a batch that is
ready. Both use the default boxes of COCO, torchvision's only ones. Peers have processes of their
own, set up as their users run them: ours keeps freed memory, as our trainer does, torchvision's
runs in plain torch and once more with our setting ("torchvision_kept").

`cfsam`: what CFSAM adds to the time of SSD300's step, over what it adds to its multiply-adds. Run
by `xattn bench detection`; `measure_speed` by `xattn bench detectors`.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import Peer, Turn, take_turns
from xattn.errors import XattnError
from xattn.evaluate.cost import ShapesOnly, count_macs
from xattn.models.multibox import (
    INPUT_SIDE_PX,
    MultiBoxOutputs,
    decode_detections,
    default_boxes,
    multibox_loss,
    to_corners,
)
from xattn.models.zoo import create_model
from xattn.structures import BoxTarget, identity_mean
from xattn.train.distributed import resolve_device

_CLASSES = 20
_NEGATIVES = 3
_OBJECTS = {"voc": 2.4, "coco": 7.3}
"""Objects of an image, on average: VOC 07+12's trainval, COCO's train2017."""
_CALLS = 5  # of a turn, of which the fastest counts
_LOSS_TOLERANCE = 1e-4  # relative
_TABLE = ("ssd300", "ssd300_se", "ssd300_cfam", "ssd300_mvit", "ssd300_cfsam")  # table 4
_WARM_UP = 3

Loss = Callable[[], Tensor]
Objects = list[dict[str, Tensor]]
"""torchvision's targets."""


def measure(loss_batch: int, step_batch: int, turns: int) -> dict[str, Any]:
    """Compare the losses and the steps.

    Args:
        loss_batch: images of a call of the loss.
        step_batch: images of a step.
        turns: turns of each peer, interleaved, after one that warms up.

    Returns:
        Milliseconds of the best turn and of the median one, ratios of the best.

    Raises:
        XattnError: the two losses differ.
    """
    device = resolve_device("auto")
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "turns": turns,
        "loss_batch": loss_batch,
        "step_batch": step_batch,
        "loss": {name: compare_losses(loss_batch, name, turns) for name in _OBJECTS},
        **compare_steps(step_batch, turns),
    }


def compare_losses(batch: int, objects: str, turns: int) -> dict[str, Any]:
    """Compare matching and loss at so many objects an image as a data set has."""
    values = {
        name: float(build(*draw_outputs(batch), draw_objects(batch, objects))())
        for name, build in _LOSSES.items()
    }
    if abs(values["ours"] / values["torchvision"] - 1) > _LOSS_TOLERANCE:
        raise XattnError(f"bench detection: found losses that differ: {values}")
    peers = _three(lambda name: partial(loss_turn, name, batch, objects))
    return {
        "objects_per_image": _OBJECTS[objects],
        "values": values,
        **_compare(take_turns(peers, turns)),
    }


def compare_steps(batch: int, turns: int) -> dict[str, Any]:
    """Compare whole steps, and CFSAM's with SSD300's."""
    peers = _three(lambda name: partial(step_turn, name, batch))
    peers["cfsam"] = Peer(partial(step_turn, "cfsam", batch), keeps_memory=True)
    times = take_turns(peers, turns)
    cfsam_ms = times.pop("cfsam")["step"]
    ours_ms = times["ours"]["step"]
    time_ratio = min(cfsam_ms) / min(ours_ms)
    macs_ratio = _macs("ssd300_cfsam") / _macs("ssd300")
    return {
        "step": _compare(times),
        "cfsam": {
            "best_ms": round(min(cfsam_ms), 1),
            "median_ms": round(median(cfsam_ms), 1),
            "time_over_ssd300": round(time_ratio, 3),
            "macs_over_ssd300": round(macs_ratio, 3),
            "added_time_over_added_macs": round((time_ratio - 1) / (macs_ratio - 1), 3),
        },
    }


def _three(build: Callable[[str], Callable[[], Turn]]) -> dict[str, Peer]:
    return {
        "ours": Peer(build("ours"), keeps_memory=True),
        "torchvision": Peer(build("torchvision"), keeps_memory=False),
        "torchvision_kept": Peer(build("torchvision"), keeps_memory=True),
    }


def _compare(times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return figures of each thing that was timed: by peer, and how many times faster ours is."""
    ours = times["ours"]
    return {
        key: {
            **{f"{name}_best_ms": round(min(of[key]), 1) for name, of in times.items()},
            **{f"{name}_median_ms": round(median(of[key]), 1) for name, of in times.items()},
            "times_faster": round(min(times["torchvision"][key]) / min(ours[key]), 2),
            "times_faster_same_allocator": round(
                min(times["torchvision_kept"][key]) / min(ours[key]), 2
            ),
        }
        for key in ours
    }


def loss_turn(peer: str, batch: int, objects: str) -> Turn:
    """Return what measures the milliseconds of a loss, alone and with its gradient."""
    device = resolve_device("auto")
    offsets, logits = (tensor.to(device).requires_grad_() for tensor in draw_outputs(batch))
    target = BoxTarget(*(tensor.to(device) for tensor in draw_objects(batch, objects)))
    loss = _LOSSES[peer](offsets, logits, target)
    return lambda: {
        "forward": _fastest_ms(loss, device),
        "forward_backward": _fastest_ms(
            lambda: torch.autograd.grad(loss(), (offsets, logits)), device
        ),
    }


def step_turn(peer: str, batch: int) -> Turn:
    """Return what measures the milliseconds of a step."""
    device = resolve_device("auto")
    torch.manual_seed(0)
    images = torch.randn(batch, 3, INPUT_SIDE_PX, INPUT_SIDE_PX, device=device)
    target = BoxTarget(*(tensor.to(device) for tensor in draw_objects(batch, "voc")))
    build = {"torchvision": _their_step}.get(peer, partial(_our_step, peer))
    loss, model = build(images, target)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss().backward()

    return lambda: {"step": _fastest_ms(step, device, calls=1)}


def _fastest_ms(function: Callable[[], object], device: torch.device, calls: int = _CALLS) -> float:
    return min(_time_ms(function, device) for _ in range(calls))


def _time_ms(function: Callable[[], object], device: torch.device) -> float:
    started = _now_ms(device)
    function()
    return _now_ms(device) - started


def _now_ms(device: torch.device) -> float:
    """Return the time when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() * 1000


def draw_outputs(batch: int) -> tuple[Tensor, Tensor]:
    """Draw offsets (B, P, 4) and logits (B, P, 21)."""
    generator = torch.Generator().manual_seed(0)
    count = len(default_boxes("coco"))
    return (
        torch.randn(batch, count, 4, generator=generator),
        torch.randn(batch, count, _CLASSES + 1, generator=generator),
    )


def draw_objects(batch: int, objects: str) -> BoxTarget:
    """Draw at least one object for each image, with sides of 20..270 px, small ones more often."""
    generator = torch.Generator().manual_seed(1)
    others = torch.poisson(torch.full((batch,), _OBJECTS[objects] - 1), generator=generator).long()
    most = int(others.max()) + 1
    sides = 20 + 250 * torch.rand(batch, most, 2, generator=generator).square()
    corners = torch.rand(batch, most, 2, generator=generator) * (INPUT_SIDE_PX - sides)
    labels = torch.randint(_CLASSES, (batch, most), generator=generator)
    labels[torch.arange(most) > others[:, None]] = -1
    boxes = torch.cat([corners, corners + sides], 2)
    return BoxTarget(boxes.where(labels[..., None] >= 0, 0), labels)


def _our_loss(offsets: Tensor, logits: Tensor, target: BoxTarget) -> Loss:
    outputs = MultiBoxOutputs(offsets, logits, default_boxes("coco").to(logits.device))
    return lambda: multibox_loss(outputs, target, identity_mean, negatives=_NEGATIVES)["loss"]


def _their_loss(offsets: Tensor, logits: Tensor, target: BoxTarget) -> Loss:
    from torchvision.ops import box_iou  # noqa: PLC0415

    with torch.device("meta"):
        model = _their_model()
    objects = _their_objects(target)
    head = {"bbox_regression": offsets, "cls_logits": logits}
    anchors = [to_corners(default_boxes("coco").to(logits.device))] * len(objects)

    def loss() -> Tensor:
        matched = [
            model.proposal_matcher(box_iou(own["boxes"], boxes))
            for own, boxes in zip(objects, anchors, strict=True)
        ]
        return _sum(model.compute_loss(objects, head, anchors, matched))

    return loss


_LOSSES = {"ours": _our_loss, "torchvision": _their_loss}


def _our_step(peer: str, images: Tensor, target: BoxTarget) -> tuple[Loss, nn.Module]:
    name = {"ours": "ssd300", "cfsam": "ssd300_cfsam"}[peer]
    model = create_model(name, num_classes=_CLASSES, box_sizes="coco").to(images.device).train()
    return (
        lambda: multibox_loss(model(images), target, identity_mean, negatives=_NEGATIVES)["loss"],
        model,
    )


def _their_step(images: Tensor, target: BoxTarget) -> tuple[Loss, nn.Module]:
    model = _their_model().to(images.device).train()
    model.transform = _Ready(images)
    objects = _their_objects(target)
    return lambda: _sum(model(list(images), objects)), model


def _their_model() -> Any:
    from torchvision.models.detection import ssd300_vgg16  # noqa: PLC0415

    # Without weights it trains all layers.
    return ssd300_vgg16(weights=None, weights_backbone=None, num_classes=_CLASSES + 1)


class _Ready(nn.Module):
    """Stands in for torchvision's transform: gives the batch as it is."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images

    def forward(self, _images: list[Tensor], objects: Objects) -> tuple[Any, Objects]:
        from torchvision.models.detection.image_list import ImageList  # noqa: PLC0415

        sizes = [(INPUT_SIDE_PX, INPUT_SIDE_PX)] * len(self.images)
        return ImageList(self.images, sizes), objects


def _their_objects(target: BoxTarget) -> Objects:
    return [
        {"boxes": boxes[labels >= 0], "labels": labels[labels >= 0] + 1}
        for boxes, labels in zip(*target, strict=True)
    ]


def _sum(losses: dict[str, Tensor]) -> Tensor:
    return losses["bbox_regression"] + losses["classification"]


def _macs(name: str) -> int:
    with ShapesOnly():
        model = create_model(name, num_classes=_CLASSES)
    return count_macs(model, (3, INPUT_SIDE_PX, INPUT_SIDE_PX), counting="products")


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with the threads that torch takes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


def measure_speed(runs: int, **overrides: Any) -> dict[str, Any]:
    """Time the detectors of the paper's table 4, one image at a time, in turns.

    They have fresh weights, so that all classes of all default boxes compete: decoding and its
    suppression take longer than after training, when few scores are above the threshold.

    Args:
        runs: images that each one sees, after three to warm up.
        **overrides: of the models, see `create_model`.

    Returns:
        "fps" without decoding and "fps_with_nms" with it, by median times.
    """
    device = resolve_device("auto")
    torch.manual_seed(0)
    size = INPUT_SIDE_PX, INPUT_SIDE_PX
    image = torch.randn(1, 3, *size, device=device)
    models = {
        name: create_model(name, num_classes=_CLASSES, **overrides).to(device).eval()
        for name in _TABLE
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(_WARM_UP + runs):
            for name, model in models.items():
                started = _now_ms(device)
                outputs = model(image)
                seen = _now_ms(device)
                decode_detections(outputs, size)
                times[name].append((seen - started, _now_ms(device) - started))
    models_ms = {
        name: [median(column) for column in zip(*rows[_WARM_UP:], strict=True)]
        for name, rows in times.items()
    }
    return {
        "device": device_name(device),
        "runs": runs,
        "batch": 1,
        "models": {
            name: {
                "forward_ms": round(forward, 2),
                "with_nms_ms": round(whole, 2),
                "fps": round(1000 / forward, 2),
                "fps_with_nms": round(1000 / whole, 2),
            }
            for name, (forward, whole) in models_ms.items()
        },
    }
