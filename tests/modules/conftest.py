"""What the tests of `torch.compile` share."""

import pytest
import torch


@pytest.fixture
def fresh_compiler():
    """Graphs of other tests neither serve here nor count."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
