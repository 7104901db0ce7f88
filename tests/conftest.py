from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """As every worker has it; two on a busy machine wait for each other."""
    torch.set_num_threads(1)
