"""The Deep Layer Aggregation networks."""

from dla_fast.models.convert import from_original, load_state_dict, to_original
from dla_fast.models.dense import DLASeg
from dla_fast.models.dla import DLA, FeatureInfo
from dla_fast.models.registry import create_model, list_models

__all__ = [
    "DLA",
    "DLASeg",
    "FeatureInfo",
    "create_model",
    "from_original",
    "list_models",
    "load_state_dict",
    "to_original",
]
