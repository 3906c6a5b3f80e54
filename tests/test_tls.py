"""Who may come in: amqps:// with an authority of the tests' own, and credentials that stay unseen.

The listeners are RabbitMQ's own, not a proxy's: it sends its authority along with its certificate,
which changes what OpenSSL says to a client that does not know it.
"""

import datetime
import subprocess
import sys

import pytest
import trustme

from tests.harness.brokers import free_ports
from tests.harness.readmes import block
from tests.harness.scripts import BOTH, NEW_TASK, RECEIVED, SECRET, WAITING, told
from tests.harness.waiting import wait_until


def erlang(pem):
    """Return a PEM as RabbitMQ's shell takes it, so that no file has to get to the broker."""
    lines = pem.bytes().decode().splitlines()
    return f'base64:decode(<<"{"".join(lines[1:-1])}">>)'


def listen(broker, host, port, certificate, *authorities, options=""):
    """Have the broker listen there for TLS, with `certificate`; `authorities` go along with it."""
    sent_along = ", ".join(erlang(one.cert_pem) for one in authorities)
    broker.ctl(
        "eval",
        f'ok = rabbit_networking:start_ssl_listener({{"{host}", {port}, auto}}, ['
        f"{{cert, {erlang(certificate.cert_chain_pems[0])}}},"
        f"{{key, {{'ECPrivateKey', {erlang(certificate.private_key_pem)}}}}},"
        f"{{cacerts, [{sent_along}]}}{options}], 1).",
    )


def stop_listening(broker, host, port):
    broker.ctl("eval", f'rabbit_networking:stop_tcp_listener({{"{host}", {port}, auto}}).')


@pytest.fixture(scope="module")
def host(broker):
    """The address where the listeners are, and that their certificates name."""
    if sys.platform != "linux" and broker.inner_host != broker.host:
        pytest.skip("a container's own address is reached on Linux alone")
    broker.ctl("eval", "rabbit_networking:ensure_ssl().")
    return broker.inner_host


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def authority_file(authority, tmp_path_factory):
    path = tmp_path_factory.mktemp("authority") / "authority.pem"
    authority.cert_pem.write_to_path(path)
    return path


@pytest.fixture(scope="module")
def listeners(broker, host, authority):
    """TLS listeners of the broker by what is wrong with the certificates, as "host:port"."""
    now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)
    right = authority.issue_cert(host)
    certificates = {
        "nothing": right,
        "no authority": right,
        "the client's": right,
        "name": authority.issue_cert("elsewhere.example"),
        "expired": authority.issue_cert(host, not_before=now - 2 * day, not_after=now - day),
    }
    ports = dict(zip(certificates, free_ports(len(certificates)), strict=True))
    for what, certificate in certificates.items():
        authorities = [] if what == "no authority" else [authority]
        ask = ", {verify, verify_peer}, {fail_if_no_peer_cert, true}"
        options = ask if what == "the client's" else ""
        listen(broker, host, ports[what], certificate, *authorities, options=options)
    yield {what: f"{host}:{port}" for what, port in ports.items()}
    for port in ports.values():
        stop_listening(broker, host, port)


@pytest.fixture
def start(open_console):
    return lambda program, *words, **options: open_console(
        *program, *(words or ("task",) * (program is NEW_TASK)), **options
    )


@pytest.mark.parametrize("where", ["in SSL_CERT_FILE", "in the URL"])
def test_tasks_are_sent_and_done_over_tls(new_task, worker, listeners, authority_file, where):
    url, env = f"amqps://guest:guest@{listeners['nothing']}/%2F", {}
    if where == "in the URL":
        host = listeners["nothing"].rpartition(":")[0]  # a comma may be in a URL, too
        url += f"?ssl_options={{'cafile': '{authority_file}', 'server_hostname': '{host}'}}"
    else:
        env = {"SSL_CERT_FILE": str(authority_file)}
    new_task("task", url=url, env=env)
    console = worker(url=url, env=env)
    console.wait_for_line(RECEIVED)
    assert console.err == []


@BOTH
@pytest.mark.parametrize(
    "wrong, why",
    [
        ("name", "certificate is not valid for"),
        ("expired", "certificate has expired"),
    ],
)
def test_a_wrong_certificate_is_refused(start, program, listeners, authority_file, wrong, why):
    place = listeners[wrong]
    url = f"amqps://guest:{SECRET}@{place}/%2F"
    told(start(program, url=url, env={"SSL_CERT_FILE": str(authority_file)}), why, place)


def test_a_certificate_of_the_clients_is_named_as_in_the_readme(
    new_task, listeners, host, authority, authority_file, tmp_path
):
    client = authority.issue_cert("client.example")
    client.cert_chain_pems[0].write_to_path(tmp_path / "client.pem")
    client.private_key_pem.write_to_path(tmp_path / "client.key")
    url = block("text", "ssl_options").strip()
    for old, new in {
        "user:password@rabbitmq.example": "guest:guest@" + listeners["the client's"],
        "rabbitmq.example": host,
        "/etc/ca.pem": str(authority_file),
        "/etc/client": str(tmp_path / "client"),
    }.items():
        assert old in url
        url = url.replace(old, new)
    new_task("task", url=url)


@BOTH
def test_a_listener_that_asks_for_a_certificate_says_so(start, program, listeners, authority_file):
    """No advice hides it. RabbitMQ hangs up at once, so that its reason may not arrive."""
    place = listeners["the client's"]
    url = f"amqps://guest:{SECRET}@{place}/%2F"
    console = start(program, url=url, env={"SSL_CERT_FILE": str(authority_file)})
    told(console, "SSL.*(CERTIFICATE_REQUIRED|HANDSHAKE_FAILURE|EOF)", place)


def test_renewed_certificates_are_read(broker, host, worker, tmp_path):
    """A file that is missing meanwhile is told as such."""
    old, new = trustme.CA(), trustme.CA()
    file, port = tmp_path / "authority.pem", free_ports(1)[0]
    old.cert_pem.write_to_path(file)
    url = f"amqps://guest:guest@{host}:{port}/?ssl_options={{'cafile': '{file}', "
    listen(broker, host, port, old.issue_cert(host), old)
    try:
        console = worker(url=f"{url}'server_hostname': '{host}'}}")
        stop_listening(broker, host, port)
        listen(broker, host, port, new.issue_cert(host), new)
        file.unlink()
        broker.ctl("close_all_connections", "renewed")
        line = console.wait_for_line(rf".*:{port}: cannot read a file.*; trying again")
        assert "No such file" in line.text
        new.cert_pem.write_to_path(file)
        console.wait_for_line(WAITING, count=2)
    finally:
        stop_listening(broker, host, port)


@BOTH
@pytest.mark.parametrize("sent_along", ["nothing", "no authority"])
def test_an_unknown_authority_is_refused(start, program, listeners, sent_along):
    place = listeners[sent_along]
    console = start(program, url=f"amqps://guest:{SECRET}@{place}/%2F")
    why = "self.signed certificate|unable to get local issuer certificate"
    told(console, f"CERTIFICATE_VERIFY_FAILED.*({why})", place)


@BOTH
def test_a_listener_without_tls_behind_amqps(start, broker, program):
    place = f"127.0.0.1:{broker.port}"
    console = start(program, url=f"amqps://guest:{SECRET}@{place}/%2F")
    line = told(console, "WRONG_VERSION_NUMBER|SSL.* record layer", place).text
    assert f"{place}: SSLError(" in line  # in the system's words alone


@BOTH
def test_a_listener_with_tls_behind_amqp(start, listeners, program):
    """It hangs up without a word, as a broker does that boots."""
    place = listeners["nothing"]
    console = start(program, url=f"amqp://guest:{SECRET}@{place}/%2F")
    told(console, "no AMQP answer", place)


# --- Passwords: `told` looks for them in every failure; here is what else may show them ---


@pytest.fixture
def url_with_secret(broker):
    """The broker's URL for a user whose password is found wherever it shows."""
    broker.ctl("add_user", "tenant", SECRET)
    broker.ctl("set_permissions", "tenant", ".*", ".*", ".*")
    yield broker.url(f"tenant:{SECRET}")
    broker.ctl("delete_user", "tenant")


@BOTH
def test_what_rabbitmq_is_told_of_a_client_shows_no_password(
    start, broker, queue, url_with_secret, program
):
    start(program, *["-"] * (program is NEW_TASK), url=url_with_secret, stdin=subprocess.PIPE)
    name = f"{program[-1].rpartition('/')[2]} "  # what it has told RabbitMQ of itself
    shown = wait_until(
        lambda: (
            name in (text := broker.ctl("list_connections", "name", "client_properties")) and text
        ),
        f"{name} in rabbitmqctl list_connections",
    )
    assert SECRET not in shown
