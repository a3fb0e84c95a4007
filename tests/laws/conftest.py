import warnings

import pytest
import torch

from undula import Site


@pytest.fixture(autouse=True)
def _evidence(monkeypatch):
    """Every site knows a gradient and its inputs' moments: methods that start from data meet made-up data here."""
    monkeypatch.setattr(Site, "_evidence", lambda site, what: MadeUp(site.shape))


@pytest.fixture(autouse=True)
def _tiny():
    """The laws' layers have fewer entries than UniLoRA's default vector has numbers."""
    warnings.filterwarnings("ignore", ".* has more numbers than the .* entries")


class MadeUp:
    def __init__(self, shape):
        self.shape = shape

    def gradient(self, name):
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(len(name)))

    def moments(self, name):
        x = torch.randn(3 * self.shape[1], self.shape[1], generator=torch.Generator().manual_seed(len(name)))
        return x.T @ x, x.sum(0), len(x)
