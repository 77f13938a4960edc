"""A headless Chromium for reports: opened from disk, in light or dark, as wide as asked."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

# Without the last five Chromium talks to servers of its own at every start.
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Browser:
    """One tab."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(
        self, page: Path, *, size: tuple[int, int], dark: bool = False, media: str = "screen", script: bool = True
    ) -> None:
        """Load a page in a window of `size` (width, height) CSS pixels, for a reader who prefers light or dark."""
        width, height = size
        settings: dict[str, dict[str, Any]] = {
            "Emulation.setDeviceMetricsOverride": {
                "width": width,
                "height": height,
                "deviceScaleFactor": 1,
                "mobile": False,
            },
            "Emulation.setEmulatedMedia": {
                "media": media,
                "features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
            },
            "Emulation.setScriptExecutionDisabled": {"value": not script},
        }
        for command, arguments in settings.items():
            self.driver.execute_cdp_cmd(command, arguments)
        self.driver.get(page.as_uri())

    def type(self, id_: str, text: str) -> None:
        """Write into a field, by the element's id."""
        self.driver.find_element(By.ID, id_).send_keys(text)

    def click(self, selector: str) -> None:
        """Click the first element that a CSS selector finds."""
        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def run(self, script: str) -> Any:
        """What a script says of the page."""
        return self.driver.execute_script(script)

    def complaints(self) -> list[str]:
        """What the page wrote to the console."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]  # type: ignore[no-untyped-call]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def screenshot(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode(self.driver.get_screenshot_as_base64())


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start one with a profile of its own, and end it."""
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(prefix="parity-browser-") as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = Chrome(options=options, service=Service(executable_path=shutil.which("chromedriver")))
        try:
            tab = Browser(driver)
            driver.get("about:blank")
            tab.requests()  # those of the browser's own first page
            yield tab
        finally:
            driver.quit()
