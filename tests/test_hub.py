"Models by name, and publishing and loading through a server with the hub's HTTP interface"

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from hub_toys import Hub, Repo
from mednext_v2.cli import main
from mednext_v2.core import MissingExtra
from mednext_v2.factory import create_model
from mednext_v2.finetuning import import_parent
from mednext_v2.integrations.hub import from_pretrained, licence_fields, push_to_hub
from mednext_v2.models.card import add_scores, read_card
from mednext_v2.models.hub import find_model, parse_hub_name
from mednext_v2.models.registry import load_model
from mednext_v2.zoo.catalogue import find_fetched
from model_toys import save_unet


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A server of its own, an empty cache, and a working directory without models"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def publish(hub: Hub, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
    hub.repos[name] = Repo(private)
    hub.repos[name].commit(files)
    return hub.repos[name]


def test_of_a_repository_only_card_and_weights_are_downloaded(hub, tmp_path):
    wanted = files_of(save_unet(tmp_path / "mine"))
    publish(hub, "clinic/spleen", wanted | {"optimizer.pt": b"pickle", "README.md": b"# read me"})
    folder = find_fetched("clinic/spleen", imported=True)
    assert files_of(folder) == wanted and folder.is_relative_to(tmp_path / "cache")
    assert not [line for line in hub.asked if "optimizer" in line]
    assert find_model(Path("hf://clinic/spleen")) == folder


def test_folds_come_as_folders(hub, tmp_path):
    from mednext_v2.inference.predictor import load_ensemble

    for fold in range(2):
        save_unet(tmp_path / f"mine/fold_{fold}", seed=fold)
    publish(hub, "clinic/folds", files_of(tmp_path / "mine"))
    (member,) = load_ensemble(find_model("clinic/folds"))
    assert len(member.models) == 2


def test_a_revision_stays_what_it_was(hub, tmp_path):
    repo = publish(hub, "clinic/spleen", files_of(save_unet(tmp_path / "old")))
    first, old = repo.sha, find_model("clinic/spleen")
    repo.commit(files_of(save_unet(tmp_path / "new", seed=1)))
    new = find_model("clinic/spleen")
    assert files_of(new) == files_of(tmp_path / "new") and files_of(old) == files_of(tmp_path / "old")
    assert find_model(f"clinic/spleen@{first}") == old


def test_without_a_connection_the_copy_is_used(hub, tmp_path, monkeypatch):
    publish(hub, "clinic/spleen", files_of(save_unet(tmp_path / "mine")))
    folder = find_model("clinic/spleen")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert find_model("clinic/spleen") == folder
    with pytest.raises(ConnectionError, match="clinic/other: there is no such file or folder.*no answer from http://127.0.0.1:9"):
        find_model("clinic/other")


def test_what_is_no_model_of_ours_is_refused(hub, tmp_path):
    publish(hub, "clinic/pickle", {"pytorch_model.bin": b"\x80\x04", "config.json": b"{}"})
    with pytest.raises(ValueError, match=r"clinic/pickle holds no card.json.*pytorch_model.bin may run code and is not downloaded.*mednextv2 import"):
        find_model("clinic/pickle")
    assert not [line for line in hub.asked if "resolve" in line]
    publish(hub, "clinic/other", {"card.json": b'{"name": "something else"}', "model.safetensors": b"x"})
    with pytest.raises(ValueError, match="card.json"):
        find_model("clinic/other")


def test_altered_or_missing_weights_are_refused(hub, tmp_path):
    files = files_of(save_unet(tmp_path / "mine"))
    broken = bytearray(files["model.safetensors"])
    broken[-1] ^= 1
    publish(hub, "clinic/altered", files | {"model.safetensors": bytes(broken)})
    publish(hub, "clinic/without", {"card.json": files["card.json"]})
    for name in ("clinic/altered", "clinic/without"):
        with pytest.raises(ValueError, match="is not what card.json beside it describes"):
            find_model(name)


def test_without_huggingface_hub_the_extra_is_named(hub, monkeypatch):
    monkeypatch.setattr("mednext_v2.core.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"clinic/spleen, a model of the hub, needs huggingface_hub: pip install 'mednext_v2\[hub\]'"):
        find_model("clinic/spleen")


def test_private_and_unknown_names(hub, tmp_path, monkeypatch):
    publish(hub, "clinic/secret", files_of(save_unet(tmp_path / "mine")), private=True)
    for name in ("clinic/secret", "clinic/none"):
        with pytest.raises(FileNotFoundError, match="not on the hub, or is private.*hf auth login"):
            find_model(name)
    with pytest.raises(FileNotFoundError, match="no such revision"):
        monkeypatch.setenv("HF_TOKEN", "hf_toy")
        find_model("clinic/secret@v9")
    assert (find_model("clinic/secret") / "card.json").is_file()


def test_a_model_of_this_repository_comes_before_the_hub(hub, tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").touch()
    for name in ("results/study/models/base", "models/study/clinic/spleen", "models/mini/base"):
        save_unet(tmp_path / name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_model("clinic/spleen") == tmp_path / "models/study/clinic/spleen"
    assert find_fetched("study/models/base") == tmp_path / "results/study/models/base"
    with pytest.raises(ValueError, match="base means 2 models .*give more of the path"):
        find_model("base")
    with pytest.raises(
        FileNotFoundError, match=f"spleen.pth: there is no such file.*no model of that name below {tmp_path / 'models'}, {tmp_path / 'results'};.*zoo list"
    ):
        find_model("clinic/spleen.pth")
    assert not hub.asked


def test_an_imported_model_of_the_zoo_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_unet(Path("models/totalsegmentator_ct_291"))
    assert find_fetched("totalsegmentator_ct_291", imported=True) == find_model("totalsegmentator_ct_291") == folder


@pytest.mark.parametrize(
    "text", ["../clinic/spleen", "clinic//spleen", "clinic/spleen/", "-x/y", "clinic/spl een", "models/x", "C:/x", "hf://x", "a/b.safetensors"]
)
def test_what_is_no_name_of_the_hub(text):
    assert parse_hub_name(text) is None


# Publishing


def login(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_toy")


def run(line: str, capsys) -> str:
    main(line.split())
    return capsys.readouterr().out


def test_what_is_published_is_loaded_again(hub, tmp_path, monkeypatch, capsys):
    login(monkeypatch)
    save_unet(tmp_path / "mine", licence="MIT", provenance="the toys of a test")
    add_scores(tmp_path / "mine", {"dsc": 0.5, "cases": 2, "split": "test"}, "mednextv2 finetune -d raw -o spleen")
    assert f"published at {hub.url}/clinic/spleen; next" in run("push mine clinic/spleen", capsys)
    model, card = from_pretrained("clinic/spleen")
    own, kept = load_model(tmp_path / "mine")
    assert card == kept == read_card(tmp_path / "mine")
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in model.state_dict().items())
    page = hub.repos["clinic/spleen"].files["README.md"].decode()
    about = ModelCard(page)
    assert hub.validated == [page]
    assert (about.data.license, about.data.library_name, about.data.pipeline_tag) == ("mit", "mednext_v2", "image-segmentation")
    (result,) = about.data.eval_results
    assert (result.dataset_name, result.dataset_split, result.metric_type, result.metric_value) == ("toy", "test", "dice", 0.5)
    for text in (
        "| 2 | rim | organ |",
        "| Dice (DSC) | 0.5000 |",
        "mednextv2 finetune -d raw -o spleen",
        "2 × 2 × 2 mm",
        "the toys of a test",
        "predict -m clinic/spleen",
    ):
        assert text in page


def test_the_commands_take_a_name_of_the_hub(hub, tmp_path, monkeypatch, capsys):
    publish(hub, "clinic/spleen", files_of(save_unet(tmp_path / "mine")))
    scan = nib.Nifti1Image(np.random.default_rng(0).normal(size=(20, 20, 20)).astype("float32"), np.diag([2, 2, 2, 1]))
    nib.save(scan, tmp_path / "scan.nii.gz")
    for model, out in (("mine", "a"), ("clinic/spleen", "b"), ("hf://clinic/spleen", "c")):
        run(f"predict -m {model} -i scan.nii.gz -o {out}.nii.gz --device cpu", capsys)
    first, *others = (np.asarray(nib.load(tmp_path / f"{out}.nii.gz").dataobj) for out in "abc")
    assert first.any() and all((first == other).all() for other in others)
    assert import_parent("clinic/spleen", tmp_path / "tuned") == find_model("clinic/spleen")
    network, (trained, _) = create_model(pretrained="clinic/spleen"), load_model(tmp_path / "mine")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in trained.state_dict().items())


def test_info_import_and_push_take_a_model_by_name(hub, tmp_path, monkeypatch, capsys):
    facts = dict(licence="MIT", provenance="the toys of a test", mirror_axes=(0, 1), windows="monai")
    publish(hub, "clinic/spleen", files_of(save_unet(tmp_path / "mine", **facts)))
    save_unet(tmp_path / "models/toys/spleen", **facts)
    save_unet(tmp_path / "models/folds/fold_0", **facts)
    login(monkeypatch)
    for number, name in enumerate(("mine", "clinic/spleen", "hf://clinic/spleen", "toys/spleen", "spleen", "folds")):
        folder, said = find_fetched(name), run(f"info {name}", capsys)
        assert "model folder of this library by card.json" in said and "MIT" in said
        run(f"import {name} copies/{number}", capsys)
        assert read_card(tmp_path / f"copies/{number}") == read_card(folder if name != "folds" else folder / "fold_0")
        assert run(f"push {name} clinic/other --show", capsys).endswith("nothing was sent\n")
    for line in ("info clinic/none", "import clinic/none out", "push clinic/none clinic/other --show"):
        with pytest.raises(SystemExit, match="clinic/none: there is no such file or folder, and no model of that name below .*is not on the hub"):
            main(line.split())
    with pytest.raises(SystemExit, match="no backbone 'tyni'; there are: mednext_v2_tiny.*tyni: there is no such file or folder"):
        main(["info", "tyni"])
    assert "GFLOP" in run("info tiny --patch 32", capsys)


def test_a_second_version_replaces_the_first(hub, tmp_path, monkeypatch):
    login(monkeypatch)
    for fold in range(3):
        save_unet(tmp_path / f"old/fold_{fold}", seed=fold, licence="MIT")
    push_to_hub(tmp_path / "old", "clinic/spleen")
    assert "3 folds that are averaged" in hub.repos["clinic/spleen"].files["README.md"].decode()
    with pytest.raises(ValueError, match="holds several folds: use `predict`"):
        from_pretrained("clinic/spleen")
    push_to_hub(save_unet(tmp_path / "new", licence="MIT"), "clinic/spleen")
    assert set(hub.repos["clinic/spleen"].files) == {"card.json", "model.safetensors", "README.md"}


def test_what_others_wrote_stays(hub, tmp_path, monkeypatch):
    login(monkeypatch)
    save_unet(tmp_path / "mine", licence="MIT")
    publish(hub, "clinic/bert", {"pytorch_model.bin": b"x", "config.json": b"{}"})
    with pytest.raises(FileExistsError, match="clinic/bert holds something else"):
        push_to_hub(tmp_path / "mine", "clinic/bert")
    publish(hub, "clinic/page", {"README.md": b"---\nlicense: mit\n---\nBy hand\n", ".gitattributes": b""})
    with pytest.warns(UserWarning, match="written by hand"):
        push_to_hub(tmp_path / "mine", "clinic/page")
    assert b"By hand" in hub.repos["clinic/page"].files["README.md"] and "card.json" in hub.repos["clinic/page"].files


def test_nothing_is_sent_that_may_not_be(hub, tmp_path, monkeypatch, capsys):
    login(monkeypatch)
    save_unet(tmp_path / "open")
    for changes, licence, told in (
        ({}, "", r"licence of the weights is not known \(empty\): give it with --licence"),
        ({"licence": "MIT"}, "Apache-2.0", "its card states MIT, not Apache-2.0"),
        ({"licence": "not to be shared: the parent's licence, CC BY-NC-ND 4.0, allows no derivatives"}, "MIT", "not to be shared"),
        ({"licence": "unknown until the parent's terms are read (custom); own part MIT"}, "", "is not known"),
    ):
        with pytest.raises(ValueError, match=told):
            push_to_hub(save_unet(tmp_path / "mine", **changes), "clinic/spleen", licence)
    with open(tmp_path / "mine/model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(ValueError, match="is not what card.json beside it describes"):
        push_to_hub(tmp_path / "mine", "clinic/spleen")
    with pytest.raises(ValueError, match="give owner/name"):
        push_to_hub(tmp_path / "open", "spleen")
    shown = run("push open clinic/spleen --licence MIT --show", capsys)
    assert "license: mit" in shown and "with card.json, model.safetensors; nothing was sent" in shown
    assert not hub.asked


def test_a_given_licence_is_in_the_card_that_is_published(hub, tmp_path, monkeypatch):
    login(monkeypatch)
    push_to_hub(save_unet(tmp_path / "mine"), "clinic/spleen", licence="CC BY 4.0", private=True)
    assert from_pretrained("clinic/spleen")[1].licence == "CC BY 4.0" and hub.repos["clinic/spleen"].private
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "another"))
    with pytest.raises(FileNotFoundError, match="private"):
        from_pretrained("clinic/spleen")


def test_places_of_this_machine_are_named(hub, tmp_path, monkeypatch):
    login(monkeypatch)
    save_unet(tmp_path / "mine", licence="MIT")
    add_scores(tmp_path / "mine", {"dsc": 0.5}, "mednextv2 finetune -d /home/me/raw -o spleen")
    with pytest.warns(UserWarning, match="become public: /home/me/raw; to avoid it, train with relative paths .* or edit scores in that file"):
        push_to_hub(tmp_path / "mine", "clinic/spleen")


@pytest.mark.parametrize("token", ["", "hf_of_somebody_else"])
def test_without_a_login_the_error_says_how(hub, tmp_path, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PermissionError, match="clinic/spleen: the hub refuses it .HTTP 401.: log in with `hf auth login`, or set HF_TOKEN"):
        push_to_hub(save_unet(tmp_path / "mine", licence="MIT"), "clinic/spleen")
    assert not hub.repos


@pytest.mark.parametrize("status", [401, 403])
def test_who_may_not_is_told_how_to_log_in(hub, tmp_path, monkeypatch, status):
    mine = save_unet(tmp_path / "mine", licence="MIT")
    monkeypatch.setattr("hub_toys.Handler.repo", lambda self, name, write=False: self.refuse(status, "", "not for you"))
    for command in ("predict -m clinic/spleen -i scan.nii.gz -o labels.nii.gz", f"push {mine} clinic/spleen"):
        nib.save(nib.Nifti1Image(np.ones((8, 8, 8), "float32"), np.eye(4)), tmp_path / "scan.nii.gz")
        login(monkeypatch)
        with pytest.raises(SystemExit, match="`hf auth login`, or set HF_TOKEN|`hf auth login` or HF_TOKEN"):
            main(command.split())


@pytest.mark.parametrize(
    "licence, fields",
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("CC BY-NC-SA 4.0", {"license": "cc-by-nc-sa-4.0"}),
        ("MIT, with attribution: the parent is under CC BY 4.0", {"license": "other", "license_name": "mit-with-attribution-the-parent-is-under-cc-by-4.0"}),
    ],
)
def test_licences_as_the_hub_names_them(licence, fields):
    assert licence_fields(licence) == fields
