"""Downloads with a faulty environment: wrong variables, network, proxies and caches."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from hub_runs import LFS, MODEL, SCRIPTS, TOKEN, WANTED, Run, config_json
from hub_server import Fault, serve
from stages import job_arguments, script


@pytest.fixture
def hub():
    with serve() as server:
        server.host("Qwen/tiny", MODEL, LFS)
        yield server


@pytest.fixture
def download(tmp_path, hub):
    run = Run(tmp_path, hub)
    yield run
    subprocess.run(["chmod", "-R", "u+rwX", str(tmp_path)], check=True)  # so that pytest can remove it


def kept(download, mode: str) -> None:
    """Fill the cache, change its mode, and forget the result."""
    download.succeeds(download.model())
    download.manifest.unlink()
    shutil.rmtree(download.folder / "results")
    subprocess.run(["chmod", "-R", mode, str(download.home)], check=True)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"HF_ENDPOINT": ""}, "HF_ENDPOINT is empty: set it to an address such as https://huggingface.co"),
        ({"HF_ENDPOINT": "huggingface.co"}, "HF_ENDPOINT is 'huggingface.co': set it to an address such as https://"),
        ({"HF_ENDPOINT": f"http://me:{TOKEN}@hub:port"}, "HF_ENDPOINT is 'http://hub:port'"),
        ({"HTTP_PROXY": "socks5://127.0.0.1:9"}, "HTTP_PROXY is 'socks5://127.0.0.1:9', a SOCKS proxy, which needs"),
        ({"all_proxy": "socks5h://127.0.0.1:9"}, "all_proxy is 'socks5h://127.0.0.1:9', a SOCKS proxy"),
        ({"HTTPS_PROXY": f"http://me:{TOKEN}@[::1"}, "HTTPS_PROXY is 'http://[::1': set it to the address of a proxy"),
        ({"HTTP_PROXY": "ftp://127.0.0.1:9"}, "HTTP_PROXY is 'ftp://127.0.0.1:9': set it to the address of a proxy"),
        ({"NO_PROXY": "[::1"}, "NO_PROXY is '[::1'"),
        ({"SSL_CERT_FILE": "/nowhere"}, "SSL_CERT_FILE is '/nowhere', which can't be read as certificates"),
        ({"HF_OIDC_RESOURCE": "x"}, "HF_OIDC_RESOURCE is set but yields no token"),
        ({"HF_HOME": "/etc/hostname/home"}, "/etc/hostname is not a folder: set HF_HOME to a folder"),
        (
            {"HF_HUB_CACHE": "/proc/nothing"},
            "/proc/nothing can't be created (No such file or directory): set HF_HUB_CACHE",
        ),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named_before_anything_is_asked(hub, download, setting, line):
    download.fails(download.model(**setting), line)
    assert not hub.requests


@pytest.mark.parametrize("name", ["HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"])
def test_a_setting_that_the_client_can_t_be_imported_with_is_named(download, name):
    job = job_arguments({"source": {"repo": "Qwen/tiny"}})
    command = [sys.executable, script("download"), *job, "--name", "tiny"]
    command += ["--folder", str(download.folder), "--manifest", str(download.manifest)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS), name: "1.5"}
    download.fails(
        subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120),
        f"{name} is '1.5': set it to a whole number of seconds, or unset it",
    )


def test_a_mirror_may_lie_below_a_path_and_a_token_may_end_in_a_line_break(hub, download):
    hub.prefix = "/mirror"
    download.succeeds(download.model(HF_ENDPOINT=f"{hub.address}/mirror/", HF_TOKEN=f"{TOKEN}\n"))
    assert hub.asked("resolve/")[0].headers["authorization"] == f"Bearer {TOKEN}"


def test_a_dead_proxy_is_named_without_its_password(hub, download):
    result = download.model(HTTP_PROXY=f"http://me:{TOKEN}@127.0.0.1:9")
    download.fails(result, f"no answer from {hub.address} through the proxy http://127.0.0.1:9 (HTTP_PROXY)")
    assert not hub.requests
    download.succeeds(download.model(HTTP_PROXY="http://127.0.0.1:9", NO_PROXY="127.0.0.1,localhost"))


def test_the_variable_that_keeps_it_offline_is_named(download):
    download.fails(download.model(TRANSFORMERS_OFFLINE="1"), "TRANSFORMERS_OFFLINE is set", "run once without TRANSFO")
    download.fails(download.model(TRANSFORMERS_OFFLINE="1", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"hf_x", "(Permission denied): correct it, or set HF_TOKEN"),
        (b"\xff\xfe", "(not text)"),
        (None, "(Is a directory)"),
    ],
    ids=["unreadable", "binary", "folder"],
)
def test_a_token_s_file_that_can_t_be_read_is_named(hub, download, content, words):
    file = download.home / "token"
    file.parent.mkdir()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
        file.chmod(0 if content == b"hf_x" else 0o600)
    download.fails(download.model(), f"the token file {file} can't be read", words)
    assert not hub.requests


@pytest.mark.parametrize(
    ("status", "environment", "words"),
    [
        (401, {}, "the Hub asks for a token: set HF_TOKEN"),
        (401, {"HF_TOKEN": "hf_old"}, "the Hub refuses the token: check HF_TOKEN"),
        (403, {}, "forbids it (403): check what the token may read, and what a firewall lets pass"),
        (404, {}, "answers 404: check HF_ENDPOINT"),
        (407, {}, "check the proxy, its user and its password"),
    ],
)
def test_a_refusal_suggests_the_cause(hub, download, status, environment, words):
    hub.faults.append(Fault("GET /api", status, times=99))
    download.fails(download.model(**environment), words)


PAGE = b"<html>Accept our terms</html>"


@pytest.mark.parametrize(
    ("request_", "headers", "content"),
    [
        ("GET /api", {"Content-Type": "text/html"}, PAGE),
        ("GET /api", {"Content-Encoding": "gzip"}, PAGE),
        ("/resolve/", {"Content-Type": "text/html"}, PAGE),
        ("GET /api", {"Content-Type": "application/json"}, b"[]"),
        ("GET /api", {"Content-Type": "application/json"}, b'{"id": "Qwen/tiny"}'),
        ("GET /api", {}, json.dumps({"id": "Qwen/tiny", "sha": "a" * 40, "siblings": [{"rfilename": "a"}]}).encode()),
    ],
    ids=["page", "coded", "pages for files", "list", "no commit", "no sizes"],
)
def test_a_response_that_no_hub_gives_is_reported_as_such(hub, download, request_, headers, content):
    """The answer of a network's login page, or of another kind of server."""
    hub.faults.append(Fault(request_, 200, headers, content=content, times=99))
    download.fails(download.model(), hub.address, "as a Hub does: check HF_ENDPOINT")


def test_the_host_that_does_not_answer_is_named_though_the_hub_did(hub, download):
    headers = {"Location": "http://localhost:9/content", "X-Repo-Commit": "a" * 40, "X-Linked-Size": "5"}
    hub.faults.append(Fault("HEAD .*safetensors", 302, headers | {"X-Linked-Etag": f'"{"a" * 64}"'}, times=99))
    download.fails(download.model(), "no answer from http://localhost:9 (")


def test_an_endless_redirection_ends_in_one_line(hub, download):
    hub.faults.append(Fault("GET /api", 302, {"Location": "/api/again"}, times=999))
    download.fails(download.model(), "does not answer as a Hub does")


def test_a_server_without_tls_is_asked_once(hub, download):
    result = download.model(HF_ENDPOINT=hub.address.replace("http:", "https:"))
    download.fails(result, f"no trusted connection to {hub.address.replace('http:', 'https:')}", "this machine's clock")
    assert "again in" not in result.stderr


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl, to make a certificate")
def test_an_untrusted_certificate_is_named_as_the_cause(tmp_path):
    """The certificate of an intercepting proxy, or any with a wrong clock."""
    certificate = tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", str(tmp_path / "key.pem")]
    subprocess.run([*command, "-out", str(certificate)], check=True, capture_output=True)
    with certificate.open("a") as file:
        file.write((tmp_path / "key.pem").read_text())
    with serve(certificate) as hub:
        hub.host("Qwen/tiny", MODEL, LFS)
        download = Run(tmp_path, hub)
        result = download.model()
        download.fails(
            result, f"no trusted connection to {hub.address} (", "CERTIFICATE_VERIFY_FAILED", "SSL_CERT_FILE"
        )
        assert "again in" not in result.stderr
        download.succeeds(download.model(SSL_CERT_FILE=str(certificate)))


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_read_only_cache_that_holds_everything_is_enough(download, offline):
    kept(download, "a-w")
    manifest = download.succeeds(download.model(HF_HUB_OFFLINE=offline))
    assert set(manifest.files) == WANTED


def test_a_read_only_cache_that_lacks_a_file_says_so(hub, download):
    kept(download, "a-w")
    hub.repositories["models/Qwen/tiny"].commit(MODEL | {"config.json": config_json(new=1)})
    download.fails(download.model(), "config.json", "the cache lacks the file and can't be written: set HF_HOME")


def test_a_cache_that_can_t_be_made_is_named(download):
    (download.folder / "mine").mkdir(mode=0o555)
    home = download.folder / "mine/home"
    download.fails(download.model(HF_HOME=str(home)), f"{home}/hub can't be created (Permission denied): set HF_HOME")
    download.home.write_text("a file")
    download.fails(download.model(HF_HUB_OFFLINE="1"), f"{download.home} is not a folder")


def test_a_file_of_the_cache_that_can_t_be_read_is_named(download):
    kept(download, "u+w")
    (blob,) = [path.resolve() for path in download.home.rglob("snapshots/*/config.json")]
    blob.chmod(0)
    download.fails(download.model(), "config.json: Permission denied: check who may read and write it")


def test_a_damaged_file_that_can_t_be_removed_is_not_reported_as_removed(download):
    kept(download, "u+w")
    (blob,) = [path.resolve() for path in download.home.rglob("snapshots/*/config.json")]
    blob.write_bytes(MODEL["config.json"].replace(b"5", b"6"))
    subprocess.run(["chmod", "-R", "a-w", str(download.home)], check=True)
    download.fails(download.model(), "config.json: digest", "remove it from the cache (Permission denied here)")


@pytest.mark.parametrize("tree", [None, "not JSON"])
def test_a_cache_without_its_listing_is_used_offline(download, tree):
    """A cache of an older client, or a damaged one."""
    kept(download, "u+w")
    (listing,) = download.home.rglob("trees/*.json")
    listing.unlink()
    if tree:
        listing.write_text(tree)
    assert set(download.succeeds(download.model(HF_HUB_OFFLINE="1")).files) == WANTED
