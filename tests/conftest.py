"""What every test has: no folder of the user's is touched."""

import pytest


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory, monkeypatch):
    """Data, reports and cache of each test session lie in a temporary folder; nobody's settings reach a test."""
    base = tmp_path_factory.getbasetemp()
    for name in ("data", "reports", "cache"):
        monkeypatch.setenv(f"IRRA_{name.upper()}", str(base / name))
    monkeypatch.delenv("IRRA_SMOKE", raising=False)
