"""The Explore page as a user has it: words for what they do and see. Waits, never sleeps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

# The component lives in a shadow root.
FIND_ROOT = """
const hosts = [...document.querySelectorAll("[data-testid=stBidiComponentIsolated]")];
const root = hosts.map((h) => h.shadowRoot?.querySelector("[data-part=root]")).find(Boolean);
"""


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Returns the condition's value as soon as it is true.

    Raises:
        AssertionError: With ``what``, if it is not true in time.
    """
    clock = threading.Event()
    end = time.monotonic() + seconds
    while True:
        try:
            value = condition()
        except StaleElementReferenceException:
            value = None
        if value:
            return value
        assert time.monotonic() < end, what
        clock.wait(0.05)


class Page:
    """One browser with a fresh profile."""

    def __init__(
        self, browser: str, driver: str, profile: Path, downloads: Path, *, dark: bool, width: int
    ) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for argument in (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-dev-shm-usage",
            "--no-first-run",
            f"--window-size={width},1400",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        self.downloads = downloads
        self.driver.execute_cdp_cmd(
            "Browser.setDownloadBehavior",
            {"behavior": "allow", "downloadPath": str(downloads)},
        )
        if dark:
            scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
            self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})

    def close(self) -> None:
        self.driver.quit()

    def open(self, address: str) -> None:
        self.driver.get(address)
        self.wait(lambda: self.button("Generate"), "the page does not come up", 90)

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
        return wait_for(condition, seconds, f"{what}\n{self.text()[:600]}")

    # ------------------------------------------------------------ Streamlit's widgets

    def text(self) -> str:
        return str(self.driver.execute_script("return document.body.innerText"))

    def button(self, label: str) -> WebElement | None:
        for button in self.driver.find_elements(By.TAG_NAME, "button"):
            if button.text.strip().split("\n")[-1] == label:
                return button
        return None

    def press(self, label: str) -> None:
        def pressed() -> bool:
            button = self.button(label)
            if button is None:
                return False
            try:
                button.click()
            except ElementClickInterceptedException:
                return False
            return True

        self.wait(pressed, f"there is no button {label!r}")

    def type_prompt(self, text: str) -> None:
        found = self.wait(
            lambda: self.driver.find_elements(By.CSS_SELECTOR, "[data-testid=stTextArea] textarea"),
            "there is no prompt box",
        )
        box = found[0]
        box.clear()
        box.send_keys(text)

    def slider(self, label: str) -> WebElement:
        for slider in self.driver.find_elements(By.CSS_SELECTOR, "[data-testid=stSlider]"):
            if label in slider.text:
                return slider.find_element(By.CSS_SELECTOR, "input[type=range]")
        raise AssertionError(f"there is no slider {label!r}")

    def unfold(self, title: str) -> None:
        """Opens an expander."""
        script = """
            const fits = (s) => s.innerText.includes(arguments[0]);
            const found = [...document.querySelectorAll("summary")].find(fits);
            if (found && !found.parentElement.open) found.click();
            return Boolean(found);
        """
        self.wait(lambda: self.driver.execute_script(script, title), f"there is no {title!r}")

    def select(self, label: str, choice: str) -> None:
        """Takes a choice of a select box."""

        def option() -> WebElement | None:
            for found in self.driver.find_elements(By.CSS_SELECTOR, "[role=option]"):
                if found.text.strip() == choice:
                    return found
            selector = f"[data-testid=stSelectbox] input[aria-label='{label}']"
            box = self.driver.find_element(By.CSS_SELECTOR, selector)
            if box.get_attribute("aria-expanded") != "true":
                box.click()
            return None

        self.wait(option, f"{label!r} has no choice {choice!r}").click()

    def generate(self, prompt: str) -> None:
        self.type_prompt(prompt)
        self.press("Generate")

    def wait_until_finished(self, seconds: float = 60) -> None:
        self.wait(lambda: "Finished" in self.text(), "the run does not finish", seconds)

    def console_errors(self) -> list[str]:
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]

    # ------------------------------------------------------------ the component

    def component(self, script: str, *arguments: Any) -> Any:
        """Runs JavaScript that knows the component as ``root``; None while it is not there."""
        body = f"{FIND_ROOT} if (!root) return null; {script}"
        return self.driver.execute_script(body, *arguments)

    def texts(self) -> list[str]:
        """The arms' texts; the first is the routed one."""
        script = "return [...root.querySelectorAll('.card.arm .body')].map((b) => b.textContent)"
        return self.component(script) or []

    def n_tokens(self) -> int:
        return int(self.component("return root.querySelectorAll('.token').length") or 0)

    def n_columns(self) -> int:
        script = "return root.querySelector('[data-part=plot]').getAttribute('aria-colcount')"
        return int(self.component(script) or 0)

    def painted_width(self) -> int:
        """How far to the right the heatmap has colours, in pixels of the canvas."""
        return int(
            self.component(
                """
                const canvas = root.querySelector("[data-part=main]");
                if (!canvas.width) return 0;
                const row = Math.round(canvas.height * 0.6);
                const line = canvas.getContext("2d").getImageData(0, row, canvas.width, 1).data;
                const last = line.slice(-4);
                let x = canvas.width - 1;
                const same = (i) => [0, 1, 2].every((c) => line[4 * i + c] === last[c]);
                while (x > 0 && same(x)) x -= 1;
                return x;
                """
            )
            or 0
        )

    def tooltip(self) -> str:
        script = "const t = root.querySelector('.tip'); return t.hidden ? '' : t.innerText"
        return str(self.component(script) or "")

    def choose(self, label: str) -> None:
        """Presses one of the component's own buttons."""
        script = """
            const fits = (b) => b.textContent.trim().startsWith(arguments[0]);
            [...root.querySelectorAll("button")].find(fits).click();
        """
        self.component(script, label)

    def point_at(self, x: float, y: float) -> None:
        """Moves the pointer to a place of the plot, as parts of its width and height."""
        script = """
            const over = root.querySelector(".over");
            over.scrollIntoView({ block: "center" });
            const b = over.getBoundingClientRect();
            return [b.left + b.width * arguments[0], b.top + b.height * arguments[1]];
        """
        left, top = self.component(script, x, y)
        actions = ActionChains(self.driver)
        actions.w3c_actions.pointer_action.move_to_location(int(left), int(top))
        actions.perform()

    def read_cell(self, x: float, y: float, expected: str) -> str:
        """Points at a cell until its tooltip says what is expected; the page may still move."""
        nudge = iter([0.0, 0.004] * 1000)

        def said() -> str:
            self.point_at(x + next(nudge), y)
            return self.tooltip() if expected in self.tooltip() else ""

        return str(self.wait(said, f"no cell at {x}, {y} says {expected!r}"))

    def point_at_token(self, index: int) -> None:
        """Moves the pointer to a token of the texts."""
        script = """
            const token = root.querySelectorAll(".token")[arguments[0]];
            token.scrollIntoView({ block: "center" });
            return token;
        """
        ActionChains(self.driver).move_to_element(self.component(script, index)).perform()

    def marked(self) -> list[str]:
        script = "return [...root.querySelectorAll('.token.on')].map((t) => t.textContent)"
        return self.component(script) or []
