"""The Deep Layer Aggregation networks."""

from dla_fast.models.convert import convert_state_dict, from_original, load_state_dict, to_original
from dla_fast.models.dense import DLASeg
from dla_fast.models.dla import DLA, FeatureInfo
from dla_fast.models.layouts import ConvertedStateDict
from dla_fast.models.pretrained import load_pretrained
from dla_fast.models.registry import create_model, list_models

__all__ = [
    "ConvertedStateDict",
    "DLA",
    "DLASeg",
    "FeatureInfo",
    "convert_state_dict",
    "create_model",
    "from_original",
    "list_models",
    "load_pretrained",
    "load_state_dict",
    "to_original",
]
