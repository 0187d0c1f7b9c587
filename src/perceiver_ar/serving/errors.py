"""Errors in OpenAI's form."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

FAILED = "the server failed to answer this request; its log has the reason"
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param, code), status, headers)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Message and name of the first wrong field in a list of pydantic's errors. Never repeats the value sent."""
    error = errors[0]
    where = [str(part) for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid" or not where:
        return "the body must be a JSON object, sent as Content-Type: application/json", None
    field = where[0]
    if error["type"] == "extra_forbidden":
        name = ".".join(where)
        return f"{name} is not supported: leave it out", name
    return f"{field} is invalid: {error['msg']}", field
