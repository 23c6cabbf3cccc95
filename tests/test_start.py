"From foreign weights to a model of one's own: import, train from it, predict"

import contextlib
import io
import json

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from mednext_v2 import cli
from mednext_v2.data.preprocess import prepare
from mednext_v2.models.card import read_card, read_state
from mednext_v2.zoo import catalogue
from test_importers import DNA, V2, dna, nnunet_folder
from test_training_sets import CHEST, write_raw

TRAIN = "train {data} {out} --from {parent} --recipe smoke --device cpu --workers 0 --unchecked --recipe-set steps=2 patch=(16,16,16) checkpoint_every=2"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chest")
    write_raw(CHEST, folder / "raw")
    prepare(CHEST, folder / "raw", folder / "chest")
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    with torch.no_grad():
        source, _ = dna(*DNA["resenc"])
    place = nnunet_folder(folder / "nnUNetTrainer__nnUNetPlans__3d_fullres", source.state_dict())
    said = run(f"import {place} {folder / 'ours'} --licence CC-BY-NC-4.0")
    assert "100.0% of the tensors filled" in said and "resenc_l" in said
    return folder / "ours"


def run(line: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        cli.main(line.split())
    return said.getvalue()


@pytest.mark.slow
def test_imported_network_is_trained_and_predicts(imported, prepared, tmp_path):
    "The network is built as the parent's card says, heads go by name, the licence goes on"
    out = tmp_path / "tuned"
    run(TRAIN.format(data=prepared / "chest", out=out, parent=imported))
    card, parent = read_card(out), read_card(imported)
    for name in ("n_stages", "features_per_stage", "strides", "kernel_sizes"):
        assert card.overrides[name] == parent.overrides[name]
    assert card.backbone == "resenc_l" and card.parent == parent.sha256 and card.init == "ours"
    assert "non-commercial" in card.licence.lower()
    became = pd.read_csv(f"{out}.run/transfer.csv").set_index("name")
    heads = became[became.index.str.contains("seg_layers") & (became.outcome != "skipped")]
    assert set(heads.outcome) == {"adapted"} and "rows of 3 of 3 classes" in set(heads.note)  # Liver and spleen exchanged
    scan = prepared / "raw" / CHEST.folder / "imagesTr" / "chest_0_0000.nii.gz"
    run(f"predict -m {out} -i {scan} -o {tmp_path / 'labels.nii.gz'}")
    labels = nibabel.load(tmp_path / "labels.nii.gz")
    assert labels.shape == (20, 20, 20) and set(np.unique(labels.get_fdata())) <= {0, 1, 2}


@pytest.mark.slow
def test_encoder_alone_and_fresh_heads(imported, prepared, tmp_path):
    line = TRAIN.format(data=prepared / "chest", out=tmp_path / "m", parent=imported) + " --scope encoder --recipe-set freeze=encoder"
    run(line)
    state, given = read_state(tmp_path / "m"), read_state(imported)
    encoder = [name for name in state if name.startswith("encoder.") and "stem" not in name]
    assert encoder and all(torch.equal(state[name], given[name]) for name in encoder)
    became = pd.read_csv(tmp_path / "m.run" / "transfer.csv").set_index("name").outcome
    assert set(became[became.index.str.startswith(("decoder.stages", "decoder.seg_layers"))]) == {"missing", "skipped"}


def test_version_tells_what_an_issue_asks_for():
    import importlib.metadata
    import platform

    from mednext_v2 import __version__

    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    facts = " ".join(said.getvalue().split())  # argparse wraps lines
    assert ended.value.code == 0 and platform.platform() in facts
    for name, found in {"mednext_v2": __version__, "python": platform.python_version(), "torch": importlib.metadata.version("torch")}.items():
        assert f"{name} {found}" in facts


def test_info_tells_model_folders_and_files(imported, tmp_path):
    said = run(f"info {imported}")
    assert "resenc_l" in said and "liver" in said and "CC-BY-NC" in said
    torch.save({"a": torch.zeros(2)}, tmp_path / "odd.pth")
    assert "not known" in run(f"info {tmp_path / 'odd.pth'}")
    with pytest.raises(SystemExit, match="nothing.pth: there is no such file or folder"):
        run(f"info {tmp_path / 'nothing.pth'}")


def test_import_of_labels_that_the_file_does_not_tell(tmp_path):
    with torch.no_grad():
        source, _ = dna(*DNA["resenc"])
    torch.save(V2 | {"network_weights": source.state_dict()}, tmp_path / "a.pth")
    zscore = {"schemes": ["zscore"], "mean": [0.0], "std": [1.0], "low": [0.0], "high": [0.0], "nonzero": False}
    facts = {"labels": {"liver": 1, "spleen": 2}, "normalisation": zscore}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    run(f"import {tmp_path / 'a.pth'} {tmp_path / 'm'} --facts {tmp_path / 'facts.json'} --spacing 1 1 1 --patch 32 32 32 --modality CT --licence CC0")
    assert read_card(tmp_path / "m").labels == {"liver": 1, "spleen": 2}


# ------------------------------------------------------------------------------------------- mistakes on the command line

DEVICE_LINES = [
    "train data/chest {out} --device",
    "finetune -d data/raw -o {out} --device",
    "replay bundle --device",
    "predict -m model -i scan.nii.gz -o {out}.nii.gz --device",
]


def mistake(line: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(line.split())
    return f"{ended.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("line", DEVICE_LINES)
def test_find_device_answers_for_every_command_before_work(line, tmp_path, capsys, monkeypatch):
    line = line.format(out=tmp_path / "out")
    assert "mednextv2: device 'tpu' is not available here" in mistake(f"{line} tpu", capsys)
    monkeypatch.setattr(cli, "find_device", lambda name: (_ for _ in ()).throw(ValueError(f"asked for {name}")))
    assert "mednextv2: asked for npu:3" in mistake(f"{line} npu:3", capsys)
    assert not list(tmp_path.iterdir())


def test_commands_say_the_same_of_devices(capsys):
    said = set()
    for command in ("train", "finetune", "predict", "replay"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        _, _, text = " ".join(capsys.readouterr().out.split()).partition("--device DEVICE where")
        said.add(text.partition(" (default")[0])
    assert len(said) == 1 and "auto" in said.pop()


@pytest.mark.parametrize(
    ("line", "usage", "hint"),
    [
        ("train a b --set steps=2", "usage: mednextv2 train", "--set: did you mean --recipe-set?"),
        ("evaluate a b --dataset x", "usage: mednextv2 evaluate", "--dataset: did you mean --task?"),
        ("predict -m a -i b -o c --weights d", "usage: mednextv2 predict", "--weights: did you mean --model?"),
        ("train a b --weights d=1", "usage: mednextv2 train", "--weights: did you mean --from or --sampling?"),
        ("info base --batch=3", "usage: mednextv2 info", ""),
        ("zoo list --lang", "usage: mednextv2 zoo list", "--lang: did you mean --long?"),
        ("doctor --data a --zzz", "usage: mednextv2 doctor", "unrecognized arguments: --zzz"),
    ],
)
def test_unknown_options_show_the_usage_of_their_command_and_a_near_match(line, usage, hint, capsys):
    if "--batch=3" in line:  # An abbreviation that argparse knows
        assert "base" in run(line)
        return
    said = mistake(line, capsys)
    assert said.startswith("2") and usage in said and hint in said


def test_info_obeys_its_options_or_refuses_them(imported, capsys):
    assert run("info tiny --batch-size 8 --precision fp32") != run("info tiny")
    assert run("info mednext_v2_tiny --batch-size 8").split()[-7:] == run("info tiny --batch-size 8").split()[-7:]
    assert "mednext_v1_small_k5" in run("info v1_small* --patch 32")
    told = "--batch-size, --precision: no effect here, mednext_v1_small, mednext_v1_small_k5 is no single size of MedNeXt"
    assert told in mistake("info v1_small* --batch-size 8 --precision fp32", capsys)
    assert "--precision: no effect here, unet is no single size of MedNeXt" in mistake("info unet --precision fp32", capsys)
    assert "--patch: no effect here" in mistake(f"info {imported} --patch 64", capsys)


def test_names_of_the_zoo_say_how_to_fetch_and_import(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MEDNEXT_V2_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    name = "totalsegmentator_ct_291"
    write_raw(CHEST, tmp_path / "raw")
    lines = [f"train data {tmp_path}/out --from {name}", f"predict -m {name} -i a.nii.gz -o {tmp_path}/b.nii.gz"]
    for line in [*lines, f"finetune -d raw/{CHEST.folder} -m {name} -o {tmp_path}/tuned"]:
        assert f"on this machine: run `mednextv2 zoo fetch {name}`" in mistake(f"{line} --device cpu", capsys)
    monkeypatch.setattr(catalogue, "is_cached", lambda entry, home: True)
    for line in lines:
        assert f"run `mednextv2 import {tmp_path / 'cache/zoo' / name / 'model'} models/{name}`" in mistake(f"{line} --device cpu", capsys)
    assert catalogue.find_fetched(name) == tmp_path / "cache/zoo" / name / "model"
    (tmp_path / name).mkdir()  # A folder of one's own comes first
    assert str(catalogue.find_fetched(name)) == name
