"""Numbers away from the start, as after training."""

import torch


@torch.no_grad()
def shake(of, by=0.1):
    """Adds noise to an adapter's parameters, or to these; returns what it was given."""
    for p in of.parameters() if hasattr(of, "parameters") else of:
        p.add_(by * torch.randn_like(p))
    return of


def shaken(method, site, by=0.3):
    """Factors of a method at a site with noise in what trains, detached."""
    return {k: t.detach() + by * torch.randn_like(t) if t.requires_grad else t for k, t in method.init(site).items()}
