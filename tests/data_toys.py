"""A task that several tests build their raw folders for."""

from mednext_v2.data.datasets import Dataset

DEMO = Dataset(
    name="demo",
    dataset=7,
    title="Mini demo CT",
    modality="CT",
    labels={"liver": 1, "lesion": 2},
    groups={"liver": "organ", "lesion": "pathology"},
    spacing=(2.0, 3.0, 4.0),
    patch=(8, 8, 8),
    nsd_tolerance=2.0,
    role="finetune",
    licence="none",
    citation="none",
)
