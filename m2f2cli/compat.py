"""Where m2f2 touches what a library does not offer publicly, or sets for a whole process.

Each function names the version it was seen in and the reason; ``tests/test_compat.py`` fails when
the library moves.
"""

from __future__ import annotations

import os
from pathlib import Path


def configure_gradio(folder: Path) -> None:
    """Keep gradio's files in one folder, and let it neither report to its makers nor count visits.

    gradio 6.24 takes these from the environment alone, when it is imported and when an upload is
    read; there is no parameter for them.

    Args:
        folder: For the pictures of the page and for uploads.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1000000000"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def forget_accelerator() -> None:
    """Let the next ``Accelerator`` of this process choose device and precision anew.

    accelerate 1.15 keeps both for the whole process and refuses others; ``Accelerator`` has no
    public way to put them back. transformers' ``TrainingArguments`` calls the same method.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
