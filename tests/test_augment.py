"Patches: pure in seed and step, placed where they should be, image and label together, read box by box"

import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from monai.data.meta_obj import get_track_meta
from monai.transforms import Compose
from scipy import ndimage

from mednext_v2.data import augment as module
from mednext_v2.data.augment import (
    AUGMENTATIONS,
    NNUNET_TURN,
    ArrayCases,
    CaseCache,
    PatchSampler,
    augment_patch,
    augmentation,
    crop,
    first_voxel,
    iterate_batches,
    needed_margin,
    patch_loader,
    thin_axis,
    voxels_by_class,
)
from mednext_v2.data.transforms import EachChanneld, RandBlur, RandGamma, RandSpatiald, random_displacement
from training_toys import readers, toy_cases


def sampler(augment="nnunet", seed=0, **options):
    settings = dict(patch=(12, 10, 8), batch_size=2, foreground=0.5)
    return PatchSampler(toy_cases(), "train", augment=augment, seed=seed, **settings | options)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class OnDisk:
    "An array that can only be sliced; remembers every box it was asked for"

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.boxes = array, array.shape, array.dtype, []

    def __getitem__(self, box):
        assert all(isinstance(part, slice) and part.step is None for part in box)
        found = self.array[box]
        self.boxes.append(found.shape)
        return found

    def __array__(self, *_, **__):
        raise AssertionError("read as a whole")


class DiskCases:
    "Cases on disk, opened anew at every question, as a prepared folder does it"

    def __init__(self, cases, dtype=np.float32):
        self.cases, self.dtype, self.opened = cases, dtype, []

    def __getattr__(self, name):
        if name in ("ids", "foreground", "lowest", "manifest"):
            return getattr(self.cases, name)
        raise AttributeError(name)

    def image(self, case):
        self.opened.append(OnDisk(self.cases.image(case).astype(self.dtype)))
        return self.opened[-1]

    def label(self, case):
        self.opened.append(OnDisk(self.cases.label(case)))
        return self.opened[-1]


# ---------------------------------------------------------------------------------------------- stream


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_batch_depends_on_seed_and_step_alone(augment):
    one, two = sampler(augment), sampler(augment)
    forwards = [one.batch(step) for step in range(12)]
    np.random.seed(1)
    torch.manual_seed(1)
    backwards = [two.batch(step) for step in reversed(range(12))][::-1]
    assert all(equal(a, b) for a, b in zip(forwards, backwards))
    assert not equal(forwards[0], forwards[1])
    assert not equal(forwards[0], sampler(augment, seed=1).batch(0))


@pytest.mark.parametrize(
    ("workers", "start", "method", "prefetch"), [(0, 3, None, 2), (1, 0, "fork", 1), (2, 3, "fork", 2), (3, 1, "fork", 3), (1, 5, "spawn", 2), (2, 8, None, 2)]
)
def test_stream_is_the_same_for_any_workers_start_and_method(workers, start, method, prefetch):
    source = sampler("nnunet_elastic", patch=(16, 12, 12))
    wanted = [source.batch(step) for step in range(8)]
    np.random.seed(5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loader = patch_loader(source, start, 8, workers, prefetch=prefetch, method=method)
    found = list(loader)
    assert len(found) == max(8 - start, 0)
    assert all(equal(a, b) for a, b in zip(found, wanted[start:], strict=True))
    assert torch.equal(torch.get_rng_state(), before)  # The network's own draws are not disturbed


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_stream_is_the_same_when_varied_outside_of_the_workers(workers):
    source = sampler("nnunet_elastic")
    outside = patch_loader(source, 2, 7, workers, device="cpu", augment_on_device=True)
    assert all(equal(batch, source.batch(step)) for step, batch in enumerate(outside, 2))


def test_threads_do_not_show():
    "A mean over more than 32,768 voxels is added up in another order on two threads"
    volume = np.random.default_rng(0).normal(size=(1, 48, 48, 48)).astype(np.float32)
    cases = ArrayCases({"a": volume}, {"a": np.zeros((48, 48, 48), np.uint8)}, {"train": ("a",)})
    source = PatchSampler(cases, "train", (40, 40, 40), 1, 0.0, "nnunet")
    steps, before = range(12), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = [source.batch(step) for step in steps]
        torch.set_num_threads(2)
        two = [source.batch(step) for step in steps]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert all(equal(a, b) for a, b in zip(one, two))


def test_stream_is_the_same_through_a_pickle_and_after_a_fork():
    source = sampler()
    wanted = source.batch(4)
    copy = pickle.loads(pickle.dumps(source))
    assert not copy.opened.kept and source.opened.kept
    assert equal(copy.batch(4), wanted)


def test_leaving_a_loader_ends_its_workers():
    loader = patch_loader(sampler(), steps=50, workers=2)
    next(loader)
    assert len(readers()) == 2
    loader.close()
    assert readers() == []


class Fails:
    "A sampler that does something bad in step 3"

    def __init__(self, what):
        self.what = what

    def __getitem__(self, step):
        if step == 3:
            self.what()
        return torch.full((1,), step), torch.zeros(1)


def bad_value():
    raise ValueError("no such\nthing")


def death():
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_goes_wrong_in_a_worker_is_said_with_its_step():
    loader, seen = patch_loader(Fails(bad_value), steps=6, workers=2), []
    with pytest.raises(RuntimeError, match="^step 3: ValueError: no such\nthing$"):
        for image, _ in loader:
            seen.append(int(image))
    assert seen == [0, 1, 2] and readers() == []


def test_dead_worker_is_noticed():
    # PyTorch raises in whatever the process does at the moment, most likely waiting
    with pytest.raises(RuntimeError, match="DataLoader worker .*(killed by signal|exited unexpectedly)"):
        list(patch_loader(Fails(death), steps=6, workers=1, prefetch=1))
    assert readers() == []


def test_dead_worker_is_explained():
    class Loader:
        sampler = range(7, 9)

        def __iter__(self):
            raise RuntimeError("DataLoader worker (pid(s) 5) exited unexpectedly")
            yield

    with pytest.raises(RuntimeError, match=r"^waiting for step 7: .* use fewer workers \(DataLoader worker"):
        next(iterate_batches(Loader(), None, torch.device("cpu"), False))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("on_device", [False, True])
def test_damaged_case_is_named(workers, on_device):
    cases = toy_cases(train=1)
    source = PatchSampler(cases, "train", (8, 8, 8), 2, 0.0, "none")
    cases.images["toy0"] = cases.images["toy0"][:, :2]  # Truncated: smaller than its label
    loader = patch_loader(source, 5, 7, workers, augment_on_device=on_device)
    wanted = r"^step 5, patch 0, case toy0: ValueError: the image has \(2, 20, 20\)"
    with pytest.raises(RuntimeError, match=wanted):
        next(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(start=-1), "start must be 0 or more, got -1"),
        (dict(start=5, steps=4), "steps must be 5 or more, got 4"),
        (dict(workers=-2), "workers must be 0 or more"),
        (dict(workers=1, prefetch=0), "prefetch must be 1 or more"),
    ],
)
def test_bad_loader_settings(options, message):
    with pytest.raises(ValueError, match=message):
        patch_loader(sampler(), **options)


# ------------------------------------------------------------------------------------------ variations


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_shapes_types_and_values(augment):
    source = sampler(augment, batch_size=3)
    for step in range(10):
        image, label = source.batch(step)
        assert type(image) is type(label) is torch.Tensor  # No MONAI subclass, which a checkpoint would keep
        assert (image.dtype, image.shape) == (torch.float32, (3, 1, 12, 10, 8))
        assert (label.dtype, label.shape) == (torch.int64, (3, 1, 12, 10, 8))
        assert torch.isfinite(image).all() and set(label.unique().tolist()) <= {0, 1, 2}


def spatial(patch, **options):
    return RandSpatiald(("image", "label"), patch, **options)


TURNING = dict(turn=np.pi / 6, turn_prob=1.0)
ZOOMING = dict(zoom=(0.7, 1.4), zoom_prob=1.0)
BENDING = dict(bend_prob=1.0)
MIRRORS = [Compose([t]) for t in augmentation("nnunet", (24, 24, 24)).transforms[-3:]]


@pytest.mark.parametrize(
    "change", [TURNING, ZOOMING, BENDING, TURNING | ZOOMING | BENDING, *MIRRORS], ids=["turn", "zoom", "bend", "all", "mirror x", "mirror y", "mirror z"]
)
def test_image_and_label_move_together(change):
    """The image is the label, a ball off the middle: where the image is 0 or 1 the label says so, at the border
    it is the thresholded image up to a few voxels, and the centres of mass agree"""
    transforms = Compose([spatial((24, 24, 24), **change)]) if isinstance(change, dict) else change
    for transform in transforms.transforms:
        transform.prob = 1.0
    grid = np.stack(np.meshgrid(*[np.arange(72)] * 3, indexing="ij"))
    ball = np.linalg.norm(grid - np.array([37, 34, 36]).reshape(3, 1, 1, 1), axis=0) < 6
    offsets, moved = [], 0
    for seed in range(20):
        edge = [24 - m for m in needed_margin(transforms, seed)]
        region = ball[tuple(slice(e, 72 - e) for e in edge)]
        image, label = (v[0].numpy() for v in augment_patch(transforms, region[None].astype(np.float32), region, seed))
        sure = (image < 1e-4) | (image > 1 - 1e-4)  # All eight voxels around agree
        assert np.array_equal(label[sure], image[sure].round()) and sure.mean() > 0.8
        assert ((image > 0.5) == label).mean() > 0.99
        where = grid[:, :24, :24, :24]
        centres = [[(mass * axis).sum() / mass.sum() for axis in where] for mass in (image, label)]
        offsets.append(np.subtract(*centres))
        moved += not np.array_equal(label, ball[24:48, 24:48, 24:48])
    assert moved >= 12
    assert np.abs(np.mean(offsets, 0)).max() < 0.06 and np.abs(offsets).max() < 0.4


def test_turn_is_nnunets_matrix_and_the_margin_holds_all_it_looks_at():
    "Channels that are coordinates come out as M p: linear interpolation is exact on them, clamping is not"
    patch = (12, 9, 10)
    change = spatial(patch, **TURNING | ZOOMING)
    axes = [np.arange(n) - (n - 1) / 2 for n in patch]
    inside = np.stack(np.meshgrid(*axes, indexing="ij"))
    for seed in range(25):
        state = np.random.RandomState(seed)
        state.random_sample(3)
        a, b, c = (state.uniform(-np.pi / 6, np.pi / 6) for _ in range(3))
        factor = state.uniform(0.7, 1.4)
        x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
        y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
        z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
        size = [n + 2 * m for n, m in zip(patch, needed_margin(Compose([change]), seed))]
        axes = [np.arange(n) - (n - 1) / 2 for n in size]
        region = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
        found, _ = augment_patch(Compose([change]), region, np.zeros(size, np.uint8), seed)
        wanted = np.einsum("ij,jxyz->ixyz", z @ y @ x * factor, inside)
        assert np.abs(found.numpy() - wanted).max() < 1e-3
        # No more is read than the last corner needs: one voxel
        reach = np.abs(wanted).max((1, 2, 3)) - (np.array(patch) - 1) / 2
        assert all(m == max(0, np.ceil(r - 1e-4)) for m, r in zip(change.margin, reach))


def test_bend_is_smooth_small_and_within_its_margin():
    size, moved = (64, 48, 56), []
    for seed in range(8):
        field = random_displacement(np.random.RandomState(seed), size, (11, 11), (450, 450))
        assert field.shape == (3, 16, 12, 14)
        full = ndimage.zoom(field, (1, 4, 4, 4), order=1)
        assert np.abs(np.diff(full, axis=1)).max() < 0.6  # Nothing folds
        moved.append(field[:, 4:-4, 3:-3, 4:-4].std())
    # nnU-Net v1: white noise from -1 to 1, smoothed over 11 voxels, times 450
    assert np.mean(moved) == pytest.approx(450 * 3**-0.5 / (2 * np.pi**0.5 * 11) ** 1.5, rel=0.35)
    change = spatial((20, 20, 20), bend_prob=1.0, magnitude=(4000, 4000))
    for seed in range(5):
        beyond = needed_margin(Compose([change]), seed)
        furthest = np.abs(change.field).max((1, 2, 3))
        assert beyond == tuple(np.ceil(furthest.round(4)).astype(int)) and max(beyond) > 1


@pytest.mark.parametrize(("patch", "axis"), [((8, 32, 32), 0), ((32, 8, 32), 1), ((32, 30, 9), 2), ((32, 32, 11), None)])
def test_slab_moves_in_its_plane_only(patch, axis):
    assert thin_axis(patch) == axis
    change = augmentation("nnunet_elastic", patch).transforms[0]
    change.chances = (1.0, 1.0, 1.0)
    cosines = []
    for seed in range(20):
        change.set_random_state(seed).randomize()
        cosines.append(change.matrix[(axis or 0) - 1, (axis or 0) - 1])
        if axis is None:
            assert np.abs(change.matrix[2]).min() > 1e-6
        else:
            unit = np.eye(3)[axis]
            assert np.allclose(change.matrix[axis], unit) and np.allclose(change.matrix[:, axis], unit)
            assert change.margin[axis] == 0 and not change.field[axis].any()
    assert (min(cosines) < -0.6) == (axis is not None)  # Up to half a turn in a slab, 30 degrees otherwise
    low = augmentation("nnunet", patch).transforms[5]
    low.prob = low.channel_prob = 1.0
    low.set_random_state(1)
    layers = torch.randn([n if a == (axis or 0) else 1 for a, n in enumerate(patch)])
    image = low({"image": layers.expand(patch)[None].clone()})["image"][0]
    assert torch.allclose(image, layers.expand(patch), atol=1e-6) == (axis is not None)


CHANCES = {  # nnUNetTrainer.get_training_transforms of nnU-Net 2.8.1, in its order
    "RandGaussianNoised": [0.1],
    "RandBlur": [0.2],
    "RandScaleIntensityd": [0.15],
    "RandScaleIntensityFixedMeand": [0.15],
    "RandSimulateLowResolution": [0.25],
    "RandGamma": [0.1, 0.3],
    "RandFlipd": [0.5, 0.5, 0.5],
}


def test_chances_are_nnunets():
    transforms = augmentation("nnunet", (8, 8, 8)).transforms
    found = {}
    for transform in transforms[1:]:
        name = type(getattr(transform, "transform", transform)).__name__
        found.setdefault(name if name in CHANCES else type(transform).__name__, []).append(transform.prob)
    assert found == CHANCES and list(found) == list(CHANCES)
    assert transforms[0].chances == (0.2, 0.2, 0.0)
    elastic = augmentation("nnunet_elastic", (8, 8, 8)).transforms
    assert elastic[0].chances == (0.2, 0.2, 0.2)
    assert elastic[0].magnitude == (0, 900) and elastic[0].sigma == (9, 13)
    gammas = [t.transform for t in transforms if isinstance(getattr(t, "transform", None), RandGamma)]
    assert [gamma.invert_image for gamma in gammas] == [True, False]


@pytest.mark.parametrize("augment", ["light", "nnunet", "nnunet_elastic"])
def test_every_variation_comes_up_as_often_as_it_should_and_data_stay_untouched(augment):
    cases = toy_cases()
    before = {case: cases.image(case).copy() for case in cases.ids("train")}
    source = PatchSampler(cases, "train", (12, 10, 8), 1, 0.5, augment)
    first, *others = source.transforms.transforms
    drawn = np.zeros(len(others) + 1)
    for step in range(200):
        source.batch(step)
        drawn += [first._do_transform, *(transform._do_transform for transform in others)]
    still = np.prod([1 - chance for chance in first.chances])
    for share, wanted in zip(drawn / 200, [1 - still, *(transform.prob for transform in others)]):
        assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / 200) ** 0.5
    assert all(np.array_equal(cases.image(case), image) for case, image in before.items())


def test_turns_and_zooms_are_drawn_evenly_from_nnunets_ranges():
    change = spatial((16, 16, 16), **{k: v for k, v in NNUNET_TURN.items() if k != "keys"})
    turns, zooms = [], []
    for seed in range(3000):
        change.set_random_state(seed).randomize()
        factor = np.linalg.det(change.matrix) ** (1 / 3)
        turn = change.matrix / factor
        zooms += [factor] if abs(factor - 1) > 1e-9 else []
        turns += [np.arctan2(turn[2, 1], turn[2, 2])] if abs(turn - np.eye(3)).max() > 1e-9 else []
    for found, (low, high) in ((np.degrees(turns), (-30, 30)), (np.array(zooms), (0.7, 1.4))):
        assert abs(len(found) / 3000 - 0.2) < 0.03
        near = 0.02 * (high - low)
        assert low <= found.min() < low + near and high - near < found.max() <= high
        assert abs(found.mean() - (low + high) / 2) < 0.05 * (high - low)
        assert found.std() == pytest.approx((high - low) / 12**0.5, rel=0.06)


def only(number, image, seed, size=16):
    "One transform of nnU-Net's list, certain to be applied, on an image of several channels"
    transform = augmentation("nnunet", (size,) * 3).transforms[number]
    transform.prob = 1.0
    found, _ = augment_patch(Compose([transform]), image, np.zeros((size,) * 3, np.uint8), seed)
    return found.numpy().astype(float), transform


def noisy(channels=4, size=16, seed=0):
    return np.random.default_rng(seed).normal(size=(channels, size, size, size)).astype(np.float32)


def test_noise_has_a_deviation_from_0_to_a_tenth_shared_by_the_channels():
    image, spread = noisy(), []
    for seed in range(200):
        added = only(1, image, seed)[0] - image
        one, *rest = added.std((1, 2, 3))
        assert np.allclose(rest, one, rtol=0.1) and abs(np.corrcoef(added.reshape(4, -1))[0, 1]) < 0.1
        spread.append(added.std())
    assert 0.095 < max(spread) < 0.105 and min(spread) < 0.003 and abs(np.mean(spread) - 0.05) < 0.007


def test_blur_is_a_mirrored_gaussian_on_half_of_the_channels():
    image, sigmas, blurred = noisy(1, 16), [], 0
    for seed in range(120):
        found, transform = only(2, image, seed)
        if np.array_equal(found[0], image[0]):
            continue
        blurred += 1
        sigma = (transform.transform.x, transform.transform.y, transform.transform.z)
        sigmas.extend(sigma)
        wanted = ndimage.gaussian_filter(image[0].astype(float), sigma, mode="mirror", truncate=3.0)
        assert np.abs(found[0] - wanted).max() < 1e-4
    assert 40 < blurred < 80 and 0.5 <= min(sigmas) < 0.52 and 0.98 < max(sigmas) <= 1.0
    assert len({round(s, 6) for s in sigmas}) == len(sigmas)
    several = [(only(2, noisy(6), seed)[0] != noisy(6)).any((1, 2, 3)).sum() for seed in range(60)]
    assert 0 < min(several) + 1 and len(set(several)) > 3  # Channel by channel
    assert RandBlur(prob=1.0)(torch.randn(1, 3, 8, 2)).shape == (1, 3, 8, 2)


def test_brightness_and_contrast_are_drawn_per_channel():
    image = noisy()
    bright, contrast = [], []
    for seed in range(150):
        found = only(3, image, seed)[0]
        factors = (found / image).mean((1, 2, 3))
        assert np.abs(found - image * factors[:, None, None, None]).max() < 1e-4
        assert len(set(factors.round(6))) == 4
        bright.extend(factors)
        found = only(4, image, seed)[0]
        for channel, before in zip(found, image.astype(float)):
            inner = np.abs(before) < 1
            factor = np.polyfit(before[inner], channel[inner], 1)[0]
            mean = before.mean()
            wanted = np.clip((before - mean) * factor + mean, before.min(), before.max())
            assert np.abs(channel - wanted).max() < 1e-3
            contrast.append(factor)
    for found in (bright, contrast):
        assert 0.75 - 1e-3 < min(found) < 0.76 and 1.24 < max(found) < 1.25 + 1e-3
        assert abs(np.mean(found) - 1) < 0.03


def test_low_resolution_is_nearest_down_and_linear_up():
    ramp = np.broadcast_to(np.arange(16.0, dtype=np.float32), (1, 16, 16, 16)).copy()
    changed, factors = 0, []
    for seed in range(120):
        found, transform = only(5, ramp, seed)
        assert np.abs(found - ramp).max() < 1.6  # Where it was, up to the coarse voxel
        changed += not np.array_equal(found, ramp)
        factors.append(transform.transform.zoom_factor)
        n = max(1, round(16 * factors[-1]))
        if not np.array_equal(found, ramp):
            coarse = np.floor((np.arange(n) + 0.5) * 16 / n)  # Nearest to each coarse centre
            wanted = np.interp((np.arange(16) + 0.5) * n / 16 - 0.5, np.arange(n), coarse)
            assert np.abs(found[0, 0, 0] - wanted).max() < 1e-4
    assert 30 < changed < 75 and 0.5 <= min(factors) < 0.52 and max(factors) > 0.97


@pytest.mark.parametrize(("number", "sign"), [(6, -1), (7, 1)])
def test_gamma_keeps_mean_and_deviation_and_is_below_1_half_of_the_time(number, sign):
    image, gammas = noisy(2), []
    for seed in range(150):
        found, transform = only(number, image, seed)
        before = image.astype(float)
        assert np.allclose(found.mean((1, 2, 3)), before.mean((1, 2, 3)), atol=1e-4)
        assert np.allclose(found.std((1, 2, 3)), before.std((1, 2, 3)), rtol=1e-3)
        last = sign * before[1]  # The transform remembers the last channel
        changed = ((last - last.min()) / np.ptp(last)) ** transform.transform.gamma_value
        wanted = (changed - changed.mean()) / changed.std() * last.std() + last.mean()
        assert np.abs(sign * found[1] - wanted).max() < 2e-3
        gammas.append(transform.transform.gamma_value)
    below = np.array(gammas) < 1
    assert 0.35 < below.mean() < 0.65 and 0.7 <= min(gammas) < 0.72 and 1.45 < max(gammas) <= 1.5


def test_channels_are_changed_one_by_one():
    image = noisy(3)
    each = EachChanneld(RandGamma, 1.0, gamma=(0.7, 1.5), retain_stats=True)
    each.set_random_state(state=np.random.RandomState(0))
    together = each({"image": torch.from_numpy(image)})["image"]
    state = np.random.RandomState(0)
    state.random_sample()  # Whether the patch is changed
    for channel, found in zip(image, together):
        state.random_sample()  # Whether the channel is
        single = RandGamma(prob=1.0, gamma=(0.7, 1.5), retain_stats=True).set_random_state(state=state)
        assert torch.equal(single(torch.from_numpy(channel[None]))[0], found)


def test_settings_of_the_process_are_put_back():
    before, threads = get_track_meta(), torch.get_num_threads()
    sampler().batch(0)
    assert get_track_meta() is before and torch.get_num_threads() == threads
    broken = sampler("none")
    broken.transforms = lambda sample: 1 / 0
    broken.transforms.transforms = []
    with pytest.raises(RuntimeError, match="^step 0, patch 0: ZeroDivisionError: division by zero$"):
        broken.batch(0)
    assert get_track_meta() is before and torch.get_num_threads() == threads


# --------------------------------------------------------------------------------------------- patches


@pytest.mark.parametrize(("batch_size", "share"), [(1, 0.33), (2, 0.33), (2, 0.5), (3, 0.7), (2, 0.0), (2, 1.0)])
def test_share_of_foreground_is_exact_and_even(batch_size, share):
    source = sampler("none", batch_size=batch_size, foreground=share)
    chosen = [source.is_foreground(step, index) for step in range(300) for index in range(batch_size)]
    assert abs(sum(chosen) - share * len(chosen)) <= 1
    for start in range(0, len(chosen) - 30, 30):
        assert abs(sum(chosen[start : start + 30]) - share * 30) <= 1


def test_half_of_a_batch_of_two_is_one():
    source = sampler("none", foreground=0.5)
    assert all(sum(source.is_foreground(step, i) for i in range(2)) == 1 for step in range(50))


def test_foreground_centre_is_on_a_class_and_classes_are_equally_likely():
    cases = toy_cases(size=24)
    source = PatchSampler(cases, "train", (3, 3, 3), 2, 1.0, "none")
    centres = torch.cat([source.batch(step)[1][:, 0, 1, 1, 1] for step in range(150)])
    counts = torch.bincount(centres, minlength=3).tolist()
    # At the rim of the scan the patch is pushed inside, off its voxel
    assert counts[0] < 30 and min(counts[1:]) > 100
    sizes = np.bincount(np.concatenate([cases.label(c).ravel() for c in cases.ids("train")]))
    assert sizes[1] > 5 * sizes[2]


def test_case_without_foreground_is_sampled_anywhere():
    image = np.random.default_rng(0).normal(size=(1, 9, 9, 9)).astype(np.float32)
    empty = ArrayCases({"a": image}, {"a": np.zeros((9, 9, 9), np.uint8)}, {"train": ("a",)})
    source = PatchSampler(empty, "train", (4, 4, 4), 2, 1.0, "none")
    assert len({float(source.batch(step)[0][0, 0, 0, 0, 0]) for step in range(20)}) > 5


def test_patches_reach_every_voxel():
    ramp = np.arange(6**3, dtype=np.float32).reshape(1, 6, 6, 6)
    cases = ArrayCases({"a": ramp}, {"a": np.zeros((6, 6, 6), np.uint8)}, {"train": ("a",)})
    source = PatchSampler(cases, "train", (4, 4, 4), 2, 0.0, "none")
    seen = torch.cat([source.batch(step)[0].flatten() for step in range(60)]).unique()
    assert len(seen) == 6**3


def test_patch_larger_than_the_scan_is_filled_with_the_lowest_value():
    image = np.stack([np.full((4, 6, 4), 2.0), np.full((4, 6, 4), 5.0)]).astype(np.float32)
    image[:, 0, 0, 0] = [-3, 1]
    label = np.ones((4, 6, 4), np.uint8)
    cases = ArrayCases({"a": image}, {"a": label}, {"train": ("a",)})
    patch, truth = PatchSampler(cases, "train", (8, 4, 6), 1, 1.0, "none").batch(0)
    assert truth.sum() == 4 * 4 * 4 and truth[0, 0, 2:6, :, 1:5].all()
    outside = truth[0, 0] == 0
    assert (patch[0, 0][outside] == -3).all() and (patch[0, 1][outside] == 1).all()


def test_crop_equals_padding_and_slicing():
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(5, 6, 7))
    padded = np.pad(volume, 8, constant_values=-9)
    for _ in range(50):
        start, size = rng.integers(-4, 6, 3), tuple(rng.integers(1, 9, 3))
        if all(0 < a + s and a < n for a, s, n in zip(start, size, volume.shape)):
            wanted = padded[tuple(slice(a + 8, a + 8 + s) for a, s in zip(start, size))]
            assert np.array_equal(crop(volume, tuple(start), size, -9), wanted)


def test_place_stays_inside_and_keeps_the_centre():
    rng = np.random.default_rng(0)
    for _ in range(100):
        shape, size = rng.integers(4, 20, 3), rng.integers(1, 24, 3)
        centre = rng.integers(0, shape)
        for a, s, n, c in zip(first_voxel(centre, size, shape), size, shape, centre):
            assert (0 <= a <= n - s) if s <= n else (a <= 0 and a + s >= n)
            assert a <= c < a + s


def test_crop_of_a_box_outside_is_all_filling():
    volume = np.ones((2, 4, 4, 4), np.float16)
    found = crop(volume, (6, -9, 0), (3, 3, 3), (-1.0, -2.0))
    assert found.dtype == np.float16 and (found[0] == -1).all() and (found[1] == -2).all()


def test_voxels_by_class_thins_evenly_and_leaves_out_what_is_ignored():
    label = np.zeros((30, 20, 10), np.uint8)
    label[10:] = 3
    label[0, 0, 0], label[1] = 1, 4
    found = voxels_by_class(label, most=100, ignore=4)
    assert list(found) == [1, 3] and found[1].tolist() == [[0, 0, 0]] and 90 < len(found[3]) <= 100
    assert (label[tuple(found[3].T)] == 3).all()
    assert len(np.unique(np.diff(np.ravel_multi_index(found[3].T, label.shape)))) == 1
    assert list(voxels_by_class(label)) == [1, 3, 4]


def test_no_patch_is_centred_on_the_ignore_label():
    label = np.zeros((20, 20, 20), np.uint8)
    label[4:16, 4:16, 4:16] = 3
    label[10, 10, 10] = 1
    image = np.zeros((1, 20, 20, 20), np.float32)
    for ignore, wanted in ((3, {1}), (None, {1, 3})):
        cases = ArrayCases({"a": image}, {"a": label}, {"train": ("a",)}, ignore=ignore)
        source = PatchSampler(cases, "train", (3, 3, 3), 2, 1.0, "none")
        centres = torch.cat([source.batch(step)[1][:, 0, 1, 1, 1] for step in range(20)])
        assert set(centres.tolist()) == wanted
    assert 3 in source.batch(0)[1]  # It stays in the label, for the loss to leave out


# --------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_only_the_box_is_read_once_for_all_channels(augment):
    cases = toy_cases(size=40)
    cases.images.update({case: np.repeat(image, 2, 0) for case, image in cases.images.items()})
    disk, patch = DiskCases(cases), (12, 10, 8)
    source = PatchSampler(disk, "train", patch, 2, 0.5, augment)
    memory = PatchSampler(cases, "train", patch, 2, 0.5, augment)
    for step in range(12):
        before = sum(len(array.boxes) for array in disk.opened)
        found = source.batch(step)
        assert equal(found, memory.batch(step))
        # Two patches: image and label
        assert sum(len(array.boxes) for array in disk.opened) == before + 4
    read = [box for array in disk.opened for box in array.boxes if len(box) == 4]
    largest = {"none": 1, "light": 1.6, "nnunet": 2.6, "nnunet_elastic": 2.8}[augment]
    assert {box[0] for box in read} == {2}
    assert all(n <= np.ceil(largest * max(patch)) for box in read for n in box[1:])
    assert np.median([np.prod(box[1:]) for box in read]) == np.prod(patch)
    assert len(disk.opened) == 2 * 3  # Three cases, opened once each


def test_locating_reads_nothing():
    disk = DiskCases(toy_cases())
    source = PatchSampler(disk, "train", (6, 6, 6), 1, 0.5, "nnunet")
    for step in range(10):
        name, start, _ = source.locate(step, 0)
        assert name in source.cases and all(0 <= a <= 14 for a in start)
    assert all(array.boxes == [] for array in disk.opened)


def test_half_precision_becomes_float32():
    cases = toy_cases()
    halved = DiskCases(cases, np.float16)
    rounded = ArrayCases({case: image.astype(np.float16).astype(np.float32) for case, image in cases.images.items()}, cases.labels, cases.splits)
    for augment in AUGMENTATIONS:
        ours = PatchSampler(halved, "train", (12, 24, 8), 2, 0.5, augment)
        wanted = PatchSampler(rounded, "train", (12, 24, 8), 2, 0.5, augment)
        ours.prepared.lowest = wanted.prepared.lowest
        ours.opened = CaseCache(ours.prepared)
        for step in range(6):
            image, label = ours.batch(step)
            assert image.dtype == torch.float32 and equal((image, label), wanted.batch(step))
    assert ours.region(0, 0)[0].dtype == torch.float16  # Half the way to a GPU


@pytest.mark.parametrize("augment", ["nnunet", "nnunet_elastic"])
def test_nothing_is_invented_inside_of_a_scan(augment):
    "A scan of ones whose outside is -9: turned patches near its middle show no -9, those at its rim do"
    ones = {"a": np.ones((1, 96, 96, 96), np.float32)}

    class Cases(ArrayCases):
        def lowest(self, case):
            return (-9.0,)

        def foreground(self, case):
            return {1: np.array([self.middle])}

    for middle, clean in (((48, 48, 48), True), ((0, 48, 95), False)):
        cases = Cases(ones, {"a": np.ones((96, 96, 96), np.uint8)}, {"train": ("a",)})
        cases.middle = middle
        source = PatchSampler(cases, "train", (20, 20, 20), 1, 1.0, "none")
        source.transforms = Compose(augmentation(augment, (20, 20, 20)).transforms[:1])
        outside = [source.batch(step) for step in range(30)]
        assert all((image > 0.999).all() and label.all() for image, label in outside) == clean
        assert all(((image < -8.99) <= (label == 0)).all() for image, label in outside)


def test_scan_smaller_than_the_patch_with_turns():
    cases = toy_cases(size=10)
    low = {case: cases.lowest(case)[0] for case in cases.ids("train")}
    source = PatchSampler(cases, "train", (16, 12, 12), 2, 0.5, "nnunet_elastic")
    source.transforms = Compose(source.transforms.transforms[:1])
    for step in range(15):
        image, label = source.batch(step)
        assert image.shape == (2, 1, 16, 12, 12) and torch.isfinite(image).all()
        for index in range(2):
            name, start, _ = source.locate(step, index)
            assert start == (-3, -1, -1) and image[index].min() >= low[name] - 1e-4
        assert label.any()


def test_latest_cases_are_kept_within_number_and_size():
    opened = []

    class Many:
        def image(self, case):
            opened.append(case)
            return np.zeros((1, 2, 2, 2))

        def label(self, case):
            return np.zeros((2, 2, 2), np.uint8)

        def lowest(self, case):
            return (0.0,)

        def foreground(self, case):
            return {1: np.zeros((100, 3), np.int32), 2: np.zeros((0, 3), np.int32)}

    latest = CaseCache(Many(), most=3, nbytes=10**6)
    for case in "abcad":
        assert list(latest[case].foreground) == [1]  # A class without voxels cannot be aimed at
    assert list(latest.kept) == ["c", "a", "d"] and opened == list("abcd") and latest.held == 3 * 1200
    small = CaseCache(Many(), nbytes=2500)
    for case in "xyz":
        small[case]
    assert list(small.kept) == ["y", "z"] and small.held == 2400
    single = CaseCache(Many(), nbytes=10)
    assert single["w"] is single["w"]  # One is always kept
    latest.process = -1  # As after a fork
    latest["a"]
    assert list(latest.kept) == ["a"] and opened.count("a") == 2


def test_fingerprint_follows_content_and_settings():
    base = sampler().fingerprint
    assert base == sampler().fingerprint
    changed = [sampler(seed=1), sampler(batch_size=3), sampler("light"), sampler(patch=(8, 8, 8))]
    changed.append(sampler(foreground=1))
    cases = toy_cases()
    cases.images["toy0"][0, 0, 0, 0] += 1
    changed.append(PatchSampler(cases, "train", (12, 10, 8), 2, 0.5))
    assert len({base, *(s.fingerprint for s in changed)}) == 7


def test_fingerprint_follows_the_strengths_of_a_preset(monkeypatch):
    base = sampler("light").fingerprint
    (spatial_, options), *rest = AUGMENTATIONS["light"]
    monkeypatch.setitem(AUGMENTATIONS, "light", ((spatial_, options | dict(turn_prob=0.21)), *rest))
    assert sampler("light").fingerprint != base


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(patch=(8, 8)), "three positive sizes"),
        (dict(patch=(8, 0, 8)), "three positive sizes"),
        (dict(batch_size=0), "batch_size positive"),
        (dict(foreground=1.5), "share from 0 to 1, got 1.5"),
        (dict(augment="strong"), "there are: none, light, nnunet, nnunet_elastic"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        sampler(**options)


def test_empty_and_unknown_splits():
    cases = toy_cases()
    with pytest.raises(ValueError, match="no split 'test'"):
        PatchSampler(cases, "test", (8, 8, 8))
    cases.splits["test"] = ()
    with pytest.raises(ValueError, match="'test' has no case"):
        PatchSampler(cases, "test", (8, 8, 8))


LEFT = """
from training_toys import readers, toy_cases
from mednext_v2.data.augment import PatchSampler, patch_loader
batches = patch_loader(PatchSampler(toy_cases(), "train", (8, 8, 8), augment="none"), steps=50, workers=1)
next(batches)
raise ValueError("something else")
"""


def test_program_that_fails_while_workers_read_ahead_ends():
    "Workers pass over SIGTERM, and Python would wait for them at its end"
    from pathlib import Path

    done = subprocess.run([sys.executable, "-c", LEFT], cwd=Path(__file__).parent, capture_output=True, timeout=120)
    assert done.returncode == 1 and b"something else" in done.stderr


class Silent:
    "A sampler whose first batch never comes"

    fingerprint = "silent"

    def __getitem__(self, step):
        time.sleep(120)


def test_a_worker_that_lives_and_sends_nothing_is_an_error(monkeypatch):
    monkeypatch.setattr(module, "BATCH_TIMEOUT", 2)
    begin = time.perf_counter()
    with pytest.raises(RuntimeError, match="no batch came for step 0 .*shared memory"):
        next(patch_loader(Silent(), 0, 1, workers=1))
    assert time.perf_counter() - begin < 60
