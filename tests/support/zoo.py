"""Every registered method, and wrappers around methods of every rung: what the laws run over."""

import undula
from undula import (
    Additive,
    Centred,
    DoRA,
    Dropout,
    LoRA,
    LoRAN,
    Method,
    Reweight,
    Sum,
)
from undula.kernels.solver import Randomised
from undula.methods import lorta, tenslora
from undula.methods.activations import ReLU, Sinter
from undula.methods.aurora import PerChannel
from undula.methods.dylora import Frozen
from undula.methods.lora import Fixed
from undula.methods.unilora import Independent
from undula.starts import (
    EVA,
    FullStep,
    Gaussian,
    LoRAGA,
    LoRASB,
    MiLoRA,
    OfWeight,
    OLoRA,
    Orthogonal,
    PiSSA,
    Shuffled,
    channels,
    masks,
)

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
        undula.LoRTA(r=3, heads=4, orientation=lorta.HeadsInOutputs()),
        *(undula.TensLoRA(r=3, heads=4, stacking=s()) for s in tenslora.Stacking.registry.values()),
        undula.TensLoRA(r=3, scale=2.0, factorisation=tenslora.CP()),
        undula.TensLoRA(r=3, heads=4, stacking=tenslora.AttQKVDepth(), factorisation=tenslora.CP()),
        undula.TensLoRA(r=2, heads=2, stacking=tenslora.AttQKVDepth(), factorisation=tenslora.Tucker(4, 3, 2, 2)),
        undula.BlockLoRA(r=5, blocks=3),
        undula.Restarted(LoRA(r=2), past=3),
        undula.Restarted(Dropout(undula.AuroRAStatic(), 0.5), past=2),
        undula.GatedLoRA(r=4, open=2),
        Dropout(undula.AdaLoRA(r=2), 0.5),
        undula.DyLoRA(r=3, scaling=Fixed(2.0)),
        undula.DyLoRA(r=1, nesting=Frozen()),  # from rank 2 on, its gradient is not the function's
        undula.SHiRA(r=1, s=0.5, mask=masks.Rand(seed=3)),
        undula.SHiRA(r=2, mask=masks.Struct(shift=2)),
        undula.SHiRA(r=1, mask=masks.Magnitude()),
        undula.SHiRA(r=1, mask=masks.Gradient()),
        undula.SHiRA(r=2, mask=masks.SNIP()),
        Dropout(undula.SHiRA(r=1), 0.5),
        DoRA(undula.SHiRA(r=1)),
        undula.S2FT(share=0.3, side=channels.Inputs()),
        undula.S2FT(share=0.3, selection=channels.Weight()),
        undula.S2FT(share=0.3, selection=channels.Activation(channels.Smallest())),
        undula.S2FT(share=0.3, side=channels.Inputs(), selection=channels.WeightActivation()),
        undula.S2FT(share=1.0, side=channels.Inputs(), selection=channels.Gradient()),
        Dropout(undula.S2FT(share=0.3), 0.5),
        Dropout(undula.VeRA(r=4), 0.5),
        undula.NOLA(r=2, k=5, l=3, c=3.0, seed=1, scaling=undula.RankStabilised()),
        undula.UniLoRA(r=2, d=30, bound=0.1, seed=1, assignment=Independent()),
        undula.TeRA(r=2, modes=3, d=0.8, seed=1),
        undula.TeRA(r=5, modes=1),
        undula.LoRAXS(r=3, alpha=3.0, std=1e-3),
        undula.LoRASB(r=3, alpha=1.5, eta=1e-3),
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
