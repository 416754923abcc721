"""Weights in and out: our own files and those of whoever published the models before us."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xattn.errors import CheckpointError, UnknownNameError
from xattn.models.hila import Hila
from xattn.models.ssd_weights import SSD_SOURCES
from xattn.models.swin_weights import SWIN_SOURCES
from xattn.models.vit_weights import VIT_SOURCES
from xattn.models.weights_names import (
    from_hila,
    from_hugging_face,
    from_mscan,
    from_nvlabs,
    from_timm_pvt,
)
from xattn.nn.grids import resize_grids
from xattn.storage import write_atomic

WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Somebody's names for the tensors of a model.

    Args:
        name: what `load_weights` calls it.
        mark: is found in some key of theirs, and in no key of a source further down.
        convert: their tensors to ours; see `weights_names`.
    """

    name: str
    mark: re.Pattern[str]
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


SOURCES = (
    Source("hila", re.compile(r"(^|\.)(topdown|bottomup|prevblock|prevnorm)\.\d\d\."), from_hila),
    Source("mscan", re.compile(r"\.attn\.spatial_gating_unit\."), from_mscan),
    Source(
        "nvlabs",
        re.compile(r"^(backbone\.)?(patch_embed\d|block\d\.\d+)\.|^decode_head\.linear_c\d\."),
        from_nvlabs,
    ),
    Source(
        "hugging_face",
        re.compile(
            r"^(segformer\.)?(encoder\.(patch_embeddings|block)\.\d\.|stages\.\d\.patch_embeddings\.)"
            r"|^decode_head\.(linear_c|linear_projections)\.\d\."
        ),
        from_hugging_face,
    ),
    Source(
        "timm_pvt",
        re.compile(r"^stages\.\d\.(downsample\.proj\.|blocks\.\d+\.attn\.(q|kv)\.)"),
        from_timm_pvt,
    ),
    *(
        Source(name, mark, convert)
        for name, (mark, convert) in (VIT_SOURCES | SWIN_SOURCES | SSD_SOURCES).items()
    ),
    Source("xattn", re.compile(""), dict),
)
"""Every source known, the first whose mark is found is taken; ours is what none of them claims."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of every key, in our names.

    Args:
        source: whose key names the weights had.
        loaded: keys of the model that were set.
        missing: keys of the model that kept their values.
        unexpected: keys given that the model has no place for.
        other_shape: of the missing, those that were given in another shape: that one and ours.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shape: Mapping[str, tuple[Shape, Shape]]

    def summary(self) -> str:
        """Return one line for a log."""
        total = len(self.loaded) + len(self.missing)
        parts = [f"{len(self.loaded)} of {total} tensors loaded ({self.source} names)"]
        for title, keys in self._rest().items():
            if keys:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                parts.append(f"{title}: {keys[0]}{more}")
        return "; ".join(parts)

    def listing(self) -> str:
        """Return the summary's first part and below it every key that was not loaded, and why."""
        lines = [self.summary().partition(";")[0]]
        for title, keys in self._rest().items():
            lines += [f"{title}: {key}" for key in keys]
        return "\n".join(lines)

    def _rest(self) -> dict[str, list[str]]:
        return {
            "missing": [key for key in self.missing if key not in self.other_shape],
            "other shape": [
                f"{key} {given} for {ours}" for key, (given, ours) in self.other_shape.items()
            ],
            "left over": list(self.unexpected),
        }


def load_weights(
    model: nn.Module,
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    source: str = "auto",
    partial: bool = False,
) -> LoadReport:
    """Set a model's weights from a file or a state dict, in whole or in part.

    A backbone's weights, with or without their "backbone." prefix, fit whatever model has that
    backbone. Head tensors of another shape (another number of classes) are left out, position
    embeddings of another grid resized. After plain backbone weights have come into a HILA backbone,
    its low blocks are copied anew.

    Args:
        model: is changed in place.
        path_or_state_dict: a file with one of `WEIGHTS_SUFFIXES`, or its contents.
        source: whose key names: a name of `SOURCES`, or "auto" to see it from the keys.
        partial: whether backbone tensors of another shape are left out too.

    Raises:
        CheckpointError: the file cannot be read, nothing in it fits, or a tensor of the backbone
            has another shape; the model is then unchanged.
        UnknownNameError: `source` is none of these.
    """
    names = [known.name for known in SOURCES]
    if source not in ("auto", *names):
        raise UnknownNameError("weights source", source, ["auto", *names])
    if isinstance(path_or_state_dict, str | Path):
        origin, raw = str(path_or_state_dict), _read(Path(path_or_state_dict))
    else:
        origin, raw = "state dict", dict(path_or_state_dict)
    wanted = _recognise(raw) if source == "auto" else source
    own = model.state_dict()
    given = _match_prefix(SOURCES[names.index(wanted)].convert(raw), own)
    given = resize_grids(model, given)
    fitting, other_shape = _fitting(given, own)
    if not fitting and not other_shape:
        raise CheckpointError(f"{origin}: {_strangeness(raw, wanted, own)}")
    prefix = _backbone_prefix(own)
    wrong = [key for key in other_shape if key.startswith(prefix)]
    if not fitting or (wrong and not partial):
        key = (wrong or list(other_shape))[0]
        found, expected = other_shape[key]
        raise CheckpointError(
            f"{origin}: {key} has shape {found}, the model expects {expected}, and so on for "
            f"{len(other_shape)} of {len(given)} tensors; is it another variant?"
        )
    model.load_state_dict(fitting, strict=False)
    _complete_hila(model, fitting)
    return LoadReport(
        source=wanted,
        loaded=tuple(fitting),
        missing=tuple(key for key in own if key not in fitting),
        unexpected=tuple(key for key in given if key not in own),
        other_shape=other_shape,
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
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as weights: {error}") from error
    return {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


def _read_pickle(path: Path) -> dict[str, Any]:
    """Return the state dict of a torch file, also where it is wrapped together with more."""
    from pickle import UnpicklingError  # noqa: PLC0415

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, EOFError, LookupError, TypeError, AttributeError) as error:
        # All of these come of bytes that are no pickle: a web page saved as weights, say.
        raise ValueError("it holds more than tensors, or is damaged") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise ValueError(f"found a {type(content).__name__}, expected a state dict")
    return content


def _recognise(given: Mapping[str, Tensor]) -> str:
    """Return the name of the first source whose mark is found in a key."""
    marked = (known.name for known in SOURCES if any(map(known.mark.search, given)))
    return next(marked, SOURCES[-1].name)


def _strangeness(raw: Mapping[str, Tensor], source: str, own: Mapping[str, Tensor]) -> str:
    """Say why nothing fits: what the keys look like, beside what the model has."""
    if not raw:
        return "holds no tensors"
    groups = list(dict.fromkeys(key.split(".")[0] for key in raw))
    look = ", ".join(groups[:8]) + (", ..." if len(groups) > 8 else "")
    looks_like = _recognise(raw)
    known = ", ".join(known.name for known in SOURCES)
    likeness = (
        f"none of the sources known ({known})" if looks_like == "xattn" else f"'{looks_like}'"
    )
    return (
        f"none of its {len(raw)} tensors, read as '{source}', fits the model, which has e.g. "
        f"{next(iter(own))}; its keys begin with {look}: it looks like {likeness}"
    )


def _backbone_prefix(own: Mapping[str, Tensor]) -> str:
    """Return what a model's backbone keys begin with: nothing if the model is a bare backbone."""
    prefix = "backbone."
    return prefix if any(key.startswith(prefix) for key in own) else ""


def _match_prefix(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put "backbone." before backbone keys, or take it away, as the model has it."""
    prefix = _backbone_prefix(own)
    placed = {}
    for key, tensor in given.items():
        stays = key in own or key.startswith("head.")
        placed[key if stays else prefix + key.removeprefix("backbone.")] = tensor
    return placed


def _fitting(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, tuple[Shape, Shape]]]:
    """Return the tensors that fit a place of the model, and both shapes of those that do not.

    Shapes that differ in sides of 1 only are the same: a 1x1 convolution's and a Linear's weight.
    """
    fitting: dict[str, Tensor] = {}
    other_shape: dict[str, tuple[Shape, Shape]] = {}
    for key, tensor in given.items():
        if key not in own:
            continue
        if tensor.squeeze().shape == own[key].squeeze().shape:
            fitting[key] = tensor.reshape(own[key].shape)
        else:
            other_shape[key] = tuple(tensor.shape), tuple(own[key].shape)
    return fitting, other_shape


def _complete_hila(model: nn.Module, loaded: Mapping[str, Tensor]) -> None:
    """Copy the low blocks of a HILA backbone that was given its plain part only."""
    if any("exchanges." in key for key in loaded) or not any("stages." in key for key in loaded):
        return
    for module in model.modules():
        if isinstance(module, Hila):
            module.copy_low_blocks()
