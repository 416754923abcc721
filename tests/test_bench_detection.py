"""The benchmarks of the detectors at small sizes: what they report, not how fast."""

from functools import partial

import pytest
import torch

from benchmarks import detection
from xattn.errors import XattnError


@pytest.fixture
def here(monkeypatch):
    """Let peers take their turns in this process."""

    def turns_here(peers, turns):
        built = {name: peer.build() for name, peer in peers.items()}
        rounds = [{name: turn() for name, turn in built.items()} for _ in range(turns)]
        return {
            name: {key: [of_round[name][key] for of_round in rounds] for key in rounds[0][name]}
            for name in peers
        }

    monkeypatch.setattr(detection, "take_turns", turns_here)


@pytest.mark.parametrize("objects", ["voc", "coco"])
def test_losses_are_equal_and_timed(here, objects):
    result = detection.compare_losses(3, objects, turns=1)
    assert result["values"]["ours"] == pytest.approx(result["values"]["torchvision"], rel=1e-5)
    for part in ("forward", "forward_backward"):
        figures = result[part]
        ratio = figures["torchvision_best_ms"] / figures["ours_best_ms"]
        assert figures["times_faster"] == pytest.approx(ratio, rel=0.05)
        assert figures["times_faster_same_allocator"] > 0


def test_losses_that_differ_are_told(monkeypatch):
    monkeypatch.setattr(detection, "_NEGATIVES", 2)
    with pytest.raises(XattnError, match="losses that differ"):
        detection.compare_losses(2, "voc", turns=1)


def test_objects_are_as_many_as_a_data_set_has():
    for objects, mean in (("voc", 2.4), ("coco", 7.3)):
        labels = detection.draw_objects(2000, objects).labels
        counts = (labels >= 0).sum(1).float()
        assert counts.min() >= 1
        assert counts.mean().item() == pytest.approx(mean, rel=0.05)


def test_steps_share_the_work():
    """Both are given weights and images of the same sizes, and all of them get gradients."""
    images = torch.randn(1, 3, 300, 300)
    target = detection.draw_objects(1, "voc")
    counts = []
    for build in (detection._their_step, partial(detection._our_step, "ours")):
        loss, model = build(images, target)
        loss().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    assert counts == [26_285_486] * 2


def test_steps_are_compared(here, monkeypatch):
    def constant(name, batch):
        return lambda: {"step": {"cfsam": 150.0, "ours": 100.0}.get(name, 120.0)}

    monkeypatch.setattr(detection, "step_turn", constant)
    result = detection.compare_steps(2, turns=3)
    assert result["step"]["step"]["times_faster"] == 1.2
    assert result["cfsam"]["macs_over_ssd300"] == pytest.approx(45.236 / 31.3735, abs=1e-3)
    assert result["cfsam"]["added_time_over_added_macs"] == pytest.approx(0.5 / 0.4419, abs=5e-3)


def test_speed_table():
    result = detection.measure_speed(2, width=4)
    assert result["runs"] == 2
    assert result["device"]
    assert list(result["models"]) == [
        "ssd300",
        "ssd300_se",
        "ssd300_cfam",
        "ssd300_mvit",
        "ssd300_cfsam",
    ]
    for figures in result["models"].values():
        assert figures["fps"] > figures["fps_with_nms"] > 0
