"""URLs as they may be kept: without passwords, tokens and signatures.

Called for every URL that is stored in an index or appears in a message. What is cut out are the
parts that grant access: user information, and the query parameters of the signing schemes that
image hosts use (Amazon S3 and CloudFront, Google Cloud Storage, Azure SAS, Alibaba OSS, Tencent
COS, Akamai, Facebook, Discord) or whose very name says secret. Many of those words are harmless
elsewhere (`expires`, `sv`, `oh`), so they count only beside the signature they belong to; all else
stays byte for byte, since a URL is also an image's identity.
"""

import re
from urllib.parse import unquote

_SECRET_PREFIXES = ("x-amz-", "x-goog-", "x-oss-", "q-sign-", "q-key-")
_SECRETS = frozenset(
    # signatures, and the keys they name
    {"signature", "x-signature", "sig", "hmac", "hdnea", "hdnts", "hdntl", "__token__", "q-ak"}
    | {"q-signature", "awsaccesskeyid", "googleaccessid", "ossaccesskeyid", "key-pair-id"}
    # credentials
    | {"token", "access_token", "auth_token", "authtoken", "id_token", "refresh_token", "jwt"}
    | {"security-token", "auth", "auth_key", "authorization", "api_key", "apikey", "secret"}
    | {"client_secret", "password", "passwd", "pwd"}
    # sessions
    | {"session", "sessionid", "session_id", "jsessionid", "phpsessid"}
)
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


def redact(url: str) -> str:
    """A URL without user information, fragment, secrets and signatures; the rest as it was.

    Elsewhere than in HTTP a # is part of a name, and in file: URLs all is. Never raises: what is no
    URL passes as far as it has no such parts.
    """
    if "?" not in url and "@" not in url and "#" not in url:
        return url
    scheme, separator, _ = url.partition("://")
    if scheme == "file":
        return url
    text = _without_user(url) if "@" in url else url
    if not separator or scheme.lower() in ("http", "https"):
        text = text.partition("#")[0]
    base, mark, query = text.partition("?")
    kept = _without_secrets(query)
    return f"{base}{mark}{kept}" if kept or not query else base


def host_of(url: str) -> str:
    """The host a URL names, in lower case, without user, port and final dot; "" if there is none.

    Never raises. The name is as written: what it resolves to is not looked at.
    """
    found = _AUTHORITY.match(url)
    host = found[2].rpartition("@")[2] if found else ""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()


def _without_user(url: str) -> str:
    found = _AUTHORITY.match(url)
    if not found:
        return url
    scheme, authority, rest = found.groups()
    # A password that holds one of / ? # unescaped ends the authority early: what is left of it
    # looks like a host with a port that is no number, and the @ comes later.
    if "@" not in authority and not _HOST.fullmatch(authority):
        authority += rest
        rest = ""
    return f"{scheme}{authority.rpartition('@')[2]}{rest}"


def _without_secrets(query: str) -> str:
    parts = query.split("&")
    names = [unquote(part.partition("=")[0]).lower() for part in parts]
    secrets = _secrets_among(set(names))
    if not secrets:
        return query
    return "&".join(part for part, name in zip(parts, names, strict=True) if name not in secrets)


def _secrets_among(names: set[str]) -> set[str]:
    secrets = {name for name in names if name in _SECRETS or name.startswith(_SECRET_PREFIXES)}
    for needed, companions in _COMPANIONS:
        if needed <= names:
            secrets |= companions & names
    return secrets
