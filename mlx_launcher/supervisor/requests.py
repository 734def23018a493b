"""What may be asked on the control socket, and what is wrong with a request."""

from typing import Any

from mlx_launcher.supervisor.control import Answer, error_answer

KNOWN = ("status", "metrics", "stop", "restart", "switch")


def wrong(request: dict[str, Any], default_timeout_s: float) -> Answer | None:
    """The answer to a request that is none; None to one that is. A stop without `timeout_s` gets the default."""
    do = request.get("do")
    if do not in KNOWN:
        return error_answer("bad_request", f"no request is called {do!r}", f"Known: {', '.join(KNOWN)}")
    if do == "stop":
        timeout_s = request.setdefault("timeout_s", default_timeout_s)
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 <= timeout_s < 1e9:
            return error_answer("bad_request", "timeout_s is a number of seconds")
    if do == "switch" and (
        request.get("to") not in ("fallback", "configured") or not isinstance(request.get("reason"), str)
    ):
        return error_answer("bad_request", 'to is "fallback" or "configured", reason is a text')
    return None
