"""LoRA-Pro's "full" form (see `lorapro`): AdamW's moments are those of full fine-tuning, of the size of W.

    g~ = s (B g_A + g_B A)                                                 the projection of dL/dW, (O, I)
    M <- b1 M + (1 - b1) g~,   V <- b2 V + (1 - b2) g~^2,   G = M^ / (sqrt(V^) + eps)
    (g_A, g_B) = corrected(s B'G, s G A'),   A <- A - lr g_A,   B <- B - lr g_B

with b1, b2 and eps of the base where it has them, else AdamW's.  What is no pair follows the base.  `max_norm` clips
the corrected gradients that g~ is made of.  Two numbers are remembered for each entry of W, as full fine-tuning does:
that is its price, and the reason for which the "efficient" form is the default.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lorapro import LoRAPro, corrected
from .paired import gradients
from .pairs import Pair, Stacked, alike

FIRST, SECOND = "undula_first", "undula_second"  # moments (O, I), in the state of A


class LoRAProFull(LoRAPro):
    """See the module."""

    alone = True
    lacks = ("maximize", "amsgrad")

    def base_step(self) -> None:
        self.told = [(those, *gradients(those)) for those in alike(self.following())]
        for those, _, _ in self.told:
            for pair in those:  # the base moves all but these
                pair.A.grad = pair.B.grad = None
        super().base_step()

    def moved(self) -> None:
        groups = {id(t): group for group in self.param_groups for t in group["params"]}
        for those, g_A, g_B in self.told:
            pair = Stacked.of(those)
            back = [self._through(p, a, b, groups[id(p.A)]) for p, a, b in zip(those, g_A, g_B, strict=True)]
            back_A, back_B = (torch.stack(each) for each in zip(*back, strict=True))
            new = corrected(pair, back_A, back_B, self.damping)
            for p, *steps in zip(those, *new, strict=True):
                for t, step in zip((p.A, p.B), steps, strict=True):
                    lr = float(groups[id(t)]["lr"])
                    t.mul_(1 - lr * groups[id(t)].get("weight_decay", 0.0)).sub_(step.to(t.dtype), alpha=lr)
        self.told = []

    def _through(self, p: Pair, g_A: Tensor, g_B: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(s B'G, s G A') of a pair's corrected gradients; its moments go a step."""
        left, right = (t.detach().to(g_A.dtype) for t in (p.left, p.right))
        g = p.scale * (left @ g_A + g_B @ right)
        state, (b1, b2), eps = self.state[p.A], group.get("betas", (0.9, 0.999)), group.get("eps", 1e-8)
        if FIRST not in state:
            state["step"] = torch.zeros(())  # bases look for it
            self.state[p.B]["step"] = torch.zeros(())  # see `Paired.widened`
            state[FIRST], state[SECOND] = torch.zeros_like(g), torch.zeros_like(g)
        state["step"] += 1
        state[FIRST].lerp_(g, 1 - b1)
        state[SECOND].mul_(b2).addcmul_(g, g, value=1 - b2)
        step = float(state["step"])
        root = (state[SECOND] / (1 - b2**step)).sqrt_().add_(eps)
        G = torch.div(state[FIRST], root, out=root).div_(1 - b1**step)
        return p.scale * left.T @ G, p.scale * G @ right.T
