"A Lightning module around a network of this library, trained on patches of a prepared data set"

import lightning
import torch

from mednext_v2 import PatchSampler, Prepared, create_model, dice_ce, patch_loader


class Segmenter(lightning.LightningModule):
    def __init__(self, num_classes: int):
        super().__init__()
        self.network = create_model("tiny", in_channels=1, num_classes=num_classes, width=4, depths=(1, 1, 1), ratios=(2, 2, 2))

    def training_step(self, batch, _):
        return dice_ce(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


data = Prepared("prepared")
patches = patch_loader(PatchSampler(data, "train", patch=(16, 16, 16), batch_size=2), steps=10)
trainer = lightning.Trainer(max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(Segmenter(data.dataset.num_classes), patches)
print(f"{trainer.global_step} steps")
