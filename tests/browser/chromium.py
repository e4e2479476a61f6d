"""Run a page in headless Chromium (Debian's package ``chromium``): what it shows, says, and asks the network for."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps"),
)
LIGHT, DARK = 1, 0  # of Blink's setting preferredColorScheme

# Reads the page in a frame of the wanted width, because Chromium's own window is at least 500 pixels wide.
MEASURE = """<!doctype html><body style="margin:0"><iframe id="page" style="border:0;width:%dpx;height:4000px"
srcdoc="%s"></iframe><pre id="found"></pre><script>
document.getElementById("page").addEventListener("load", event => {
  const page = event.target.contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > root.clientWidth + 1);
  document.getElementById("found").textContent = JSON.stringify({
    scrollWidth: root.scrollWidth, clientWidth: root.clientWidth, wide: wide.map(e => e.outerHTML.slice(0, 200)),
    background: getComputedStyle(page.body).backgroundColor, color: getComputedStyle(page.body).color,
    attacked: String(event.target.contentWindow.attacked || ""),
    small: Math.min(...[...page.querySelectorAll("svg text")].map(e => e.getBoundingClientRect().height)
      .filter(Boolean)),
  });
});</script>"""


@dataclass(frozen=True)
class Shown:
    """``found`` are MEASURE's values, ``console`` the lines of the console, ``urls`` what was asked for."""

    found: dict[str, Any]
    console: list[str]
    urls: set[str]


def show(page: str, folder: Path, width: int, scheme: int = LIGHT) -> Shown:
    """Show a page in a frame of ``width`` pixels."""
    wrapper, log = folder / "wrapper.html", folder / "net.json"
    wrapper.write_text(MEASURE % (width, html.escape(page)), encoding="utf-8")
    said = run(folder, scheme, f"--log-net-log={log}", "--enable-logging=stderr", "--dump-dom", wrapper.as_uri())
    [found] = re.findall(r'<pre id="found">(.+?)</pre>', said.stdout, re.DOTALL)
    console = [line for line in said.stderr.splitlines() if ":CONSOLE" in line]
    urls = {str(event.get("params", {}).get("url", "")) for event in json.loads(log.read_text())["events"]}
    return Shown(json.loads(html.unescape(found)), console, urls - {""})


def screenshot(page: Path, image: Path, folder: Path, width: int, height: int, scheme: int = LIGHT) -> None:
    """Write a PNG of a page's beginning."""
    run(folder, scheme, f"--screenshot={image}", f"--window-size={width},{height}", page.resolve().as_uri())


def run(folder: Path, scheme: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM
    profile = f"--user-data-dir={folder / 'profile'}"
    resolver = "--host-resolver-rules=MAP * ~NOTFOUND"
    command = [CHROMIUM, *QUIET, profile, resolver, f"--blink-settings=preferredColorScheme={scheme}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
