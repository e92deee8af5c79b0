"""What each of several processes runs in ``test_explainer_processes``: trainings by settings.

``python -m tests.training.stages_together FOLDER`` with torchrun's environment variables.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import m2f2cli.models  # noqa: F401 - before transformers

# isort: split
import torch
import yaml

from m2f2cli.training.explainer import prepare
from tests.training.talks import KINDS


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for file in sorted(folder.glob("*.yaml")):
        run = prepare(KINDS[file.stem.split("-")[0]].from_flat(yaml.safe_load(file.read_text())))
        run.run()
        if run.trainer is not None and run.trainer.is_world_process_zero():
            file.with_suffix(".json").write_text(json.dumps(run.trainer.state.log_history))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
