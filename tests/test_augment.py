"Patches: pure in seed and step, placed where they should be, image and label together"

import numpy as np
import pytest
import torch
from mednext_v2.augment import AUGMENTATIONS, ArrayCases, PatchSampler, augmentation, crop, place, vary, voxels_by_class
from monai.data.meta_obj import get_track_meta
from monai.transforms import RandAffined
from training_toys import toy_cases


def sampler(augment="nnunet", seed=0, **options):
    settings = dict(patch=(12, 10, 8), batch=2, foreground=0.5)
    return PatchSampler(toy_cases(), "train", augment=augment, seed=seed, **settings | options)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


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


def test_workers_give_the_same_batches():
    source = sampler()
    loader = torch.utils.data.DataLoader(source, batch_size=None, sampler=range(3, 9), num_workers=2)
    for step, batch in enumerate(loader, 3):
        assert equal(batch, source.batch(step))


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_shapes_types_and_values(augment):
    source = sampler(augment, batch=3)
    for step in range(10):
        image, label = source.batch(step)
        assert type(image) is type(label) is torch.Tensor  # No MONAI subclass, which a checkpoint would keep
        assert (image.dtype, image.shape) == (torch.float32, (3, 1, 12, 10, 8))
        assert (label.dtype, label.shape) == (torch.int64, (3, 1, 12, 10, 8))
        assert torch.isfinite(image).all() and set(label.unique().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("preset", "place"), [("light", 0), *(("nnunet", i) for i in range(5))]
)
def test_image_and_label_move_together(preset, place):
    "The image is the label, a ball: after each spatial change their centres of mass still agree"
    spatial = augmentation(preset, (24, 24, 24))
    spatial.transforms = [t for t in spatial.transforms if set(t.keys) == {"image", "label"}][place : place + 1]
    spatial.transforms[0].prob = 1
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"))
    ball = np.linalg.norm(grid - np.array([13, 11, 12]).reshape(3, 1, 1, 1), axis=0) < 6
    offsets, moved = [], 0
    for seed in range(30):
        image, label = vary(spatial, ball.astype(np.float32)[None], ball.astype(np.uint8), seed)
        masses = [volume[0].numpy().astype(float) for volume in (image, label)]
        first, second = ([(m * axis).sum() / m.sum() for axis in grid] for m in masses)
        offsets.append(np.subtract(first, second))
        moved += not np.array_equal(masses[1], ball)
    assert moved >= 25
    assert np.abs(np.mean(offsets, 0)).max() < 0.05 and np.abs(offsets).max() < 0.3


@pytest.mark.parametrize("augment", ["light", "nnunet"])
def test_every_variation_comes_up_and_data_stay_untouched(augment):
    cases = toy_cases()
    before = {case: cases.image(case).copy() for case in cases.ids("train")}
    source = PatchSampler(cases, "train", (12, 10, 8), 1, 0.5, augment)
    drawn = {id(t): 0 for t in source.transforms.transforms}
    for step in range(120):
        source.batch(step)
        for transform in source.transforms.transforms:
            drawn[id(transform)] += transform._do_transform
    for transform in source.transforms.transforms:
        share, wanted = drawn[id(transform)] / 120, transform.prob
        assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / 120) ** 0.5, transform
    assert all(np.array_equal(cases.image(case), image) for case, image in before.items())


def test_monai_setting_is_put_back():
    before = get_track_meta()
    sampler().batch(0)
    assert get_track_meta() is before
    broken = sampler("none")
    broken.transforms = lambda sample: 1 / 0
    broken.transforms.transforms = []
    with pytest.raises(ZeroDivisionError):
        broken.batch(0)
    assert get_track_meta() is before


@pytest.mark.parametrize(("batch", "share"), [(1, 0.33), (2, 0.33), (2, 0.5), (3, 0.7), (2, 0.0), (2, 1.0)])
def test_share_of_foreground_is_exact_and_even(batch, share):
    source = sampler("none", batch=batch, foreground=share)
    chosen = [source.is_foreground(step, index) for step in range(300) for index in range(batch)]
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
        for a, s, n, c in zip(place(centre, size, shape), size, shape, centre):
            assert (0 <= a <= n - s) if s <= n else (a <= 0 and a + s >= n)
            assert a <= c < a + s


def test_voxels_by_class_thins_evenly():
    label = np.zeros((30, 30, 30), np.uint8)
    label[10:] = 3
    label[0, 0, 0] = 1
    one, three = voxels_by_class(label, most=100)
    assert one.tolist() == [0] and 90 < len(three) <= 100
    assert (label.ravel()[three] == 3).all() and len(np.unique(np.diff(three))) == 1


def test_slab_turns_in_its_plane_only():
    for patch, axes in {(8, 32, 32): [0], (32, 8, 32): [1], (32, 32, 32): [0, 1, 2]}.items():
        grid = next(t for t in augmentation("nnunet", patch).transforms if isinstance(t, RandAffined))
        turned = [i for i, r in enumerate(grid.rand_affine.rand_affine_grid.rotate_range) if r > 0]
        assert turned == axes


def test_fingerprint_follows_content_and_settings():
    base = sampler().fingerprint
    assert base == sampler().fingerprint
    changed = [sampler(seed=1), sampler(batch=3), sampler("light"), sampler(patch=(8, 8, 8)), sampler(foreground=1)]
    cases = toy_cases()
    cases.images["toy0"][0, 0, 0, 0] += 1
    changed.append(PatchSampler(cases, "train", (12, 10, 8), 2, 0.5))
    assert len({base, *(s.fingerprint for s in changed)}) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(patch=(8, 8)), "three positive sizes"),
        (dict(patch=(8, 0, 8)), "three positive sizes"),
        (dict(batch=0), "batch positive"),
        (dict(foreground=1.5), "share from 0 to 1, got 1.5"),
        (dict(augment="strong"), "there are: none, light, nnunet"),
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
