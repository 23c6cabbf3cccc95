# Written by `make export` from nbs/91_public.ipynb
from .network.grn import GRN3d as GRN3d
from .network.blocks import MedNeXtBlock as MedNeXtBlock
from .network.mednext import Arch as Arch
from .network.mednext import MedNeXt as MedNeXt
from .network.mednext import pad_to_stride as pad_to_stride
from .network.scaling import PRESETS as PRESETS
from .network.scaling import create_model as create_model
from .network.scaling import scale as scale
from .network.scaling import count_parameters as count_parameters
from .network.scaling import estimate as estimate
from .models.card import Card as Card
from .models.card import save_model as save_model
from .models.registry import backbone_table as backbone_table
from .models.registry import create as create
from .models.registry import declare as declare
from .models.registry import load_model as load_model
from .models.transfer import freeze as freeze
from .models.transfer import transfer as transfer
from .data.datasets import Dataset as Dataset
from .data.datasets import get_dataset as get_dataset
from .data.datasets import raw_dataset as raw_dataset
from .data.preprocess import Prepared as Prepared
from .data.augment import PatchSampler as PatchSampler
from .data.augment import patch_loader as patch_loader
from .training.losses import dice_ce as dice_ce
from .training.losses import deep_supervision_loss as deep_supervision_loss
from .training.recipe import Recipe as Recipe
from .training.recipe import get_recipe as get_recipe
from .training.trainer import fit as fit
from .inference.windows import sliding_window as sliding_window
from .inference.predictor import predict as predict
from .inference.files import predict_files as predict_files
from .evaluation.metrics import dice as dice
from .evaluation.metrics import surface_dice as surface_dice
from .evaluation.metrics import hausdorff as hausdorff
from .evaluation.metrics import evaluate as evaluate
from .evaluation.statistics import bootstrap as bootstrap
from .evaluation.statistics import compare as compare
from .zoo.importers import import_model as import_model
from .zoo.catalogue import fetch as fetch
from .zoo.catalogue import zoo_table as zoo_table
from .finetuning import finetune as finetune

__version__: str
__all__: list[str]
