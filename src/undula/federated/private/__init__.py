"""Differential privacy of adapters: of single rows (DP-SGD), of whole clients; and an attack that asks what is left."""

from .accounting import epsilon, noise_for
from .client_level import ClientLevel
from .dpsgd import DPSGD
from .loop import Private
from .losses import attack
from .membership import Membership, membership, most

__all__ = ["DPSGD", "ClientLevel", "Membership", "Private", "attack", "epsilon", "membership", "most", "noise_for"]
