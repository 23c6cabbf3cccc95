"Models by name, and publishing and loading through a server with the hub's HTTP interface"

from pathlib import Path

import pytest

from hub_toys import Hub, Repo
from mednext_v2.models.hub import find_model, parse_hub_name
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
