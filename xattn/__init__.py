"""Cross-layer-attention vision models: trained, compared and served from one pipeline.

`import xattn` costs nothing: the functions below import torch when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xattn.models.weights import load_weights
    from xattn.models.zoo import create_model, create_recipe, list_models

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "create_recipe", "list_models", "load_weights"]

_HOMES = {
    "create_model": "xattn.models.zoo",
    "create_recipe": "xattn.models.zoo",
    "list_models": "xattn.models.zoo",
    "load_weights": "xattn.models.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'xattn' has no attribute '{name}'")
    import importlib  # noqa: PLC0415 (kept out of `import xattn`)

    return getattr(importlib.import_module(_HOMES[name]), name)
