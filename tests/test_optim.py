"""Learning rates by hand, and which parameter falls into which group."""

import pytest
import torch
from torch import nn

from xattn.models.zoo import create_model
from xattn.train.optim import OptimConfig, apply_lr, build_optimizer, lr_at


def test_poly_with_warmup_multiplies() -> None:
    config = OptimConfig(lr=6e-5, warmup_steps=10, warmup_start=0.1)
    assert lr_at(0, 100, config) == pytest.approx(6e-6)
    assert lr_at(5, 100, config) == pytest.approx(6e-5 * 0.95 * (0.1 + 0.9 * 0.5))
    assert lr_at(10, 100, config) == pytest.approx(6e-5 * 0.9)
    assert lr_at(99, 100, config) == pytest.approx(6e-5 * 0.01)
    assert lr_at(100, 100, config) == 0.0


def test_cosine_ends_at_its_floor() -> None:
    config = OptimConfig(lr=1e-3, schedule="cosine", min_lr=1e-5)
    assert lr_at(0, 10, config) == pytest.approx(1e-3)
    assert lr_at(5, 10, config) == pytest.approx((1e-3 + 1e-5) / 2)
    assert lr_at(10, 10, config) == pytest.approx(1e-5)


def test_a_rate_can_be_held_for_an_epoch() -> None:
    stepwise = OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=20, warmup_start=1e-3)
    held = stepwise.model_copy(update={"update_every_steps": 10})
    rates = [lr_at(step, 100, held) for step in range(100)]
    assert rates[:10] == [1e-6] * 10
    assert rates == [lr_at(step - step % 10, 100, stepwise) for step in range(100)]


def test_groups_follow_the_names_of_the_papers() -> None:
    model = create_model("segformer_b0", num_classes=5)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, head_lr_multiplier=10.0))
    where = {
        id(parameter): group for group in optimizer.param_groups for parameter in group["params"]
    }
    named = dict(model.named_parameters())
    assert len(where) == len(named), "every trainable parameter is in the optimiser, once"
    for name, parameter in named.items():
        group = where[id(parameter)]
        assert group["multiplier"] == (10.0 if name.startswith("head.") else 1.0), name
        assert group["weight_decay"] == (0.0 if "norm" in name else 0.01), name
    assert where[id(named["head.bn.weight"])]["weight_decay"] == 0.01, "as in the reference"
    apply_lr(optimizer, 2e-3)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([2e-3, 2e-2])


@pytest.mark.parametrize("name", ["hila_segformer_b0_s3", "hila_mit_b0_s3"])
def test_what_hila_copies_is_in_the_optimizer_before_the_first_forward(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, stages=(2, 3, 4), drop_path=0.0)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    listed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    apply_lr(optimizer, 1e-2)
    optimizer.step()
    for key, parameter in model.named_parameters():
        assert (id(parameter) in listed) == parameter.requires_grad, key
        assert torch.equal(parameter, before[key]) != parameter.requires_grad, key
    moved = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("low_block" in key for key in moved)


def test_vectors_can_be_left_undecayed() -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, no_decay=(), decay_vectors=False))
    decays = {
        tuple(parameter.shape): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert decays == {(2, 3): 0.01, (2,): 0.0}


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(requires_grad=False)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1


def test_steps_of_the_rate() -> None:
    config = OptimConfig(
        lr=1e-3, schedule="step", milestones=(3, 5), warmup_steps=2, warmup_start=0.5
    )
    rates = [lr_at(step, 8, config) for step in range(7)]
    assert rates == pytest.approx([5e-4, 7.5e-4, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
    with pytest.raises(ValueError, match=r"found \[3\] with schedule 'poly', expected some with"):
        OptimConfig(lr=1e-3, milestones=(3,))
    with pytest.raises(ValueError, match=r"found \[\] with schedule 'step'"):
        OptimConfig(lr=1e-3, schedule="step")
    for milestones in ((5, 5), (5, 2)):
        with pytest.raises(ValueError, match=r"milestones: found .* expected ascending ones"):
            OptimConfig(lr=1e-3, schedule="step", milestones=milestones)


def test_a_rate_that_would_rise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"min_lr: found 1, expected at most lr, 0\.0005"):
        OptimConfig(lr=5e-4, schedule="cosine", min_lr=1.0)


def test_sgd_is_torch_s() -> None:
    config = OptimConfig(
        optimizer="sgd", lr=0.1, momentum=0.5, weight_decay=0.2, head_lr_multiplier=3.0
    )
    model = nn.ModuleDict({"head": nn.Linear(2, 1), "norm": nn.Linear(2, 1)})
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, torch.optim.SGD)
    apply_lr(optimizer, 0.1)
    by_rate = {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert by_rate == {(0.1 * 3.0, 0.2), (0.1, 0.0)}
    weight = model["head"].weight
    start = weight.detach().clone()
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    first = 1 + 0.2 * start
    moved = start - 0.3 * first
    expected = moved - 0.3 * (0.5 * first + 1 + 0.2 * moved)
    torch.testing.assert_close(weight.detach(), expected)
