"""What each of several processes runs in ``test_explainer_processes``: trainings by settings.

``python -m tests.training.stages_together FOLDER [STEP]`` with torchrun's environment variables;
with a step each training stops before it.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import m2f2cli.models  # noqa: F401 - before transformers

# isort: split
import torch
import yaml

from m2f2cli.training.explainer import prepare
from m2f2cli.training.trainer import Trainer
from tests.training.talks import KINDS
from tests.training.test_resume import Crash


def main(folder: Path, crash: int | None) -> None:
    torch.set_num_threads(1)
    for file in sorted(folder.glob("*.yaml")):
        run = prepare(KINDS[file.stem.split("-")[0]].from_flat(yaml.safe_load(file.read_text())))
        if crash is not None:
            with suppress(KeyboardInterrupt):
                run.run(advance=Crash(crash))
            os._exit(0)  # as a kill would: nothing is taken down in order
        run.run()
        if isinstance(run, Trainer) and run.accelerator.is_main_process:
            file.with_suffix(".json").write_text(json.dumps(run.history))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
