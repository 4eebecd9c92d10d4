"""Web page at `/`: one file, with a policy that lets a browser run only the scripts of this file."""

import base64
import hashlib
import re
from pathlib import Path

PAGE_FILE = Path(__file__).with_name("templates") / "detect.html"


def read_page() -> tuple[str, dict[str, str]]:
    """Read the text of the page and its HTTP headers."""
    text = PAGE_FILE.read_text()
    return text, {
        "Content-Security-Policy": content_security_policy(text),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


def content_security_policy(text: str) -> str:
    """Allow scripts and styles by their hashes, images made by the page, requests to its own server; nothing else."""
    scripts, styles = (_hashes(text, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src blob: data:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(text: str, tag: str) -> str:
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = (hashlib.sha256(content.encode()).digest() for content in contents)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
