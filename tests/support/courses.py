"""Every allocator with a method that it works on, for the tests that all of them have to pass.

The shares fit into 12 updates or more; sites need min(O, I) >= 4.
"""

import undula
from undula import ranks
from undula.methods.dylora import Frozen
from undula.ranks.diffora import Shared
from undula.ranks.sora import Linear

GATED = undula.GatedLoRA(r=3)
COURSES = {
    "AdaLoRA": (undula.AdaLoRA(r=3), ranks.AdaLoRA(target=1, warmup=0.1, settle=0.3, every=2)),
    "SoRA": (undula.SoRA(r=3), ranks.SoRA(lr=5.0, levels=Linear(0.0, 0.1, 3))),
    "ALoRA": (undula.GatedLoRA(r=2, open=1), ranks.ALoRA(rounds=2, count=1, first=0.3, between=0.3)),
    "DyLoRA": (undula.Dropout(undula.DyLoRA(r=3), 0.1), ranks.DyLoRA()),
    "DyLoRA, frozen": (undula.DyLoRA(r=3, nesting=Frozen()), ranks.DyLoRA(low=2)),
    "DiffoRA": (GATED, ranks.DiffoRA(rho=0.5, search=0.5)),
    "DiffoRA, shared": (GATED, ranks.DiffoRA(rho=0.3, search=0.5, rest=Shared())),
    "Budget": (GATED, ranks.Budget(total=8)),
    "ReLoRA": (undula.LoRA(r=2), ranks.ReLoRA(cycles=3)),
    "LoRASC": (undula.LoRA(r=2), ranks.LoRASC(cycles=3, merge=0.5, noise=0.05)),
    "LoRASC, whole": (undula.LoRA(r=2), ranks.LoRASC(cycles=3, noise=0.05)),
    "XGBLoRA": (undula.LoRA(r=1), ranks.XGBLoRA(boosters=3, layers=1, penalty=1e-3)),
    "SRLoRA": (undula.LoRA(r=2), ranks.SRLoRA(target=4)),
}


def check_complete():
    """Raises where an allocator of the library is not in the list."""
    here = {type(how) for _, how in COURSES.values()}
    missing = {a for a in ranks.Allocator.registry.values() if a.__module__.startswith("undula.")} - here
    assert not missing, f"no test course for {missing}"
