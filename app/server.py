"""Serving the page to this machine alone."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.page import head, theme

HOST = "127.0.0.1"
# The browser is to fetch nothing from elsewhere. Gradio's own scripts are inline and build functions of text; what is
# framed carries a policy of its own.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; form-action 'self'; base-uri 'self'; frame-ancestors 'none'"
)


def listen(port: int) -> socket.socket:
    """A socket of this machine alone; of `port` 0 the system chooses one.

    Raises:
        ValueError: the port is none, or taken.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port} must lie in 0..{2**16 - 1}; 0: any that is free")
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError as error:
        listening.close()
        raise ValueError(f"--port {port} can not be had ({error.strerror}); name another, or 0 for any") from error
    listening.listen()
    return listening


def serve(blocks: gr.Blocks, listening: socket.socket) -> None:
    """Serve the page until the process is interrupted."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Policy)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])  # not under a name that points here
    gr.mount_gradio_app(
        app, blocks, path="/", server_name=HOST, server_port=listening.getsockname()[1], footer_links=[],
        run_history=False, ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, theme=theme(),
        head=head(), app_kwargs={"docs_url": None, "redoc_url": None},
    )  # fmt: skip
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    with suppress(KeyboardInterrupt):  # which uvicorn hands on once it has ended
        uvicorn.Server(config).run(sockets=[listening])


class _Policy:
    """Puts the policy on all that is sent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, _with_policy(send) if scope["type"] == "http" else send)


def _with_policy(send: Send) -> Callable:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
        await send(message)

    return sent
