"""The toy network and its export, once for all tests of graphs: none of them changes either."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
import pytest
import torch
from torch import nn
from toy import INFO, Toy

from ptqd_export.export import export_fp


@pytest.fixture(scope="session")
def toy() -> Iterator[nn.Module]:
    """The network of support/toy.py, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield Toy().eval()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base(toy: nn.Module) -> ir.Model:
    """Its export in full precision."""
    return export_fp(toy, INFO)
