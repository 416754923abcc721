"""Weights in and out: our own files and the authors' original MiT and SegFormer key names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xattn.errors import CheckpointError, UnknownNameError
from xattn.models.hila import HilaMiT
from xattn.storage import write_atomic

SOURCES = ("auto", "xattn", "nvlabs")
WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth")

# NVlabs/SegFormer's names in the order of rewriting; the prefix "decode_head." has become "head.".
_NVLABS_RULES = (
    (r"^patch_embed(\d)\.proj\.", r"stages.\1.embed.conv."),
    (r"^patch_embed(\d)\.norm\.", r"stages.\1.embed.norm."),
    (r"^block(\d)\.", r"stages.\1.blocks."),
    (r"^norm(\d)\.", r"stages.\1.norm."),
    (r"\.attn\.q\.", ".attention.query."),
    (r"\.attn\.kv\.", ".attention.key_value."),
    (r"\.attn\.proj\.", ".attention.output."),
    (r"\.attn\.sr\.", ".attention.reduce."),
    (r"\.attn\.norm\.", ".attention.reduce_norm."),
    (r"\.mlp\.fc1\.", ".ffn.expand."),
    (r"\.mlp\.dwconv\.dwconv\.", ".ffn.depthwise."),
    (r"\.mlp\.fc2\.", ".ffn.contract."),
    (r"^head\.linear_c(\d)\.proj\.", r"head.linears.\1."),
    (r"^head\.linear_fuse\.conv\.", "head.fuse."),
    (r"^head\.linear_fuse\.bn\.", "head.bn."),
    (r"^head\.linear_pred\.", "head.classifier."),
)
_NVLABS_MARK = re.compile(r"(^|\.)patch_embed\d\.|^decode_head\.linear_c\d\.")
# The head's base class makes this convolution, which its forward pass does not use.
_NVLABS_UNUSED = "decode_head.conv_seg."


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of every key.

    Args:
        loaded: keys of the model that were set.
        missing: keys of the model that kept their values.
        unexpected: keys given (in our names) that the model has no place for.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def summary(self) -> str:
        """Return one line for a log."""
        parts = [f"{len(self.loaded)} of {len(self.loaded) + len(self.missing)} tensors loaded"]
        for title, keys in (("missing", self.missing), ("unexpected", self.unexpected)):
            if keys:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                parts.append(f"{title}: {keys[0]}{more}")
        return "; ".join(parts)


def load_weights(
    model: nn.Module,
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    source: str = "auto",
) -> LoadReport:
    """Set a model's weights from a file or a state dict, in whole or in part.

    A backbone's weights, with or without their "backbone." prefix, fit whatever model has that
    backbone. Head tensors of another shape (another number of classes) are left out. After plain
    MiT weights have come into a HILA backbone, its low blocks are copied anew.

    Args:
        model: is changed in place.
        path_or_state_dict: a .safetensors, .pt or .pth file, or its contents.
        source: whose key names: "xattn", "nvlabs" (MiT and SegFormer, original code), or "auto".

    Raises:
        CheckpointError: the file cannot be read, nothing in it fits, or a tensor outside the head
            has another shape; the model is then unchanged.
        UnknownNameError: `source` is none of these.
    """
    if source not in SOURCES:
        raise UnknownNameError("weights source", source, SOURCES)
    if isinstance(path_or_state_dict, str | Path):
        origin, given = str(path_or_state_dict), _read(Path(path_or_state_dict))
    else:
        origin, given = "state dict", dict(path_or_state_dict)
    if source == "nvlabs" or (source == "auto" and any(map(_NVLABS_MARK.search, given))):
        given = _from_nvlabs(given)
    own = model.state_dict()
    given = _match_prefix(given, own)
    fitting = _fitting(given, own, origin)
    if not fitting:
        raise CheckpointError(
            f"{origin}: none of its {len(given)} tensors fits the model; it has e.g. "
            f"{next(iter(given), 'nothing')}, the model {next(iter(own))}"
        )
    model.load_state_dict(fitting, strict=False)
    _complete_hila(model, fitting)
    return LoadReport(
        loaded=tuple(fitting),
        missing=tuple(key for key in own if key not in fitting),
        unexpected=tuple(key for key in given if key not in own),
    )


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write all weights and buffers as safetensors; a reader sees the whole file or none.

    Args:
        model: on any device.
        path: the file; its folder must exist.
    """
    path = Path(path)
    tensors = {
        key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()
    }
    write_atomic(path, lambda partial: save_file(tensors, partial))


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file.

    Raises:
        CheckpointError: it is missing, unreadable or of another kind.
    """
    if path.suffix not in WEIGHTS_SUFFIXES:
        expected = ", ".join(WEIGHTS_SUFFIXES)
        raise CheckpointError(f"{path}: found '{path.suffix}', expected {expected}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as weights: {error}") from error
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def _read_pickle(path: Path) -> dict[str, Any]:
    """Return the state dict of a torch file, also where it is wrapped together with more."""
    from pickle import UnpicklingError  # noqa: PLC0415

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError("it holds more than tensors, or is damaged") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise ValueError(f"found a {type(content).__name__}, expected a state dict")
    return content


def _from_nvlabs(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under our names; stages and levels count from 0 here, from 1 there."""
    renamed = {}
    for key, tensor in given.items():
        if key.startswith(_NVLABS_UNUSED):
            continue
        name = key.removeprefix("backbone.")
        name = re.sub(r"^decode_head\.", "head.", name)
        name = re.sub(
            r"^(patch_embed|block|norm|head\.linear_c)(\d)\.",
            lambda match: f"{match[1]}{int(match[2]) - 1}.",
            name,
        )
        for pattern, replacement in _NVLABS_RULES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _match_prefix(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put "backbone." before backbone keys, or take it away, as the model has it."""
    prefix = "backbone."
    wanted = prefix if any(key.startswith(prefix) for key in own) else ""
    return {
        key if key.startswith("head.") else wanted + key.removeprefix(prefix): tensor
        for key, tensor in given.items()
    }


def _fitting(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: str
) -> dict[str, Tensor]:
    """Return the tensors that the model has a place for.

    Raises:
        CheckpointError: one outside the head has another shape.
    """
    fitting = {}
    for key, tensor in given.items():
        if key not in own:
            continue
        if tensor.shape == own[key].shape:
            fitting[key] = tensor
        elif not key.startswith("head."):
            raise CheckpointError(
                f"{origin}: {key} has shape {tuple(tensor.shape)}, the model expects "
                f"{tuple(own[key].shape)}; is it another variant?"
            )
    return fitting


def _complete_hila(model: nn.Module, loaded: Mapping[str, Tensor]) -> None:
    """Copy the low blocks of a HILA backbone that was given its plain part only."""
    if any("exchanges." in key for key in loaded):
        return
    for module in model.modules():
        if isinstance(module, HilaMiT):
            module.copy_low_blocks()
