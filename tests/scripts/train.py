"Train a network on a data set that `mednextv2 prepare` wrote, then use the model"

import torch

from mednext_v2 import TrainSettings, get_recipe, load_model, train_model

settings = TrainSettings(
    data="prepared",
    out="models/trained",
    backbone="unet",
    recipe=get_recipe("smoke", steps=4, patch=(16, 16, 16), lr=1e-3),
    folder="models/trained.run",
    overrides={"filters": (4, 8, 8)},
)
history = train_model(settings)
print(f"loss {history.loss.iloc[0]:.2f} -> {history.loss.iloc[-1]:.2f}")

model, card = load_model("models/trained")
with torch.no_grad():
    logits = model(torch.zeros(1, card.in_channels, 32, 32, 32))
print(f"{card.backbone} for {', '.join(card.labels)}: {tuple(logits.shape)}")
