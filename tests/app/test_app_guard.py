"""Access control of the page: the token, the origin of requests, and the open routes."""

from __future__ import annotations

import asyncio

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette", reason="comes with gradio")

from palimpsest.app.guard import Guard, new_token  # noqa: E402

TOKEN, PORT = "5eed" * 12, 7860
ROOT = f"http://127.0.0.1:{PORT}"
READ = ("/assets/index.js", "/static/a.js", "/theme.css", "/gradio_api/queue/data", "/gradio_api/heartbeat/abc")
ROUTES = [*(("GET", path) for path in READ), ("POST", "/gradio_api/queue/join"), ("POST", "/gradio_api/run/predict")]
FILES = ("/gradio_api/file=/etc/passwd", "/gradio_api/proxy=http://a", "/config", "/gradio_api/info",
         "/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/heartbeat/a/b")  # fmt: skip
WRITES = ("/gradio_api/upload", "/upload", "/gradio_api/component_server", "/", "/assets/a")
CLOSED = [*(("GET", path) for path in FILES), *(("POST", path) for path in WRITES), ("PUT", "/"),
          ("OPTIONS", "/gradio_api/queue/join")]  # fmt: skip
EVERY = [("GET", "/"), *ROUTES, *CLOSED]
WRONG = ("", f"palimpsest-{PORT}=", f"palimpsest-{PORT}={TOKEN[:-1]}", f"palimpsest-1={TOKEN}", f"palimpsest-{PORT}=é",
         "\x01; =")  # fmt: skip


@pytest.fixture
def reached() -> list[str]:
    """Paths of the requests that passed."""
    return []


@pytest.fixture
def ask(reached):
    """Function that sends a request to the guard: (method, path, headers) -> response."""

    async def app(scope, receive, send):
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})

    def asked(method: str, path: str, **headers: str) -> object:
        async def once() -> object:
            transport = httpx.ASGITransport(Guard(app, TOKEN, PORT))
            async with httpx.AsyncClient(transport=transport, base_url=ROOT) as client:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.request(method, path, headers=named)

        return asyncio.run(once())

    return asked


COOKIE = f"theme=dark; palimpsest-{PORT}={TOKEN}"


def test_the_token_opens_the_page_and_becomes_a_cookie(ask):
    opened = ask("GET", f"/?token={TOKEN}")
    assert opened.text == "in" and "default-src 'self'" in opened.headers["content-security-policy"]
    name, *rest = opened.headers["set-cookie"].split("; ")
    assert name == f"palimpsest-{PORT}={TOKEN}" and set(rest) == {"Path=/", "HttpOnly", "SameSite=Strict"}
    again = ask("GET", "/", cookie=COOKIE)
    assert again.text == "in" and "set-cookie" not in again.headers


@pytest.mark.parametrize("cookie", WRONG)
def test_nothing_opens_without_the_token(ask, reached, cookie):
    for method, path in EVERY:
        refused = ask(method, path, **({"cookie": cookie.encode()} if cookie else {}))
        assert refused.status_code == 403 and "?token=" in refused.text and not reached
        assert "set-cookie" not in refused.headers and "access-control-allow-origin" not in refused.headers
        assert ask(method, f"{path}?token=", cookie=cookie.encode()).status_code == 403


def test_routes_of_the_page_pass_and_others_are_closed(ask, reached):
    own = {"cookie": COOKIE, "origin": ROOT, "sec_fetch_site": "same-origin"}
    for method, path in ROUTES:
        assert ask(method, path, **own).text == "in" and ask(method, path, cookie=COOKIE).text == "in"
    reached.clear()
    for method, path in CLOSED:
        assert ask(method, path, **own).status_code == 404 and not reached


@pytest.mark.parametrize("headers", [
    {"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:9999"},
    {"origin": f"https://127.0.0.1:{PORT}"}, {"origin": f"http://localhost:{PORT}"}, {"origin": f"{ROOT}.evil.example"},
    {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"},
    {"origin": ROOT, "sec_fetch_site": "cross-site"},
])  # fmt: skip
def test_other_web_sites_are_refused_even_with_the_cookie(ask, reached, headers):
    for method, path in EVERY:
        assert ask(method, path, cookie=COOKIE, **headers).status_code == 403 and not reached


def test_a_link_with_the_token_opens_the_page_and_nothing_else(ask):
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert ask("GET", f"/?token={TOKEN}", **link).text == "in"
    assert ask("GET", "/", cookie=COOKIE, **link).status_code == 403
    assert ask("POST", f"/gradio_api/queue/join?token={TOKEN}", **link).status_code == 403
    assert ask("GET", f"/?token={TOKEN}", sec_fetch_site="cross-site", sec_fetch_mode="cors").status_code == 403


def test_there_is_no_websocket():
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/", "query_string": f"token={TOKEN}".encode(), "headers": []}
    asyncio.run(Guard(None, TOKEN, PORT)(scope, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_tokens_differ():
    assert len({new_token() for _ in range(100)}) == 100 and len(new_token()) >= 32
