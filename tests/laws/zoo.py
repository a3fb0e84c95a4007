"""Every registered method, and wrappers around methods of every rung: what the laws run over."""

import undula
from undula import Additive, Centred, DoRA, Dropout, LoRA, LoRAN, Method, Reweight, Sum
from undula.activations import ReLU, Sinter
from undula.kernels.solver import Randomised
from undula.methods.aurora import PerChannel
from undula.starts import EVA, FullStep, Gaussian, LoRAGA, LoRASB, MiLoRA, OfWeight, OLoRA, Orthogonal, PiSSA, Shuffled

INNER = [LoRA(r=3), LoRAN(r=2, activation=Sinter(a=0.5, w=2.0)), DoRA(LoRA(r=2)), undula.AuroRA()]


def zoo() -> list[Method]:
    needs_parts = (Dropout, Centred, Sum)
    plain = [m() for m in Method.registry.values() if not issubclass(m, needs_parts)]
    wrapped = [Dropout(m, 0.5) for m in INNER]
    wrapped += [DoRA(m) for m in INNER if isinstance(m, Additive)]
    wrapped += [Centred(m, Gaussian(0.3)) for m in INNER if isinstance(m, Additive)]
    wrapped += [
        DoRA(Dropout(LoRA(r=2), 0.5)),
        Sum((LoRA(r=2), LoRA(r=3)), (0.5, -2.0)),
        Sum((LoRA(r=2), INNER[1]), (0.5, 1.0)),
    ]
    varied = [
        LoRA(r=4, alpha=1.0),
        LoRA(r=4, scaling=undula.RankStabilised()),
        LoRAN(r=3, activation=Sinter(a=0.3, w=5.0), learn=("a", "w")),
        Centred(LoRAN(r=2, activation=ReLU()), Gaussian(0.3)),
        undula.AuroRA(r=3, spline=PerChannel(), order=2),
        undula.AuroRAStatic(r=3, kappa=1.0, centred=False),
        *(Centred(LoRA(r=2), start) for start in (Orthogonal(), PiSSA(), MiLoRA(), OLoRA(), LoRAGA(), LoRASB(), EVA())),
        Centred(LoRA(r=3), LoRAGA(Shuffled(), FullStep())),
        Centred(LoRA(r=1, scaling=undula.RankStabilised()), LoRAGA(magnitude=OfWeight())),
        Centred(INNER[1], PiSSA(Randomised())),
        Centred(LoRAN(r=2), EVA()),
    ]
    return plain + wrapped + varied


ZOO = zoo()
MERGEABLE = [m for m in ZOO if isinstance(m, Reweight)]
ADDITIVE = [m for m in ZOO if isinstance(m, Additive)]
LOW_RANK = [m for m in ZOO if isinstance(m, undula.LowRank)]
