from . import accounting as accounting
from . import auditing as auditing
from . import compression as compression
from . import model_attacks as model_attacks
from . import server_optimizers as server_optimizers
from .adaptive import FedAdagrad, FedAdam, FedYogi
from .aggregation import Aggregator, Mean, mean
from .averaging import FedAvg, FedAvgM, FedProx
from .buffered import Buffered, FedBuff
from .centres import centered_clipping, fltrust, geometric_median, norm_bounding
from .checks import Check, CheckContext
from .codecs import Codec
from .compression import QSGD, Quantize, Sign
from .context import Context
from .coordinates import median, sign_majority, trimmed_mean
from .corrections import Prox
from .drift import FedDyn, Scaffold
from .error_feedback import Downlink, ErrorFeedback
from .fair import QFedAvg
from .guarantees import Guarantee
from .mixing import bucketing, nearest_neighbor_mixing
from .model_attacks import CraftContext, ModelAttack
from .normalized import FedNova
from .plugins import Plugin
from .privacy import AdaptiveClip, Clip, LocalNoise, Noise, clip
from .private import DPFedAvg
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
from .secure_sum import SecureSum
from .selection import bulyan, dnc, krum, multi_krum
from .server_optimizers import ServerOptimizer
from .sparsification import RandomK, TopK
from .strategy import Strategy

__all__ = [
    "QSGD",
    "AdaptiveClip",
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
    "Clip",
    "Codec",
    "Context",
    "CraftContext",
    "DPFedAvg",
    "DnC",
    "DnCRule",
    "Downlink",
    "ErrorFeedback",
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
    "Guarantee",
    "Krum",
    "KrumRule",
    "LocalNoise",
    "Mean",
    "Median",
    "MedianRule",
    "ModelAttack",
    "MultiKrum",
    "MultiKrumRule",
    "NearestNeighborMixing",
    "Noise",
    "NormBounding",
    "NormBoundingRule",
    "Plugin",
    "Poisson",
    "Prox",
    "QFedAvg",
    "Quantize",
    "RandomK",
    "Sampling",
    "Scaffold",
    "SecureSum",
    "ServerOptimizer",
    "Sign",
    "SignMajorityRule",
    "SignSGD",
    "Strategy",
    "TopK",
    "TrimmedMean",
    "TrimmedMeanRule",
    "accounting",
    "auditing",
    "bucketing",
    "bulyan",
    "centered_clipping",
    "clip",
    "compression",
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
