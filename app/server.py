"""A server of the page for this machine only."""

import socket
from contextlib import suppress

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from palimpsest.app.guard import Guard
from palimpsest.app.page import head, theme

HOST = "127.0.0.1"


def listen(port: int) -> socket.socket:
    """Return a listening socket on the loopback address; the system chooses a port for 0.

    Raises ValueError if the port is invalid or in use.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port} must lie in 0..{2**16 - 1}; 0: any that is free")
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError as error:
        listening.close()
        raise ValueError(f"--port {port} cannot be used ({error.strerror}); name another, or 0 for any") from error
    listening.listen()
    return listening


def serve(blocks: gr.Blocks, listening: socket.socket, token: str) -> None:
    """Serve the page to holders of the token until the process is interrupted."""
    config = uvicorn.Config(
        guarded(blocks, listening.getsockname()[1], token), log_level="warning", timeout_graceful_shutdown=1
    )
    with suppress(KeyboardInterrupt):  # uvicorn raises it again after its shutdown
        uvicorn.Server(config).run(sockets=[listening])


def guarded(blocks: gr.Blocks, port: int, token: str) -> FastAPI:
    """Return the application that serves the page."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, token=token, port=port)
    # Refuses other names that resolve here.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    address = {"path": "/", "server_name": HOST, "server_port": port}
    look = {"theme": theme(), "head": head(), "footer_links": []}
    off = dict.fromkeys(("run_history", "ssr_mode", "pwa", "mcp_server", "enable_monitoring"), False)
    return gr.mount_gradio_app(app, blocks, app_kwargs={"docs_url": None, "redoc_url": None}, **address, **look, **off)
