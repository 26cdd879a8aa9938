"""The site in a browser, every page: light and wide, dark and as narrow as a telephone, without a network (make docs-check)."""

import contextlib
import json
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.support.docs.pages import DOCS

SITE = DOCS.parent / "site"
NARROW, WIDE = 380, 1280  # CSS pixels
SECONDS = 540

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed: apt-get install chromium"),
    pytest.mark.skipif(not (SITE / "index.html").is_file(), reason="the site is not built: make docs"),
]

# put into every page: what goes wrong is kept, and the system's theme is that of the address
WATCH = """<script>
  window.found = [];
  localStorage.clear();  // the theme of a page before
  addEventListener("error", (e) => found.push(e.message || "cannot load " + (e.target.src || e.target.href)), true);
  addEventListener("unhandledrejection", (e) => found.push("rejected: " + e.reason));
  addEventListener("securitypolicyviolation", (e) => found.push("needs a network: " + e.blockedURI));
  const dark = location.search === "?dark";
  const ask = window.matchMedia.bind(window);
  window.matchMedia = (query) => query.includes("prefers-color-scheme")
    ? { matches: query.includes("dark") === dark, media: query, addEventListener() {}, addListener() {} }
    : ask(query);
</script>"""

# loads one page after another in a frame, and sends what it saw
HARNESS = """<!doctype html><body><script>
  const light = (css) => css.match(/[0-9.]+/g).slice(0, 3).map((c) => {
    c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; })
    .reduce((s, c, i) => s + c * [0.2126, 0.7152, 0.0722][i], 0);
  const look = (page, theme, width) => new Promise((done) => {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width:${width}px;height:900px;border:0`;
    frame.onload = () => setTimeout(() => { try {
      const inside = frame.contentWindow, html = inside.document.documentElement;
      const text = inside.document.querySelector("article p, article li, article td")
        || inside.document.querySelector("article");
      const style = inside.getComputedStyle(text), back = inside.getComputedStyle(inside.document.body).backgroundColor;
      const [a, b] = [light(style.color), light(back)].sort((x, y) => y - x);
      const wide = [...inside.document.querySelectorAll("article *")].filter((e) => e.getBoundingClientRect().right > width + 1
        && !e.closest("pre, .md-typeset__scrollwrap, .md-typeset__table, table, .highlight"));
      done({ page, theme, width, errors: inside.found, scheme: inside.document.body.dataset.mdColorScheme,
        contrast: (a + 0.05) / (b + 0.05),
        scroll: html.scrollWidth - html.clientWidth,
        wide: wide.slice(0, 3).map((e) => e.outerHTML.slice(0, 90)),
        words: inside.document.querySelector("article").innerText.length });
      } catch (error) { done({ page, theme, width, errors: [String(error)] }); }
      frame.remove();
    }, 30);
    frame.src = page + (theme === "dark" ? "?dark" : "?light");
    document.body.append(frame);
  });
  (async () => {
    const seen = [];
    for (const [page, theme, width] of %s) seen.push(await look(page, theme, width));
    await fetch("/seen", { method: "POST", body: JSON.stringify(seen) });
  })();
</script>"""


class Handler(SimpleHTTPRequestHandler):
    """The site, watched; and the harness, which posts what it saw."""

    def __init__(self, *args, visits, seen, done, **kwargs):
        self.visits, self.seen, self.done = visits, seen, done
        super().__init__(*args, directory=str(SITE), **kwargs)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/harness":
            return self.answer(HARNESS.replace("%s", json.dumps(self.visits)))
        file = SITE / path.lstrip("/")
        if file.suffix == ".html" and file.is_file():
            return self.answer(file.read_text().replace("<head>", f"<head>{WATCH}", 1))
        return super().do_GET()

    def do_POST(self):
        self.seen.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer("")
        self.done.set()

    def answer(self, text):
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self):
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:")
        super().end_headers()

    def log_message(self, *_):
        pass


def visit(pages, folder):
    """What the browser saw of each (page, theme, width)."""
    seen, done = [], threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, visits=pages, seen=seen, done=done))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}",
        "--window-size=1400,1000",
    ]
    browser = subprocess.Popen([*command, "--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}/harness"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        assert done.wait(SECONDS), "the browser has not finished"
    finally:
        browser.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            browser.wait(20)
        server.shutdown()
        server.server_close()
    return seen


def faults(one):
    """What is wrong with a page as it was seen."""
    found = list(one["errors"])
    if "scheme" not in one:  # it could not be looked at
        return found
    if one["scheme"] != {"dark": "slate", "light": "default"}[one["theme"]]:
        found.append(f"the theme is {one['scheme']}")
    if one["contrast"] < 4.5:  # WCAG 2.2, 1.4.3, of text
        found.append(f"contrast {one['contrast']:.1f}")
    if one["scroll"] > 0 or (one["width"] == NARROW and one["wide"]):
        found.append(f"wider than {one['width']} pixels by {one['scroll']}: {one['wide']}")
    if one["words"] < 40:
        found.append("hardly any text")
    return found


def test_every_page_works(tmp_path):
    pages = [path.relative_to(SITE).as_posix() for path in sorted(SITE.rglob("*.html")) if path.name != "404.html"]
    assert len(pages) > 30
    visits = [(page, "light", WIDE) for page in pages] + [(page, "dark", NARROW) for page in pages]
    seen = visit(visits, tmp_path)
    assert [(one["page"], one["theme"], one["width"]) for one in seen] == visits
    wrong = {f"{one['page']}, {one['theme']}, {one['width']}": found for one in seen if (found := faults(one))}
    assert not wrong, json.dumps(wrong, indent=1)


def test_what_is_wrong_with_a_page_is_seen(tmp_path, monkeypatch):
    broken = tmp_path / "site"
    broken.mkdir()
    (broken / "page.html").write_text(
        "<html><head></head><body data-md-color-scheme='default' style='background:#fff'>"
        "<article><p style='color:#eee;width:900px'>"
        "text</p></article><img src='http://elsewhere.example/a.png'><script>undefined.x</script></body></html>"
    )
    monkeypatch.setattr("tests.docs.test_site.SITE", broken)
    (one,) = visit([("page.html", "dark", NARROW)], tmp_path / "profile")
    found = " ".join(faults(one))
    for word in ("Cannot read properties", "needs a network", "theme is default", "contrast", "wider than 380", "hardly any"):
        assert word in found, found
