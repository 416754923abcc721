"""The training loop: a function that knows neither Ray, MLflow, DVC nor paths.

The outside enters as callables. Position is counted in steps; since batch n is a pure function of
(seed, n), and the randomness inside the model of (seed, n, rank), a run that stops after any step
and goes on from its state is the run that never stopped.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from xattn.errors import ConfigError, XattnError
from xattn.memory import memory_in_words
from xattn.structures import Batch, Recipe
from xattn.train.distributed import Ranks, mean_over_ranks
from xattn.train.optim import OptimConfig, apply_lr, lr_at


class FitConfig(BaseModel):
    """How long and in which precision to train.

    Args:
        steps: optimiser steps in all.
        global_batch: images a step over all workers.
        log_every_steps: distance of the points of the loss curve.
        checkpoint_every_steps: at most this many steps are lost by a kill.
        clip_norm: largest gradient norm; none without it.
        precision: "fp32" or "bf16" (autocast).
        channels_last: memory order of 4-D weights and images.
        compile: whether torch.compile makes the step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(gt=0)
    global_batch: int = Field(gt=0)
    log_every_steps: int = Field(default=20, gt=0)
    checkpoint_every_steps: int = Field(default=200, gt=0)
    clip_norm: float | None = Field(default=None, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: bool = False


class DivergedError(XattnError):
    """The loss is no number any more; the message names the steps in which it happened."""


@dataclass(slots=True)
class State:
    """All that changes while training.

    Args:
        model: the plain module that is saved; its parameters are those that `forward` trains.
        forward: `model` as it is called: wrapped by DDP, compiled, or itself.
        optimizer: over the parameters of `model`.
        step: steps taken.
    """

    model: nn.Module
    forward: Callable[[Tensor], object]
    optimizer: torch.optim.Optimizer
    step: int = 0


@dataclass(frozen=True, slots=True)
class StepLog:
    """One point of the curves: means over the steps since the previous point and over all ranks."""

    step: int
    samples: int
    lr: float
    images_per_s: float
    losses: dict[str, float]


def train_step(
    state: State, batch: Batch, recipe: Recipe, config: FitConfig, ranks: Ranks
) -> dict[str, Tensor]:
    """Take one step on this rank's share of the batch; return the named losses, detached."""
    with _autocast(config, ranks.device):
        outputs = state.forward(batch.images)
        losses = recipe.loss(outputs, batch.target, mean_over_ranks)
    state.optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    if config.clip_norm is not None:
        nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm)
    state.optimizer.step()
    state.step += 1
    return {name: value.detach() for name, value in losses.items()}


def fit(
    state: State,
    batches: Iterable[Batch],
    recipe: Recipe,
    config: FitConfig,
    optim: OptimConfig,
    ranks: Ranks,
    *,
    seed: int,
    on_log: Callable[[StepLog], None],
    after_step: Callable[[State], None],
) -> None:
    """Train from `state.step` to `config.steps`.

    Args:
        state: changed in place.
        batches: this rank's shares, the first being that of step `state.step`.
        recipe: loss of the outputs; its model is not used, `state.forward` is.
        config: length, precision.
        optim: learning rate of each step.
        ranks: this process's place.
        seed: from which the model's own randomness (dropout, drop-path) is derived.
        on_log: called on every rank with each point of the curve.
        after_step: called on every rank after each step; saves and evaluates when it is time.

    Raises:
        DivergedError: the loss became infinite or no number.
        CapacityError: a worker's images do not fit its memory.
        ConfigError: they are too few for a BatchNorm of the model.
    """
    state.model.train()
    window = _Window(config.global_batch, ranks)
    for batch in batches:
        torch.manual_seed(step_seed(seed, state.step, ranks.rank))
        lr = lr_at(state.step, config.steps, optim)
        apply_lr(state.optimizer, lr)
        on_device = batch.to(ranks.device, config.channels_last)
        with _batch_in_words(config.global_batch, len(batch.images)):
            losses = train_step(state, on_device, recipe, config, ranks)
        window.add(losses)
        if state.step % config.log_every_steps == 0 or state.step == config.steps:
            on_log(window.close(state.step, lr))
        after_step(state)
        window.forget_pause()


def check_finite(state: State) -> None:
    """Raise a DivergedError if a weight or what the optimiser keeps of it is no finite number.

    The loss tells one step later: without this a checkpoint could hold what no restart mends.
    """
    kept = (value for slot in state.optimizer.state.values() for value in slot.values())
    tensors = [*state.model.state_dict().values(), *(v for v in kept if isinstance(v, Tensor))]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise DivergedError(
            f"weights became infinite or no numbers by step {state.step}; lower optim.lr or set "
            "fit.clip_norm"
        )


@contextmanager
def _batch_in_words(global_batch: int, own: int) -> Iterator[None]:
    """Make one line of what torch says of a batch that is too large or too small."""
    found = f"fit.global_batch: found {global_batch}, {own} on a worker"
    try:
        with memory_in_words(found):
            yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            f"{found}, expected 2 or more: this model has a BatchNorm behind a map of one cell"
        ) from error


def step_seed(seed: int, step: int, rank: int) -> int:
    """Derive the seed of one step on one rank: 63 bits mixed from three integers (splitmix64)."""
    value = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB
    value %= 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return (value ^ (value >> 31)) >> 1


def _autocast(config: FitConfig, device: torch.device) -> AbstractContextManager[object]:
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


class _Window:
    """Sums losses on the device and seconds of training between two points of the curve."""

    def __init__(self, global_batch: int, ranks: Ranks) -> None:
        self._global_batch, self._ranks = global_batch, ranks
        self._sums: dict[str, Tensor] = {}
        self._steps, self._started, self._stopped = 0, time.perf_counter(), time.perf_counter()

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1
        self._stopped = time.perf_counter()

    def forget_pause(self) -> None:
        """Leave what happened since the last step (saving, evaluating) out of the rate."""
        self._started += time.perf_counter() - self._stopped

    def close(self, step: int, lr: float) -> StepLog:
        # One reduction and one wait for the device a point, not a step.
        names = sorted(self._sums)
        stacked = torch.stack([self._sums[name].float() for name in names]) / self._steps
        means = dict(zip(names, mean_over_ranks(stacked).tolist(), strict=True))
        if not all(math.isfinite(value) for value in means.values()):
            raise DivergedError(
                f"the loss became {means['loss']} between steps {step - self._steps} and {step} "
                f"at a learning rate of {lr:.2e}; lower optim.lr or set fit.clip_norm"
            )
        seconds = max(time.perf_counter() - self._started, 1e-9)
        rate = self._steps * self._global_batch / seconds
        self._sums, self._steps, self._started = {}, 0, time.perf_counter()
        return StepLog(step, step * self._global_batch, lr, rate, means)
