"Small cases in memory and a small network, shared by the tests of the training modules"

import dataclasses
import multiprocessing

import numpy as np
import torch

from mednext_v2.core import Resources
from mednext_v2.data.augment import ArrayCases
from mednext_v2.models.registry import create
from mednext_v2.training import trainer
from mednext_v2.training.monitor import Display
from mednext_v2.training.recipe import Recipe
from mednext_v2.training.trainer import training_sampler


def toy_cases(train: int = 3, size: int = 20) -> ArrayCases:
    "Balls (class 1, bright) and cubes (class 2, dark) in noise"
    images, labels = {}, {}
    for number in range(train + 1):
        rng = np.random.default_rng(number)
        grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"))
        centre = rng.uniform(0.4, 0.6, 3) * size
        label = (np.linalg.norm(grid - centre[:, None, None, None], axis=0) < size / 4).astype(np.uint8)
        x, y, z = rng.integers(0, 4, 3)
        label[x : x + 5, y : y + 5, z : z + 5] = 2
        image = np.array([0, 1, -1])[label] + rng.normal(0, 0.3, label.shape)
        images[f"toy{number}"], labels[f"toy{number}"] = image.astype(np.float32)[None], label
    names = list(images)
    return ArrayCases(images, labels, {"train": tuple(names[:-1]), "val": (names[-1],)})


def toy_model(seed: int = 0, deep_supervision: bool = True):
    torch.manual_seed(seed)
    return create("unet", 1, 3, deep_supervision=deep_supervision, filters=(4, 8, 8))


def toy_recipe(**changes) -> Recipe:
    settings = dict(steps=12, patch=(8, 8, 8), lr=1e-2, warmup=2, foreground=0.5, augment="light", checkpoint_every=4)
    return Recipe(**settings | changes)


def split(options: dict) -> dict:
    "Fields of `Resources` and `Display` among options put into these; on the CPU, without a bar"
    rest, made = dict(options), {}
    for name, kind, first in (("resources", Resources, dict(device="cpu")), ("display", Display, dict(progress=False))):
        own = {field.name: rest.pop(field.name) for field in dataclasses.fields(kind) if field.name in rest}
        made[name] = kind(**first | own)
    return rest | made


def fit(*given, **options):
    "`trainer.fit` with the fields of `Resources` and `Display` as arguments"
    return trainer.fit(*given, **split(options))


def toy_run(folder, recipe: Recipe, **options):
    "The model after training, and the history"
    model, sampler = toy_model(), training_sampler(recipe, toy_cases())
    return model, fit(recipe, model, sampler, folder, **options)


def readers() -> list:
    "The loader's processes that live; joblib keeps idle ones of its own, which other tests leave behind"
    return [child for child in multiprocessing.active_children() if "Loky" not in child.name]
