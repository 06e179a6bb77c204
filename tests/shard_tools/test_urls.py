"""Redaction: what grants access goes, what identifies an image stays."""

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_tools.urls import host_of, redact, redact_text

UNCHANGED = [
    "https://example.com/a/b.jpg",
    "https://example.com/a.jpg?w=640&h=480&fit=crop",
    "https://example.com/a.jpg?",
    "https://example.com/a.jpg?a&&b=&=c",
    "https://example.com/a.jpg?w=%7E+%C3%A9&é=1",
    "https://example.com/p@q/a.jpg?mail=a@b",
    "http://[::1]/a@b.jpg",
    "https://example.com/a.jpg?expires=3&policy=open",  # no signature beside them
    "https://example.com/a.jpg?ow=640&oh=480",
    "https://example.com/a.jpg?sv=1&sp=2&st=x",
    "https://example.com/a.jpg?tokenize=1&authority=x&signature_font=3",
    "file:///photos/a#1?token=@.jpg",
    "s3://bucket/holiday #3.jpg",
    "photo@home.jpg",
    "C:\\photos\\a@2x.jpg",
    "https://example.com//cdn//logo@2x.png?x=a//b@c",
    "https://example.com/a;v=1;size=2/b.jpg;type=x&w=1",
    "https://example.com/a.jpg?w=1;h=2&amp;fit=crop&AMP;q=3?v=4",
    "https://example.com/a.jpg?bg=%23fff&x=%3D%3d%253D%C3%A9%ff&mail=a%40b&at=10:30",
    "https://proxy.com/w_200,c_fit/https%3A%2F%2Fexample.com%2fa%3Fw=1%26h%3D2",
    "https://proxy.com/?url=https://example.com/a?w=1&n=http%253A%252F%252Fexample.com%252Fa",
    "https://example.com/a?x-oss-process=image/resize,w_200&x-bce-process=image/resize",
    "https://example.com/a?design=1&signs=2&assign=3&keyword=access",
    "",
]

CUT = [
    ("https://user:secret@example.com/a.jpg", "https://example.com/a.jpg"),
    ("https://secret@example.com:8443/a.jpg", "https://example.com:8443/a.jpg"),
    ("https://u@x:secret@example.com/a.jpg", "https://example.com/a.jpg"),
    ("https://user:sec/ret@example.com/a.jpg", "https://example.com/a.jpg"),
    ("https://user:sec#ret@example.com/a.jpg", "https://example.com/a.jpg"),
    ("https://user:sec?ret@example.com/a.jpg", "https://example.com/a.jpg"),
    ("ftp://user:secret@example.com/a.jpg", "ftp://example.com/a.jpg"),
    ("s3://key:secret@bucket/a.jpg", "s3://bucket/a.jpg"),
    ("//user:secret@example.com/a.jpg", "//example.com/a.jpg"),
    ("https://example.com/a.jpg#secret", "https://example.com/a.jpg"),
    ("https://e.com/a?w=1&X-Amz-Signature=secret&x-amz-date=9&h=2", "https://e.com/a?w=1&h=2"),
    ("https://e.com/a?X%2DAmz%2DSignature=secret", "https://e.com/a"),
    ("https://e.com/a?AWSAccessKeyId=secret&Signature=secret&Expires=9", "https://e.com/a"),
    (
        "https://e.com/a?Policy=secret&Signature=secret&Key-Pair-Id=secret&v=2",
        "https://e.com/a?v=2",
    ),
    ("https://e.com/a?X-Goog-Signature=secret&x-goog-expires=9", "https://e.com/a"),
    ("https://e.com/a?sv=1&se=2&sr=b&sp=r&SIG=secret&w=3", "https://e.com/a?w=3"),
    ("https://e.com/a?access_token=secret&size=l", "https://e.com/a?size=l"),
    ("https://e.com/a?size=l&token=secret#token=secret", "https://e.com/a?size=l"),
    ("https://e.com/a?hdnea=st=1~exp=2~hmac=secret", "https://e.com/a"),
    ("https://e.com/a?_nc_cat=1&oh=secret&oe=6501", "https://e.com/a?_nc_cat=1"),
    ("https://e.com/a?ex=1&is=2&hm=secret", "https://e.com/a"),
    ("https://e.com/a?md5=secret&expires=2", "https://e.com/a"),
    # Other separators, and those of HTML.
    ("https://e.com/a?x=1;token=secret", "https://e.com/a?x=1"),
    ("https://e.com/a?token=secret;x=1", "https://e.com/a?x=1"),
    ("https://e.com/a?token=sec;secret==;secret&x=1", "https://e.com/a?x=1"),
    ("https://e.com/a?x=1&amp;token=secret&amp;y=2", "https://e.com/a?x=1&amp;y=2"),
    ("https://e.com/a?x=1&AMP;amp;token=secret", "https://e.com/a?x=1&AMP;amp"),
    ("https://e.com/a?x=1?token=secret?y=2", "https://e.com/a?x=1?y=2"),
    ("https://e.com/a?x=1& token =secret", "https://e.com/a?x=1"),
    # In the path.
    ("https://e.com/a;jsessionid=secret", "https://e.com/a"),
    ("https://e.com/a;v=1;JSESSIONID=secret/b.jpg?x=1", "https://e.com/a;v=1/b.jpg?x=1"),
    ("https://e.com/a.jpg&token=secret/secret&x=1", "https://e.com/a.jpg&x=1"),
    ("https://e.com/a%3Bjsessionid%3Dsecret%26x=1", "https://e.com/a%26x=1"),
    # More names.
    ("https://e.com/a?sign=secret&t=1", "https://e.com/a?t=1"),
    ("https://e.com/a?authkey=secret&auth-key=secret&AUTH_KEY=secret", "https://e.com/a"),
    ("https://e.com/a?accesskey=secret&access_key=secret&AccessKeyId=secret", "https://e.com/a"),
    ("https://e.com/a?x-bce-signature=secret&x-bce-date=secret&w=1", "https://e.com/a?w=1"),
    ("https://e.com/a?csrfToken=secret&x-api-key=secret&user_password=secret", "https://e.com/a"),
    # URLs in URLs.
    (
        "https://p.com/_next/image?url=https%3A%2F%2Fu%3Asecret@e.com%2fa%3Fw%3D1%26sig%3Dsecret&q=75",
        "https://p.com/_next/image?url=https%3A%2F%2Fe.com%2fa%3Fw%3D1&q=75",
    ),
    (
        "https://p.com/?u=http%253A%252F%252Fe.com%252F%253Fx%253D1%2526token%253Dsecret&q=1",
        "https://p.com/?u=http%253A%252F%252Fe.com%252F%253Fx%253D1&q=1",
    ),
    ("https://p.com/w_1/https%3A%2F%2Fe.com%2Fa%3Ftoken%3Dsecret", None),
    ("https://p.com/2020/http://u:secret@e.com/a", "https://p.com/2020/http://e.com/a"),
    ("https://p.com/?url=https://u:secret@e.com/a&w=1", "https://p.com/?url=https://e.com/a&w=1"),
    (
        "https://p.com/?url=https://e.com/a?token=secret&w=1",
        "https://p.com/?url=https://e.com/a&w=1",
    ),
    ("https://p.com/?url=//u:secret@e.com/a", "https://p.com/?url=//e.com/a"),
    ("https://p.com/?url=u%3Asecret%40e.com", "https://p.com/?url=e.com"),
    ("https://p.com/?https://u:secret@e.com/a=1", "https://p.com/?https://e.com/a=1"),
    ("https://p.com/?to=%2Fa%3Fx%3D1%26token%3Dsecret", "https://p.com/?to=%2Fa%3Fx%3D1"),
    ("https://p.com/?to=%2Fa%3Fx=1%26token=secret", "https://p.com/?to=%2Fa%3Fx=1"),
    # No proper URLs.
    ("user:secret@example.com/a.jpg", "example.com/a.jpg"),
    ("http:/user:secret@example.com/a.jpg", "http:/example.com/a.jpg"),
    ("http:user:secret@example.com/a.jpg", "http:example.com/a.jpg"),
    ("http:\\\\user:secret@example.com/a.jpg", "http:\\\\example.com/a.jpg"),
    ("http:///user:secret@example.com/a.jpg", "http:///example.com/a.jpg"),
    ("///user:secret@example.com/a.jpg", "///example.com/a.jpg"),
    (" https://user:secret@example.com/a.jpg", " https://example.com/a.jpg"),
    ("https://user:secret%40example.com/a.jpg", "https://example.com/a.jpg"),
    ("http://http://user:secret@example.com/a.jpg", "http://http://example.com/a.jpg"),
    ("s3:/key:secret@bucket/a.jpg", "s3:/bucket/a.jpg"),
]

TEXTS = [
    ("see https://u:secret@e.com/a?token=secret.", "see https://e.com/a."),
    ("(HTTPS://e.com/a?x=1&token=secret), then", "(HTTPS://e.com/a?x=1), then"),
    (
        "url = 'https://u:sec'ret@e.com/' or url = \"http:/u:secret@e.com\"",
        "url = 'https://e.com/' or url = \"http:/e.com\"",
    ),
    ("url in ('https://e.com/a?token=secret','x')", "url in ('https://e.com/a','x')"),
    ('{"url": "https://e.com/?sig=secret", "n": 1}', '{"url": "https://e.com/", "n": 1}'),
    ("<a href=https://e.com/a?w=1&amp;sig=secret>", "<a href=https://e.com/a?w=1>"),
    ("from s3://key:secret@bucket/x to ftp://u:secret@h", "from s3://bucket/x to ftp://h"),
    (" https://e.com/a?token=secret\n", " https://e.com/a"),
    ("u:secret@e.com/a", "e.com/a"),
    ("//u:secret@e.com/a", "//e.com/a"),
    ("http:/u:secret@e.com/a", "http:/e.com/a"),
]
SAFE_TEXTS = [
    *("", "a caption; token=1 #2", "write to me@example.com", "me@example.com", "at 10:30 @home"),
    *("https://example.com/a?w=1&h=2", "see https://example.com/a, #3 and https://e.com/(b)."),
    *("logo@2x.png", "mail: a@b", "a://b", "://@"),
]


@pytest.mark.parametrize("url", UNCHANGED)
def test_what_holds_no_secret_stays_byte_for_byte(url: str) -> None:
    assert redact(url) == url


@pytest.mark.parametrize(("url", "expected"), CUT)
def test_secrets_and_signatures_go(url: str, expected: str | None) -> None:
    assert expected is None or redact(url) == expected
    assert "secret" not in redact(url)


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_urls_in_texts_lose_their_secrets(text: str, expected: str | None) -> None:
    assert expected is None or redact_text(text) == expected
    assert "secret" not in redact_text(text)


@pytest.mark.parametrize("text", SAFE_TEXTS)
def test_other_texts_stay_byte_for_byte(text: str) -> None:
    assert redact_text(text) == text


@given(st.text(alphabet=st.sampled_from(list("ab:/?#@&;=%'.\\ \n\ud800"))) | st.text())
def test_texts_never_raise(garbage: str) -> None:
    for text in (garbage, f"http://{garbage}", f"x 'http://u:p@h/{garbage}"):
        assert len(redact_text(text)) <= len(text)


@pytest.mark.parametrize("times", range(6))
def test_no_number_of_encodings_hides_a_secret(times: int) -> None:
    nested, expected = "https://u:secret@e.com/a?x=1&token=secret", "https://e.com/a?x=1"
    for _ in range(times):
        nested, expected = quote(nested, safe=""), quote(expected, safe="")
    assert redact(f"https://p.com/?url={nested}&q=1") == f"https://p.com/?url={expected}&q=1"


@given(st.text(alphabet=st.sampled_from(list("ab:/?#@[]&=%.\\ \n\0é\ud800"))) | st.text())
def test_never_raises_and_redacts_once(garbage: str) -> None:
    host_of(garbage)
    for text in (garbage, f"http://{garbage}", f"https://h/?{garbage}"):
        once = redact(text)
        assert len(once) <= len(text)
        assert redact(once) == once


@given(st.text(alphabet="abcXYZ0189-._~%/?#:", min_size=1).map(lambda text: f"hunter2{text}"))
def test_no_password_survives_whatever_is_in_it(password: str) -> None:
    assert "hunter2" not in redact(f"https://user:{password}@example.com/a.jpg")


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://user:pw@Images.Example.COM.:8443/a.jpg", "images.example.com"),
        ("http://[2001:DB8::1]:80/", "2001:db8::1"),
        ("//cdn.example/x?y@z", "cdn.example"),
        ("file:///etc/passwd", ""),
        ("no url", ""),
    ],
)
def test_host(url: str, host: str) -> None:
    assert host_of(url) == host
