from __future__ import annotations

import pytest
import torch


@pytest.fixture
def small_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "alpha": torch.tensor(0.5),
        "a.weight": torch.randn(3, 5, generator=generator),
        "a.half": torch.randn(7, generator=generator).to(torch.bfloat16),
        "norm.num_batches_tracked": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
