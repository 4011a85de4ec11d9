"""Remove user names and passwords from MLflow URIs and errors."""

from __future__ import annotations

import re


def _user_info(uri: str) -> str:
    """Return the "user:password@" of a URI, or ""."""
    scheme, _, rest = uri.partition("://")
    user, at, _ = rest.rpartition("@")
    return "" if scheme.startswith("sqlite") else user + at


def shown(uri: str) -> str:
    """Return a URI without its user name and password."""
    user_info = _user_info(uri)
    return uri.replace(user_info, "", 1).partition("?")[0] if user_info else uri


def without_secrets(text: str, uri: str) -> str:
    """Return a text with the user names and passwords of its URIs removed."""
    user_info = _user_info(uri)
    text = text.replace(user_info, "") if user_info else text
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)


def short_reason(error: Exception, uri: str) -> str:
    """Return an error as a short line without secrets."""
    from mlflow.exceptions import MlflowException

    # SQLAlchemy puts advice before and the whole statement after what the store says
    told = " ".join(str(error).split()).partition(" [SQL: ")[0].rpartition("prematurely) ")[2]
    text = without_secrets(told, uri)[:200]
    return text if isinstance(error, MlflowException) else f"{type(error).__name__}: {text}"
