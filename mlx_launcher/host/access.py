"""Who may ask, from where, and for which model: the same for every server that a host runs."""

import contextlib
import functools
import hmac
import ipaddress
import re
from collections.abc import Iterable

from mlx_launcher.host.errors import RequestError
from mlx_launcher.host.settings import Settings

# What a browser says of a request that no page made (somebody typed the address), or a page of this very server.
_NO_STRANGER = (b"none", b"same-origin")
# [::1]:8081, 127.0.0.1:8081, localhost
_HOST = re.compile(rb"(?:\[([0-9a-f:.]+)\]|([0-9a-z.-]+))(?::[0-9]*)?")
_LOOKED_AT = frozenset((b"host", b"origin", b"sec-fetch-site", b"authorization"))
_SHOWN_CHARS = 80


def check_model(settings: Settings, name: str | None, *, exact: bool = False) -> None:
    """RequestError 404 for a model's name that is not answered to; `exact`: whatever `accept_any_model` says."""
    if name in (None, settings["model_id"], *settings["names"]) or (settings["accept_any_model"] and not exact):
        return
    served = ", ".join(dict.fromkeys(settings["names"]))
    raise RequestError(
        404,
        f"there is no model {name!r} here; this server answers to {served}",
        param="model",
        code="model_not_found",
    )


def check_key(settings: Settings, authorization: bytes) -> None:
    """RequestError 401 where the settings demand a key and this is another; one that nobody demands is not looked at."""
    key = (settings["api_key"] or "").encode()
    if settings["require_key"] and not (key and hmac.compare_digest(authorization, b"Bearer " + key)):
        raise RequestError(401, "this server wants its API key: Authorization: Bearer KEY", code="invalid_api_key")


def check_sender(settings: Settings, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """RequestError 403 for what a web page asks; `headers` are the request's, their names in lower case.

    A page must not reach the model in any way that a browser offers it:

    - Another origin. A request with an `Origin` is refused unless that is this server's own, http:// and the `Host` of the very
      request: a page of another program on this machine is a stranger too, as is the `null` of a file or a sandbox. Where a page
      asks without one (images, scripts, links), a browser of today says so in `Sec-Fetch-Site`.
    - A name that is made to lead here (DNS rebinding): its page has this server's origin. So `Host` has to be `localhost` or an
      address, which nobody can rebind, with any port: tunnels and containers have ports of their own. Where a key is demanded it
      protects more than a name does, and other names will do; but then the key is wanted for everything, on loopback too.

    Who sends no `Host` (HTTP/1.0) and no `Origin` is no browser. No answer ever has a CORS header, a preflight's neither.
    """
    given: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        if name in _LOOKED_AT:
            given.setdefault(name, []).append(value.strip())
    hosts = [host.lower() for host in given.get(b"host", [])]
    foreign = [host for host in hosts if not _leads_here_only(host)]
    if foreign and not settings["require_key"]:
        raise RequestError(
            403,
            f"this server does not answer to the host {_shown(foreign[0])}; use localhost or an address",
            code="foreign_host",
        )
    own = [b"http://" + host for host in hosts]
    strange = [origin for origin in given.get(b"origin", []) if [origin.lower()] != own]
    if strange or any(site not in _NO_STRANGER for site in given.get(b"sec-fetch-site", [])):
        who = _shown(strange[0]) if strange else "another origin"
        raise RequestError(403, f"this server does not answer to web pages of {who}", code="foreign_origin")
    if foreign:
        check_key(settings, given.get(b"authorization", [b""])[0])


@functools.lru_cache(maxsize=256)
def is_loopback(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return False


@functools.lru_cache(maxsize=256)
def _leads_here_only(host: bytes) -> bool:
    """Whether a `Host` is `localhost` or an address, with or without a port."""
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    name = (found[1] or found[2]).decode()
    with contextlib.suppress(ValueError):
        return name == "localhost" or bool(ipaddress.ip_address(name))
    return False


def _shown(text: bytes) -> str:
    return repr(text[:_SHOWN_CHARS].decode("latin-1"))
