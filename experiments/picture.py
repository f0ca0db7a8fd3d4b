"""A screenshot of a page by the browser that is installed: python experiments/picture.py PAGE.html OUT.png [width] [height]

Without a Chromium or Chrome it says so, and the picture that is there stays.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main() -> None:
    page, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    width, height = (sys.argv[3:5] + ["1200", "1500"][len(sys.argv[3:5]) :])[:2]
    browser = next((b for b in BROWSERS if shutil.which(b)), None)
    if browser is None:
        print(f"{out.name}: no Chromium or Chrome here, the picture is not made anew")
        return
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        subprocess.run([browser, *options, f"--window-size={width},{height}", f"--screenshot={out}", page.as_uri()], check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()
