"""A page in a real browser: Chromium without a window, which may reach nothing but the page."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
PROGRAMS = ("chromium", "chromedriver")
REQUEST = "Network.requestWillBeSent"


def is_installed() -> bool:
    """Return whether there is a browser."""
    return all(shutil.which(program) for program in PROGRAMS)


@contextlib.contextmanager
def opened(page: Path | str, profile: Path) -> Iterator[Opened]:
    """Yield a page, opened in a browser that has never seen anything else."""
    options = webdriver.ChromeOptions()
    browser, driver_program = map(shutil.which, PROGRAMS)
    options.binary_location = str(browser)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_program))
    try:
        address = page if isinstance(page, str) else page.as_uri()
        driver.get(address)
        yield Opened(driver, address)
    finally:
        driver.quit()


class Opened:
    """An open page.

    Attributes:
        complaints: what the browser's console said while it was opened.
        requested: the addresses that it asked for, but for those that hold their content.
    """

    def __init__(self, driver: webdriver.Chrome, address: str):
        self._driver = driver
        self.address = address
        self.complaints = driver.get_log("browser")
        events = (
            json.loads(entry["message"])["message"] for entry in driver.get_log("performance")
        )
        sent = [event["params"] for event in events if event["method"] == REQUEST]
        # the browser's own first page asks for its parts too
        asked = {told["request"]["url"] for told in sent if told["documentURL"] == address}
        self.requested = {url for url in asked if not url.startswith("data:")}

    def run(self, script: str) -> Any:
        """Return what a script does in the page."""
        return self._driver.execute_script(script)

    def choose(self, path: Path) -> None:
        """Give a file to the page's only input."""
        self._driver.find_element("tag name", "input").send_keys(str(path))

    def be_wide(self, pixels: int) -> None:
        """Make the window so wide, as a phone's."""
        metrics = {"width": pixels, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
