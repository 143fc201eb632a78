"""Access control of the page: a token, requests from the page itself, and only the routes that it needs.

Other programs on this machine and other web sites in the same browser can also reach 127.0.0.1. As with Jupyter, the
printed address carries a token, which the browser then keeps as a cookie.
"""

import re
import secrets
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Gradio has many more routes, among them upload, file and proxy.
_READ = re.compile(r"/|/(assets|static)/.*|/theme\.css|/favicon\.ico|/gradio_api/(queue/data|heartbeat/\w+|app_id)")
_POSTED = re.compile(r"/gradio_api/(queue/join|run/predict|cancel)")
_NO_TOKEN = "Open the address that python -m palimpsest.app has printed in its terminal: it ends with ?token=...\n"
_FOREIGN = "This request comes from another web site.\n"
# The browser must fetch nothing from elsewhere. Gradio's scripts are inline and evaluate text; framed pages carry their
# own policy.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; form-action 'self'; base-uri 'self'; frame-ancestors 'none'"
)


def new_token() -> str:
    """Return a token that cannot be guessed."""
    return secrets.token_hex(24)


class Guard:
    """An ASGI application that passes only requests of the page to `app`, and adds the policy to all responses.

    Args:
        token: the secret in the address.
        port: of the server; it is in the cookie's name, because browsers share cookies among the ports of a host.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token = app, token
        self._cookie = f"palimpsest-{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # the page uses none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":  # startup and shutdown of the server
            await self._app(scope, receive, send)
            return
        refusal, added = self._refusal(scope), {"content-security-policy": _POLICY, "referrer-policy": "same-origin"}
        if refusal is None and self._has_token(scope):
            added["set-cookie"] = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"
        await (refusal or self._app)(scope, receive, _with_headers(send, added))

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        typed = self._has_token(scope)
        if not typed and not self._is_token(_cookie(headers.get("cookie", ""), self._cookie)):
            return PlainTextResponse(_NO_TOKEN, 403)
        opened = typed and scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"  # by a link
        origins = headers.getlist("origin")
        if origins not in ([], [f"http://{headers.get('host')}"]):
            return PlainTextResponse(_FOREIGN, 403)
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not opened:
            return PlainTextResponse(_FOREIGN, 403)
        routes = {"GET": _READ, "HEAD": _READ, "POST": _POSTED}.get(scope["method"])
        if routes is None or not routes.fullmatch(scope["path"]):
            return PlainTextResponse("The page does not use this address.\n", 404)
        return None

    def _has_token(self, scope: Scope) -> bool:
        """Return True if the address carries the token."""
        return self._is_token(parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0])

    def _is_token(self, typed: str) -> bool:
        return secrets.compare_digest(typed.encode(), self._token.encode())


def _cookie(header: str, name: str) -> str:
    try:
        found = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def _with_headers(send: Send, added: dict[str, str]) -> Callable:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            more = [(name.encode(), value.encode()) for name, value in added.items()]
            message["headers"] = [*message.get("headers", []), *more]
        await send(message)

    return sent
