"""Make docs/images/report.png: the report of the demo, as a browser shows it.

    python scripts/make_report_picture.py    # needs the test extra and Chromium

The demo draws its pictures itself, so the picture holds nobody's data.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "report.png"
NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTH, TOP, GROUPS = 1100, 560, 640  # CSS pixels: width, heights of both parts


def main() -> int:
    """Run the demo, open its report, save its head and its groups one above the other."""
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        print("expected Chromium, found none; for example: apt install chromium", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="snip-picture-") as folder:
        demo = Path(folder, "demo")
        words = ["demo", "--out", str(demo)]
        subprocess.run([sys.executable, "-m", "snipdedup", *words], check=True)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": WIDTH, "height": TOP})
            page.goto((demo / "clean" / "report.html").as_uri())
            begin = page.evaluate("document.querySelector('#groups').getBoundingClientRect().top")
            parts = [
                page.screenshot(clip={"x": 0, "y": y, "width": WIDTH, "height": h}, full_page=True)
                for y, h in ((0, TOP), (begin, GROUPS))
            ]
            browser.close()
    picture = Image.new("RGB", (WIDTH, TOP + GROUPS))
    for part, y in zip(parts, (0, TOP), strict=True):
        picture.paste(Image.open(io.BytesIO(part)), (0, y))
    picture.quantize(64).save(PICTURE, optimize=True)
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
