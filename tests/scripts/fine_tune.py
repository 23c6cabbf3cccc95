"Fine-tune a model on a raw data set, from its files to the scores of its test cases"

from mednext_v2 import Resources, Start, finetune, get_recipe

scores = finetune(
    "raw/Dataset901_ToyChest",
    Start("models/trained", heads="fresh"),
    "finetuned",
    recipe=get_recipe("smoke", steps=4, lr=1e-3),
    resources=Resources(device="cpu", workers=1),
)
print(scores.groupby("label")[["dsc", "nsd"]].mean().round(3))
