"""Presets: the numbers are those of the papers, and every one takes real steps on tiny data.

The constants here are typed from the papers, not read from the files. Tiny means: raw files in the
layout of their owner with few, small images; sizes, steps and batches are lowered and places are
changed, every other number stays the preset's.
"""

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.io import savemat

from pipelines.evaluate import evaluate
from pipelines.finetune import finetune
from pipelines.pretrain import pretrain
from pipelines.shard import shard
from tests.conftest import PROJECT, write_params
from tests.raw_files import write_mask, write_text
from tests.test_segvit import TINY
from xattn.config import Config, RunConfig, list_presets, load_config, preset_path, read_yaml
from xattn.data.datasets.cityscapes import CLASSES
from xattn.data.datasets.cityscapes import MASK_END as CITY_MASK
from xattn.data.datasets.coco import CLASSES as COCO_CLASSES
from xattn.errors import XattnError
from xattn.evaluate.cost import ShapesOnly
from xattn.evaluate.detection import COCO_CATEGORY_IDS
from xattn.evaluate.inference import HEADLINE
from xattn.job import SCRATCH, Stage
from xattn.models.weights import load_weights, save_weights
from xattn.models.zoo import create_model, model_card
from xattn.nn.blocks import DropPath
from xattn.nn.grids import Grid
from xattn.storage import sha256_file, sha256_json, write_json
from xattn.train.optim import build_optimizer, lr_at

SCASEG = [name for name in list_presets() if name.startswith("scaseg-")]
HILA = [name for name in list_presets() if name.startswith("hila-")]
CLA = ["cla-ade20k", "cla-ablations-ade20k"]
SEGVIT = [name for name in list_presets() if name.startswith("segvit-")]
CITYSCAPES = [name for name in HILA if "cityscapes" in name]
MIT_TUNED = [*CITYSCAPES, "hila-ade20k", "hila-celebamask", *CLA, *SCASEG]
IMAGENET = ["hila-imagenet", "hila-ablations-imagenet"]
PRETRAINED_BY = {
    run: spec
    for preset in IMAGENET
    for run, spec in load_config(preset_path(preset)).pretrain_runs.items()
}

# ---- numbers ------------------------------------------------------------------------------------

PVT = {  # spec HILA 4.1
    "seed": 1,
    "pretrain.order.repeats": 3,
    "pretrain.augment.size": 224,
    "pretrain.augment.scale": (0.08, 1.0),
    "pretrain.augment.interpolation": "bicubic",
    "pretrain.augment.flip": 0.5,
    "pretrain.augment.colour_jitter": 0.0,
    "pretrain.augment.rand_augment.num_operations": 2,
    "pretrain.augment.rand_augment.probability": 0.5,
    "pretrain.augment.rand_augment.magnitude": 9.0,
    "pretrain.augment.rand_augment.magnitude_std": 0.5,
    "pretrain.augment.random_erasing.probability": 0.25,
    "pretrain.mix.mixup": 0.8,
    "pretrain.mix.cutmix": 1.0,
    "pretrain.mix.switch": 0.5,
    "pretrain.mix.probability": 1.0,
    "pretrain.mix.label_smoothing": 0.1,
    "pretrain.fit.steps": 300 * 1251,
    "pretrain.fit.global_batch": 8 * 128,
    "pretrain.fit.clip_norm": None,
    "pretrain.optim.lr": 5e-4 * 1024 / 512,
    "pretrain.optim.weight_decay": 0.05,
    "pretrain.optim.betas": (0.9, 0.999),
    "pretrain.optim.schedule": "cosine",
    "pretrain.optim.min_lr": 1e-5,
    "pretrain.optim.warmup_steps": 5 * 1251,
    "pretrain.optim.update_every_steps": 1251,
    "pretrain.optim.head_lr_multiplier": 1.0,
    "pretrain.optim.decay_vectors": False,
    "evaluate.split": "val",
    "evaluate.classification.size": 224,
    "evaluate.classification.resize": 256,
    "cluster.workers": 8,
}
SEGFORMER = {  # spec HILA 4.2, what both data sets share
    "seed": 1,
    "finetune.augment.ratio": (0.5, 2.0),
    "finetune.augment.class_cap": 0.75,
    "finetune.augment.flip": 0.5,
    "finetune.augment.photometric": True,
    "finetune.loss": {"normalise": "all"},
    "finetune.fit.precision": "fp32",
    "finetune.fit.clip_norm": None,
    "finetune.fit.steps": 160_000,
    "finetune.optim.lr": 6e-5,
    "finetune.optim.betas": (0.9, 0.999),
    "finetune.optim.weight_decay": 0.01,
    "finetune.optim.no_decay": ("norm",),
    "finetune.optim.decay_vectors": True,
    "finetune.optim.head_lr_multiplier": 10.0,
    "finetune.optim.schedule": "poly",
    "finetune.optim.power": 1.0,
    "finetune.optim.min_lr": 0.0,
    "finetune.optim.warmup_steps": 1500,
    "finetune.optim.warmup_start": 1e-6,
    "finetune.optim.update_every_steps": 1,
    "evaluate.segmentation.ratios": (1.0,),
    "evaluate.segmentation.flip": False,
}
ADE20K = {
    "finetune.augment.base": (512, 2048),
    "finetune.augment.crop": (512, 512),
    "finetune.fit.global_batch": 16,
    "finetune.validate_on.transform.base": (512, 2048),
    "finetune.validate_on.transform.multiple": 32,
    "evaluate.split": "val",
    "evaluate.segmentation.base": (512, 2048),
    "evaluate.segmentation.multiple": 32,
    "evaluate.segmentation.window": None,
    "evaluate.multi_scale.base": (512, 2048),
    "evaluate.multi_scale.multiple": 32,
    "evaluate.multi_scale.ratios": (0.75, 0.875, 1.0, 1.125, 1.25),
    "evaluate.multi_scale.flip": True,
    "evaluate.multi_scale.average": "probabilities",
    "evaluate.boundary.image_thresholds": (3.0,),
}


def on_cityscapes(
    base: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int] | None
) -> dict[str, Any]:
    """Return the numbers of a resolution; without a stride the image is seen whole."""
    windows = {
        f"evaluate.{part}.window{end}": value
        for part in ("segmentation", "multi_scale")
        for end, value in ((".crop", crop), (".stride", stride))
    }
    whole = {"evaluate.segmentation.window": None, "evaluate.multi_scale.window": None}
    return {
        **SEGFORMER,
        "finetune.augment.base": base,
        "finetune.augment.crop": crop,
        "finetune.fit.global_batch": 8,
        "evaluate.split": "val",
        "evaluate.segmentation.base": base,
        "evaluate.multi_scale.base": base,
        "evaluate.multi_scale.ratios": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
        "evaluate.multi_scale.flip": True,
        "evaluate.multi_scale.average": "probabilities",
        "evaluate.boundary.numbers": (0.00088, 0.001875, 0.00375, 0.005),
        **(windows if stride else whole),
    }


FULL = on_cityscapes((1024, 2048), (1024, 1024), (768, 768))
CROPS = {"evaluate.crops": ((624, 1248), (424, 848), (224, 448))}  # spec HILA 5.4
NUMBERS: dict[str, dict[str, Any]] = {
    "hila-imagenet": PVT,
    "hila-ablations-imagenet": PVT,
    "hila-ade20k": {**SEGFORMER, **ADE20K},
    "hila-swin-ade20k": {  # spec HILA 4.3
        **SEGFORMER,
        **ADE20K,
        "finetune.optim.head_lr_multiplier": 1.0,
        "finetune.optim.no_decay": ("norm", "relative_position_bias"),
    },
    "hila-cityscapes": {**FULL, **CROPS},
    "hila-cityscapes-b2": {
        **FULL,
        **CROPS,
        "finetune.fit.steps": 320_000,
        "finetune.fit.global_batch": 4,
    },
    "hila-ablations-cityscapes": FULL,
    "hila-cityscapes-768": on_cityscapes((768, 1536), (768, 768), (768, 768)),
    "hila-cityscapes-640": on_cityscapes((640, 1280), (640, 1280), None),
    "hila-cityscapes-512": on_cityscapes((512, 1024), (512, 1024), None),
    "hila-celebamask": {  # spec HILA 4.4
        **SEGFORMER,
        "finetune.augment.base": (256, 256),
        "finetune.augment.crop": (256, 256),
        "finetune.fit.global_batch": 16,
        "datasets.celebamask.shards.images.max_side": 256,
        "evaluate.split": "test",
    },
    **{
        preset: {  # spec CLA 1.9
            **SEGFORMER,
            "finetune.augment.base": (512, 2048),
            "finetune.augment.crop": (512, 512),
            "finetune.fit.steps": 320_000,
            "finetune.fit.global_batch": 8,
            "finetune.validate_on.transform.base": (512, 2048),
            "finetune.validate_on.transform.multiple": 64,
            "evaluate.split": "val",
            "evaluate.segmentation.base": (512, 2048),
            "evaluate.segmentation.multiple": 64,
            "evaluate.segmentation.window": None,
            "evaluate.multi_scale": None,
            "cluster.workers": 1,
        }
        for preset in CLA
    },
}

ON_ONE_SCALE = {  # spec SCASeg 13: its parents' recipe
    **SEGFORMER,
    **{key: value for key, value in ADE20K.items() if not re.search("multi_scale|boundary", key)},
    "evaluate.multi_scale": None,
    "evaluate.boundary": None,
    "finetune.train_split": "train",
}
NUMBERS |= {
    "scaseg-ade20k": ON_ONE_SCALE,
    "scaseg-cityscapes": {
        **{key: value for key, value in ON_ONE_SCALE.items() if not key.endswith(".window")},
        "finetune.augment.base": (1024, 2048),
        "finetune.augment.crop": (1024, 1024),
        "finetune.fit.global_batch": 8,
        "finetune.validate_on.transform.base": (1024, 2048),
        "evaluate.segmentation.base": (1024, 2048),
        "evaluate.segmentation.window.crop": (1024, 1024),
        "evaluate.segmentation.window.stride": (768, 768),
    },
    "scaseg-cocostuff164k": {
        **ON_ONE_SCALE,
        "datasets.cocostuff164k.settings": {"version": "164k", "classes": 171},
        "finetune.fit.steps": 80_000,
    },
    "scaseg-voc2012": {
        **ON_ONE_SCALE,
        "finetune.fit.steps": 80_000,
        "finetune.train_split": "train_aug",
    },
}


def of_segvit(  # spec SegViT 5.1 and 5.2
    base: tuple[int, int], crop: int, stride: int, steps: int, decay: float, power: float
) -> dict[str, Any]:
    return {
        "seed": 0,
        "finetune.augment.base": base,
        "finetune.augment.crop": (crop, crop),
        "finetune.augment.ratio": (0.5, 2.0),
        "finetune.augment.class_cap": 0.75,
        "finetune.augment.flip": 0.5,
        "finetune.augment.photometric": True,
        "finetune.loss": {},
        "finetune.fit.steps": steps,
        "finetune.fit.global_batch": 16,
        "finetune.fit.precision": "fp32",
        "finetune.fit.clip_norm": 35.0,
        "finetune.optim.lr": 2e-5,
        "finetune.optim.head_lr_multiplier": 10.0,
        "finetune.optim.weight_decay": decay,
        "finetune.optim.no_decay": ("norm",),
        "finetune.optim.decay_vectors": True,
        "finetune.optim.betas": (0.9, 0.999),
        "finetune.optim.schedule": "poly",
        "finetune.optim.power": power,
        "finetune.optim.min_lr": 0.0,
        "finetune.optim.warmup_steps": 1500,
        "finetune.optim.warmup_start": 1e-6,
        **{
            f"evaluate.{part}.{key}": value
            for part in ("segmentation", "multi_scale")
            for key, value in (
                ("base", base),
                ("shortest", crop),
                ("multiple", 1),
                ("window.crop", (crop, crop)),
                ("window.stride", (stride, stride)),
            )
        },
        "evaluate.multi_scale.ratios": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75),
        "evaluate.multi_scale.flip": True,
        "evaluate.multi_scale.average": "probabilities",
    }


ADE_512 = of_segvit((512, 2048), 512, 341, 160_000, 0.01, 1.0)
NUMBERS |= {
    "segvit-ade20k": of_segvit((640, 2048), 640, 608, 160_000, 0.01, 1.0),
    "segvit-ade20k-512": ADE_512,
    "segvit-ablations-ade20k": ADE_512,
    "segvit-cocostuff10k": {
        **of_segvit((512, 2048), 512, 341, 80_000, 0.02, 2.0),
        "evaluate.split": "test",
        "datasets.cocostuff.settings": {"version": "10k", "classes": 171},
    },
    "segvit-pascal-context": {
        **of_segvit((520, 520), 480, 320, 80_000, 0.03, 1.0),
        "evaluate.split": "val",
        "datasets.pascal_context.settings": {"classes": 60},
    },
}


def number_at(config: Config, dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value[key] if isinstance(value, dict) else getattr(value, key)
    return value


@pytest.mark.parametrize("preset", [*HILA, *CLA, *SEGVIT, *SCASEG])
def test_numbers_are_the_paper_s(preset: str) -> None:
    config = load_config(preset_path(preset))
    found = {dotted: number_at(config, dotted) for dotted in NUMBERS[preset]}
    assert found == NUMBERS[preset]


def test_the_rates_of_pretraining_by_hand() -> None:
    """An epoch at 1e-6, four more on a straight line to 1e-3, then the cosine by whole epochs."""
    fit, optim = (
        getattr(load_config(preset_path(IMAGENET[0])).pretrain, k) for k in ("fit", "optim")
    )
    rates = [lr_at(epoch * 1251, fit.steps, optim) for epoch in range(300)]
    assert rates[0] == pytest.approx(1e-6)
    assert rates[1] == pytest.approx(1e-6 + (1e-3 - 1e-6) / 5, rel=1e-3)  # times the cosine
    for epoch in (5, 150, 299):
        cosine = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 300)) / 2
        assert rates[epoch] == pytest.approx(cosine)
        assert lr_at(epoch * 1251 + 1250, fit.steps, optim) == rates[epoch]


@pytest.mark.parametrize("preset", MIT_TUNED)
def test_the_rates_of_fine_tuning_by_hand(preset: str) -> None:
    fit, optim = (getattr(load_config(preset_path(preset)).finetune, k) for k in ("fit", "optim"))
    assert lr_at(0, fit.steps, optim) == pytest.approx(6e-5 * 1e-6)
    half = 0.5 * (1 + 1e-6) * (1 - 750 / fit.steps)
    assert lr_at(750, fit.steps, optim) == pytest.approx(6e-5 * half)
    assert lr_at(1500, fit.steps, optim) == pytest.approx(6e-5 * (1 - 1500 / fit.steps))
    assert lr_at(fit.steps - 1, fit.steps, optim) == pytest.approx(6e-5 / fit.steps)


def test_the_ablations_keep_the_recipe_of_what_they_ablate() -> None:
    whole, ablated = (load_config(preset_path(name)) for name in CLA)
    assert ablated.finetune == whole.finetune
    assert ablated.evaluate == whole.evaluate
    for run in ("segformer_b0", "cla_segformer_b0"):
        assert ablated.runs[run] == whole.runs[run]
    models, backbones = (load_config(preset_path(name)) for name in IMAGENET)
    assert backbones.pretrain == models.pretrain
    whole, ablated, wide = (
        load_config(preset_path(f"hila-{name}"))
        for name in ("cityscapes", "ablations-cityscapes", "cityscapes-b2")
    )
    assert ablated.finetune == whole.finetune
    assert wide.evaluate == whole.evaluate
    shared = whole.runs.keys() & ablated.runs.keys()
    assert {"segformer_b1", "hila_segformer_b1_s3", "hila_segformer_b1_s234"} <= shared
    for run in shared:
        assert ablated.runs[run] == whole.runs[run], "the same job, which is not trained twice"


# ---- runs ---------------------------------------------------------------------------------------


def runs_of(preset: str) -> dict[str, RunConfig]:
    config = load_config(preset_path(preset))
    return {**config.pretrain_runs, **config.runs}


HIGH: dict[str, dict[str, Any]] = {
    "b0_s3": {},
    "b1_s3": {},
    "b1_s234": {},
    # Table 7b, of which table 7a varies the constants.
    "b0_s3_unshared": {"share": False},
    "b0_s3_unshared_a10_b10": {"share": False, "alpha": 1.0, "beta": 1.0},
    "b0_s3_unshared_a02_b08": {"share": False, "alpha": 0.2, "beta": 0.8},
    "b0_s3_unshared_a08_b02": {"share": False, "alpha": 0.8, "beta": 0.2},
    # Table 3.
    "b1_s2": {"stages": [2]},
    "b1_s4": {"stages": [4]},
    "b1_s34": {"stages": [3, 4]},
    "b1_s234_up": {"top_down": False},
    # Table 7d.
    "b1_s234_p2": {"patch": 2},
    "b1_s234_p6": {"patch": 6},
}
"""HILA models that are pretrained with HILA: what differs from the published ones."""
LIKE = {"b1_s2": "b1_s3", "b1_s4": "b1_s3", "b1_s34": "b1_s234"}
"""Published models by another name than the run's begins with."""
NARROW = {"head_width": 128}
SWIN_T = "weights/swin_tiny_patch4_window7_224.pth"
MSCAN = {size: f"weights/mscan_{size}.pth" for size in "tsbl"}
STRIDES = {"": {}, "_stride2": {"stride": [1, 2, 1]}, "_stride1": {"stride": [1, 1, 1]}}
CONSTANTS = {"a10_b10": (1.0, 1.0), "a02_b08": (0.2, 0.8), "a08_b02": (0.8, 0.2)}


def low(size: str) -> dict[str, tuple[str, str, dict[str, Any]]]:
    return {f"segformer_{size}": (f"segformer_{size}", f"mit_{size}", {})}


def high(*names: str) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Return (model, initial weights, overrides) of runs that are pretrained with HILA."""
    return {
        f"hila_segformer_{name}": (
            f"hila_segformer_{LIKE.get(name, '_'.join(name.split('_')[:2]))}",
            f"hila_mit_{name}",
            HIGH[name],
        )
        for name in names
    }


def plain(*names: str) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Return the same of runs whose backbone was pretrained as plain MiT."""
    return {
        f"hila_segformer_{name}_plain": (f"hila_segformer_{name}", f"mit_{name[:2]}", {})
        for name in names
    }


B2 = "hila_segformer_b2_s234"
TABLE_1 = {
    **low("b0"), **plain("b0_s3"), **high("b0_s3"),
    **low("b1"), **plain("b1_s3", "b1_s234"), **high("b1_s3", "b1_s234"),
    **low("b2"),
}  # fmt: skip
FACES = {"segformer_b2": ("segformer_b2", SCRATCH, NARROW), B2: (B2, SCRATCH, NARROW)}
CLA_B0: dict[str, dict[str, Any]] = {
    "": {},
    "_p14": {"pairs": [[1, 4]]},
    "_p23": {"pairs": [[2, 3]]},
    "_p13_p24": {"pairs": [[2, 4], [1, 3]]},
    "_p34_p23_p12": {"pairs": [[3, 4], [2, 3], [1, 2]]},
    "_p34_p23_p14": {"pairs": [[3, 4], [2, 3], [1, 4]]},
    "_d1": {"d": 1},
    **{f"_d{d}": {"d": d, "impl": "literal"} for d in (4, 8, 16)},
    "_no_fuse": {"final_fuse": False, "proj": "always"},
    "_no_fj": {"concat_fj": False, "proj": "always"},
    "_gate": {"combine": "gate"},
    "_concat": {"combine": "concat"},
    "_unscaled": {"encoder_scale": "one", "decoder_scale": "one"},
}
RUNS = {
    "cla-ade20k": {
        **{name: run for size in ("b0", "b1", "b2") for name, run in low(size).items()},
        **{
            f"cla_segformer_{size}": (f"cla_segformer_{size}", f"mit_{size}", {})
            for size in ("b0", "b1")
        },
    },
    "cla-ablations-ade20k": low("b0")
    | {
        f"cla_segformer_b0{end}": ("cla_segformer_b0", "mit_b0", over)
        for end, over in CLA_B0.items()
    },
    "hila-ade20k": {**TABLE_1, B2: (B2, "mit_b2", {}), **high("b0_s3_unshared")},
    "hila-swin-ade20k": {
        name: (name, SWIN_T, {"drop_path": 0.3})
        for name in ("upernet_swin_t", "hila_upernet_swin_t_s234")
    },
    "hila-cityscapes": TABLE_1,
    "hila-cityscapes-b2": {B2 + end: (B2, "mit_b2", over) for end, over in STRIDES.items()},
    **{f"hila-cityscapes-{side}": {**low("b0"), **high("b0_s3")} for side in (768, 640, 512)},
    "hila-ablations-cityscapes": {**low("b1"), **high(*HIGH)},
    "hila-celebamask": FACES
    | {
        f"{B2}_{end}": (B2, SCRATCH, {**NARROW, "alpha": alpha, "beta": beta})
        for end, (alpha, beta) in CONSTANTS.items()
    },
}

SCASEG_RUNS = {
    **{
        f"scaseg_mit_{size}": (f"scaseg_mit_{size}", f"mit_{size}", {})
        for size in ("b0", "b1", "b2")
    },
    **{f"scaseg_mscan_{size}": (f"scaseg_mscan_{size}", MSCAN[size], {}) for size in MSCAN},
}
RUNS |= dict.fromkeys(SCASEG, SCASEG_RUNS)


VIT_B, VIT_L = (
    f"weights/{name}.pth" for name in ("jx_vit_base_p16_384", "vit_large_patch16_384_augreg")
)


SSD = {  # spec CFSAM 2.5
    "finetune.task": "detection",
    "finetune.augment.size": 300,
    "finetune.augment.min_ious": (0.0, 0.1, 0.3, 0.7, 0.9),
    "finetune.augment.max_zoom": 4.0,
    "finetune.augment.zoom_out": 0.5,
    "finetune.augment.swap_channels": 0.5,
    "finetune.loss": {"negatives": 3},
    "finetune.optim.optimizer": "sgd",
    "finetune.optim.lr": 1e-3,
    "finetune.optim.momentum": 0.9,
    "finetune.optim.weight_decay": 5e-4,
    "finetune.optim.no_decay": (),
    "finetune.optim.decay_vectors": True,
    "finetune.optim.head_lr_multiplier": 1.0,
    "finetune.optim.schedule": "step",
}
VOC_EPOCH, COCO_EPOCH = -(-16_551 // 48), -(-82_783 // 16)  # steps, the last batch kept


@pytest.mark.parametrize(
    ("preset", "epoch", "batch", "epochs", "fall_at"),
    [
        ("cfsam-voc", VOC_EPOCH, 48, 260, (130, 220)),
        ("cfsam-coco", COCO_EPOCH, 16, 120, (60, 101)),
    ],
)
def test_recipes_of_cfsam(
    preset: str, epoch: int, batch: int, epochs: int, fall_at: tuple[int, int]
) -> None:
    config = load_config(preset_path(preset))
    for key, expected in SSD.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        assert value == expected, key
    fit, optim = config.finetune.fit, config.finetune.optim
    assert (fit.global_batch, fit.steps) == (batch, epochs * epoch)
    rates = [lr_at(n * epoch, fit.steps, optim) for n in (1, fall_at[0] - 1, *fall_at, epochs - 1)]
    # The warm-up is over within two epochs; each rate holds from its epoch's first step on.
    assert rates[1:] == pytest.approx([1e-3, 1e-4, 1e-5, 1e-5])
    table_4 = ["ssd300", "ssd300_se", "ssd300_cfam", "ssd300_mvit", "ssd300_cfsam"]
    assert list(config.runs)[:5] == table_4
    assert all(spec.model == name for name, spec in config.runs.items())
    sizes = {spec.overrides.get("box_sizes", "voc") for spec in config.runs.values()}
    assert sizes == {"coco" if preset == "cfsam-coco" else "voc"}


def full_and_shrunk(**overrides: Any) -> dict[str, tuple[str, str, dict[str, Any]]]:
    return {name: (name, VIT_L, overrides) for name in ("segvit_l", "segvit_shrunk_l")}


RUNS |= {
    "segvit-ade20k": full_and_shrunk()
    | {  # table 7
        "segvit_shrunk_l_conv": ("segvit_shrunk_l", VIT_L, {"sampling": "conv"}),
        "segvit_shrunk_l_qkv": ("segvit_shrunk_l", VIT_L, {"sampling": "nearest_qkv"}),
    },
    "segvit-ade20k-512": {
        "segvit_b": ("segvit_b", VIT_B, {}),
        "segvit_swin_t": ("segvit_swin_t", SWIN_T, {}),
    },
    "segvit-cocostuff10k": full_and_shrunk(crop=[512, 512]),
    "segvit-pascal-context": full_and_shrunk(crop=[480, 480]),
    "segvit-ablations-ade20k": {  # tables 4, 5 and 8
        "setr_naive_b": ("setr_naive_b", VIT_B, {}),
        "segvit_b_12_ce": ("segvit_b", VIT_B, {"taps": [12]}),
        "segvit_b_12": ("segvit_b", VIT_B, {"taps": [12]}),
        "segvit_b_6_12": ("segvit_b", VIT_B, {"taps": [6, 12]}),
        "segvit_b": ("segvit_b", VIT_B, {}),
        "segvit_b_3_6_9_12": ("segvit_b", VIT_B, {"taps": [3, 6, 9, 12]}),
        "segvit_naive_shrunk_b": ("segvit_naive_shrunk_b", VIT_B, {}),
        "segvit_shrunk_b": ("segvit_shrunk_b", VIT_B, {}),
    },
}


@pytest.mark.parametrize("preset", SEGVIT)
def test_models_of_segvit_are_of_the_crop_and_one_loss_is_another(preset: str) -> None:
    config = load_config(preset_path(preset))
    for name, spec in config.runs.items():
        assert spec.loss == ({"kind": "ce"} if name == "segvit_b_12_ce" else {})
        with ShapesOnly():
            built = create_model(spec.model, num_classes=1, **spec.overrides)
        for part in built.modules():
            if isinstance(part, Grid):
                side = config.finetune.augment.crop[0] // 16
                assert part.weight.shape[:2] == (side, side)


@pytest.mark.parametrize("preset", RUNS)
def test_runs_are_the_papers_rows(preset: str) -> None:
    runs = load_config(preset_path(preset)).runs
    found = {
        name: (
            spec.model,
            spec.init.removeprefix("results/pretrain/").removesuffix("/model.json"),
            spec.overrides,
        )
        for name, spec in runs.items()
    }
    assert found == RUNS[preset]


def test_what_is_pretrained() -> None:
    found = {name: (spec.model, spec.overrides) for name, spec in PRETRAINED_BY.items()}
    wanted: dict[str, Any] = {f"mit_{size}": (f"mit_{size}", {}) for size in ("b0", "b1", "b2")}
    for model, init, overrides in high(*HIGH).values():
        wanted[init] = (model.replace("segformer", "mit"), overrides)
    assert found == wanted


def shapes_of(spec: RunConfig, num_classes: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = create_model(spec.model, num_classes=num_classes, **spec.overrides)
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("preset", "run"),
    [(preset, run) for preset in (*HILA, *CLA, *SCASEG) for run in runs_of(preset)],
)
def test_every_run_builds_and_its_initial_weights_fit(preset: str, run: str) -> None:
    spec = runs_of(preset)[run]
    own = {k.removeprefix("backbone."): v for k, v in shapes_of(spec, 19).items()}
    if not spec.init.startswith("results/pretrain/"):
        assert spec.init in (SCRATCH, SWIN_T, *MSCAN.values())
        return
    source = PRETRAINED_BY[spec.init.split("/")[2]]
    given = shapes_of(source, 1000)
    given = {k.removeprefix("backbone."): v for k, v in given.items() if not k.startswith("head.")}
    common = own.keys() & given.keys()
    assert {key: own[key] for key in common} == {key: given[key] for key in common}
    lacking = {key for key in own if not key.startswith("head.")} - given.keys()
    if source.model.startswith("hila"):  # the very backbone
        assert own.keys() >= given.keys()
        assert not lacking
    else:  # all but what HILA adds, which then starts from its own block
        assert all(key.startswith("exchanges.") for key in lacking)


@pytest.mark.parametrize(
    "model", ["segformer_b0", "hila_segformer_b0_s3", "hila_segformer_b2_s234", "scaseg_mit_b0"]
)
def test_drop_path_and_groups_of_fine_tuning(model: str) -> None:
    """SegFormer's rule goes by names; here by kinds: a LayerNorm is decayed in a head alone."""
    optim = load_config(preset_path("hila-ade20k")).finetune.optim
    with torch.device("meta"):
        built = create_model(model, num_classes=150)
        optimizer = build_optimizer(built, optim)
    rates = [part.rate for part in built.modules() if isinstance(part, DropPath)]
    assert max(rates) == pytest.approx(0.1)
    head = {id(parameter) for parameter in built.head.parameters()}
    norms = {
        id(parameter)
        for part in built.modules()
        if isinstance(part, torch.nn.LayerNorm)
        for parameter in part.parameters()
    } - head
    assert norms
    seen = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.0 if id(parameter) in norms else 0.01)
            assert group["multiplier"] == (10.0 if id(parameter) in head else 1.0)
            seen += 1
    assert seen == len(list(built.parameters()))


def test_drop_path_and_groups_of_swin() -> None:
    optim = load_config(preset_path("hila-swin-ade20k")).finetune.optim
    with torch.device("meta"):
        built = create_model("hila_upernet_swin_t_s234", num_classes=150, drop_path=0.3)
        optimizer = build_optimizer(built, optim)
    rates = [part.rate for part in built.modules() if isinstance(part, DropPath)]
    assert max(rates) == pytest.approx(0.3)
    # A LayerNorm's and the table of a window; not the vector of an exchange.
    still = {
        id(parameter)
        for part in built.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if isinstance(part, torch.nn.LayerNorm) or name == "relative_position_bias"
    }
    assert len(still) > 100
    for group in optimizer.param_groups:
        assert group["multiplier"] == 1.0
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.0 if id(parameter) in still else 0.01)


@pytest.mark.parametrize("model", ["mit_b0", "hila_mit_b0_s3"])
def test_drop_path_and_groups_of_pretraining(model: str) -> None:
    optim = load_config(preset_path("hila-imagenet")).pretrain.optim
    with torch.device("meta"):
        built = create_model(model, num_classes=1000)
        optimizer = build_optimizer(built, optim)
    rates = [part.rate for part in built.modules() if isinstance(part, DropPath)]
    assert max(rates) == pytest.approx(0.1)
    for group in optimizer.param_groups:
        assert group["multiplier"] == 1.0
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0)


# ---- raw files, as their owners have them, of few and small images -------------------------------


def draw(path: Path, size: tuple[int, int], number: int) -> None:
    """Write an image of noise, (width, height) in px."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)


def blocks(size: tuple[int, int], ids: Any, number: int) -> Any:
    """Return a mask of (height, width) made of 16 px squares of these ids."""
    grid = np.random.default_rng(number).choice(ids, (-(-size[1] // 16), -(-size[0] // 16)))
    return np.kron(grid, np.ones((16, 16), np.uint8))[: size[1], : size[0]]


def make_ade20k(root: Path) -> None:
    for folder, count in (("training", 3), ("validation", 2)):
        for number in range(count):
            name, size = f"{folder}/ADE_{number:08}", (96, 72 - number)
            draw(root / f"images/{name}.jpg", size, number)
            write_mask(root / f"annotations/{name}.png", blocks(size, range(151), number))


def make_cityscapes(root: Path) -> None:
    size = (512, 256)  # px; the distance crops need more than 50 of them above and below
    ids = [0, *(label_id for label_id, _ in CLASSES.values())]
    for split, count in (("train", 2), ("val", 1)):
        for number in range(count):
            name = f"{split}/ulm/ulm_{number:06}_000019"
            draw(root / f"leftImg8bit/{name}_leftImg8bit.png", size, number)
            write_mask(root / f"gtFine/{name}{CITY_MASK}", blocks(size, ids, number))


def make_celebamask(root: Path) -> None:
    numbers = {0: 5, 1: 162770, 2: 162771, 3: 182638}  # train, train, val, test
    lines = "".join(f"{n} {in_celeba} {n:06}.jpg\n" for n, in_celeba in numbers.items())
    write_text(root / "CelebA-HQ-to-CelebA-mapping.txt", f"idx orig_idx orig_file\n{lines}")
    for number in numbers:
        draw(root / f"CelebA-HQ-img/{number}.jpg", (96, 96), number)
        for part in ("skin", "hair", "nose"):
            seen = 255 * blocks((48, 48), [0, 1], number + len(part))
            write_mask(root / f"CelebAMask-HQ-mask-anno/0/{number:05}_{part}.png", seen)


def make_imagenet(root: Path) -> None:
    for wnid in ("n02012849", "n02102480", "n03126707"):
        for split, count in (("train", 12), ("val", 2)):
            for number in range(count):
                draw(root / f"{split}/{wnid}/{wnid}_{split}_{number}.JPEG", (48, 40), number)


def make_camvid(root: Path) -> None:
    for split in ("train", "val", "test"):
        lines = [f"{split}/f{n}.png {split}annot/f{n}.png" for n in range(2)]
        write_text(root / f"{split}.txt", "\n".join(lines) + "\n")
        for number in range(2):
            draw(root / f"{split}/f{number}.png", (96, 72), number)
            write_mask(root / f"{split}annot/f{number}.png", blocks((96, 72), range(12), number))


def make_cocostuff(root: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        names = [f"{split}_{number}" for number in range(count)]
        write_text(root / f"imageLists/{split}.txt", "".join(f"{name}\n" for name in names))
        for number, name in enumerate(names):
            draw(root / f"images/{name}.jpg", (96, 72), number)
            path = root / f"annotations/{name}.mat"
            path.parent.mkdir(parents=True, exist_ok=True)
            savemat(path, {"S": blocks((96, 72), [0, 1, 2, 100, 182], number)})
    for split, count in (("train", 3), ("val", 2)):  # version 164k, beside it
        for number in range(count):
            name = f"{split}2017/{number:012}"
            draw(root / f"images/{name}.jpg", (96, 72), number)
            write_mask(root / f"annotations/{name}.png", blocks((96, 72), [0, 1, 181, 255], number))


def make_pascal_context(root: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        names = [f"2008_{split}{number}" for number in range(count)]
        lists = root / f"ImageSets/SegmentationContext/{split}.txt"
        write_text(lists, "".join(f"{name}\n" for name in names))
        for number, name in enumerate(names):
            draw(root / f"JPEGImages/{name}.jpg", (96, 72), number)
            mask = blocks((96, 72), range(60), number)
            write_mask(root / f"SegmentationClassContext/{name}.png", mask)


def make_voc(root: Path) -> None:
    names = {"trainaug": ("2007_000032", "2008_000002"), "val": ("2007_000033", "2007_000042")}
    for split, listed in names.items():
        write_text(root / f"ImageSets/Segmentation/{split}.txt", "\n".join(listed) + "\n")
        for number, name in enumerate(listed):
            draw(root / f"JPEGImages/{name}.jpg", (96, 72), number)
            folder = "SegmentationClassAug" if name.startswith("2008") else "SegmentationClass"
            write_mask(root / f"{folder}/{name}.png", blocks((96, 72), range(21), number))


def annotate(path: Path, size: tuple[int, int], names: tuple[str, ...], number: int) -> None:
    """Write VOC's XML with an object a name."""
    objects = "".join(
        f"<object><name>{name}</name><difficult>{int(place == 2)}</difficult><bndbox>"
        f"<xmin>{5 + 20 * place}</xmin><ymin>{9 + number}</ymin><xmax>{30 + 20 * place}</xmax>"
        f"<ymax>{50 + number}</ymax></bndbox></object>"
        for place, name in enumerate(names)
    )
    sides = f"<width>{size[0]}</width><height>{size[1]}</height><depth>3</depth>"
    write_text(path, f"<annotation><size>{sides}</size>{objects}</annotation>")


def make_boxes(root: Path, splits: dict[str, int], names: tuple[str, ...]) -> None:
    for split, count in splits.items():
        listed = [f"{split}_{number}" for number in range(count)]
        write_text(root / f"ImageSets/Main/{split}.txt", "\n".join(listed) + "\n")
        for number, name in enumerate(listed):
            draw(root / f"JPEGImages/{name}.jpg", (96, 72), number)
            annotate(root / f"Annotations/{name}.xml", (96, 72), names, number)


def make_bccd(root: Path) -> None:
    make_boxes(root, {"train": 3, "val": 2, "test": 2}, ("RBC", "WBC", "Platelets"))


def make_voc0712(root: Path) -> None:
    make_boxes(root / "VOC2007", {"trainval": 2, "test": 2}, ("cat", "sofa", "car"))
    make_boxes(root / "VOC2012", {"trainval": 2}, ("bird", "dog"))


def make_coco(root: Path) -> None:
    categories = [
        {"id": i, "name": n} for i, n in zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True)
    ]
    for split, count in (("train", 3), ("val", 2)):
        images, annotations = [], []
        for number in range(1, count + 1):
            name = f"COCO_{split}2014_{number:012}.jpg"
            draw(root / f"{split}2014/{name}", (96, 72), number)
            images.append({"id": number, "file_name": name, "width": 96, "height": 72})
            common = {"image_id": number, "category_id": 90, "iscrowd": 0}
            annotations.append({"id": number, "bbox": [4, 9, 40, 33.5], "area": 800.5, **common})
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_text(root / f"annotations/instances_{split}2014.json", json.dumps(content))


def make_folder(root: Path) -> None:
    for split in ("train", "val", "test"):
        for name in ("glass", "paper"):
            for number in range(3):
                draw(root / f"{split}/{name}/{number}.jpg", (48, 40), number)


MAKERS: dict[str, Callable[[Path], None]] = {
    "ade20k": make_ade20k,
    "bccd": make_bccd,
    "camvid": make_camvid,
    "celebamask": make_celebamask,
    "cityscapes": make_cityscapes,
    "coco": make_coco,
    "cocostuff": make_cocostuff,
    "folder": make_folder,
    "imagenet": make_imagenet,
    "pascal_context": make_pascal_context,
    "voc": make_voc,
    "voc0712": make_voc0712,
}
FEW = {"train": 4, "val": 2, "test": 2, "image_size": [64, 64]}  # of drawn scenes
FEW_SETTINGS = {"imagenet": {"classes": 3}}


# ---- real steps ---------------------------------------------------------------------------------

SIZES = {"base", "crop", "stride", "size", "resize", "shortest"}


def shrink(section: Any, factor: float) -> Any:
    """Return a section with every size divided by a factor."""
    if not isinstance(section, dict):
        return section
    return {
        key: scaled(value, factor) if key in SIZES else shrink(value, factor)
        for key, value in section.items()
    }


def scaled(value: Any, factor: float) -> Any:
    if isinstance(value, list):
        return [scaled(item, factor) for item in value]
    return max(1, round(value / factor))


def lower(stage: dict[str, Any], factor: float, batch: int) -> dict[str, Any]:
    """Return a stage's recipe with lower sizes, steps and batches."""
    stage = shrink(stage, factor)
    stage["fit"] |= {"steps": 2, "log_every_steps": 1, "checkpoint_every_steps": 2}
    stage["fit"]["global_batch"] = batch
    # After the first step, whose rate is next to nothing, comes one at half the peak.
    stage["optim"] |= {"warmup_steps": 1, "update_every_steps": 1}
    stage["validate_on"] |= {"batch": 2, "every_steps": 2}
    return stage


def miniature(preset: str, raw: Path) -> dict[str, Any]:
    params = read_yaml(preset_path(preset))
    for key, dataset in params["datasets"].items():
        if dataset["reader"] == "synthetic":
            dataset["settings"] |= FEW
        else:
            dataset["root"] = str(raw / (key if key in MAKERS else dataset["reader"]))
            dataset["settings"] = dataset.get("settings", {}) | FEW_SETTINGS.get(
                dataset["reader"], {}
            )
    of_class = params["pretrain"]["augment"]["size"] / 32
    detects = params["finetune"].get("task") == "detection"
    # SSD's boxes are made for one size.
    of_crop = 1.0 if detects else max(params["finetune"]["augment"]["crop"]) / 64
    # More than the order has partitions, so that images are mixed.
    params["pretrain"] = lower(params["pretrain"], of_class, 26)
    params["finetune"] = lower(params["finetune"], of_crop, 2)
    evaluation = params["evaluate"]
    evaluation["classification"] = shrink(evaluation["classification"], of_class)
    for name in ("segmentation", "multi_scale"):
        if name in evaluation:
            evaluation[name] = shrink(evaluation[name], of_crop)
    if "crops" in evaluation:  # the images have a quarter of their sides
        evaluation["crops"] = scaled(evaluation["crops"], 4)
    if "small_classes" in evaluation:
        evaluation["small_classes"] = str(PROJECT / evaluation["small_classes"])
    evaluation |= {"batch": 2, "device": "cpu", "pictures": 1}
    for run in params["runs"].values():
        if run["init"].startswith("weights/"):
            run["init"] = SCRATCH
        if run["model"] in TINY:
            run["overrides"] = run.get("overrides", {}) | TINY[run["model"]]
        if detects:
            run["overrides"] = run.get("overrides", {}) | {"width": 8}
    params["cluster"] |= {"backend": "process", "workers": 1, "device": "cpu"}
    params["tracking"]["enabled"] = False
    return params


def smallest(runs: dict[str, RunConfig]) -> str:
    """Return the name of the smallest run of a paper's own system, else of the smallest."""
    cards = {name: model_card(spec.model) for name, spec in runs.items()}
    own = ("HILA", "CLA")
    return min(cards, key=lambda name: (cards[name].system not in own, cards[name].params))


def lay_weights(init: str, base: Path) -> None:
    """Put random weights where another preset's pretraining would have left its own."""
    name = init.split("/")[2]
    folder = (base / init).parent
    folder.mkdir(parents=True)
    spec = PRETRAINED_BY[name]
    torch.manual_seed(0)
    weights = folder / "model.safetensors"
    save_weights(create_model(spec.model, num_classes=1000, **spec.overrides), weights)
    card = {"weights": weights.name, "weights_sha256": sha256_file(weights)}
    write_json(base / init, card)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make every raw folder; gives it, and a folder that keeps the shards of each preset's data."""
    raw = tmp_path_factory.mktemp("raw")
    for reader, make in MAKERS.items():
        make(raw / reader)
    return raw, tmp_path_factory.mktemp("shards")


def use_shards(name: str, dataset: dict[str, Any], base: Path, kept: Path) -> None:
    """Shard a data set of the project, once for all presets that have it."""
    common = kept / sha256_json({name: dataset})
    place = base / "data" / "shards" / name
    if not common.exists():
        shard(name, base, jobs=1)
        place.rename(common)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(common)


@pytest.mark.parametrize("preset", list_presets())
def test_real_steps_and_the_protocol_on_tiny_data(
    preset: str, places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, kept = places
    monkeypatch.chdir(tmp_path)
    params = miniature(preset, raw)
    config = load_config(write_params(tmp_path, params))
    stage: Stage = "finetune" if config.runs else "pretrain"
    runs = config.runs or config.pretrain_runs
    run = smallest(runs)
    use_shards(runs[run].dataset, params["datasets"][runs[run].dataset], tmp_path, kept)
    init = runs[run].init
    if init.startswith("results/"):
        source = init.split("/")[2]
        if source in config.pretrain_runs:
            name = config.pretrain_runs[source].dataset
            use_shards(name, params["datasets"][name], tmp_path, kept)
            pretrain(source, tmp_path)
        else:
            lay_weights(init, tmp_path)

    folder = (finetune if stage == "finetune" else pretrain)(run, tmp_path)
    with (folder / "curve.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    if init.startswith("results/"):
        before = load_file((tmp_path / init).with_name("model.safetensors"))
        after = load_file(folder / "model.safetensors")
        kept_keys = [key for key in before if key in after and not key.startswith("head.")]
        moved = sum(not torch.equal(before[key], after[key]) for key in kept_keys)
        assert moved > 0.95 * len(kept_keys), "a step at half the rate moves (almost) every weight"

    metrics = evaluate(run, tmp_path, stage)
    wanted = {HEADLINE[config.finetune.task if stage == "finetune" else "classification"]}
    if config.evaluate.multi_scale is not None:
        wanted.add("mIoU_ms")
    if config.evaluate.boundary is not None and stage == "finetune":
        wanted.add("boundary_F")
        wanted |= {f"boundary_F_{h}x{w}" for h, w in config.evaluate.crops}
        wanted |= {"image_boundary_F"} if config.evaluate.boundary.image_thresholds else set()
    assert all(0 <= metrics[name] <= 1 for name in wanted)
    assert ("mIoU_ms" in metrics) == (config.evaluate.multi_scale is not None)


def test_a_run_s_own_loss_is_the_one_that_it_descends(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cross entropy of scores in [0, 1] stays by log(150); the set loss has that and more in it."""
    monkeypatch.chdir(tmp_path)
    params = miniature("segvit-ablations-ade20k", places[0])
    load_config(write_params(tmp_path, params))
    use_shards("ade20k", params["datasets"]["ade20k"], tmp_path, places[1])
    for run, is_ce in (("segvit_b_12_ce", True), ("segvit_b_12", False)):
        with (finetune(run, tmp_path) / "curve.csv").open() as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
        assert all((loss < math.log(150) + 0.1) == is_ce for loss in losses), losses


def test_weights_of_another_backbone_do_not_slip_in() -> None:
    """What the test of initial weights rules out is refused: a patch of 6 is not one of 4."""
    model = create_model("hila_segformer_b1_s234", num_classes=19)
    other = create_model("hila_mit_b1_s234", num_classes=1000, patch=6)
    with pytest.raises(XattnError, match="is it another variant"):
        load_weights(model, other.state_dict())
