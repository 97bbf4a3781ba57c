"""Errors as the responses that OpenAI's clients know."""

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import CnqError, Interrupted, PromptError
from ..slots import Busy, Stopping
from .protocol import ApiError


def as_api(error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case HTTPException():
            return ApiError(error.status_code, f"{error.detail}.", code=error.detail.lower().replace(" ", "_"))
        case Busy():
            return ApiError(429, str(error), code="queue_full", type="rate_limit_error")
        case Stopping() | Interrupted():
            return ApiError(503, str(Stopping()), code="stopping", type="server_error")
        case PromptError():
            return ApiError(400, str(error), code="invalid_value", param="messages")
    return ApiError(500, str(error), code="internal_error", type="server_error")


def response(error: Exception) -> Response:
    told = as_api(error)
    headers = {"WWW-Authenticate": "Bearer"} if told.status == 401 else {}
    if isinstance(error, Busy):
        headers["Retry-After"] = str(error.seconds)
    return JSONResponse(told.body(), told.status, headers)


async def refused(request: Request, error: Exception) -> Response:
    return response(error)


async def our_bug(request: Request, error: Exception) -> Response:
    """Starlette raises the error again, and its traceback is logged."""
    return response(CnqError("an error in the server itself; its log tells more."))


async def nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
