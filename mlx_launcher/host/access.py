"""Who may ask, and for which model: the same for every server that a host runs."""

import contextlib
import hmac
import ipaddress

from mlx_launcher.host.errors import RequestError
from mlx_launcher.host.settings import Settings


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
    wanted = b"Bearer " + (settings["api_key"] or "").encode()
    if settings["require_key"] and not hmac.compare_digest(authorization, wanted):
        raise RequestError(401, "this server wants its API key: Authorization: Bearer KEY", code="invalid_api_key")


def is_loopback(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return False
