"""Redaction of secrets in texts that are shown or stored."""

import re

_USER = re.compile(r"(?<=://)[^/\s?#]*@")


def redact(text: str) -> str:
    """Replace user names and passwords in URIs: `http://***@host/path`."""
    return _USER.sub("***@", text)
