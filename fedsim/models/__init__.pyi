from .cnn import cnn
from .logistic import logistic
from .mlp import mlp

__all__ = ["cnn", "logistic", "mlp"]
