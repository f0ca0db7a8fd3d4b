"""Runs a run again (`mmft reproduce`) and writes the verdict into a README: python experiments/again.py README.md OUTPUT_DIR RUN

The new run lies in OUTPUT_DIR/again. Exit code 1, the verdict written all the same, when mmft calls the two runs different.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from table import put


def main() -> None:
    readme, out, run = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    shutil.rmtree(out / "again", ignore_errors=True)
    code = subprocess.run([sys.executable, "-m", "mmft", "reproduce", f"run={run.as_posix()}", f"output_dir={(out / 'again').as_posix()}"]).returncode
    (found,) = (out / "again").glob("*/reproduce.json")
    verdict = json.loads(found.read_text(encoding="utf-8"))["verdict"]
    put(readme, "again", f"`mmft reproduce run={run.as_posix()}`: {verdict}.")
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
