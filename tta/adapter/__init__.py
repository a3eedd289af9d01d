"""The adapter: the base class of every method, its state, its defence, and the way out of it into a plain model."""

from tta.adapter.base import Adapter, config_class
from tta.adapter.defence import Output, Progress
from tta.adapter.modules import unwrap
from tta.adapter.outputs import KINDS, Outputs
from tta.hyperparameters import Config, OptimizerConfig
from tta.messages import require

__all__ = [
    "KINDS",
    "Adapter",
    "Config",
    "OptimizerConfig",
    "Output",
    "Outputs",
    "Progress",
    "config_class",
    "optimizers",
    "require",
    "saving",
    "unwrap",
]
