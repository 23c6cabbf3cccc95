"Score two folders of label maps, and compare the models by surface dice"

import nibabel
import numpy as np
import pandas as pd

from mednext_v2 import compare, evaluate, raw_dataset, surface_dice

dataset = raw_dataset("raw/Dataset901_ToyChest")
tables = [evaluate(f"predictions/{name}", "labels", dataset, tolerance=2.0).assign(model=name) for name in ("trained", "finetuned")]
scores = pd.concat(tables)
print(scores.groupby(["model", "label"])[["dsc", "nsd"]].mean().round(3))

result = compare(scores, {"model": "finetuned"}, {"model": "trained"}, metric="nsd")
print(f"surface dice {result['difference']:+.3f} ({result['low']:.3f} to {result['high']:.3f}), p = {result['p']:.2f}")

truth, prediction = (np.asarray(nibabel.Nifti1Image.from_filename(f"{folder}/held.nii.gz").dataobj) for folder in ("labels", "predictions/finetuned"))
for label, value in dataset.labels.items():
    print(label, round(surface_dice(prediction == value, truth == value, spacing=(1.0, 1.0, 1.0), tolerance=2.0), 3))
