"""The gallery of a data set that wants to do harm, in a real browser."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.store import Store, open_store
from shard_tools.gallery import write_gallery
from tests.support.browser import Browser, require_chromium
from tests.support.dataset import pictures
from tests.support.snapshots import write_snapshot

TRACKER = "tracker.invalid"
RUN = "document.title='RUN';alert(1)"
PLAIN = f"https://{TRACKER}/plain.jpg?a=1&b=2#c"  # the only one that becomes a link
HOSTILE = (
    f"<script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</title></bdi></svg><svg onload={RUN}>",
    f'"><img src=//{TRACKER}/a.png onerror="{RUN}">',
    f"' onmouseover='{RUN}' autofocus onfocus='{RUN}",
    f"javascript:{RUN}",
    f"JaVaScRiPt://{TRACKER}/%0a{RUN}",
    f"java\tscript:{RUN}",
    f"data:text/html,<script>{RUN}</script>",
    f"vbscript:{RUN}",
    f'https://{TRACKER}/"onclick="{RUN}',
    f"https://good.example@{TRACKER}/x.jpg",
    f"https://{TRACKER}\\@good.example/x.jpg",
    f"https://{TRACKER}/<b>.jpg",
    PLAIN,
    f"<base href=//{TRACKER}/><link rel=stylesheet href=//{TRACKER}/x.css>",
    f'<meta http-equiv="refresh" content="0;url=http://{TRACKER}/">',
    f"<iframe src=http://{TRACKER}/></iframe><object data=http://{TRACKER}/>",
    f"<style>body{{background:url(//{TRACKER}/b.png)}}</style>",
    "photo\u202egpj.exe",
    "a\0b\x1b[31m\x85\u2028c",
    "<!-- ]]> --> {{7*7}} &lt;script&gt; &#x202e;",
    "http://[::bad",
    "x" * 100_000,
    "\u05d0\u05d1\u05d2 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
)

LOOK = """
(async () => {
  const all = [...document.querySelectorAll('*')];
  await Promise.all([...document.images].map(image => image.decode()));
  return {
    title: document.title,
    images: [...document.images].map(image => image.naturalWidth),
    broken: [...document.querySelectorAll('.broken')].map(each => each.textContent),
    handlers: all.filter(e => [...e.attributes].some(a => a.name.startsWith('on'))).length,
    styled: all.filter(e => e.hasAttribute('style')).length,
    active: document.querySelectorAll(
      'script, iframe, object, embed, base, link, form, meta[http-equiv=refresh]').length,
    styles: document.querySelectorAll('style').length,
    links: [...document.querySelectorAll('a')].map(a => [a.href, a.rel, a.referrerPolicy]),
    text: document.body.textContent,
    maxWidth: getComputedStyle(document.body).maxWidth,
    background: getComputedStyle(document.body).backgroundColor,
    overflow: document.documentElement.scrollWidth - innerWidth,
    policy: document.querySelector('meta[http-equiv]').content,
  };
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = require_chromium("that the gallery runs no script and loads nothing")
    with Browser(program, tmp_path_factory.mktemp("browser")) as running:
        yield running


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a data set whose every text is hostile; one sample is damaged."""
    name = f"'\"><img src=x onerror={RUN}>"  # a directory may be called that
    folder = tmp_path_factory.mktemp("set")
    store = open_store(folder / name)
    images = pictures(len(HOSTILE))
    kept: list[dict[str, object]] = [
        {"data": image, "source": text, "label": text, "key": text, "format": text}
        for image, text in zip(images, HOSTILE, strict=True)
    ]
    kept[0] |= {"crc32c": 1}
    rejects = [{"source": text, "reason": text} for text in HOSTILE]
    tars = dict(enumerate((text for text in HOSTILE if "://" in text), start=1))
    note = f"{''.join(HOSTILE[:-2])} clusters: dedup/a/clusters.parquet"
    _write_clusters(store)
    adopted = [[{"source": text, "reason": text}] for text in HOSTILE[: len(tars)]]
    snapshot = write_snapshot(store, [[*kept, *rejects], *adopted], tars=tars, note=note)
    return write_gallery(store, snapshot, samples=len(HOSTILE), output=str(folder / "gallery.html"))


def _write_clusters(store: Store) -> None:
    rows = [
        {"cluster": n // 2, "kept": n % 2 == 0, "shard": 0, "row": n, "key": text, "distance": n}
        for n, text in enumerate(HOSTILE)
    ]
    rows[3] |= {"row": 10**6}  # not there
    body = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), body)
    store.put_if_absent("dedup/a/clusters.parquet", body.getvalue())


def test_the_browser_would_tell(browser: Browser, tmp_path: Path) -> None:
    """The checks below see it when a page runs a script, breaks a policy or calls somewhere."""
    naive, guarded = tmp_path / "naive.html", tmp_path / "guarded.html"
    evil = "<title>t</title><script>document.title='RUN'</script><img src=http://seen.invalid/a>"
    policy = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\">"
    naive.write_text(evil)
    guarded.write_text(policy + evil)
    seen = browser.open(naive.as_uri(), "document.title")
    assert seen.value == "RUN"
    assert seen.requests == ["http://seen.invalid/a"]
    assert any("seen.invalid" in line for line in browser.contacted)
    seen = browser.open(guarded.as_uri(), "document.title")
    assert seen.value == "t"
    assert any("Content Security Policy" in line for line in seen.console)


def test_hostile_names_do_nothing(browser: Browser, gallery: str) -> None:
    seen = browser.open(gallery, LOOK)
    page = seen.value
    assert page["title"].startswith("file:///")
    assert page["title"].endswith("version 1")
    assert (seen.console, seen.dialogs, seen.requests) == ([], [], [])
    assert not [line for line in browser.contacted if TRACKER in line]
    assert (page["handlers"], page["styled"], page["active"], page["styles"]) == (0, 0, 0, 1)
    assert page["policy"].startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert page["maxWidth"] != "none"  # so the style sheet was let in


def test_every_picture_shows(browser: Browser, gallery: str) -> None:
    page = browser.open(gallery, LOOK).value
    clusters = len(HOSTILE) - 2  # one is damaged, one is not there
    assert len(page["images"]) == len(HOSTILE) - 1 + clusters
    assert min(page["images"]) > 30
    assert sorted({text.partition(":")[0] for text in page["broken"]}) == [
        "damaged",
        "not in this version",
    ]


def test_links_lead_only_where_they_say(browser: Browser, gallery: str) -> None:
    links = browser.open(gallery, LOOK).value["links"]
    outward = [link for link in links if not link[0].startswith(f"{gallery}#")]
    assert len(outward) == 3  # samples, rejects, duplicates
    for link in outward:
        assert link == [PLAIN, "noopener noreferrer nofollow", "no-referrer"]


def test_what_cannot_be_seen_is_spelt_out(browser: Browser, gallery: str) -> None:
    text = browser.open(gallery, LOOK).value["text"]
    assert "photo⟨U+202E⟩gpj.exe" in text
    assert "a⟨U+0000⟩b⟨U+001B⟩[31m⟨U+0085⟩⟨U+2028⟩c" in text
    assert not set(text) & set("\u202e\u2066\u2028\u200b\0\x1b")
    assert "xxx…xxx" in text
    assert max(map(len, text.split())) < 1500


def test_it_fits_a_phone_and_the_dark(browser: Browser, gallery: str) -> None:
    phone = browser.open(gallery, LOOK, width_px=360)
    assert phone.value["overflow"] <= 0
    light = browser.open(gallery, LOOK)
    dark = browser.open(gallery, LOOK, dark=True)
    assert light.value["overflow"] <= 0
    assert (brightness(light.screenshot) > 200, brightness(dark.screenshot) < 80) == (True, True)


def brightness(screenshot: str) -> float:
    """Of the page's left margin, 0 to 255."""
    with Image.open(io.BytesIO(base64.b64decode(screenshot))) as image:
        return float(image.convert("L").getpixel((2, 2)))
