"""What tests of the experiments share."""

import gc

import pytest


@pytest.fixture
def abandoned_reads():
    """Collect, before the next test, what Orbax abandons where a read fails.

    Python says of each such coroutine that it could not be ended: the test that damages
    a checkpoint ignores `pytest.PytestUnraisableExceptionWarning`.
    """
    yield
    gc.collect()
