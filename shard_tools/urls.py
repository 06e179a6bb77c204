"""URLs as they may be kept: without passwords, tokens and signatures.

Called for every URL, and every text that may hold some, that is stored or appears in a message.
What is cut out are the parts that grant access: user information, and the query and path
parameters of the signing schemes that image hosts use (Amazon S3 and CloudFront, Google Cloud
Storage, Azure SAS, Alibaba OSS, Tencent COS, Baidu BOS, Huawei OBS, Volcengine TOS, Akamai,
Facebook, Discord) or whose very name says secret. URLs inside of URLs, as proxies have them, are
searched too, however often they are percent-encoded. Lists come from anywhere, so what is no proper
URL (`u:p@host/x`, `?a=1?token=…`, `&amp;` for `&`) is read as what was probably meant.

Many of those words are harmless elsewhere (`expires`, `sv`, `oh`), so they count only beside the
signature they belong to; all else stays byte for byte, since a URL is also an image's identity.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import unquote

_SECRET_PREFIXES = (
    *("x-amz-", "x-goog-", "x-oss-", "x-cos-", "x-bce-", "x-obs-", "x-tos-"),
    *("q-sign-", "q-key-"),
)
# Without any - and _ in them.
_SECRET_ENDINGS = (
    *("token", "signature", "secret", "password", "apikey", "accesskey", "accesskeyid"),
    *("secretkey", "authkey", "sessionid"),
)
_SECRETS = frozenset(
    {"sig", "sign", "ssig", "hmac", "hdnea", "hdnts", "hdntl", "qak", "googleaccessid"}
    | {"keypairid", "jwt", "auth", "authorization", "passwd", "pwd", "session", "phpsessid"}
)
_HARMLESS = frozenset({"x-oss-process", "x-bce-process", "x-tos-process"})  # which rendering
_AZURE = {"se", "sp", "sv", "sr", "st", "ss", "srt", "spr", "sip", "si"}
_AZURE |= {"skoid", "sktid", "skt", "ske", "sks", "skv"}
# (what must all be there, what then goes as well)
_COMPANIONS: list[tuple[set[str], set[str]]] = [
    ({"signature"}, {"expires", "policy"}),
    ({"x-signature"}, {"x-expires"}),
    ({"sig"}, _AZURE),
    ({"md5", "expires"}, {"md5", "expires"}),
    ({"oh", "oe"}, {"oh", "oe"}),  # Facebook
    ({"ex", "is", "hm"}, {"ex", "is", "hm"}),  # Discord
]
_AUTHORITY = re.compile(r"([^/?#@]*//)([^/?#]*)(.*)", re.DOTALL)
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")
# What stands before an authority in a URL, even a bad one; a drive's letter is no scheme.
_BEFORE_LOGIN = re.compile(r"[^/?#@]*//+|\s*[a-z][a-z0-9+.\-]+:[/\\]+|\s*https?:", re.IGNORECASE)
_BARE_LOGIN = re.compile(r"\s*[^/?#@:\s\\]+:[^/?#\s\\]*@")
_RELATIVE_LOGIN = re.compile(r"\s*(?:[a-z][a-z0-9+.\-]+:)?//[^/?#]*@", re.IGNORECASE)
_WEB_URL = re.compile(r"https?:[/\\]", re.IGNORECASE)
_SEPARATOR = re.compile(r"(&amp;|[&;?#])", re.IGNORECASE)
_PATH_PARAMETER = re.compile(r";([^;/=]*)=[^;/]*|&([^&;/=]*)=[^&;]*")
_ESCAPE = re.compile(r"%[0-9a-fA-F]{2}|.", re.DOTALL)
_ESCAPED_MARK = re.compile(r"%(?:25)*(?:3[abdf]|2[36]|40)", re.IGNORECASE)  # one of : ; = ? # & @
_MAX_DEPTH = 16  # URLs in URLs, and percent-encodings
# A quotation mark may be a part of a URL, unless it looks like the end of what it quotes.
_URL_IN_TEXT = re.compile(
    r"(?:https?:[/\\]|[a-z][a-z0-9+.\-]{1,20}://)(?:[^\s<>\"']|[\"'](?![\s),;:\]}]|$))*",
    re.IGNORECASE,
)
_PUNCTUATION = ").,;:!]}"


def redact(url: str) -> str:
    """A URL without user information, fragment, secrets and signatures; the rest as it was.

    Elsewhere than in HTTP a # is part of a name, and in file: URLs all is. Never raises: what is no
    URL passes as far as it has no such parts.
    """
    is_bare = not ("?" in url or "@" in url or "#" in url or ";" in url or "&" in url)
    if is_bare and ("%" not in url or not _ESCAPED_MARK.search(url)):
        return url
    if url.startswith("file:"):
        return url
    # What was cut may have stood between the parts of something else: until nothing is found.
    while (shorter := _redact_once(url, _MAX_DEPTH)) != url:
        url = shorter
    return url


def redact_text(text: str) -> str:
    """A text in which every URL is redacted, as a whole if it is one itself. Never raises.

    Of URLs inside a text those are found that have a scheme and end before a space.
    """
    if "://" not in text and "@" not in text:
        return text
    is_one = len(text.split(None, 1)) == 1
    if is_one and (_RELATIVE_LOGIN.match(text) or _BARE_LOGIN.match(text)):
        return redact(text)
    if is_one and _URL_IN_TEXT.match(text.lstrip()):
        return redact(text)
    return _URL_IN_TEXT.sub(_redact_found, text)


def host_of(url: str) -> str:
    """The host a URL names, in lower case, without user, port and final dot; "" if there is none.

    Never raises. The name is as written: what it resolves to is not looked at.
    """
    found = _AUTHORITY.match(url)
    host = found[2].rpartition("@")[2] if found else ""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()


def _redact_found(found: re.Match[str]) -> str:
    url = found[0].rstrip(_PUNCTUATION)  # the sentence's, not the URL's
    return redact(url) + found[0][len(url) :]


def _redact_once(url: str, depth: int) -> str:
    text = _without_user(url) if "@" in url or "%40" in url else url
    scheme, separator, _ = text.partition("://")
    if not separator or scheme.strip().lower() in ("http", "https"):
        text = text.partition("#")[0]
    base, mark, query = text.partition("?")
    if "%" in base or ":" in base or ";" in base or "&" in base:
        base = _redact_path(base, depth)
    kept = _without_secrets(query, depth)
    return f"{base}{mark}{kept}" if kept or not query else base


def _redact_path(base: str, depth: int) -> str:
    """All that stands before the query, the scheme and the host too."""
    if ";" in base or "&" in base:
        base = _PATH_PARAMETER.sub(_path_parameter, base)
    scheme = _BEFORE_LOGIN.match(base)
    start = scheme.end() if scheme else 0
    return base[:start] + _redact_nested(base[start:], depth)


def _path_parameter(found: re.Match[str]) -> str:
    name = _plain_name(found[1] or found[2] or "")
    return "" if _is_secret(name) else found[0]


def _without_user(url: str) -> str:
    before = _BEFORE_LOGIN.match(url)
    if before is None:
        login = _BARE_LOGIN.match(url)
        return url[login.end() :] if login else url
    start = end = before.end()
    while end < len(url) and url[end] not in "/?#":
        end += 1
    authority = url[start:end]
    # A password that holds one of / ? # unescaped ends the authority early: what is left of it
    # looks like a host with a port that is no number, and the @ comes later.
    if "@" not in authority and not _HOST.fullmatch(authority):
        authority, end = url[start:], len(url)
    return before[0] + authority.replace("%40", "@").rpartition("@")[2] + url[end:]


def _without_secrets(query: str, depth: int) -> str:
    """Name-value pairs without the secret ones; of the others, the URLs in them redacted."""
    pieces = _SEPARATOR.split(query)  # a pair, a separator, a pair, …
    names = [_plain_name(piece.partition("=")[0]) for piece in pieces[::2]]
    secrets = _secrets_among(set(names))
    kept: list[str] = []
    was_cut = False
    for name, piece, separator in zip(names, pieces[::2], ["", *pieces[1::2]], strict=True):
        # A secret may hold a ; ? or # itself: what names nothing still belongs to it.
        goes_on = was_cut and separator in (";", "?", "#") and "=" not in piece.rstrip("=")
        was_cut = name in secrets or goes_on
        if not was_cut:
            kept += [separator, _redact_pair(piece, depth)]
    return "".join(kept[1:])


def _redact_pair(pair: str, depth: int) -> str:
    if "%" in pair or ":" in pair:
        pair = _redact_nested(pair, depth)
    if "@" not in pair:
        return pair
    name, equals, value = pair.partition("=") if "=" in pair else ("", "", pair)
    is_login = _RELATIVE_LOGIN.match(value) or _BARE_LOGIN.match(value)
    return f"{name}{equals}{_without_user(value)}" if is_login else pair


def _redact_nested(text: str, depth: int) -> str:
    """A part of a URL in which there may be another URL, percent-encoded or not."""
    if not depth:
        return text
    if found := _WEB_URL.search(text):
        start = found.start()
        return text[:start] + _redact_once(text[start:], depth - 1)
    if not _ESCAPED_MARK.search(text):
        return text
    spelt = _ESCAPE.findall(text)
    plain = "".join(chr(int(one[1:], 16)) if len(one) == 3 else one for one in spelt)
    kept = _without_secrets(plain, depth - 1)
    return text if kept == plain else _spelt_like(zip(spelt, plain, strict=True), kept)


def _spelt_like(spelt: Iterable[tuple[str, str]], text: str) -> str:
    """A text as (spelling, character) pairs spell it, from some of which it was left."""
    pairs = iter(spelt)
    return "".join(next(one for one, same in pairs if same == character) for character in text)


@lru_cache(maxsize=4096)
def _plain_name(name: str) -> str:
    return unquote(name).strip().lower()


def _secrets_among(names: set[str]) -> set[str]:
    secrets = {name for name in names if _is_secret(name)}
    for needed, companions in _COMPANIONS:
        if needed <= names:
            secrets |= companions & names
    return secrets


@lru_cache(maxsize=4096)
def _is_secret(name: str) -> bool:
    if name.startswith(_SECRET_PREFIXES):
        return name not in _HARMLESS
    letters = name.replace("-", "").replace("_", "")
    return letters in _SECRETS or letters.endswith(_SECRET_ENDINGS)
