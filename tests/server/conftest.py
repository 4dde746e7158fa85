"""One server with the demo model, which the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import Running, running


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """With two sessions, no key, and counts at /metrics."""
    with running(metrics=True) as one:
        yield one
