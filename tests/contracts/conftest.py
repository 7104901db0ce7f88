"""What the tests of the contracts share."""

from __future__ import annotations

import pytest

import fedsim

pytest.register_assert_rewrite("tests.contracts.contract")


@pytest.fixture(scope="class")
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> fedsim.Result:
    """A class's experiment with the things themselves, run in this process."""
    out = tmp_path_factory.mktemp("runs") / "objects"
    return fedsim.run(request.cls.experiment(), out=out, engine="inline")
