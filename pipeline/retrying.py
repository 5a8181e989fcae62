"""Which answers of a server may be another one later, and when it wants to be asked again."""

import datetime
import email.utils

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
