"""AdamW or SGD with the papers' parameter groups; learning rates as a pure function of the step.

Sources: SegFormer and HILA's configuration files: parameters whose name contains "norm" are not
decayed, those whose name contains "head" learn ten times as fast, poly schedule with a linear
warm-up. PVT's ImageNet recipe: nothing one-dimensional is decayed, cosine schedule. SSD's and
CFSAM's: SGD with momentum, a rate that falls to a tenth at milestones.

A learning rate that is computed from the step needs no state in the checkpoint.
"""

import math
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

_FALL = 0.1
_Moment = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(BaseModel):
    """An optimiser and its schedule.

    Args:
        optimizer: "adamw" or "sgd".
        lr: peak learning rate of the backbone.
        weight_decay: of AdamW decoupled, of SGD added to the gradient.
        betas: decay rates of AdamW's moments.
        momentum: of SGD.
        schedule: "poly" (power 1 is a straight line) or "cosine", down to `min_lr`; or "step".
        power: exponent of the poly schedule.
        min_lr: learning rate at the last step, for a multiplier of one.
        milestones: ascending steps of the schedule "step", at each of which the rate falls to a
            tenth; those at or beyond the last step never come.
        warmup_steps: steps of linear warm-up, which multiplies the schedule.
        warmup_start: the factor at step 0.
        update_every_steps: the rate changes after so many steps; 1 is every step, as in
            mmsegmentation, an epoch's number of them is timm's, hence PVT's, way.
        head_lr_multiplier: applied to parameters whose name contains "head".
        no_decay: parts of names; a parameter whose name contains one is not decayed.
        decay_vectors: whether one-dimensional parameters (biases, norms) are decayed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[_Moment, _Moment] = (0.9, 0.999)
    momentum: _Moment = 0.9
    schedule: Literal["poly", "cosine", "step"] = "poly"
    power: float = Field(default=1.0, gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    milestones: tuple[Annotated[int, Field(gt=0)], ...] = ()
    warmup_steps: int = Field(default=0, ge=0)
    warmup_start: float = Field(default=1e-6, ge=0, le=1)
    update_every_steps: int = Field(default=1, gt=0)
    head_lr_multiplier: float = Field(default=1.0, gt=0)
    no_decay: tuple[str, ...] = ("norm",)
    decay_vectors: bool = True

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                f"milestones: found {list(self.milestones)} with schedule '{self.schedule}', "
                "expected some with 'step' and none with another"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones: found {list(self.milestones)}, expected ascending ones")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr: found {self.min_lr:g}, expected at most lr, {self.lr:g}")
        return self


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of step `step` (0-based) out of `total_steps`, multiplier one."""
    step -= step % config.update_every_steps
    progress = min(step / max(total_steps, 1), 1.0)
    if config.schedule == "poly":
        factor = float((1.0 - progress) ** config.power)
    elif config.schedule == "step":
        factor = _FALL ** sum(step >= milestone for milestone in config.milestones)
    else:
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    lr = config.min_lr + (config.lr - config.min_lr) * factor
    if step < config.warmup_steps:
        lr *= config.warmup_start + (1.0 - config.warmup_start) * step / config.warmup_steps
    return lr


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimiser over every trainable parameter, in at most four groups.

    Each group carries `multiplier`, by which `apply_lr` scales the scheduled rate.

    Args:
        model: the plain module, before DDP or compile change its names.
        config: rates, decay and name rules.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_head = "head" in name
            is_decayed = _is_decayed(name, parameter, config)
            groups.setdefault((is_head, is_decayed), []).append(parameter)
    param_groups = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if is_decayed else 0.0,
            "multiplier": config.head_lr_multiplier if is_head else 1.0,
        }
        for (is_head, is_decayed), parameters in groups.items()
    ]
    is_cuda = next(model.parameters()).is_cuda
    if config.optimizer == "sgd":
        momentum = config.momentum
        return torch.optim.SGD(param_groups, lr=config.lr, momentum=momentum, fused=is_cuda)
    return torch.optim.AdamW(param_groups, lr=config.lr, betas=config.betas, fused=is_cuda)


def _is_decayed(name: str, parameter: nn.Parameter, config: OptimConfig) -> bool:
    if any(part in name for part in config.no_decay):
        return False
    return config.decay_vectors or parameter.ndim > 1


def apply_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's rate to `lr` times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["multiplier"]
