import gc
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of processes that tests start

import pytest
import torch

from .support import device, logs, thinning, warm

WARM = "UNDULA_TESTS_WARM"
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser):
    parser.addoption("--few", type=int, metavar="N", help="of every test's cases only N, evenly spread")
    parser.addoption("--all-cases", action="store_true", help="whole products of cases, see support/thinning.py")


def pytest_collection_modifyitems(config, items):
    device.deselect(config, items)
    thinning.deselect(config, items)
    few, cases = config.getoption("--few"), {}
    if few is None:
        return
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {item for of in cases.values() for item in of[:: -(-len(of) // few)]}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_report_collectionfinish(config):
    return device.report()


def pytest_configure(config):
    """Without pages of trainings, see `pages`.  Here, for nothing of undula is to be imported before the tests begin:
    mutants put other sources in its place."""
    from undula.train import page

    config.addinivalue_line("markers", thinning.MARKER)
    device.choose()
    config.drawn, page.write = page.write, lambda *_: None
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        config.warm = tempfile.TemporaryDirectory()
        os.environ[WARM] = config.warm.name  # of all workers
        warm.start(config.warm.name)


def pytest_sessionstart(session):
    logs.only_where_asked(session.config.pluginmanager.get_plugin("logging-plugin"))


@pytest.fixture(scope="session")
def python():
    """An interpreter without the seconds of other packages' imports, see support/warm.py."""
    if WARM in os.environ:
        warm.ready(os.environ[WARM])
        yield str(Path(os.environ[WARM]) / "python")
    else:
        with tempfile.TemporaryDirectory() as folder, warm.commands(folder):
            yield str(Path(folder).resolve() / "python")


@pytest.fixture
def pages(monkeypatch, pytestconfig):
    """Trainings write their pages: which takes as long as a tiny training, so it is left out elsewhere."""
    from undula.train import page

    monkeypatch.setattr(page, "write", pytestconfig.drawn)


known = 0  # modules


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What modules hold is never freed.  Without having to look through it, the full collections that every training
    begins and ends with take a hundredth of the time: more than half of what a tiny training takes."""
    global known  # noqa: PLW0603
    if len(sys.modules) > known + 50:
        gc.collect()
        gc.freeze()
        known = len(sys.modules)


@pytest.fixture(autouse=True)
def _seed():
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` takes a millisecond for devices that are not there
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64():
    """Laws and formulas are tested in float64."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def made_up_evidence(monkeypatch):
    """Every site knows a gradient and its inputs' moments: methods that start from data meet made-up data.  Layers are
    small: they have fewer entries than UniLoRA's default vector has numbers."""
    from undula import Site

    monkeypatch.setattr(Site, "_evidence", lambda site, what: MadeUp(site.shape))
    warnings.filterwarnings("ignore", ".* has more numbers than the .* entries")


class MadeUp:
    def __init__(self, shape):
        self.shape = shape

    def gradient(self, name):
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(len(name)), device="cpu")

    def moments(self, name):
        g = torch.Generator().manual_seed(len(name))
        x = torch.randn(3 * self.shape[1], self.shape[1], generator=g, device="cpu")
        return x.T @ x, x.sum(0), len(x)
