from .cnn import cnn
from .logistic import logistic
from .mlp import mlp
from .vision import mobilenet, resnet18, resnet34, resnet50, shufflenet

__all__ = ["cnn", "logistic", "mlp", "mobilenet", "resnet18", "resnet34", "resnet50", "shufflenet"]
