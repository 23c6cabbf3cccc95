"A small U-Net and its card, shared by the tests that read, predict with or damage a model folder"

import torch

from mednext_v2.models.card import Card, save_model
from mednext_v2.models.registry import create

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # Definitions last as long as this
KNOWN = {"schemes": ["zscore"], "mean": [0], "std": [1], "low": [0], "high": [0], "nonzero": False}
UNET_CARD = dict(
    backbone="unet",
    overrides={"filters": (4, 8, 8)},
    in_channels=1,
    labels={"core": 1, "rim": 2},
    groups={"core": "organ", "rim": "organ"},
    task="toy",
    modality="MR",
    spacing=(2.0, 2.0, 2.0),
    patch=(16, 16, 16),
    normalisation=KNOWN,
    recipe={},
)


def save_unet(folder, seed: int = 0, **changes):
    "A model folder with random weights; `changes` are fields of its card"
    torch.manual_seed(seed)
    card = Card(**UNET_CARD | changes)
    save_model(folder, create("unet", card.in_channels, card.num_classes, filters=(4, 8, 8)), card)
    return folder


def declare_torchvision():
    """Let torchvision be imported beside a torch that it was not built for, as the one for the CPU alone is.

    Its compiled operators do not load there. timm and torchmetrics import it and use none of them: declared, they let its Python part be imported."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for operator in ("nms", "qnms"):
            OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
