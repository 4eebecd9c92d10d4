"""What must not be shown."""

import re

_USER = re.compile(r"(?<=://)[^/\s?#]*@")


def redact(text: str) -> str:
    """The text with user names and passwords of URIs replaced: `http://***@host/path`."""
    return _USER.sub("***@", text)
