"The loop learns, stops when it must, and continues to the same bits after being killed"

import dataclasses
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tqdm import tqdm

from mednext_v2.core import Resources
from mednext_v2.models.registry import create
from mednext_v2.training import checkpoint
from mednext_v2.training.checkpoint import check_identity, read_checkpoint, save_checkpoint, weights_digest
from mednext_v2.training.engine import make_engine
from mednext_v2.training.losses import deep_supervision_loss
from mednext_v2.training.monitor import log_curves
from mednext_v2.training.recipe import RECIPES, Recipe, get_recipe, learning_rate, make_optimizer
from mednext_v2.training.state import PREEMPTED
from mednext_v2.training.trainer import check_run, loss_options, prepare_step, train_step, training_sampler
from mednext_v2.training.validation import PatchValidation, patch_validation
from training_toys import fit, readers, toy_cases, toy_model, toy_recipe, toy_run


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


# ---------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=0), "steps must be a positive whole number, got 0"),
        (dict(steps=10.0), "steps must be a positive whole number, got 10.0"),
        (dict(batch_size=0), "batch_size must be a positive whole number"),
        (dict(lr=0), "lr must be a positive number, got 0"),
        (dict(lr=-1e-3), "lr must be a positive number"),
        (dict(lr=math.nan), "lr must be a positive number, got nan"),
        (dict(lr="1e-3"), "lr must be a positive number, got '1e-3'"),
        (dict(lr=True), "lr must be a positive number, got True"),
        (dict(warmup=12), "warmup must be below steps = 12, got 12"),
        (dict(warmup=-1), "warmup must be a whole number, 0 or more"),
        (dict(patch=(8, 8)), "patch must be three positive whole numbers"),
        (dict(patch=(8, 8, -8)), "patch must be three positive whole numbers"),
        (dict(patch=8), "patch must be three positive whole numbers, got 8"),
        (dict(foreground=33), "foreground must be a share from 0 to 1, got 33"),
        (dict(augment="strong"), "augment must be one of none, light, nnunet"),
        (dict(precision="fp8"), "precision must be fp32, bf16 or fp16"),
        (dict(grad_accum_steps=3), "grad_accum_steps must be a divisor of batch_size = 2, got 3"),
        (dict(ema=1.0), "ema must be a share below 1, got 1.0"),
        (dict(keep="final"), "keep must be last or best"),
        (dict(keep="best"), "keep best and patience need validate_every, got 0"),
        (dict(patience=3), "keep best and patience need validate_every, got 0"),
        (dict(optimizer="adam"), "optimizer must be adamw or sgd"),
        (dict(max_grad_norm=0), "max_grad_norm must be a positive number"),
        (dict(eps=0), "eps must be a positive number"),
        (dict(weight_decay=-1), "weight_decay must be a number, 0 or more"),
        (dict(deep_supervision=1), "deep_supervision must be true or false"),
        (dict(checkpoint_every=0), "checkpoint_every must be a positive whole number"),
        (dict(validate_every=-5), "validate_every must be a whole number, 0 or more"),
    ],
)
def test_recipes_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        toy_recipe(**changes)
    assert str(error.value).startswith("recipe: ") and "\n" not in str(error.value)


def test_recipe_defaults_are_v1s_and_lists_become_tuples():
    recipe = Recipe(steps=100, patch=[32, 32, 16])
    assert (recipe.eps, recipe.weight_decay, recipe.max_grad_norm, recipe.poly_power) == (1e-4, 3e-5, 12.0, 0.9)
    assert recipe.patch == (32, 32, 16) and hash(recipe)


@pytest.mark.parametrize("warmup", [0, 1, 50])
def test_learning_rate_is_the_formula(warmup):
    recipe = Recipe(steps=300, warmup=warmup, lr=0.02)
    rates = [learning_rate(t, recipe) for t in range(300)]
    for t, rate in enumerate(rates):
        wanted = 0.02 * (t + 1) / warmup if t < warmup else 0.02 * (1 - (t - warmup) / (300 - warmup)) ** 0.9
        assert rate == pytest.approx(wanted)
    assert max(rates) == 0.02 and min(rates) > 0
    decay = torch.optim.lr_scheduler.PolynomialLR  # PyTorch's own poly, without warm-up
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler = decay(optimizer, total_iters=300 - warmup, power=0.9)
    for rate in rates[warmup : warmup + 20]:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        optimizer.step()
        scheduler.step()


# ------------------------------------------------------------------------------------------------ step


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_loop_equals_one_written_out(tmp_path, optimizer):
    recipe = toy_recipe(optimizer=optimizer, max_grad_norm=0.5, steps=5)
    trained, history = toy_run(tmp_path, recipe, log_every=1)
    model, sampler = toy_model(), training_sampler(recipe, toy_cases())
    options = dict(momentum=0.99, nesterov=True) if optimizer == "sgd" else dict(eps=1e-4)
    cls = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    plain = cls(model.parameters(), lr=1.0, weight_decay=3e-5, foreach=False, **options)
    for step in range(5):
        plain.param_groups[0]["lr"] = learning_rate(step, recipe)
        image, label = sampler.batch(step)
        loss = deep_supervision_loss(model(image), label)
        plain.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        plain.step()
        assert history.loss[step] == pytest.approx(loss.item(), rel=1e-4)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_it_learns(tmp_path):
    recipe = toy_recipe(steps=80, lr=2e-2, patch=(16, 16, 16), eps=1e-8)
    validate = patch_validation(recipe, toy_cases(), batches=3)
    torch.manual_seed(0)
    model = create("unet", 1, 3, True, filters=(8, 16, 16))
    with torch.no_grad():
        before = validate(model)
    history = fit(recipe, model, training_sampler(recipe, toy_cases()), tmp_path, validate=validate, device="cpu", progress=False)
    assert history.val_dice.iloc[-1] > 0.75 > 0.5 > before
    assert history.loss.iloc[-1] < 0.6 * history.loss.iloc[0]


def one_step(recipe, model, batch):
    "Loss and norm of one step, by the engine"
    engine = make_engine(recipe, model, Resources("cpu"))
    model, optimizer = engine.prepare(model, make_optimizer(recipe, model))
    return train_step(recipe, engine, model, optimizer, batch, loss_options(recipe))


def test_gradients_are_clipped_and_present_only_reaches_the_loss():
    recipe = toy_recipe(optimizer="sgd", weight_decay=0.0, max_grad_norm=1e-3, lr=1.0)
    image, label = training_sampler(recipe, toy_cases()).batch(0)
    model = toy_model()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    one_step(recipe, model, (image, label))
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm() < 1e-3 * 1.0 * (1 + 0.99) * 1.01  # Nesterov's first step
    label[:] = label.clamp(max=1)
    losses = []
    for present_only in (True, False):
        changed = dataclasses.replace(recipe, present_only=present_only)
        losses.append(one_step(changed, toy_model(), (image, label))[0])
    assert losses[0] < losses[1]


def test_bf16_computes_in_bf16_and_keeps_float32_weights():
    seen = []
    model = toy_model()
    model.bottleneck.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for precision in ("fp32", "bf16"):
        recipe = toy_recipe(precision=precision)
        one_step(recipe, model, training_sampler(recipe, toy_cases()).batch(0))
    assert seen == [torch.float32, torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("where", ["image", "weights"])
def test_numbers_that_are_not_finite_stop_the_run(tmp_path, where):
    recipe = toy_recipe(checkpoint_every=2)
    model, sampler = toy_model(), training_sampler(recipe, toy_cases())

    class Poisoned:
        def __getitem__(self, step):
            image, label = sampler[step]
            if step == 4 and where == "image":
                image[0, 0, 0, 0, 0] = math.inf
            if step == 4 and where == "weights":
                with torch.no_grad():
                    next(model.parameters()).fill_(math.nan)
            return image, label

    with pytest.raises(FloatingPointError, match=r"step 5 of 12: loss is nan.*learning rate") as error:
        fit(recipe, model, Poisoned(), tmp_path, device="cpu", progress=False)
    assert "\n" not in str(error.value)
    state = read_checkpoint(tmp_path)
    assert state["progress"]["step"] == 4 and all(torch.isfinite(v).all() for v in state["model"].values())
    if where == "image":
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_gradients_that_are_not_finite_leave_the_weights():
    model = toy_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.bottleneck.conv2.conv.weight.register_hook(lambda gradient: gradient * math.inf)
    recipe = toy_recipe()
    loss, norm = one_step(recipe, model, training_sampler(recipe, toy_cases()).batch(0))
    assert math.isfinite(loss) and not math.isfinite(norm)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------------------------------------- resume


class Dies(Exception):
    pass


KILLED_AT = random.Random(0).sample(range(4, 38), 10)  # Ten different steps


def dies_at(folder: Path, recipe: Recipe, step: int, wait: float) -> None:
    "A run that kill -9 ends so many seconds after a step"

    timer = threading.Timer(wait, os.kill, (os.getpid(), signal.SIGKILL))

    def on_step(done: int) -> None:
        if done >= step and not timer.is_alive():
            timer.start()

    toy_run(folder, recipe, on_step=on_step)


def with_a_lock_of_its_own(function, *arguments) -> None:
    "A forked process shares tqdm's lock, and one that is killed while it holds the lock would stop every bar after it"
    tqdm.set_lock(threading.RLock())
    function(*arguments)


def in_a_child(function, *arguments) -> int:
    "Exit code of a forked process"
    process = multiprocessing.get_context("fork").Process(target=with_a_lock_of_its_own, args=(function, *arguments))
    process.start()
    process.join()
    return process.exitcode


def test_killed_runs_end_with_the_same_bits(tmp_path):
    "kill -9 at ten random steps, and moments of them, against one run that is left alone"
    recipe = toy_recipe(steps=60, checkpoint_every=3)
    whole, history = toy_run(tmp_path / "whole", recipe)
    draw, reached = random.Random(1), []
    for step in sorted(KILLED_AT):
        wait = draw.choice([0, draw.uniform(0, 0.02)])
        assert in_a_child(dies_at, tmp_path / "killed", recipe, step, wait) == -signal.SIGKILL
        reached.append(read_checkpoint(tmp_path / "killed")["progress"]["step"])
    assert reached == sorted(reached) and len(set(reached)) > 4 and reached[-1] < 60
    resumed, its_history = toy_run(tmp_path / "killed", recipe)
    assert same(resumed, whole)
    pd.testing.assert_frame_equal(its_history, history)
    for name in ("loss", "lr"):
        path = Path("live") / "plots" / "metrics" / f"{name}.tsv"
        assert (tmp_path / "killed" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


def dies_while_saving(folder: Path, recipe: Recipe, moment: str) -> None:
    "A run that kill -9 ends in its second checkpoint, once half is written or between the two renames"
    saves, torch_save, os_replace = [], torch.save, os.replace

    def save(state, path):
        torch_save(state, path)
        saves.append(path)
        if len(saves) == 2 and moment == "while writing":
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def replace(source, target):
        before = moment == "before the renames" and str(target).endswith("previous.pt")
        if len(saves) == 2 and before:
            os.kill(os.getpid(), signal.SIGKILL)
        os_replace(source, target)
        if len(saves) == 2 and str(target).endswith("previous.pt"):
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save, checkpoint.os.replace = save, replace
    toy_run(folder, recipe)


@pytest.mark.parametrize("moment", ["while writing", "before the renames", "between the renames"])
def test_killed_while_a_checkpoint_is_written(tmp_path, moment):
    recipe, folder = toy_recipe(), tmp_path / "killed"
    whole, _ = toy_run(tmp_path / "whole", recipe)
    assert in_a_child(dies_while_saving, folder, recipe, moment) == -signal.SIGKILL
    assert [path.name for path in folder.glob(".tmp*")] == [".tmp-0-last.pt"]
    assert read_checkpoint(folder)["progress"]["step"] == 4
    resumed, _ = toy_run(folder, recipe)
    assert same(resumed, whole) and not list(folder.glob(".tmp*"))


@pytest.mark.parametrize("damage", ["truncated", "bit", "empty", "text"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    recipe = toy_recipe()
    whole, history = toy_run(tmp_path, recipe)
    last = tmp_path / "last.pt"
    data = bytearray(last.read_bytes())
    if damage == "bit":
        with zipfile.ZipFile(last) as archive:  # Between the members lies padding, where a bit does no harm
            member = max(archive.infolist(), key=lambda info: info.file_size)
        data[data.index(archive_bytes := member.filename.encode()) + len(archive_bytes) + member.file_size // 2] ^= 1
    last.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"hello"}.get(damage, data))
    with pytest.warns(UserWarning, match="last.pt is damaged"):
        resumed, its_history = toy_run(tmp_path, recipe)
    assert same(resumed, whole)
    pd.testing.assert_frame_equal(its_history, history)
    assert read_checkpoint(tmp_path)["progress"]["step"] == 12 and (tmp_path / "previous.pt").exists()


def test_only_damaged_checkpoints_is_an_error(tmp_path):
    save_checkpoint(tmp_path, step=1)
    save_checkpoint(tmp_path, step=2)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no checkpoint that can be read: delete it"):
        read_checkpoint(tmp_path)


def test_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/pwned",))

    torch.save({"step": Evil()}, tmp_path / "last.pt")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match="can be read"):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_finished_run_is_only_read(tmp_path):
    recipe = toy_recipe()
    trained, history = toy_run(tmp_path, recipe)
    stamp = (tmp_path / "last.pt").stat().st_mtime_ns
    again, its_history = toy_run(tmp_path, recipe)
    assert same(again, trained) and (tmp_path / "last.pt").stat().st_mtime_ns == stamp
    pd.testing.assert_frame_equal(its_history, history)


@pytest.mark.parametrize(("workers", "augment_on_device"), [(2, False), (0, True), (1, True)])
def test_read_ahead_changes_nothing(tmp_path, workers, augment_on_device):
    recipe = toy_recipe(steps=6, checkpoint_every=2, augment="nnunet_elastic")
    alone, history = toy_run(tmp_path / "alone", recipe)
    ahead, its_history = toy_run(tmp_path / "ahead", recipe, workers=workers, augment_on_device=augment_on_device)
    assert same(alone, ahead)
    pd.testing.assert_frame_equal(its_history, history)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_a_compiled_run_is_the_same_run_and_its_checkpoints_fit_another(tmp_path):
    recipe = toy_recipe(steps=4, checkpoint_every=2)
    alone, history = toy_run(tmp_path / "alone", recipe)
    other, its_history = toy_run(tmp_path / "compiled", recipe, compiled="default", channels_last=True)
    assert list(other.state_dict()) == list(alone.state_dict())
    for name, value in alone.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], atol=1e-3), name
    pd.testing.assert_frame_equal(its_history, history, rtol=1e-2)
    # What a compiled run saved, a plain one goes on from
    with pytest.raises(ValueError, match="compiled was default, now none; channels_last was True, now False"):
        toy_run(tmp_path / "compiled", recipe)
    with pytest.warns(UserWarning, match="compiled was default"):
        again, _ = toy_run(tmp_path / "compiled", recipe, resume="force")
    assert same(again, other)


def test_unknown_modes_of_compiling_are_refused(tmp_path):
    with pytest.raises(ValueError, match="compiled must be one of none, default, reduce-overhead, max-autotune, got 'fast'"):
        toy_run(tmp_path, toy_recipe(), compiled="fast")


def test_run_read_ahead_resumes_where_it_stopped(tmp_path):
    "Worker processes have read on when a run dies; the next one starts at the step of the checkpoint"
    recipe = toy_recipe(steps=10, checkpoint_every=4)
    whole, _ = toy_run(tmp_path / "whole", recipe)
    looked = []

    def validate(model):
        looked.append(1)
        if len(looked) == 2:
            raise Dies
        return 0.5

    recipe = dataclasses.replace(recipe, validate_every=3)
    with pytest.raises(Dies):
        toy_run(tmp_path / "stopped", recipe, workers=2, validate=validate)
    assert readers() == [] and read_checkpoint(tmp_path / "stopped")["progress"]["step"] == 4
    resumed, _ = toy_run(tmp_path / "stopped", recipe, workers=1, validate=lambda model: 0.5)
    assert same(resumed, whole)


def test_random_layers_resume_exactly(tmp_path):
    "Dropout draws from PyTorch's generator; a resumed run draws the same"

    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.Conv3d(4, 3, 1)

        def forward(self, x):
            return self.last(torch.nn.functional.dropout(self.first(x), 0.5, self.training))

    recipe = toy_recipe(steps=10, checkpoint_every=4)
    sampler = training_sampler(recipe, toy_cases())

    class Breaks:
        fingerprint = sampler.fingerprint

        def __getitem__(self, step):
            if step == 6:
                raise Dies
            return sampler[step]

    whole, broken, resumed, other = (Dropped() for _ in range(4))
    fit(recipe, whole, sampler, tmp_path / "whole", device="cpu", progress=False)
    with pytest.raises(Dies):
        fit(recipe, broken, Breaks(), tmp_path / "broken", device="cpu", progress=False)
    torch.rand(5)
    fit(recipe, resumed, sampler, tmp_path / "broken", device="cpu", progress=False)
    assert same(resumed, whole)
    fit(recipe, other, sampler, tmp_path / "other", seed=1, device="cpu", progress=False)
    assert not same(other, whole)


@pytest.mark.parametrize(
    ("field", "was"), [("recipe.lr", "0.01, now 0.02"), ("seed", "0, now 1"), *((name, "") for name in ("data", "initial weights", "network"))]
)
def test_another_run_is_refused_by_name(tmp_path, field, was):
    recipe = toy_recipe()
    toy_run(tmp_path, recipe)
    before = (tmp_path / "last.pt").read_bytes()
    model, seed, sampler_seed = toy_model(), 0, 0
    if field == "recipe.lr":
        recipe = toy_recipe(lr=2e-2)
    if field == "data":
        sampler_seed = 5
    if field == "seed":
        seed = 1
    if field == "initial weights":
        model = toy_model(seed=1)
    if field == "network":
        model = create("unet", 1, 3, True, filters=(4, 8, 12))
    sampler = training_sampler(recipe, toy_cases(), sampler_seed)
    with pytest.raises(
        ValueError, match=rf"holds another run \({field} was .*{was}[^;]*\): give another folder, delete this one, or continue it by --resume force"
    ) as error:
        fit(recipe, model, sampler, tmp_path, seed=seed, device="cpu", progress=False)
    assert "\n" not in str(error.value)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_run_with_field_names_of_an_older_version_is_told_readably(tmp_path):
    found, wanted = {"recipe.batch": "2", "seed": "0"}, {"recipe.batch_size": "2", "seed": "0"}
    told = r"holds another run \(recipe.batch = 2 is no longer known; recipe.batch_size = 2 is new\)"
    with pytest.raises(ValueError, match=told):
        check_identity(found, wanted, tmp_path)
    with pytest.warns(UserWarning, match=told):
        check_identity(found, wanted, tmp_path, force=True)


def test_a_named_recipe_is_named_once_with_what_to_set_too():
    with pytest.raises(ValueError, match="^recipe quick: warmup must be below steps = 20, got 30; set warmup too$"):
        get_recipe("quick", steps=20)
    with pytest.raises(ValueError, match="^recipe quick: warmup must be below steps = 600, got 700$"):
        get_recipe("quick", warmup=700)
    with pytest.raises(ValueError, match="^recipe quick: Recipe has no 'batch'; it has: steps, batch_size"):
        get_recipe("quick", batch=2)


# ------------------------------------------------------------------------------------------- the rest


def test_digest_sees_every_value_and_name():
    digests = {weights_digest(toy_model()), weights_digest(toy_model(seed=1))}
    changed = toy_model()
    with torch.no_grad():
        changed.heads[0].conv.conv.bias[1] += 1e-7
    digests.add(weights_digest(changed))
    digests.add(weights_digest(toy_model().bfloat16()))
    assert len(digests) == 4 and weights_digest(toy_model()) in digests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(patch=(8, 8, 10)), r"patch \(8, 8, 10\) must be divisible by 4"),
        (dict(patch=(8, 8, 12)), r"patch is \(8, 8, 12\), but the sampler has \(8, 8, 8\)"),
        (dict(batch_size=3), "batch_size is 3, but the sampler has 2"),
        (dict(augment="none"), "augment is 'none', but the sampler has 'light'"),
        (dict(foreground=0.1), "foreground is 0.1, but the sampler has 0.5"),
        (dict(deep_supervision=False), "deep_supervision is False, but the network has True"),
    ],
)
def test_recipe_network_and_sampler_have_to_agree(tmp_path, changes, message):
    sampler = training_sampler(toy_recipe(), toy_cases())
    with pytest.raises(ValueError, match=message):
        fit(toy_recipe(**changes), toy_model(), sampler, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_classes_than_outputs_are_refused_before_the_first_step():
    class Dataset:
        name, num_classes = "demo", 9

    sampler = training_sampler(toy_recipe(), toy_cases())
    object.__setattr__(sampler.prepared, "dataset", Dataset)
    with pytest.raises(ValueError, match="data set demo has 9 classes, but the network has 3 outputs"):
        check_run(toy_recipe(), toy_model(), sampler)


def test_label_outside_of_the_network_is_named(tmp_path):
    cases = toy_cases()
    for label in cases.labels.values():
        label[label == 2] = 7
    recipe = toy_recipe()
    with pytest.raises(ValueError, match=r"0\.\.2 for 3 output channels, got \[7\]"):
        fit(recipe, toy_model(), training_sampler(recipe, cases), tmp_path, device="cpu", progress=False)


def test_history_counts_every_step_once(tmp_path):
    recipe = toy_recipe(steps=10, validate_every=4)
    _, every = toy_run(tmp_path / "a", recipe, log_every=1)
    calls = []
    validate = lambda model: calls.append(model.training) or 0.5
    _, history = toy_run(tmp_path / "b", recipe, log_every=3, validate=validate)
    assert history.step.tolist() == [3, 4, 6, 8, 9, 10]
    assert history.val_dice.notna().tolist() == [False, True, False, True, False, True]
    assert calls == [False] * 3
    sizes = np.diff([0, *history.step])
    assert (history.loss * sizes).sum() == pytest.approx(every.loss.sum())
    assert history.lr.tolist() == [learning_rate(step - 1, recipe) for step in history.step]


def test_curves_need_no_repository_and_make_none(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    with log_curves(tmp_path / "run", [dict(step=1, loss=2.0, val_dice=math.nan)]) as log:
        log(dict(step=2, loss=1.0, val_dice=0.5))
    tables = {p.stem: pd.read_csv(p, sep="\t") for p in (tmp_path / "run").rglob("*.tsv")}
    assert tables["loss"].values.tolist() == [[1, 2.0], [2, 1.0]] and tables["val_dice"].values.tolist() == [[2, 0.5]]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".git", "run"]


def test_training_goes_on_without_dvclive(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dvclive", None)
    _, history = toy_run(tmp_path, toy_recipe(steps=3, warmup=1))
    assert len(history) == 1 and not (tmp_path / "live").exists()


def test_progress_in_a_log_is_a_few_whole_lines(tmp_path, capfd):
    recipe = toy_recipe()
    fit(recipe, toy_model(), training_sampler(recipe, toy_cases()), tmp_path, progress=True, title="toy run")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert 1 <= len(lines) <= 3 and "toy run: 12/12" in lines[-1] and "loss=" in lines[-1] and "lr=" in lines[-1]


def test_patch_dice_counts_over_all_patches():
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(2, 4, 5, 5, 5, generator=generator), torch.randint(0, 3, (2, 1, 5, 5, 5), generator=generator)) for _ in range(3)]
    echo = torch.nn.Identity()
    echo.weight = torch.nn.Parameter(torch.zeros(1))
    prediction = torch.cat([image.argmax(1) for image, _ in batches]).numpy()
    truth = torch.cat([label[:, 0] for _, label in batches]).numpy()
    wanted = [2 * ((prediction == c) & (truth == c)).sum() / ((prediction == c).sum() + (truth == c).sum()) for c in (1, 2)]
    assert PatchValidation(batches)(echo) == pytest.approx(np.mean(wanted))
    assert math.isnan(PatchValidation([(image, 0 * label) for image, label in batches])(echo))


def test_validation_patches_are_fixed_and_from_the_other_split():
    one, two = (patch_validation(toy_recipe(), toy_cases(), 2).batches for _ in range(2))
    assert all(torch.equal(a, b) for x, y in zip(one, two) for a, b in zip(x, y))
    held_out = toy_cases().image("toy3")
    assert all(np.isin(image.numpy(), held_out).all() for image, _ in one)


# ------------------------------------------------------------------------ accumulation, averages, best, early end


def test_parts_of_a_batch_add_up_to_the_whole(tmp_path):
    "With a Dice per patch, two parts of two patches have the gradient of four"
    losses = []
    for parts in (1, 2, 4):
        recipe = toy_recipe(batch_size=4, grad_accum_steps=parts, batch_dice=False, steps=6, optimizer="sgd", lr=1e-3)
        model, history = toy_run(tmp_path / str(parts), recipe, log_every=1)
        losses.append(history.loss.to_numpy())
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)


def test_average_is_the_formula_and_the_run_ends_with_it(tmp_path):
    recipe = toy_recipe(ema=0.9, steps=8)
    seen = []
    model, sampler = toy_model(), training_sampler(recipe, toy_cases())
    wanted = {k: v.double() for k, v in model.state_dict().items()}
    plain, _ = toy_run(tmp_path / "plain", toy_recipe(steps=8))

    class Watches:
        "The weights before each step are those after the step before"

        def __getitem__(self, step):
            seen.append({k: v.clone() for k, v in model.state_dict().items()})
            return sampler[step]

    fit(recipe, model, Watches(), tmp_path / "run", device="cpu", progress=False)
    for number, state in enumerate([*seen[1:], plain.state_dict()], 1):
        decay = min(0.9, (1 + number) / (10 + number))
        wanted = {k: decay * wanted[k] + (1 - decay) * state[k].double() for k in wanted}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_killed_run_with_an_average_and_a_best_ends_the_same(tmp_path):
    recipe = toy_recipe(ema=0.9, steps=20, validate_every=3, keep="best", checkpoint_every=4)
    dice = iter([0.1, 0.5, 0.9, 0.2, 0.1, 0.1, 0.1])
    whole, history = toy_run(tmp_path / "whole", recipe, validate=lambda model: next(dice))
    values = [0.1, 0.5, 0.9, 0.2, 0.1, 0.1, 0.1]
    calls = []

    def breaks(model):
        calls.append(1)
        if len(calls) == 4:
            raise Dies
        return values[len(calls) - 1]

    with pytest.raises(Dies):
        toy_run(tmp_path / "stopped", recipe, validate=breaks)
    rest = iter(values[2:])  # From the checkpoint of step 8 on: validations of steps 9, 12, ...
    resumed, its_history = toy_run(tmp_path / "stopped", recipe, validate=lambda model: next(rest))
    assert same(resumed, whole)
    pd.testing.assert_frame_equal(its_history, history)


def test_best_is_kept_by_smoothed_dice_and_patience_ends_a_run(tmp_path):
    recipe = toy_recipe(steps=12, validate_every=1, smooth=0.0, keep="best", patience=3)
    model, states = toy_model(), []

    def validate(network):
        states.append({k: v.clone() for k, v in network.state_dict().items()})
        return [0.1, 0.3, 0.2, 0.1, 0.1, 0.1, 0.9, 0.9][len(states) - 1]

    history = fit(recipe, model, training_sampler(recipe, toy_cases()), tmp_path, validate=validate, device="cpu", progress=False)
    assert history.step.max() == 6  # Four validations without a better one
    assert all(torch.equal(v, states[1][k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_named_recipes_are_whole_and_survive_json(name):
    import json

    recipe = get_recipe(name)
    assert Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe


def test_recipes_of_the_paper_are_what_is_known_of_it():
    pretrain, finetune, context, v1, nnunet = (get_recipe(name) for name in ("pretrain", "finetune", "finetune_192", "v1", "nnunet"))
    assert (pretrain.steps, pretrain.patch, pretrain.warmup) == (1500 * 250, (128, 128, 128), 0), "warm-up is known of fine-tuning alone"
    assert (finetune.steps, finetune.warmup, finetune.lr, finetune.patch) == (75_000, 12_500, 1e-3, (128, 128, 128))
    assert context == dataclasses.replace(finetune, patch=(192, 192, 192)), "context scaling changes the patch of fine-tuning, nothing else"
    assert nnunet.patch == v1.patch == (128, 128, 128)
    assert (v1.optimizer, v1.eps, v1.weight_decay, v1.warmup) == ("adamw", 1e-4, 3e-5, 0)
    optimizer = make_optimizer(nnunet, toy_model())
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"], nnunet.lr) == (0.99, True, 1e-2)


# ------------------------------------------------------------------------------------- told to end, full disks

SIGNALLED = """
import os, signal, sys
from pathlib import Path
from training_toys import fit, toy_cases, toy_model, toy_recipe
from mednext_v2.training.trainer import training_sampler
recipe = toy_recipe(steps=12, checkpoint_every=100)
sampler = training_sampler(recipe, toy_cases())

class Signals:
    fingerprint = sampler.fingerprint

    def __getitem__(self, step):
        if step == 6 and sys.argv[2] != "none":
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        return sampler[step]

model = toy_model()
fit(recipe, model, Signals(), Path(sys.argv[1]), device="cpu", progress=False)
from mednext_v2.training.checkpoint import weights_digest
print(weights_digest(model))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_ends_the_step_saves_and_leaves_with_its_code(tmp_path, name):
    def start(signal_name, folder):
        command = [sys.executable, "-c", SIGNALLED, str(folder), signal_name]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)

    told = start(name, tmp_path / "told")
    assert told.returncode == PREEMPTED == 75, told.stderr
    assert read_checkpoint(tmp_path / "told")["progress"]["step"] == 7
    assert start("none", tmp_path / "told").stdout == start("none", tmp_path / "whole").stdout != ""


def test_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    recipe = toy_recipe()
    whole, _ = toy_run(tmp_path / "whole", recipe)
    saves, write = [], torch.save

    def full(state, path):
        saves.append(1)
        if len(saves) == 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        write(state, path)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left.*is whole. Make room"):
        patched.setattr(torch, "save", full)
        toy_run(tmp_path / "full", recipe)
    assert read_checkpoint(tmp_path / "full")["progress"]["step"] == 4
    assert not [p.name for p in (tmp_path / "full").iterdir() if p.name.startswith(".tmp")]
    assert same(toy_run(tmp_path / "full", recipe)[0], whole)


def test_forced_and_fresh_starts(tmp_path):
    recipe = toy_recipe()
    first, _ = toy_run(tmp_path, recipe)
    longer = toy_recipe(steps=16)
    with pytest.raises(ValueError, match="recipe.steps was 12, now 16"):
        toy_run(tmp_path, longer)
    with pytest.warns(UserWarning, match="recipe.steps was 12, now 16.*forced"):
        _, history = toy_run(tmp_path, longer, resume="force")
    assert history.step.tolist() == [10, 12, 16]
    (tmp_path / "best.pt").write_bytes(b"of the older run")
    anew, history = toy_run(tmp_path, toy_recipe(keep="best", validate_every=4), resume="never", validate=lambda model: float("nan"))
    assert (tmp_path / "older-1/best.pt").read_bytes() == b"of the older run" and not (tmp_path / "best.pt").exists()
    assert same(anew, first) and history.step.tolist() == [10, 12]


def test_run_leaves_a_manifest_and_pictures(tmp_path):
    import json

    recipe = toy_recipe(validate_every=4)
    model, sampler = toy_model(), training_sampler(recipe, toy_cases())
    validate = patch_validation(recipe, toy_cases(), 2)
    fit(recipe, model, sampler, tmp_path, validate=validate, device="cpu", progress=False, pictures=2)
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["identity"]["recipe.lr"] == "0.01" and about["steps"] == 12 and about["peak_memory_gib"] > 0
    assert about["gpu_hours"] == "not available" and about["versions"]["torch"] == torch.__version__
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["step0000008.png"]


def test_half_precision_that_the_cpu_lacks_is_refused(tmp_path):
    recipe = toy_recipe(precision="fp16")
    with pytest.raises(ValueError, match="precision fp16 needs a GPU"):
        fit(recipe, toy_model(), training_sampler(recipe, toy_cases()), tmp_path, device="cpu", progress=False)


def test_network_is_plain_again_after_bf16(tmp_path):
    recipe = toy_recipe(precision="bf16")
    model, _ = toy_run(tmp_path, recipe)
    assert model(torch.zeros(1, 1, 8, 8, 8))[0].dtype == torch.float32 and "forward" not in vars(model)


def test_bundle_of_regions_and_ignored_voxels_replays_with_their_loss(tmp_path):
    from mednext_v2.training.replay import replay, write_bundle

    recipe, model = toy_recipe(), toy_model()
    batch = torch.randn(2, 1, 8, 8, 8), torch.randint(0, 5, (2, 1, 8, 8, 8))  # 4 is ignored, the network has 3 outputs
    options = loss_options(recipe) | {"regions": ((1, 2, 3), (2, 3), (3,)), "ignore": 4, "reduce": print}
    bundle = write_bundle(tmp_path, 3, "loss is nan", recipe, model, model.state_dict(), batch, options)
    assert replay(bundle).empty


def test_frozen_parts_do_not_move_and_are_free_again(tmp_path):
    from mednext_v2.models.registry import parts

    recipe = toy_recipe(freeze="encoder", precision="fp32")
    before = {name: value.clone() for name, value in toy_model().state_dict().items()}
    model, _ = toy_run(tmp_path, recipe)
    moved = {part for name, part in parts(model).items() if not torch.equal(model.state_dict()[name], before[name])}
    assert recipe.freeze == ("encoder",) and moved == {"stem", "decoder", "heads"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_early_layers_learn_more_slowly():
    recipe, model = toy_recipe(layer_decay=0.5), toy_model()
    optimizer = make_optimizer(recipe, model)
    prepare_step(optimizer, 1.0, 0, 1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert named["heads.0.conv.conv.weight"] == 1 and named["input_block.conv1.conv.weight"] == min(named.values()) < 0.1
    assert len(rates) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [("freeze", ("body",), "some of stem"), ("freeze", ("stem", "encoder", "decoder", "heads"), "some of"), ("layer_decay", 0.0, "above 0")],
)
def test_parts_and_decay_that_cannot_be_meant(field, value, rule):
    with pytest.raises(ValueError, match=f"recipe: {field} must be .*{rule}"):
        Recipe(steps=1, **{field: value})
