"""Pictures in ``real/`` and ``fake/`` folders."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from m2f2cli.data.images import IMAGE_SUFFIXES
from m2f2cli.data.samples import REAL, Sample, SampleSet, list_files, other_files, people_in
from m2f2cli.errors import InputError


def read_folder(root: Path) -> SampleSet:
    """Read ``root/real/**`` and ``root/fake/**``.

    Sub-folders: where only ``fake/`` has them, its first level names the manipulation; where both
    have them, the deepest folder names who is in the picture, and a first level of ``fake/`` with
    further folders below it names the manipulation. Identities are told by that folder or else
    by the file's name (see ``people_in``).

    Raises:
        InputError: ``real`` or ``fake`` is missing or empty.
    """
    listed = {}
    others: Counter[str] = Counter()
    for label, word in enumerate((REAL, "fake")):
        folder = root / word
        if not folder.is_dir():
            raise InputError(
                f"'{root}' has no folder '{word}'.",
                "missing",
                "Put pictures in DIR/real/ and DIR/fake/, or name the layout: ddvqa:DIR.",
            )
        files = list_files(folder, others=others)
        listed[label] = [(path, path.relative_to(folder).parts) for path in files]
        if not listed[label]:
            known = ", ".join(sorted(IMAGE_SUFFIXES))
            raise InputError(f"There are no pictures in '{folder}'.", "empty", f"Known: {known}.")
    real_has_folders = any(len(parts) > 1 for _, parts in listed[0])
    samples = []
    for label, pictures in listed.items():
        for path, parts in pictures:
            folders = parts[:-1]
            kind = REAL if label == 0 else "fake"
            if label == 1 and folders and (len(folders) > 1 or not real_has_folders):
                kind, folders = folders[0], folders[1:]
            token = folders[-1] if folders else path.stem
            name = path.relative_to(root).as_posix()
            samples.append(Sample(path, name, label, kind, people_in(token)))
    ordered = tuple(sorted(samples, key=lambda sample: sample.name))
    return SampleSet(root, "folder", ordered, remark=other_files(others, f"'{root}'"))
