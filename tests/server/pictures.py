"""Pictures of the page for docs/SERVER.md: ``python tests/server/pictures.py docs/server``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from browser import Page, browser
from serving import running


def chat(page: Page, folder: Path) -> None:
    """Before, during, after."""
    page.until("document.querySelector('#ask textarea').value.startsWith('Solve')")
    page.picture(folder / "before.png")
    page.run("document.querySelector('#ask [name=seed]').value = 1")
    page.run("document.querySelector('#ask [name=send]').click()")
    page.until("document.querySelector('.cost')?.textContent")
    page.picture(folder / "after.png")
    page.run("document.querySelector('.film input').focus()")
    while page.run("Number(document.querySelector('.film input').value)") > 0:
        page.key("ArrowLeft")
    page.picture(folder / "during.png")


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, running() as server, browser(Path(profile)) as page:
        page.size(760, 480)
        page.open(server.url)
        chat(page, folder)
        page.size(760, 395, dark=True)
        page.run("document.getElementById('tab-infill').click()")
        page.run("document.querySelector('#fill [name=n]').value = 2")
        page.run("document.querySelector('#fill [name=send]').click()")
        page.until("document.querySelectorAll('#filled article').length === 2")
        page.until("!document.querySelector('#fill [name=send]').disabled")
        page.run("document.querySelector('#filled article').scrollIntoView()")
        page.picture(folder / "infill.png")


if __name__ == "__main__":
    main()
