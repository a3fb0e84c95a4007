import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of processes that tests start

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser):
    parser.addoption("--few", type=int, metavar="N", help="of every test's cases only N, evenly spread")


def pytest_collection_modifyitems(config, items):
    few, cases = config.getoption("--few"), {}
    if few is None:
        return
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {item for of in cases.values() for item in of[:: -(-len(of) // few)]}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


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
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
