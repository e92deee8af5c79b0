from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from m2f2cli import compat
from m2f2cli.runtime import pick_dtype

FAULTS = """
import resource, sys, torch
from m2f2cli.runtime import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    torch.ones(8, 1024, 1024) * 2
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.slow
def test_freed_memory_is_kept_for_the_next_step():
    """Each step takes 64 MB, 16,384 pages; giving them back makes each of them fault again."""
    faults = {
        word: int(subprocess.check_output([sys.executable, "-c", FAULTS, word], text=True))
        for word in ("keep", "give")
    }
    assert faults["keep"] < 1000 < 50_000 < faults["give"]


@pytest.mark.parametrize(
    ("native", "stored", "found"),
    [
        (True, "bfloat16", "bfloat16"),
        (True, "float16", "float32"),
        (True, None, "float32"),
        (False, "bfloat16", "float32"),
    ],
)
def test_what_is_stored_as_bfloat16_runs_so_where_the_processor_multiplies_it(
    native, stored, found, monkeypatch
):
    monkeypatch.setattr(compat, "can_pack", lambda _: native)
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu, stored) == getattr(torch, found)
    assert pick_dtype("float16", cpu, stored) == torch.float16
