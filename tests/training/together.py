"""What each of several processes runs in ``test_processes``: trainings that note what they see.

``python -m tests.training.together FOLDER`` with torchrun's environment variables; ``FOLDER`` holds
a settings file for each scenario and gets ``<scenario>.<rank>.json``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import m2f2cli.models  # noqa: F401 - before transformers

# isort: split
import torch
import yaml

from m2f2cli.options.train_detector import TrainDetectorOptions
from m2f2cli.training.detector import prepare
from m2f2cli.training.pictures import PictureCollator
from tests.training.test_resume import Crash

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    seen: list[list[int]] = []
    measured: list[int] = []
    written: list[str] = []
    plain = PictureCollator.__call__

    def noting(self: PictureCollator, items: Any) -> Any:
        indices = [int(item["index"]) for item in items if "index" in item]
        seen.append(indices) if indices else measured.append(len(items))
        return plain(self, items)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(str(folder)) and arguments[2] & WRITES:
            written.append(str(arguments[0]))

    PictureCollator.__call__ = noting  # type: ignore[method-assign]
    sys.addaudithook(watch)
    for file in sorted(folder.glob("*.yaml")):
        options = TrainDetectorOptions.from_flat(yaml.safe_load(file.read_text()))
        for held in (seen, measured, written):
            held.clear()
        run = prepare(options)
        if file.stem == "resumed":
            try:
                run.run(advance=Crash(7))  # of eight; a state was saved after six
            except KeyboardInterrupt:
                run = prepare(TrainDetectorOptions.from_flat(options.to_flat() | {"resume": True}))
        run.run()
        found = {"seen": seen, "measured": sum(measured), "written": written}
        (folder.parent / f"{file.stem}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
