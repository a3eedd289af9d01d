"""Source: the model as trained, the row that every table starts with."""

from torch import Tensor

from tta.adapter import Adapter, Config


class SourceConfig(Config):
    """No hyper-parameters."""


class Source(Adapter):
    """Predict with the source model and learn nothing."""

    distributed = True
    multi_label = True
    tasks = ("classification", "segmentation", "regression", "detection")
    config: SourceConfig

    def adapt(self, x: Tensor) -> Tensor:
        return self.predict(x)
