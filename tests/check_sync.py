"""Fails unless nsq_repro/ is exactly what nbs/ exports and the notebooks are clean; works on a copy and changes
nothing."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def files(root):
    "Contents by path of the notebooks and modules under `root`."
    paths = [*root.glob("nbs/*.ipynb"), *root.glob("nsq_repro/*.py")]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in paths}


def export_copy(tmp):
    "Copy what is written by hand to `tmp`, then export and clean there."
    (tmp / "nsq_repro").mkdir()
    shutil.copytree(ROOT / "nbs", tmp / "nbs", ignore=shutil.ignore_patterns(".*", "*_files"))
    for f in ("settings.ini", "nsq_repro/__init__.py"):
        shutil.copy(ROOT / f, tmp / f)
    os.chdir(tmp)  # nbdev finds its settings from here
    os.environ.pop("IN_TEST", None)  # under which nbdev exports nothing
    from nbdev.clean import nbdev_clean
    from nbdev.doclinks import nbdev_export

    nbdev_export.__wrapped__()
    nbdev_clean.__wrapped__()


def main():
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        export_copy(tmp)
        ours, theirs = files(ROOT), files(tmp)
        os.chdir(ROOT)
    if not ours:
        sys.exit("no notebooks in nbs/")
    bad = sorted(f for f in ours.keys() | theirs.keys() if ours.get(f) != theirs.get(f))
    if bad:
        sys.exit(
            "\n".join(
                [
                    (
                        "out of sync, or not clean (`make export` puts it right; a module without a notebook has to be "
                        "removed):"
                    ),
                    *bad,
                ]
            )
        )
    print(
        f"{sum(f.endswith('.ipynb') for f in ours)} notebooks, {sum(f.endswith('.py') for f in ours)} modules: in "
        "sync and clean"
    )


if __name__ == "__main__":
    main()
