"""Our backbones under timm's names: `timm.create_model("hila_mit_b1_s234", features_only=True)`.

timm takes longer to import than torch, and nothing else here needs it: our names are entered when
timm has been imported, be it before or after `xattn.models`.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast


def register_names() -> None:
    """Enter our backbones into timm's registry, now or as soon as timm is imported."""
    if "timm" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterTimm())


class _AfterTimm(MetaPathFinder):
    """Finds timm as everybody else does, but enters our names once it has been executed."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        """Return timm's spec with a longer `exec_module`; nothing for any other module."""
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    """Enter every classifier of the zoo, whose backbones are what timm offers."""
    from timm.models import register_model  # noqa: PLC0415

    from xattn.models.zoo import list_models  # noqa: PLC0415

    for name in list_models("classification"):
        register_model(_entry_point(name))


def _entry_point(name: str) -> Callable[..., Any]:
    def create(
        pretrained: bool = False,
        features_only: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        num_classes: int = 1000,
        drop_path_rate: float | None = None,
        pretrained_cfg: object = None,  # noqa: ARG001 (timm gives these three to every model)
        pretrained_cfg_overlay: object = None,  # noqa: ARG001
        cache_dir: object = None,  # noqa: ARG001
        **overrides: Any,
    ) -> Any:
        """Build the classifier, or its backbone's maps; for overrides see `zoo.create_model`."""
        from xattn.errors import ConfigError  # noqa: PLC0415
        from xattn.models.pyramid import Pyramid  # noqa: PLC0415
        from xattn.models.timm_features import Features  # noqa: PLC0415
        from xattn.models.zoo import create_backbone, create_model  # noqa: PLC0415

        if pretrained:
            raise ConfigError(
                "pretrained: found True, expected False; load your own by xattn.load_weights"
            )
        if drop_path_rate is not None:
            overrides["drop_path"] = drop_path_rate
        if features_only:
            return Features(cast(Pyramid, create_backbone(name, **overrides)), out_indices)
        return create_model(name, num_classes=num_classes, **overrides)

    create.__name__ = create.__qualname__ = name
    return create
