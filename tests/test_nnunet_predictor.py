"""An nnU-Net model gives nnU-Net's labels: its own predictor beside ours, over sizes, patches, mirroring, regions, folds and grids.

nnU-Net sums windows in half precision, this library in float32. So the stock predictor is compared twice: with its sums in
float32, where labels may differ at ties only, and as it is, where every voxel that differs must be one that half precision
decides in nnU-Net itself, or a tie."""

import copy
import json
import os

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2")

RESAMPLED = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
CASES = {
    # Patch, voxel size of the model, regions, trainer mirrors, folds
    "plain": ((32, 32, 32), (2.0, 2.0, 2.0), False, False, 1),
    "anisotropic": ((16, 32, 24), (2.0, 2.0, 2.0), False, False, 1),
    "mirrored": ((16, 16, 16), (2.0, 2.0, 2.0), False, True, 1),
    "regions": ((16, 24, 16), (2.0, 2.0, 2.0), True, False, 1),
    "folds": ((16, 16, 16), (2.0, 2.0, 2.0), False, False, 2),
    "coarse": ((8, 32, 32), (7.0, 2.0, 2.0), False, False, 1),
}
SIZES = [(20, 20, 20), (40, 40, 40), (33, 52, 18)]
TIE = 0.002


def plans(patch: tuple, spacing: tuple) -> dict:
    kernels, strides = [[3, 3, 3]] * 3, [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    network = {
        "network_class_name": UNET,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [8, 16, 32],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": kernels,
            "strides": strides,
            "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
    }
    known = dict(max=300.0, mean=50.0, median=50.0, min=-900.0, percentile_00_5=-500.0, percentile_99_5=250.0, std=120.0)
    resample = "resample_data_or_seg_to_shape"
    configuration = {
        "data_identifier": "x",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [40.0] * 3,
        "spacing": list(spacing),
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": resample,
        "resampling_fn_seg": resample,
        "resampling_fn_data_kwargs": RESAMPLED,
        "resampling_fn_seg_kwargs": {**RESAMPLED, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": resample,
        "resampling_fn_probabilities_kwargs": {**RESAMPLED, "order": 1},
        "architecture": network,
        "batch_dice": True,
    }
    return {
        "dataset_name": "Dataset777_Toy",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.0] * 3,
        "original_median_shape_after_transp": [40] * 3,
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "x",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": known},
        "configurations": {"3d_fullres": configuration},
    }


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
    "nnU-Net's predictor and a model folder of ours, of the same untrained weights"
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{kind}", str(folder / kind))
        patch.setenv("nnUNet_compile", "f")
        yield make_both(*CASES[request.param], folder, patch)


def make_both(size: tuple, spacing: tuple, regions: bool, mirrored: bool, folds: int, folder, patch):
    import nnunetv2.inference.predict_from_raw_data as predicting
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module
    from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring

    from mednext_v2.zoo.importers import import_model

    kind = module.nnUNetTrainer if mirrored else nnUNetTrainerNoMirroring
    patch.setattr(predicting, "recursive_find_trainer_class_by_name", lambda name: kind)
    labels = {"background": 0, "whole": [1, 2], "core": 2} if regions else {"background": 0, "left": 1, "right": 2}
    about = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 5, "file_ending": ".nii.gz"}
    about |= {"regions_class_order": [1, 2]} if regions else {}
    known = plans(size[::-1], spacing)  # nnU-Net's axes are Z, Y, X
    place = None
    for fold in range(folds):
        torch.manual_seed(fold)
        trainer = kind(copy.deepcopy(known) | {"continue_training": False}, "3d_fullres", fold, copy.deepcopy(about), torch.device("cpu"))
        manager, outputs = trainer.plans_manager, 2 if regions else 3
        trainer.network = trainer.build_network_architecture(manager, trainer.configuration_manager, 1, outputs, True)
        trainer.num_input_channels = 1
        trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        trainer._best_ema = np.float64(0.5)
        os.makedirs(trainer.output_folder, exist_ok=True)
        trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_final.pth"))
        place = os.path.dirname(trainer.output_folder)
        for name, values in (("plans.json", known), ("dataset.json", about)):
            with open(os.path.join(place, name), "w") as file:
                json.dump(values, file)
    theirs = predicting.nnUNetPredictor(use_mirroring=True, device=torch.device("cpu"), allow_tqdm=False)
    theirs.initialize_from_trained_model_folder(place, tuple(range(folds)), "checkpoint_final.pth")
    for fold in range(folds):
        out = folder / "model" / f"fold_{fold}" if folds > 1 else folder / "model"
        import_model(place, out, {"licence": "none"}, fold=fold)
    return theirs, folder / "model", mirrored


def nnunet_labels(theirs, values: np.ndarray, spacing: tuple) -> np.ndarray:
    given = np.ascontiguousarray(values.transpose(2, 1, 0))[None]
    labels = theirs.predict_single_npy_array(given, {"spacing": list(spacing[::-1])}, None, None, False)
    return np.asarray(labels).transpose(2, 1, 0)


def margins(model, image, found: np.ndarray, other: np.ndarray, tta: bool) -> np.ndarray:
    "By how much our logits prefer our label to the other, where the two differ; of regions, how far the nearest is from 0"
    from mednext_v2.data.preprocess import coarse_axis
    from mednext_v2.inference.predictor import PredictSettings, load_ensemble, network_input, prepare_image
    from mednext_v2.inference.windows import average_models, eval_mode, lay_windows, resample_logits, slide_windows

    member = load_ensemble(model, PredictSettings(device="cpu", tta=tta))[0]
    volume = network_input([image])
    prepared, card = prepare_image(volume, member.card), member.card
    logits = torch.zeros(card.num_classes, *prepared.shape[1:])

    def keep(place, channels):
        logits[(slice(None), *place)] = torch.stack(list(channels))

    with eval_mode(*member.models):
        slide_windows(
            average_models(member.models, member.mirror_axes(PredictSettings(tta=tta))), prepared, lay_windows(prepared.shape[1:], card.patch, 0.5), keep
        )
    logits = resample_logits(logits, volume.image.shape[1:], coarse_axis(card.spacing, volume.spacing))
    differ = torch.from_numpy(found != other)
    if card.regions:
        return logits.abs().amin(0)[differ].numpy()
    pick = [torch.gather(logits, 0, torch.from_numpy(labels.astype(np.int64))[None])[0] for labels in (found, other)]
    return (pick[0] - pick[1])[differ].numpy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resampled", [False, True])
def test_labels_are_nnunets(both, size, resampled, monkeypatch):
    from mednext_v2.inference.predictor import predict
    from mednext_v2.models.card import read_card

    theirs, model, mirrored = both
    single = model if (model / "card.json").is_file() else model / "fold_0"
    spacing = tuple(read_card(single).spacing)
    if resampled:
        spacing = tuple(s * f for s, f in zip(spacing, (0.8, 1.25, 0.9)))
    rng = np.random.default_rng(sum(size))
    values = rng.normal(0, 100, size).astype(np.float32)
    image = nib.Nifti1Image(values, np.diag([*spacing, 1.0]))
    ours = np.asarray(predict(model, image, device="cpu", tta=mirrored).dataobj)
    stock = nnunet_labels(theirs, values, spacing)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "half", torch.float32)  # The type of nnU-Net's sums
        exact = nnunet_labels(theirs, values, spacing)
    assert ours.shape == exact.shape and len(np.unique(ours)) > 1
    assert (ours == exact).mean() >= 0.99
    left = margins(model, image, ours, exact, mirrored)
    assert not left.size or np.abs(left).max() < TIE, f"{left.size} voxels differ, by margins up to {np.abs(left).max():.2g}"
    decided_by_half = stock != exact
    assert ((ours != stock) & ~decided_by_half & (ours == exact)).sum() == 0
    assert (ours == stock).mean() >= 0.99


def test_a_model_without_mirroring_is_never_mirrored(both, recwarn):
    from mednext_v2.inference.predictor import predict
    from mednext_v2.models.card import read_card

    _, model, mirrored = both
    single = model if (model / "card.json").is_file() else model / "fold_0"
    assert read_card(single).mirror_axes == ((0, 1, 2) if mirrored else ())
    image = nib.Nifti1Image(np.random.default_rng(0).normal(0, 100, (20, 20, 20)).astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0]))
    plain, tta = (np.asarray(predict(model, image, device="cpu", tta=tta).dataobj) for tta in (False, True))
    assert np.array_equal(plain, tta) != mirrored
    said = [str(warning.message) for warning in recwarn if "without mirroring" in str(warning.message)]
    assert bool(said) != mirrored
