"""A page in a real browser without a window: `python tests/browser.py PAGE WIDTH [PICTURE]` prints what it found.

In a process of its own, since Qt and its Chromium want the main thread and never quite leave it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 120  # until a page that does not load is given up
# What a page is asked after it has loaded, and after a click on each column's head of its first table.
QUESTIONS = """(() => {
  const images = [...document.images];
  const first = document.querySelector("table.sortable");
  const column = (index) => [...first.tBodies[0].rows].map((row) => row.cells[index].textContent.trim());
  const sorted = [];
  first.querySelectorAll("th button").forEach((button, index) => {
    button.click();
    const up = column(index);
    button.click();
    sorted.push([button.textContent, up, column(index)]);
  });
  return JSON.stringify({
    width: window.innerWidth,
    content: document.documentElement.scrollWidth,
    images: images.length,
    broken: images.filter((image) => !image.complete || image.naturalWidth === 0).length,
    figures: [...document.querySelectorAll("figure svg")].map((svg) => [
      svg.parentElement.id, Math.round(svg.getBoundingClientRect().width), svg.querySelectorAll("path").length]),
    ids: [...document.querySelectorAll("[id]")].map((node) => node.id),
    decision: document.getElementById("decision").textContent,
    text: document.body.innerText,
    sorted: sorted,
    colours: [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor],
    requests: performance.getEntriesByType("resource").map((entry) => entry.name),
  });
})()"""


def ask(page: Path, width: int, picture: Path | None = None, *, dark: bool = False) -> dict[str, Any]:
    """What the browser says of `page` in a window `width` pixels wide; "console" has its messages.

    picture  file for a picture of the window
    """
    command = [sys.executable, __file__, str(page), str(width), str(picture or ""), "dark" if dark else ""]
    environment = os.environ | {
        "QT_QPA_PLATFORM": "offscreen",
        "QTWEBENGINE_DISABLE_SANDBOX": "1",
        "QTWEBENGINE_CHROMIUM_FLAGS": "--blink-settings=preferredColorScheme=0" if dark else "",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=2 * SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the browser ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _main(page: str, width: str, picture: str, scheme: str) -> None:
    from PySide6.QtCore import QTimer, QUrl
    from PySide6.QtWebEngineCore import QWebEnginePage
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    application = QApplication([sys.argv[0]])
    messages: list[str] = []

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:  # noqa: N802
            messages.append(f"{level.name}: {message} (line {line})")

    view = QWebEngineView()
    shown = Page(view)
    view.setPage(shown)
    view.resize(int(width), 900)
    status = [1]

    def answered(text: str) -> None:
        if picture:
            view.grab().save(picture)
        print(json.dumps(json.loads(text) | {"console": messages}), flush=True)
        status[0] = 0
        application.quit()

    def loaded(fine: bool) -> None:
        if not fine:
            application.quit()
            return
        # A moment for the first picture to be drawn.
        QTimer.singleShot(500, lambda: shown.runJavaScript(QUESTIONS, 0, answered))

    shown.loadFinished.connect(loaded)
    shown.load(QUrl.fromLocalFile(str(Path(page).resolve())))
    view.show()
    QTimer.singleShot(1000 * SECONDS, application.quit)
    application.exec()
    os._exit(status[0])  # Chromium's threads may outlive the interpreter's end and crash in it


if __name__ == "__main__":
    _main(*(sys.argv[1:] + [""] * 4)[:4])
