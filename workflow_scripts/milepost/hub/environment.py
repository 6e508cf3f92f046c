"""Check the Hub's environment variables, so that a wrong one ends in one line instead of a library's traceback.

This module does not import huggingface_hub, which reads its settings at import and may fail then.
"""

import os
import ssl
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from milepost.common.errors import UserError

WHOLE_NUMBERS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")  # read when huggingface_hub is imported
PUBLIC_HUB = "https://huggingface.co"


def require_importable() -> None:
    """Raise a `UserError` for settings with which huggingface_hub can't be imported."""
    for name in WHOLE_NUMBERS:
        value = os.environ.get(name, "")
        if value and not value.isdecimal():
            raise UserError(f"{name} is {value!r}: set it to a whole number of seconds, or unset it")


def require_usable(endpoint: str) -> None:
    """Raise a `UserError` for an address, a proxy or certificates that make requests to ``endpoint`` impossible."""
    _require_address(endpoint)
    for scheme in ("http", "https", "all"):
        if proxy := getproxies().get(scheme):
            _require_proxy(_variable(f"{scheme}_proxy"), proxy)
    try:
        httpx.Client().close()
    except (OSError, ssl.SSLError):
        name = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
        raise UserError(
            f"{name} is {os.environ.get(name)!r}, which can't be read as certificates: correct it, or unset it"
        ) from None
    except (ValueError, httpx.InvalidURL) as error:  # all proxies are valid, so no_proxy is not
        name = _variable("no_proxy")
        raise UserError(
            f"{name} is {os.environ.get(name)!r} ({error}): set it to host names with commas between them, or unset it"
        ) from None


def _require_address(endpoint: str) -> None:
    wanted = f"set it to an address such as {PUBLIC_HUB}, or unset it to use that one"
    if not endpoint.strip():
        raise UserError(f"HF_ENDPOINT is empty: {wanted}")
    try:
        parts = urlsplit(endpoint.strip())
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        httpx.URL(endpoint.strip())
    except (ValueError, httpx.InvalidURL):
        sound = False
    if not sound:
        raise UserError(f"HF_ENDPOINT is {without_password(endpoint)!r}: {wanted}")


def _require_proxy(name: str, proxy: str) -> None:
    shown = without_password(proxy)
    try:
        httpx.HTTPTransport(verify=False, proxy=proxy if "://" in proxy else f"http://{proxy}").close()
    except ImportError:
        raise UserError(
            f"{name} is {shown!r}, a SOCKS proxy, which needs a package that is not installed: run"
            " `uv pip install socksio`, name an http:// proxy instead, or unset it"
        ) from None
    except (ValueError, httpx.InvalidURL):  # their messages may contain part of the password
        raise UserError(
            f"{name} is {shown!r}: set it to the address of a proxy, such as http://proxy.example.org:3128, or unset it"
        ) from None


def proxy_for(address: str) -> str | None:
    """The proxy that requests to ``address`` go through, and its variable in brackets; None without a proxy."""
    parts = urlsplit(address)
    if proxy_bypass(parts.netloc):
        return None
    for scheme in (parts.scheme, "all"):
        if proxy := getproxies().get(scheme):
            return f"{without_password(proxy)} ({_variable(f'{scheme}_proxy')})"
    return None


def without_password(address: str) -> str:
    """``address`` without the user and password in front of its @."""
    scheme, separator, rest = address.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def offline_variable() -> str:
    """The variable that keeps huggingface_hub from asking the Hub."""
    return "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"


def cache_variable() -> str:
    """The variable that decides where the Hub's cache is."""
    return next((name for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if name in os.environ), "HF_HOME")


def token_source(file: str) -> str | None:
    """Where the token comes from: a variable, or the ``file`` of `hf auth login`; None where there is none."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return name
    return file if os.path.lexists(file) else None


def require_cache(cache: Path) -> None:
    """Raise a `UserError` if the cache folder does not exist and can't be created; it may be read-only."""
    advice = f"set {cache_variable()} to a folder that you may write to"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        other = next(place for place in (cache, *cache.parents) if os.path.lexists(place) and not place.is_dir())
        raise UserError(f"the Hub's cache {cache} can't be created: {other} is not a folder: {advice}") from None
    except OSError as error:
        raise UserError(f"the Hub's cache {cache} can't be created ({error.strerror}): {advice}") from None


def _variable(name: str) -> str:
    """The spelling of a proxy variable that is in effect; lower case takes precedence."""
    return name if os.environ.get(name) else name.upper()
