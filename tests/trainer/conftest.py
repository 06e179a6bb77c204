import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """The machine is shared, and the order of a float sum then depends on nothing else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
