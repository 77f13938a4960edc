"""Makes the pictures in docs/images anew from a report: `python tests/data/make_screenshots.py REPORT.html`.

Run it after a deliberate change of the page, and look at the pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from browser import browser

IMAGES = Path(__file__).parent.parent.parent / "docs" / "images"
_MEASURED = "document.getElementById('measured').scrollIntoView()"
_ANSWER = "document.querySelector('.prompt').open = true; document.querySelector('.prompt').scrollIntoView()"
PICTURES = {
    "report-light.png": ((1000, 900), False, ""),
    "report-dark.png": ((1000, 900), True, _MEASURED),
    "report-phone.png": ((360, 740), False, _ANSWER),
}


def main() -> None:
    page = Path(sys.argv[1]).resolve()
    IMAGES.mkdir(exist_ok=True)
    with browser() as tab:
        for name, (size, dark, script) in PICTURES.items():
            tab.open(page, size=size, dark=dark)
            tab.run(script)
            (IMAGES / name).write_bytes(tab.screenshot())


if __name__ == "__main__":
    main()
