"""What all tests share: one thread (small nets wait for a second one longer than they work), and the folder of real weights where it is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SHARED.is_dir():
        return
    for item in items:
        if item.get_closest_marker("shared"):
            item.add_marker(pytest.mark.skip(reason=f"{SHARED} is absent"))


@pytest.fixture
def shared_data() -> Path:
    """The folder with real weights and images."""
    return SHARED
