"""Which answers of a server may be another one later, and when it wants to be asked again."""

import datetime
import email.utils
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.client_proto import ResponseHandler

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
REDIRECTS = frozenset({301, 302, 303, 307, 308})


def retry_after_s(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; None if it says nothing."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        date = email.utils.parsedate_to_datetime(header)
        now = datetime.datetime.now(date.tzinfo)
        return max(0.0, (date - now).total_seconds())
    except (ValueError, OverflowError):
        return None


def protocol_of(response: "aiohttp.ClientResponse") -> "ResponseHandler | None":
    """What will tell how the connection ended, asked for before the body is read; None where all is there."""
    return None if response.connection is None else response.connection.protocol


def was_lost(protocol: "ResponseHandler | None") -> bool:
    """Whether its connection ended with an error (a reset, say) and was not closed in good order."""
    import aiohttp

    ended = None if protocol is None else protocol.exception()
    return ended is not None and not isinstance(ended, aiohttp.ServerDisconnectedError)


def was_cut(response: "aiohttp.ClientResponse", protocol: "ResponseHandler | None") -> bool:
    """Whether a lost connection ended a body of unknown length, which aiohttp takes for the body's end."""
    until_close = response.content_length is None and "Transfer-Encoding" not in response.headers
    return until_close and was_lost(protocol)
