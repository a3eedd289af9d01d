"""The adapter: the base class of every method, its state, its defence, and the way out of it into a plain model."""

from tta.adapter.base import Adapter, config_class
from tta.adapter.defence import Output, Progress
from tta.adapter.feedback import FeedbackConfig
from tta.adapter.guarding import StateDict
from tta.adapter.modules import own, unwrap
from tta.adapter.outputs import KINDS, Outputs
from tta.adapter.state import FORMAT
from tta.adapter.waiting import Answers, Told
from tta.hyperparameters import Config, OptimizerConfig
from tta.messages import require

__all__ = [
    "FORMAT",
    "KINDS",
    "Adapter",
    "Answers",
    "Config",
    "FeedbackConfig",
    "OptimizerConfig",
    "Output",
    "Outputs",
    "Progress",
    "StateDict",
    "Told",
    "config_class",
    "optimizers",
    "own",
    "require",
    "saving",
    "unwrap",
]
