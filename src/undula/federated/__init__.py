"""Adapters of parties that share no data: what a server makes of what clients send."""

from .aggregation import Aggregation, bias
from .exact import Exact
from .fair import FAIR, Cosine, Frobenius
from .fedit import FedIT
from .fedsvd import FedSVD
from .ffa import FFA
from .flasc import FLASC
from .private import DPSGD, ClientLevel
from .wire import packed, unpacked

__all__ = [
    "DPSGD",
    "FAIR",
    "FFA",
    "FLASC",
    "Aggregation",
    "ClientLevel",
    "Cosine",
    "Exact",
    "FedIT",
    "FedSVD",
    "Frobenius",
    "bias",
    "packed",
    "unpacked",
]
