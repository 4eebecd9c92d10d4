"""Refusal of a request."""

from pipeline.errors import UserError


class RequestError(UserError):
    """Refused request, with a message that says how to correct it.

    Args:
        status: HTTP status.
        field: field of the request at fault, such as `images[2]`.
        retry_after_s: delay after which a retry makes sense.
    """

    def __init__(
        self, status: int, message: str, *, field: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.retry_after_s = status, message, field, retry_after_s
