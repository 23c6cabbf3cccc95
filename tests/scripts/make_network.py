"Make a network, see what it costs, and run it on a scan"

import nibabel

from mednext_v2 import PRESETS, count_parameters, create_model, estimate, sliding_window

model = create_model("tiny", in_channels=1, num_classes=3)
cost = estimate(PRESETS["tiny"], patch=(64, 64, 64), batch_size=2, precision="bf16")
print(f"{count_parameters(model):,} parameters, {cost.total_bytes / 1e9:.1f} GB for a training step")

scan = nibabel.Nifti1Image.from_filename("scans/held_0000.nii.gz")
image = scan.get_fdata(dtype="float32")[None]
logits = sliding_window(model, image / 1000, patch=(32, 32, 32))
labels = logits.argmax(dim=0).numpy().astype("uint8")
nibabel.save(nibabel.Nifti1Image(labels, scan.affine), "untrained.nii.gz")
