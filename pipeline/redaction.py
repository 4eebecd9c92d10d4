"""Redaction of secrets in texts that are shown or stored: URIs, connection strings, headers and keys.

A password with characters that should have been escaped is ambiguous. The longer reading is then the secret, so that a
harmless part of a text may be lost and a secret is not.
"""

import re
from typing import Any

HIDDEN = "***"

# SQLAlchemy's grammar: a password holds anything but `@`, spaces too. Then up to the last `@` of the word.
_DATABASE_USER = re.compile(
    r"(\b(?:sqlite|postgres(?:ql)?|mysql|mariadb|mssql|oracle)(?:\+\w+)?://)[^\s:/]*(?::[^@\n]*)?@(?:\S*@)?"
)
# Elsewhere a space ends a password, and digits after the colon are a port. Before a lone `@` of Azure stands a container.
_USER = re.compile(
    r"(://)(?:[^\s:/?#\[]*:(?!\d{1,5}(?:[/?#\s'\"]|$))\S*@"
    r"|(?<!abfs://)(?<!abfss://)(?<!wasb://)(?<!wasbs://)[^\s/?#]*@)"
)

_NAME = (
    r"(?:[\w.-]*(?:password|passwd|passphrase|pwd|secret|secret[_-]?key|access[_-]?key(?:[_-]?id)?|account[_-]?key"
    r"|api[_-]?key|shared[_-]?key|private[_-]?key|token|signature|credentials?|authorization|odbc_connect)|sig|pass|pw)"
)
_VALUE = r"(?:'[^'\n]*'|\"[^\"\n]*\"|\{[^}\n]*\}[^&\s]*|[^&\s]*[^&\s'\",)\]}]|[^&\s])"
_PARAMETER = re.compile(rf"(?<![\w.-])({_NAME}\s?=\s?)(?!\*\*\*(?:[^\w]|$)){_VALUE}", re.IGNORECASE)
_OPTION = re.compile(rf"(--{_NAME}\s+)(?!-){_VALUE}", re.IGNORECASE)
_ITEM = re.compile(rf"(['\"]{_NAME}['\"]\s*:\s*)(?:'[^'\n]*'|\"[^\"\n]*\")", re.IGNORECASE)  # of a dictionary or JSON
_HEADER = re.compile(
    r"((?:\bauthorization|\bx-[\w-]*(?:token|key|signature))['\"]?\s*:\s*['\"]?(?:(?:bearer|basic|digest)\s+)?)[^\s'\"]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(bearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_KEY = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
)


def redact(text: str) -> str:
    """Replace user names, passwords, tokens and keys: `http://***@host/path`, `...?password=***`."""
    for pattern in (_DATABASE_USER, _USER):
        text = pattern.sub(rf"\g<1>{HIDDEN}@", text)
    for pattern in (_HEADER, _BEARER, _ITEM, _OPTION, _PARAMETER):
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return _KEY.sub(HIDDEN, text)


def redact_values(content: Any) -> Any:
    """Copy of plain data, as JSON or YAML have it, with every text redacted."""
    if isinstance(content, str):
        return redact(content)
    if isinstance(content, dict):
        return {key: redact_values(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [redact_values(value) for value in content]
    return content
