from . import model_attacks as model_attacks
from . import server_optimizers as server_optimizers
from .adaptive import FedAdagrad, FedAdam, FedYogi
from .aggregation import Aggregator, Mean, mean
from .averaging import FedAvg, FedAvgM, FedProx
from .buffered import Buffered, FedBuff
from .centres import centered_clipping, fltrust, geometric_median, norm_bounding
from .checks import Check, CheckContext
from .context import Context
from .coordinates import median, sign_majority, trimmed_mean
from .corrections import Prox
from .drift import FedDyn, Scaffold
from .fair import QFedAvg
from .mixing import bucketing, nearest_neighbor_mixing
from .model_attacks import CraftContext, ModelAttack
from .normalized import FedNova
from .plugins import Plugin
from .robust import (
    BulyanRule,
    CenteredClippingRule,
    DnCRule,
    FLTrustRule,
    GeometricMedianRule,
    KrumRule,
    MedianRule,
    MultiKrumRule,
    NormBoundingRule,
    SignMajorityRule,
    TrimmedMeanRule,
)
from .robust_presets import (
    Bulyan,
    CenteredClipping,
    DnC,
    FLTrust,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NormBounding,
    SignSGD,
    TrimmedMean,
)
from .robust_wrappers import Bucketing, NearestNeighborMixing
from .sampling import All, Fixed, Poisson, Sampling
from .selection import bulyan, dnc, krum, multi_krum
from .server_optimizers import ServerOptimizer
from .strategy import Strategy

__all__ = [
    "Aggregator",
    "All",
    "Bucketing",
    "Buffered",
    "Bulyan",
    "BulyanRule",
    "CenteredClipping",
    "CenteredClippingRule",
    "Check",
    "CheckContext",
    "Context",
    "CraftContext",
    "DnC",
    "DnCRule",
    "FLTrust",
    "FLTrustRule",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBuff",
    "FedDyn",
    "FedNova",
    "FedProx",
    "FedYogi",
    "Fixed",
    "GeometricMedian",
    "GeometricMedianRule",
    "Krum",
    "KrumRule",
    "Mean",
    "Median",
    "MedianRule",
    "ModelAttack",
    "MultiKrum",
    "MultiKrumRule",
    "NearestNeighborMixing",
    "NormBounding",
    "NormBoundingRule",
    "Plugin",
    "Poisson",
    "Prox",
    "QFedAvg",
    "Sampling",
    "Scaffold",
    "ServerOptimizer",
    "SignMajorityRule",
    "SignSGD",
    "Strategy",
    "TrimmedMean",
    "TrimmedMeanRule",
    "bucketing",
    "bulyan",
    "centered_clipping",
    "dnc",
    "fltrust",
    "geometric_median",
    "krum",
    "mean",
    "median",
    "model_attacks",
    "multi_krum",
    "nearest_neighbor_mixing",
    "norm_bounding",
    "server_optimizers",
    "sign_majority",
    "trimmed_mean",
]
