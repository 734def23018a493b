"""What can be wrong with a model, and with a request."""


class ModelFault(Exception):  # noqa: N818 - the field's word, and the channel's
    """A reason why this model will not be served however often it is tried; `hint` says what to do."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class RequestError(Exception):
    """A request that cannot be answered: HTTP status, OpenAI's error type, and where it is known the parameter at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after


class EmptyPromptError(RequestError):
    def __init__(self) -> None:
        super().__init__(400, "the prompt is empty: there is nothing to go on from", param="prompt")


class QueueFullError(RequestError):
    def __init__(self, waiting: int) -> None:
        super().__init__(
            429, f"{waiting} requests are waiting already; try again in a moment", code="queue_full", retry_after=1
        )
