"""params.yaml as typed, frozen, strict objects. Composes the settings that each room owns.

Read with ruamel.yaml (YAML 1.2), as DVC does, so that `1e-4` is a number to both. There is one way
to change a value: the file, by hand or by `dvc exp run -S finetune.optim.lr=3e-4`.
"""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from xattn.cluster.settings import ClusterConfig
from xattn.data.augment_detection import DetectionAugment, DetectionEval
from xattn.data.datasets import DatasetConfig
from xattn.data.mixing import ClassificationMix
from xattn.data.order import OrderSettings
from xattn.data.pixels import Size
from xattn.data.transforms import (
    ClassificationAugment,
    ClassificationEval,
    SegmentationAugment,
    SegmentationEval,
)
from xattn.errors import ConfigError, UnknownNameError, nearest
from xattn.evaluate.boundary import BoundaryConfig
from xattn.evaluate.inference import ProtocolConfig, SegmentationProtocol
from xattn.structures import Task
from xattn.tracking import TrackingConfig
from xattn.train.engine import FitConfig
from xattn.train.optim import OptimConfig

PARAMS = Path("params.yaml")
# Names become folders, DVC stages, dotted keys and MLflow models.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
PRESETS = Path(__file__).parent.parent / "pipelines" / "presets"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunConfig(_Section):
    """One model to train.

    Args:
        model: a name of `xattn models`.
        dataset: a key of `datasets`.
        init: the model.json of a pretrained run, a weights file, or pipelines/scratch.json.
        overrides: numbers of the model that differ from the published ones.
        loss: numbers of the loss that differ from its stage's.
    """

    model: str
    dataset: str
    init: str
    overrides: dict[str, Any] = {}
    loss: dict[str, Any] = {}


class _ValidateConfig(ProtocolConfig):
    """Scoring while training.

    Args:
        every_steps: distance between two validations; the last step is always validated.
    """

    every_steps: int = Field(gt=0)


class ValidateClassifier(_ValidateConfig):
    """Validation of a pretraining run."""

    transform: ClassificationEval


class ValidateSegmenter(_ValidateConfig):
    """Validation of a segmenter's run."""

    transform: SegmentationEval


class ValidateDetector(_ValidateConfig):
    """Validation of a detector's run."""

    transform: DetectionEval


class _StageConfig(_Section):
    """What the recipes of both training stages have in common.

    Args:
        train_split: the split to train on.
        order: how it is shuffled.
        skip_damaged: samples, over all workers, that may turn out damaged while training: the next
            sound one takes the place of each, and their number stands among the curves. 0 stops at
            the first.
        fit: length and precision.
        optim: optimiser and schedule.
    """

    train_split: str = "train"
    order: OrderSettings = OrderSettings()
    skip_damaged: int = Field(default=0, ge=0)
    fit: FitConfig
    optim: OptimConfig


class PretrainConfig(_StageConfig):
    """The recipe that every pretraining run shares.

    Args:
        augment: what happens to each image.
        mix: what happens to a batch of them; its label smoothing takes the place of the loss's.
        loss: keyword arguments of the classifier's loss, e.g. label_smoothing.
    """

    task: ClassVar[Task] = "classification"

    augment: ClassificationAugment
    mix: ClassificationMix | None = None
    loss: dict[str, Any] = {}
    validate_on: ValidateClassifier

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of a training image, px."""
        return self.augment.size, self.augment.size


class FinetuneSegmenters(_StageConfig):
    """The recipe that every fine-tuning run shares.

    Args:
        task: what the runs' models are for.
        loss: keyword arguments of the model's loss, e.g. normalise.
    """

    task: Literal["segmentation"] = "segmentation"
    augment: SegmentationAugment
    loss: dict[str, Any] = {}
    validate_on: ValidateSegmenter

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of a training image, px."""
        return self.augment.crop


class FinetuneDetectors(_StageConfig):
    """The same of detectors; `task: detection` says that it is this one."""

    task: Literal["detection"]
    augment: DetectionAugment
    loss: dict[str, Any] = {}
    validate_on: ValidateDetector

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of a training image, px."""
        return self.augment.size, self.augment.size


_FINETUNE: dict[str, type[BaseModel]] = {
    "<segmenters>": FinetuneSegmenters,
    "<detectors>": FinetuneDetectors,
}
"""By tags that no key of a file is taken for: `explain` leaves them out."""


def _finetune_tag(section: Any) -> str | None:
    task = section.get("task", "segmentation") if isinstance(section, dict) else "segmentation"
    tags = {"segmentation": "<segmenters>", "detection": "<detectors>"}
    return tags.get(task) if isinstance(task, str) else None


FinetuneConfig = FinetuneSegmenters | FinetuneDetectors


class EvaluateConfig(ProtocolConfig):
    """The final protocol.

    Args:
        segmentation: how images are shown to a segmentation model.
        multi_scale: how they are shown to it a second time, for scores whose names end in "_ms";
            boundaries and crops are scored by `segmentation` alone. None leaves it out.
        classification: how they are shown to a classifier.
        detection: how they are shown to a detector.
        boundary: the boundary scores to take of a segmentation model; None for none.
        crops: (height, width) of distance crops that are scored beside the whole image, px.
        small_classes: a file with the name of a class a line (# begins a comment), over which
            mIoU_small is the mean; relative to the project's folder.
        device: "auto", "cpu" or "cuda".
        pictures: how many images of the split are drawn in the report, evenly spread over it.
    """

    segmentation: SegmentationProtocol
    multi_scale: SegmentationProtocol | None = None
    classification: ClassificationEval
    detection: DetectionEval = DetectionEval(size=300)
    boundary: BoundaryConfig | None = None
    crops: tuple[Size, ...] = ()
    small_classes: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    pictures: int = Field(default=6, ge=0)


class ReportConfig(_Section):
    """The report's heading."""

    title: str


class Config(_Section):
    """The whole of params.yaml."""

    seed: int = Field(ge=0, lt=2**32)
    datasets: dict[Name, DatasetConfig]
    pretrain: PretrainConfig
    pretrain_runs: dict[Name, RunConfig]
    finetune: Annotated[
        Annotated[FinetuneSegmenters, Tag("<segmenters>")]
        | Annotated[FinetuneDetectors, Tag("<detectors>")],
        Discriminator(
            _finetune_tag,
            custom_error_type="unknown_task",
            custom_error_message="task: expected segmentation or detection",
        ),
    ]
    runs: dict[Name, RunConfig]
    evaluate: EvaluateConfig
    cluster: ClusterConfig
    tracking: TrackingConfig
    report: ReportConfig


def load_config(path: Path = PARAMS) -> Config:
    """Read and check a params file.

    Raises:
        ConfigError: the file is missing or no YAML; a key is unknown, missing, of the wrong type or
            out of range; a run names a data set that is not there. The message gives the dotted
            key, what was found and expected, and the nearest known name.
    """
    try:
        document = json.dumps(read_yaml(path))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path.name}: holds what JSON cannot express ({error})") from None
    try:
        # Strict JSON validation: "7" is no integer, but a YAML list may fill a tuple.
        config = Config.model_validate_json(document, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {explain(error, Config)}") from None
    except UnknownNameError as error:  # of a reader, which pydantic lets through
        raise ConfigError(f"{path.name}: datasets.*.reader: {error}") from None
    for section, runs in (("pretrain_runs", config.pretrain_runs), ("runs", config.runs)):
        for name, run in runs.items():
            if run.dataset not in config.datasets:
                unknown = UnknownNameError("data set", run.dataset, config.datasets)
                raise ConfigError(f"{path.name}: {section}.{name}.dataset: {unknown}")
    for name in config.runs.keys() & config.pretrain_runs.keys():
        raise ConfigError(f"{path.name}: runs.{name}: pretrain_runs has a run of this name too")
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML 1.2 mapping.

    Raises:
        ConfigError: the file is missing, no YAML, or no mapping.
    """
    try:
        value = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; run from the project's folder or `xattn preset use demo`"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping, found {type(value).__name__}")
    return cast(dict[str, Any], value)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Say in one line what the first fault of a validation is, by its dotted key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if part not in _FINETUNE)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{key}: {_fault(first, model)}{more}"


def _fault(details: ErrorDetails, model: type[BaseModel]) -> str:
    if details["type"] == "extra_forbidden":
        near = nearest(str(details["loc"][-1]), _fields_at(model, details["loc"][:-1]))
        return f"unknown key; did you mean '{near}'?" if near else "unknown key"
    if details["type"] == "missing":
        return "missing; it has no default"
    if details["type"] == "unknown_task":
        return f"{details['msg']}, found {details['input'].get('task')!r}"
    if details["type"] == "value_error":  # of a check of ours, which says what it found
        return details["msg"].removeprefix("Value error, ")
    message = details["msg"].replace("Input should be", "expected", 1)
    return f"{message[0].lower()}{message[1:]}, found {details['input']!r}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the model that `location` leads to."""
    for place, part in enumerate(location):
        if part in _FINETUNE:
            return _fields_at(_FINETUNE[str(part)], location[place + 1 :])
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # the key of a mapping: its value's type was taken with the field
        annotation: Any = field.annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            return []
        model = inner[-1]
    return list(model.model_fields)


def list_presets() -> list[str]:
    """Return the names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_path(name: str) -> Path:
    """Return the file of a preset.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in list_presets():
        raise UnknownNameError("preset", name, list_presets())
    return PRESETS / f"{name}.yaml"
