"Predict a folder of scans with one model, and with an ensemble of two"

from mednext_v2 import PredictSettings, predict, predict_files

settings = PredictSettings(device="cpu", fast=True)
written = predict_files("models/trained", "scans", "predictions/trained", settings)
for case, path in written.items():
    print(case, path)

predict_files("finetuned/model", "scans", "predictions/finetuned", settings, probabilities=True)
predict_files(["models/trained", "finetuned/model"], "scans", "predictions/ensemble", settings)

labels = predict("finetuned/model", "scans/held_0000.nii.gz", device="cpu")
print(labels.shape)
