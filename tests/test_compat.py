"""What ``compat`` relies on is still so in the installed libraries."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import m2f2cli.models  # noqa: F401 - before transformers
from m2f2cli import compat


def test_gradio_reads_its_settings_from_the_environment(monkeypatch, tmp_path):
    gradio = pytest.importorskip("gradio")
    for name in ("TEMP_DIR", "ANALYTICS_ENABLED", "ANALYTICS_MAX_EVENTS",
                 "ANALYTICS_CACHE_FREQUENCY"):  # fmt: skip
        monkeypatch.setenv(f"GRADIO_{name}", "1")  # put back after the test
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    compat.configure_gradio(tmp_path)
    with gradio.Blocks() as blocks:
        part = gradio.HTML()
    blocks.queue()
    assert str(tmp_path) == part.GRADIO_CACHE
    assert not blocks.analytics_enabled
    assert blocks.default_config is not None
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)


def test_what_libtiff_and_pillow_find_in_a_damaged_file_is_not_printed():
    assert compat.silence_tiff()
    code = (
        "import io; from PIL import Image; from m2f2cli.data.images import read_picture\n"
        "from m2f2cli.errors import InputError\n"
        "for coding in ('tiff_lzw', 'tiff_deflate', 'group4'):\n"
        "    file = io.BytesIO()\n"
        "    Image.effect_noise((90, 90), 60).convert('1').save(file, 'TIFF', compression=coding)\n"
        "    for n in range(8, 300, 3):\n"
        "        data = bytearray(file.getvalue()); data[n] ^= 255\n"
        "        try: read_picture(bytes(data), max_pixels=10**6)\n"
        "        except InputError: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def test_a_second_accelerator_may_compute_otherwise():
    from accelerate import Accelerator

    for precision in ("no", "bf16"):
        compat.forget_accelerator()
        assert Accelerator(cpu=True, mixed_precision=precision).mixed_precision == precision
    compat.forget_accelerator()


def test_the_attention_of_a_configuration():
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    config = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2)
    for name in ("eager", "sdpa"):
        compat.set_attention(config, name)
        assert compat.attention_of(config) == name
        attention = CLIPEncoderLayer(config).self_attn
        assert compat.attention_of(attention.config) == name
    chosen = CLIPVisionConfig(attn_implementation="eager")
    assert compat.attention_of(chosen) == "eager"


def test_leaving_runs_exit_hooks_and_flushes():
    code = (
        "import atexit\n"
        "from m2f2cli.compat import leave\n"
        "atexit.register(print, 'hook')\n"
        "print('said')\n"
        "leave(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "said\nhook\n"), done.stderr


def test_layers_packed_for_this_cpu_answer_the_same():

    assert compat.can_pack(torch.float32), "oneDNN's operators have moved: see compat.can_pack"
    generator = torch.Generator().manual_seed(0)
    values, weight = (torch.randn(9, 512, generator=generator) for _ in range(2))
    packed = compat.pack_linear(weight, rows=9)
    found = compat.packed_linear(values, packed, None, "none")
    assert torch.allclose(found, values @ weight.T, atol=1e-4)
    pictures = torch.randn(1, 4, 8, 8, generator=generator)
    filters = torch.randn(6, 4, 3, 3, generator=generator)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    folded = compat.pack_convolution(filters, geometry, pictures.shape)
    clamped = compat.packed_convolution(pictures, folded, None, geometry, clamp=True)
    expected = torch.nn.functional.conv2d(pictures, filters, padding=1).clamp(0, 6)
    assert torch.allclose(clamped, expected, atol=1e-4)
