"""Judge a folder in CI: a record for every file, a summary for people, an exit code for the job.

python moderate.py uploads/ --records verdicts.jsonl --summary summary.md [flags of m2f2 detect]

Leaves with the code of m2f2 detect: 0 nothing fake, 3 some files have no verdict, 4 a fake, other
codes for a run that failed. Run it again and only new and changed files are judged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

DONE, SOME_FAILED, FAKE_FOUND = 0, 3, 4
SENTENCES = {
    DONE: "Nothing fake was found.",
    SOME_FAILED: "Nothing fake was found, but some files have no verdict.",
    FAKE_FOUND: "Fake pictures were found.",
}


def read_current(records: Path) -> list[dict[str, Any]]:
    """The records whose file is still what was judged; m2f2 itself keeps a file's first record."""
    current = []
    for line in records.read_bytes().splitlines() if records.exists() else ():
        try:
            record = json.loads(line)
            content = Path(record["path"]).read_bytes()
        except (ValueError, OSError):  # a line that a killed run cut, or a file that is gone
            continue
        if record["sha256"] == hashlib.sha256(content).hexdigest():
            current.append(record)
    return current


def keep_current(records: Path) -> None:
    """Forget the other records, so that their files are judged again."""
    fresh = records.with_name(records.name + ".fresh")
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in read_current(records)]
    fresh.write_text("".join(lines), encoding="utf-8")
    fresh.replace(records)


def summary(records: list[dict[str, Any]], sentence: str) -> str:
    """What happened, as Markdown: what is fake, and what a person has to look at."""
    verdicts = [record["verdict"] or "none" for record in records]
    lines = [f"# {sentence}", "", "| verdict | files |", "|---|---|"]
    lines += [f"| {word} | {verdicts.count(word)} |" for word in ("real", "fake", "uncertain")]
    lines += [f"| without a verdict | {verdicts.count('none')} |"]
    titles = (
        ("fake", "Called fake"),
        ("uncertain", "Uncertain: for a person to look at"),
        ("none", "Without a verdict: for a person to look at"),
    )
    for word, title in titles:
        found = [r for r, verdict in zip(records, verdicts, strict=True) if verdict == word]
        found.sort(key=lambda record: -(record["fake_probability"] or 0))
        lines += ["", f"## {title}", ""] if found else []
        lines += [f"- {_line(record)}" for record in found]
    return "\n".join(lines) + "\n"


def _line(record: dict[str, Any]) -> str:
    score, why = record["fake_probability"], record["reason"] or record["message"]
    words = [f"`{_plain(record['path'])}`"]
    words += [f"fake probability {score:.3f}"] if score is not None else []
    words += [_plain(why)] if why else []
    return ": ".join(words)


def _plain(text: str) -> str:
    """A file's name is its sender's choice: nothing in it may become Markdown."""
    return "".join(c if c.isprintable() and c not in "`<>[]" else "?" for c in text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder")
    parser.add_argument("--records", type=Path, default=Path("verdicts.jsonl"))
    parser.add_argument("--summary", type=Path, help="appended to; standard output by default")
    arguments, further = parser.parse_known_args()
    keep_current(arguments.records)
    command = [sys.executable, "-m", "m2f2cli", "detect", arguments.folder, "--recursive"]
    command += ["--output", str(arguments.records), "--fail-on", "fake", *further]
    code = subprocess.run(command, check=False).returncode
    if code not in SENTENCES:
        return code
    lines = arguments.records.read_text(encoding="utf-8").splitlines()
    text = summary([json.loads(line) for line in lines], SENTENCES[code])
    if arguments.summary is None:
        print(text, end="")
    else:
        with arguments.summary.open("a", encoding="utf-8") as file:
            file.write(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
