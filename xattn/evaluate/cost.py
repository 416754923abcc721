"""Parameters and multiply-adds, counted as the papers count them, which is not one way.

"segformer" is the rule of SegFormer's and HILA's papers. One multiply-add counts 1: convolutions
with their bias, Linear layers (inputs * outputs), 2 for each element of a LayerNorm or BatchNorm, 1
for each element of a ReLU. Interpolation, GELU, softmax and residual sums count nothing. A module
that computes its result another way than the paper writes it down (attention by a fused kernel, the
SegFormer head before upsampling, HILA's projections before gathering) has a method
`count_macs(*inputs) -> int` that states the paper's number; its children are then not counted. A
module whose paper charges for more than is called has a method `surplus_macs(*inputs) -> int`.

"fvcore" is the rule of the tool of that name, which SegViT's and U-MixFormer's papers used, and
counts functions as they are called: products (convolutions and Linear layers without biases, matrix
products, attention's two), 5 for each element of a LayerNorm, 2 of a BatchNorm, 4 of what bilinear
interpolation returns. "products" (CFSAM's) counts the products alone. A module that computes its
result another way than papers write it down has a method `as_written` of the same result, which is
called instead.

The counts compare models with papers; they are not what our kernels execute.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from xattn.structures import Counting

Rule = Callable[[tuple[Tensor, ...], Tensor], int]
"""(inputs, output) of a module's call -> multiply-adds."""


def count_params(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_macs(
    model: nn.Module,
    input_size: tuple[int, int, int],
    *,
    counting: Counting = "segformer",
    as_printed: bool = True,
) -> int:
    """Return the multiply-adds of one image's forward pass, leaving out nearly all the computing.

    Args:
        model: takes (1, C, H, W) images; left as it was.
        input_size: (C, H, W) of the image.
        counting: the rule.
        as_printed: under "segformer", whether to add what papers charge for calls that are not
            made: HILA's counter charges attention at every block, also where a stride skips it.
    """
    macs: list[int] = []
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(_as_evaluated(model))
        mode = ShapesOnly()
        if counting == "segformer":
            for handle in _watch(model, macs, as_printed):
                stack.callback(handle.remove)
        else:
            mode = _CountedFunctions(macs, _FVCORE if counting == "fvcore" else _PRODUCTS)
            stack.enter_context(_as_written(model))
        with torch.no_grad(), mode:
            model(torch.zeros(1, *input_size, device=device))
    return sum(macs)


@contextmanager
def _as_evaluated(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, then back into what it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _as_written(model: nn.Module) -> Iterator[None]:
    """Have modules with a method `as_written` called by it."""
    modules = [module for module in model.modules() if hasattr(module, "as_written")]
    for module in modules:
        module.forward = module.as_written  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _watch(module: nn.Module, macs: list[int], as_printed: bool) -> Iterator[RemovableHandle]:
    """Have `module`, or else its children, append its count to `macs` at every call."""
    rule = _rule(module)
    if rule is not None:
        yield module.register_forward_hook(partial(_append, macs, rule))
        return
    surplus = getattr(module, "surplus_macs", None)
    if surplus is not None and as_printed:
        rule = partial(_surplus, surplus)
        yield module.register_forward_hook(partial(_append, macs, rule))
    for child in module.children():
        yield from _watch(child, macs, as_printed)


def _surplus(count: Callable[..., int], inputs: tuple[Tensor, ...], _output: Tensor) -> int:
    return count(*inputs)


def _append(
    macs: list[int], rule: Rule, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    macs.append(rule(inputs, output))


def _rule(module: nn.Module) -> Rule | None:
    """Return the counting rule of `module`, or None if its children are to say."""
    own = getattr(module, "count_macs", None)
    if own is not None:
        return lambda inputs, _: int(own(*inputs))
    if isinstance(module, nn.Conv2d):
        per_output = module.weight[0].numel() + (module.bias is not None)
        return lambda _, output: output.numel() * per_output
    if isinstance(module, nn.Linear):
        return lambda _, output: output.numel() * module.in_features
    if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
        return lambda _, output: 2 * output.numel()
    if isinstance(module, nn.ReLU):
        return lambda _, output: output.numel()
    return None


def _same_shape(first: Tensor, *_: Any, **__: Any) -> Sequence[int]:
    return first.shape


def _linear_shape(tokens: Tensor, weight: Tensor, *_: Any) -> Sequence[int]:
    return (*tokens.shape[:-1], weight.shape[0])


def _convolved_shape(
    images: Tensor,
    weight: Tensor,
    _bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    _groups: int = 1,
) -> Sequence[int]:
    shape = [images.shape[0], weight.shape[0]]
    for axis, side in enumerate(images.shape[2:]):
        covered = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        shape.append((side + 2 * padding[axis] - covered) // stride[axis] + 1)
    return shape


def _attended_shape(query: Tensor, _key: Tensor, value: Tensor, **_: Any) -> Sequence[int]:
    return (*query.shape[:-1], value.shape[-1])


def _resized_shape(images: Tensor, size: Sequence[int], *_: Any, **__: Any) -> Sequence[int]:
    return (*images.shape[:2], *size)


def _summed_shape(first: Tensor, second: Any, *_: Any, **__: Any) -> Sequence[int]:
    shape: Sequence[int] = np.broadcast_shapes(first.shape, getattr(second, "shape", ()))
    return shape


def _joined_shape(parts: Sequence[Tensor], dim: int = 0) -> Sequence[int]:
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return shape


def _multiplied_shape(first: Tensor, second: Tensor) -> Sequence[int]:
    batch = np.broadcast_shapes(first.shape[:-2], second.shape[:-2])
    return (*batch, first.shape[-2], second.shape[-1])


def _index_sizes(equation: str, *operands: Tensor) -> dict[str, int]:
    """Return the size behind every letter of an Einstein sum."""
    letters = equation.partition("->")[0].replace(" ", "").split(",")
    return {
        letter: size
        for word, operand in zip(letters, operands, strict=True)
        for letter, size in zip(word, operand.shape, strict=True)
    }


def _summed_over_shape(equation: str, *operands: Tensor) -> Sequence[int]:
    sizes = _index_sizes(equation, *operands)
    return [sizes[letter] for letter in equation.partition("->")[2].strip()]


_SHAPES: dict[Callable[..., Any], Callable[..., Sequence[int]]] = {
    F.linear: _linear_shape,
    F.layer_norm: _same_shape,
    F.gelu: _same_shape,
    F.relu: _same_shape,
    torch.Tensor.sigmoid: _same_shape,
    torch.Tensor.softmax: _same_shape,
    torch.cat: _joined_shape,
    F.batch_norm: _same_shape,
    F.interpolate: _resized_shape,
    torch.Tensor.add: _summed_shape,
    torch.Tensor.matmul: _multiplied_shape,
    torch.matmul: _multiplied_shape,
    torch.bmm: _multiplied_shape,
    torch.einsum: _summed_over_shape,
    F.scaled_dot_product_attention: _attended_shape,
    torch.conv2d: _convolved_shape,
}
"""The costly functions, with what finds the shape of their result from their arguments."""


_DRAWS = frozenset(
    {
        *(nn.init.normal_, nn.init.uniform_, nn.init.kaiming_normal_, nn.init.kaiming_uniform_),
        *(torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_),
    }
)
"""What fills new weights with random numbers, most of the time of building a model."""


class ShapesOnly(TorchFunctionMode):
    """Answer the costly functions with zeros of the right shape, which take no memory.

    A model that is built inside has arbitrary weights; only its shapes mean something.

    The meta device would be simpler, but there torch imports its compiler, which takes longer (5 s)
    than everything else that `xattn models` does.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            return kwargs.get("tensor", args[0] if args else None)
        if func in _SHAPES:
            operands = args[0] if func is torch.cat else args
            like = next(operand for operand in operands if isinstance(operand, Tensor))
            return like.new_zeros(()).expand(*_SHAPES[func](*args, **kwargs))
        return func(*args, **kwargs)


Cost = Callable[..., int]
"""(result, *arguments of the call) -> multiply-adds."""


def _linear_cost(result: Tensor, _tokens: Tensor, weight: Tensor, *_: Any) -> int:
    return result.numel() * weight.shape[1]


def _convolution_cost(result: Tensor, _images: Tensor, weight: Tensor, *_: Any) -> int:
    return result.numel() * weight[0].numel()


def _multiplication_cost(result: Tensor, first: Tensor, _second: Tensor) -> int:
    return result.numel() * first.shape[-1]


def _sum_cost(_result: Tensor, equation: str, *operands: Tensor) -> int:
    return math.prod(_index_sizes(equation, *operands).values())


def _attention_cost(result: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    return (query.numel() + result.numel()) * key.shape[-2]


def _each(count: int) -> Cost:
    return lambda result, *_, **__: count * result.numel()


_PRODUCTS: dict[Callable[..., Any], Cost] = {
    F.linear: _linear_cost,
    torch.conv2d: _convolution_cost,
    torch.Tensor.matmul: _multiplication_cost,
    torch.matmul: _multiplication_cost,
    torch.bmm: _multiplication_cost,
    torch.einsum: _sum_cost,
    F.scaled_dot_product_attention: _attention_cost,
}
_FVCORE = _PRODUCTS | {F.layer_norm: _each(5), F.batch_norm: _each(2), F.interpolate: _each(4)}


class _CountedFunctions(ShapesOnly):
    """Append the cost of every call of a function that has one.

    Args:
        macs: where to.
        costs: of the functions.
    """

    def __init__(self, macs: list[int], costs: Mapping[Callable[..., Any], Cost]) -> None:
        super().__init__()
        self._macs, self._costs = macs, costs

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func in self._costs:
            self._macs.append(self._costs[func](result, *args, **(kwargs or {})))
        return result
