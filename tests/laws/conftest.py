import pytest


@pytest.fixture(autouse=True)
def _evidence(made_up_evidence):
    """Methods that start from data meet made-up data in every law."""
