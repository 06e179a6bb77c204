"""Text from anywhere on a page."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_tools import page


class Reader(HTMLParser):
    """What a browser would see: the tags with their attributes, and the text."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(max_size=100))
def test_text_stays_text(value: str) -> None:
    seen = Reader(page.text(value))
    assert seen.tags == [("bdi", {})]
    assert seen.text == page.visible(value)


@given(st.text(max_size=100))
def test_a_hint_stays_one_attribute(value: str) -> None:
    seen = Reader(f"<i title={page.hint(value)}>")
    assert seen.tags == [("i", {"title": page.visible(value)})]


@given(st.text())
def test_nothing_is_unseen(value: str) -> None:
    shown = page.visible(value, 60)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\ud800-\udfff]", shown)
    assert len(shown) <= 60 * len("⟨U+10FFFF⟩")


def test_what_it_looks_like() -> None:
    assert page.visible("a\0b\u202ec\ud800") == "a⟨U+0000⟩b⟨U+202E⟩c⟨U+D800⟩"
    assert page.visible("0123456789", 8) == "01234…89"
    assert page.visible("Καλημέρα 写真 🐈") == "Καλημέρα 写真 🐈"


def test_a_link_leads_where_it_says() -> None:
    url = "https://a.example/x.jpg?b=1&c=%3C"
    seen = Reader(page.link(url))
    assert seen.tags[0] == (
        "a",
        {"href": url, "rel": "noopener noreferrer nofollow", "referrerpolicy": "no-referrer"},
    )
    assert seen.text == "a.example/x.jpg?b=1&c=%3C"


@pytest.mark.parametrize(
    "url",
    [
        *("javascript:alert(1)", "java\nscript:alert(1)", "data:text/html,x", "file:///etc/passwd"),
        *("//a.example/x", "https:/a", "https://", "http://[::bad", "ftp://a.example/", "s3://b/k"),
        *("https://good.example@evil.example/", "https://evil.example\\@good.example/"),
        *('https://a.example/"onclick="x', "https://a.example/<b>", "https://a.example/a b"),
        *(
            "https://a.example/\u202egpj.exe",
            "https://a.example/\0",
            "https://a.example/" + "x" * 3000,
        ),
        *("https://a.example/" + "x" * 3000, " https://a.example/", "https://a.ex\tample/"),
    ],
)
def test_anything_else_is_no_link(url: str) -> None:
    assert [tag for tag, _ in Reader(page.link(url)).tags] == ["bdi"]


def test_the_policy_lets_in_only_the_style_of_the_page() -> None:
    seen = Reader(page.page('</title>"<script>', page.Html("<p>body</p>")))
    assert [tag for tag, _ in seen.tags] == [
        *("html", "head", "meta", "meta", "meta", "meta", "title", "style", "body", "p")
    ]
    policy = dict(seen.tags[3][1])
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert str(policy["content"]).startswith(
        "default-src 'none'; img-src data:; style-src 'sha256-"
    )
    assert "unsafe" not in str(policy["content"])


def test_tables_align_numbers() -> None:
    markup = page.table(["name", "#count"], [[page.text("<b>"), page.number(12345)]])
    assert '<th class="number">count</th>' in markup
    assert '<td class="number">12,345</td>' in markup
    assert "<b>" not in markup
