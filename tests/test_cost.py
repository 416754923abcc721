import pytest
import torch
from torch import nn

from xattn.evaluate.cost import count_macs, count_params
from xattn.models.zoo import create_model, model_card


@pytest.mark.parametrize(
    ("name", "num_classes", "params"),
    [
        ("segformer_b0", 150, 3_752_694),
        ("segformer_b0", 19, 3_719_027),
        # The authors' code counts 32 more: a second position vector of 16 in two attentions.
        ("hila_segformer_b0_s3", 150, 4_178_102 - 32),
        ("hila_segformer_b0_s3", 19, 4_144_435 - 32),
    ],
)
def test_parameter_counts_are_the_reference_codes(name, num_classes, params):
    assert count_params(create_model(name, num_classes=num_classes)) == params


def test_backbone_parameter_counts():
    assert count_params(create_model("mit_b0", num_classes=1).backbone) == 3_319_392
    hila = create_model("hila_segformer_b0_s3", num_classes=1).backbone
    assert count_params(hila) == 3_744_800 - 32
    exchange = hila.exchanges["3"]
    parts = (exchange.top_down, exchange.bottom_up, exchange.low_block, exchange.low_norm)
    assert [count_params(part) for part in parts] == [65_184 - 16, 241_824 - 16, 118_272, 128]


@pytest.mark.parametrize(
    ("name", "giga_macs"),
    [
        ("segformer_b0", 8.42),
        ("hila_segformer_b0_s3", 9.76),
        ("mit_b0", 0.456),
        ("hila_mit_b0_s3", 0.691),
    ],
)
def test_macs_are_the_papers(name, giga_macs):
    assert model_card(name).macs / 1e9 == pytest.approx(giga_macs, rel=2e-3)


def test_macs_at_another_size():
    model = create_model("segformer_b0", num_classes=19)
    assert count_macs(model, (3, 512, 1024)) / 1e9 == pytest.approx(17.83, rel=1e-3)


def test_rules_by_hand_and_the_model_stays_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    macs = count_macs(model, (3, 9, 12))
    outputs = 4 * 5 * 6
    assert macs == outputs * (27 + 1) + 2 * outputs + outputs
    assert model.training
    assert not model[0]._forward_hooks
    assert torch.is_nonzero(model[0].weight.abs().sum())


def test_frozen_parameters_do_not_count():
    layer = nn.Linear(3, 4)
    layer.bias.requires_grad_(False)
    assert count_params(layer) == 12
