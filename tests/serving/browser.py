"""Debian's Chromium, driven by Selenium, with every wait bounded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
PATIENCE = 45.0  # seconds; an answer takes about one on an idle machine
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
T = TypeVar("T")


class Browser:
    """A browser with a profile of its own.

    Args:
        profile: An empty folder.
        size: (width, height) of the window in pixels.
    """

    def __init__(self, profile: Path, size: tuple[int, int] = (1280, 1100)) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*_FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
        self.driver.set_page_load_timeout(PATIENCE)
        self.driver.set_script_timeout(PATIENCE)
        self.driver.get("about:blank")
        self.driver.get_log("performance")  # what the browser does before any page

    def open(self, url: str) -> None:
        """Load a page and wait until it can be used."""
        self.driver.get(url)
        self.one("#m2-drop input[type=file]")

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """The first element of a kind, as soon as there is one."""
        return self.wait(lambda: self.all(selector)[:1], selector)[0]

    def text(self, selector: str) -> str:
        """The text of the first element of a kind, as soon as it has one."""
        return self.wait(lambda: self.one(selector).text, f"text of {selector}")

    def drop(self, *files: Path, place: str = "#m2-drop") -> None:
        self.one(f"{place} input[type=file]").send_keys("\n".join(map(str, files)))

    def tab(self, name: str) -> None:
        def shown() -> list[WebElement]:
            tabs = self.all("button[role=tab]")
            return [tab for tab in tabs if tab.is_displayed() and tab.text == name]

        self.wait(shown, f"the tab {name}")[0].click()

    def wait(self, look: Callable[[], T], what: str) -> T:
        """What ``look`` gives, as soon as that is something."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if found := look():
                    return found
            except WebDriverException:  # the page is just being drawn anew
                pass
            time.sleep(0.05)
        raise AssertionError(f"no {what} after {PATIENCE:.0f} s")

    def run(self, script: str, *given: Any) -> Any:
        return self.driver.execute_script(script, *given)

    def hosts(self) -> set[str]:
        """Where requests went since the last call."""
        found = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if not url.startswith(("data:", "blob:")):
                    found.add("/".join(url.split("/")[:3]))
        return found

    def close(self) -> None:
        self.driver.quit()
