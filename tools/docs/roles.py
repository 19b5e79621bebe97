"""A hook of mkdocs: the roles of docstrings (``:class:`~a.b.C```) as plain code."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):<code>~?([\w.]+\.)?(\w+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Return a page whose roles show the last part of their name."""
    return _ROLE.sub(r"<code>\2</code>", html)
