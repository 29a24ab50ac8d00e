"""Which hosts and pages a server answers to, what its log tells of whom, and what its own pages load."""

import json
import logging
import re
from html.parser import HTMLParser

import pytest
from running import TOKEN, Inside, Running, request
from serving import fill

from infuse import InfuseError
from infuse.bases import load_base
from infuse.serving import logs
from infuse.serving.hosts import Hosts
from infuse.serving.settings import ServeConfig

NASTY = 'x\r\nINFO admin\x1b[2J\u202e\u2028\x85\x7f"\\'


@pytest.fixture(scope="module")
def shelf(tiny_base, tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf") / "adapters"
    return root, fill(root, str(tiny_base), ["ia3", "lora"])


@pytest.fixture(scope="module")
def server(shelf, tiny_base):
    with Inside(shelf[0], load_base(str(tiny_base)), watch=0, allowed_hosts=("infuse.example",)) as server:
        yield server


# Hosts

LOOPBACK = ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000"]
DIGITS = ["192.168.1.5", "10.0.0.1:80", "[fe80::1]", "8.8.8.8"]
ALIEN = [
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evil.localhost.example",
    "localhost@evil.example", "evil", "xlocalhost", "2130706433", "0177.0.0.1", "0x7f.1", "0.0.0.0.evil.example",
    "127.0.0.1%00.evil.example", "", " ", "local host", "localhost,evil.example", "localhost/", "[::1", "::1", ":80",
    "localhost:", "localhost:x", "localhost:123456", "\xff",
]  # fmt: skip


def answers(hosts, host, method="GET", **more):
    headers = {b"host": host.encode("latin-1")} | {
        name.encode(): value.encode("latin-1") for name, value in more.items()
    }
    return hosts.refusal(method, headers) is None


@pytest.mark.parametrize("bound", ["127.0.0.1", "::1", "localhost", "192.168.1.5", "0.0.0.0", "::", "infuse.example"])
def test_hosts_by_the_address_that_a_server_listens_on(bound):
    hosts = Hosts(bound)
    assert all(answers(hosts, host) for host in LOOPBACK)
    anywhere = bound in ("0.0.0.0", "::")
    assert [host for host in DIGITS if answers(hosts, host)] == [d for d in DIGITS if anywhere or d == bound]
    assert not any(answers(hosts, host) for host in ALIEN)
    assert answers(hosts, "infuse.example:1") == (bound == "infuse.example")
    named, every = Hosts(bound, ("Infuse.Example.", "[fd00::1]")), Hosts(bound, ("*",))
    assert answers(named, "infuse.example") and answers(named, "INFUSE.EXAMPLE.:443") and answers(named, "[fd00::1]:1")
    assert not answers(named, "evil.example") and not answers(named, "x.infuse.example")
    assert answers(every, "evil.example") and not answers(every, "local host")


def test_pages_of_other_sites_may_not_send():
    hosts = Hosts("127.0.0.1", ("infuse.example",))
    for method, host, origin, fine in [
        ("POST", "localhost:8000", "http://localhost:8000", True), ("POST", "localhost", "http://localhost", True),
        ("POST", "localhost:80", "http://localhost", True), ("POST", "infuse.example", "https://infuse.example", True),
        ("POST", "127.0.0.1:8000", "https://infuse.example", True),  # a proxy in front that names the server otherwise
        ("POST", "localhost:8000", "http://localhost:3000", False), ("POST", "localhost:8000", "null", False),
        ("DELETE", "localhost:8000", "https://evil.example", False), ("POST", "localhost:8000", "", False),
        ("PUT", "localhost:8000", "http://127.0.0.1:8000", False), ("GET", "localhost", "https://evil.example", True),
    ]:  # fmt: skip
        assert answers(hosts, host, method, origin=origin) == fine, (method, host, origin)


def test_hosts_over_http(server, shelf):
    body = {"adapter": shelf[1][0], "texts": ["a"]}
    for host in ("evil.example", "evil.example:80"):
        for method, path, sent in (("GET", "/healthz", b""), ("GET", "/", b""), ("POST", "/v1/classify", body),
                                   ("DELETE", f"/v1/adapters/{shelf[1][0]}", b""), ("GET", "/none", b"")):  # fmt: skip
            got = server.ask(method, path, sent, TOKEN, {"Host": host})
            assert got.status == 403 and "--allowed-hosts" in got.error, got
    assert server.ask("GET", "/healthz", headers={"Host": "a b"}).status == 400
    assert server.ask("POST", "/v1/classify", body, headers={"Host": "infuse.example"}).status == 200
    assert server.ask("POST", "/v1/classify", body, headers={"Origin": "http://localhost"}).status == 200
    assert server.ask("POST", "/v1/classify", body, headers={"Origin": "https://evil.example"}).status == 403
    sent = (
        request("GET", "http://evil.example/healthz"),
        request("GET", "http://localhost:1/healthz", headers={"Host": "x"}),
    )
    assert [server.send(each)[0].status for each in sent] == [403, 200]  # the target goes before the header
    assert server.metric('infuse_requests_total{route="other",status="403"}') > 0


@pytest.mark.parametrize("name", ["http://a", "a:80", "a/b", "", "a b", "::1"])
def test_allowed_hosts_are_names(shelf, name):
    with pytest.raises(InfuseError, match="allowed_hosts takes names"):
        ServeConfig(shelf[0], allowed_hosts=(name,)).check()
    ServeConfig(shelf[0], allowed_hosts=("*", "a.b", "[::1]")).check()


# The log


def test_nothing_in_a_line_of_the_log_ends_it_or_changes_what_a_terminal_shows():
    line = logs.event("admin", adapter=NASTY, texts=[NASTY], count=3)
    assert line.isprintable() and line.startswith('admin adapter="x\\r\\nINFO admin\\u001b[2J\\u202e')
    assert json.loads(re.search('adapter=(".*?") texts=', line)[1]) == NASTY
    try:
        raise ValueError(NASTY)
    except ValueError as error:
        record = logging.LogRecord("x", 20, "x", 1, "what %s says", (NASTY,), (ValueError, error, error.__traceback__))
    line = logs.Lines().format(record)
    assert line.isprintable() and re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO what x\\r\\nINFO", line)


def test_the_log_of_a_server(shelf, tiny_base, tmp_path):
    """Started as a user starts it: texts if asked, every deed of an admin, refused ones too, start and end."""
    name, other = shelf[1]
    content = (shelf[0] / other / "adapter_model.safetensors").read_bytes()
    with Running(shelf[0], "--base", str(tiny_base), "--log-texts", "--watch", "0", log=tmp_path / "log") as server:
        server.classify(name, "my secret\nINFO forged\x1b[2J")
        server.ask("POST", f"/v1/adapters/{name}", token=TOKEN)
        server.ask("POST", "/v1/adapters/sent", content, token=TOKEN)
        server.ask("POST", "/v1/adapters/rubbish", b"rubbish", token=TOKEN)
        server.ask("DELETE", f"/v1/adapters/{other}", token=TOKEN)
        server.ask("DELETE", f"/v1/adapters/{other}", token="a wrong one")
        server.ask("POST", "/v1/adapters/x%0D%0AINFO%20forged%1B", token=TOKEN)
        server.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: \x1b[2J\r\n\r\nforged\r\n\r\n")
        assert server.stop() == 0
        lines = [line for line in server.output.splitlines() if not line.startswith(str(tiny_base))]
    assert all(re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z (INFO|WARNING|ERROR) \w+( \w+=|$)", line) for line in lines), lines
    assert all(line.isprintable() for line in lines) and not any("INFO forged" in line[30:40] for line in lines)
    (texts,) = [line for line in lines if " classified " in line]
    assert (
        r'texts=["my secret\nINFO forged\u001b[2J"]' in texts and f'adapter="{name}"' in texts and "answers=" in texts
    )
    deeds = [re.search(r" (INFO|WARNING) (load|install|unload|admin) .*status=(\d+)", line) for line in lines]
    assert [each.groups() for each in deeds if each] == [
        ("INFO", "load", "200"), ("INFO", "install", "200"), ("WARNING", "install", "422"), ("INFO", "unload", "200"),
        ("WARNING", "admin", "401"), ("WARNING", "load", "422"),
    ]  # fmt: skip
    assert "a wrong one" not in server.output and TOKEN not in server.output
    words = [line.split()[2] for line in lines]
    assert "serving" in words and words.index("stopping") < words.index("stopped")


# Its pages


class Loads(HTMLParser):
    """What a page would load or run."""

    def __init__(self, page):
        super().__init__()
        self.found, self.scripts = [], 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")]
        self.found += [name for name, _ in attrs if name.startswith("on") or name == "style"]


@pytest.mark.parametrize("path, links", [("/", {"data:,"}), ("/docs", {"data:,", "/", "/openapi.json"})])
def test_pages_load_nothing_from_elsewhere(server, path, links):
    got = server.ask("GET", path)
    page, policy = got.body.decode(), got.headers["content-security-policy"]
    assert got.status == 200 and set(Loads(page).found) <= links and Loads(page).scripts == (path == "/")
    assert not re.search(r"@import|url\(|https?://(?!HOST:PORT)|<iframe|<object|<embed", page)
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "*" not in policy
    assert "http" not in policy and got.headers["x-content-type-options"] == "nosniff"


def test_the_description_names_every_route_and_every_answer(server):
    page = server.ask("GET", "/docs").body.decode()
    for path, methods in server.ask("GET", "/openapi.json").json["paths"].items():
        for method, about in methods.items():
            (section,) = re.findall(rf"<section><h2><code>{method.upper()} {re.escape(path)}</code>.*?</section>", page)
            assert all(f"<th>{status}</th>" in section for status in about["responses"])
    assert server.ask("GET", "/redoc").status == 404


def test_the_description_in_a_browser(server, browser):
    """Its style is applied, and the browser has nothing to say against it."""
    browser.get_log("browser")
    browser.get(f"http://127.0.0.1:{server.port}/docs")
    assert len(browser.find_elements("css selector", "main section")) > 8
    width = browser.execute_script("return getComputedStyle(document.querySelector('main section')).borderTopWidth")
    assert width == "1px" and browser.get_log("browser") == []
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
    assert all(name.startswith("data:") for name in loaded)
