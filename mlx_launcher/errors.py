"""The one exception that reaches a user: what went wrong, and what to do next."""

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_RUNNING = 3
EXIT_CONFIG = 4
EXIT_PORT_TAKEN = 5
EXIT_NOT_READY = 6


class LaunchError(Exception):
    """A failure that a user can act on.

    `code` is stable and goes into JSON (`"port_in_use"`); `message` says what and where; `hint` says what to do, and may
    be empty; `exit_code` is one of the EXIT_ numbers above.
    """

    def __init__(self, code: str, message: str, hint: str = "", exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def as_json(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message, "hint": self.hint}
