"""Fails when pyright finds more errors in nsq_repro/ than pyproject.toml allows: the number only goes down."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def errors():
    "Errors that pyright reports, one dictionary each."
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "nsq_repro"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)["generalDiagnostics"]
    except (ValueError, KeyError):
        sys.exit(f"pyright did not run: {done.stderr.strip() or done.stdout.strip()}")
    return [e for e in found if e["severity"] == "error"]


def main():
    found = errors()
    allowed = int(re.search(r"^type-errors = (\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1])
    if len(found) > allowed:
        for e in found:
            line, message = e["range"]["start"]["line"] + 1, e["message"].splitlines()[0]
            print(f"{Path(e['file']).name}:{line}: {message} ({e.get('rule')})")
        sys.exit(f"{len(found)} type errors, {allowed} are allowed")
    more = f"; lower type-errors in pyproject.toml to {len(found)}" if len(found) < allowed else ""
    print(f"pyright: {len(found)} errors, {allowed} are allowed{more}")


if __name__ == "__main__":
    main()
