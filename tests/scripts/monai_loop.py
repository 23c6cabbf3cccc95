"MONAI's data sets, transforms, loss and sliding windows around a network of this library"
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import torch
from monai.data.dataloader import DataLoader
from monai.data.dataset import CacheDataset
from monai.inferers.utils import sliding_window_inference
from monai.losses.dice import DiceCELoss
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, NormalizeIntensityd, Orientationd, RandSpatialCropd

from mednext_v2 import create_model

keys, files = ["image", "label"], [{"image": f"scans/{case}_0000.nii.gz", "label": f"labels/{case}.nii.gz"} for case in ("held", "held1")]
load = Compose([LoadImaged(keys), EnsureChannelFirstd(keys), Orientationd(keys, axcodes="RAS"), NormalizeIntensityd("image")])
scans = CacheDataset(files, Compose([load, RandSpatialCropd(keys, (16, 16, 16), random_size=False)]), progress=False)
model = create_model("tiny", in_channels=1, num_classes=3, width=4, depths=(1, 1, 1), ratios=(2, 2, 2))
loss, optimizer = DiceCELoss(to_onehot_y=True, softmax=True), torch.optim.AdamW(model.parameters(), lr=1e-2)
for epoch in range(20):
    for batch in DataLoader(scans, batch_size=2):
        optimizer.zero_grad()
        value = loss(model(batch["image"]), batch["label"])
        value.backward()
        optimizer.step()
    print(f"epoch {epoch}: {value.item():.2f}")
with torch.no_grad():
    logits = sliding_window_inference(load(files[0])["image"][None], (16, 16, 16), 1, model)
print(type(logits).__name__, tuple(logits.shape))
