"""Who may come in: amqps:// with an authority of the tests' own.

The listeners are RabbitMQ's own, not a proxy's: it sends its authority along with its certificate,
which changes what OpenSSL says to a client that does not know it.
"""

import datetime

import pytest
import trustme

from tests.harness.brokers import free_ports
from tests.harness.readmes import block, edited
from tests.harness.scripts import RECEIVED, SECRET, WAITING, assert_told


def erlang(pem):
    """Return a PEM as RabbitMQ's shell takes it, so that no file has to get to the broker."""
    lines = pem.bytes().decode().splitlines()
    return f'base64:decode(<<"{"".join(lines[1:-1])}">>)'


def listen(broker, certificate, *authorities, options="", port=None):
    """Have the broker listen for TLS with `certificate` until it ends; return HOST:PORT.

    The `authorities` go along with the certificate.
    """
    host, port = broker.inner_host, port or free_ports(1)[0]
    sent_along = ", ".join(erlang(one.cert_pem) for one in authorities)
    broker.ctl(
        "eval",
        f'ok = rabbit_networking:start_ssl_listener({{"{host}", {port}, auto}}, ['
        f"{{cert, {erlang(certificate.cert_chain_pems[0])}}},"
        f"{{key, {{'ECPrivateKey', {erlang(certificate.private_key_pem)}}}}},"
        f"{{cacerts, [{sent_along}]}}{options}], 1).",
    )
    return f"{host}:{port}"


@pytest.fixture(scope="module")
def host(shared_broker):
    """The address where the listeners are, and that their certificates name."""
    shared_broker.ctl("eval", "rabbit_networking:ensure_ssl().")
    return shared_broker.inner_host


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def authority_file(authority, tmp_path_factory):
    path = tmp_path_factory.mktemp("authority") / "authority.pem"
    authority.cert_pem.write_to_path(path)
    return str(path)


@pytest.fixture(scope="module")
def listeners(shared_broker, host, authority):
    """Where the broker listens, as HOST:PORT, by what is odd about it."""
    now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)
    expired = authority.issue_cert(host, not_before=now - 2 * day, not_after=now - day)
    elsewhere = authority.issue_cert("elsewhere.example")
    right = authority.issue_cert(host)
    ask = ", {verify, verify_peer}, {fail_if_no_peer_cert, true}"
    return {
        "nothing": listen(shared_broker, right, authority),
        "no authority": listen(shared_broker, right),
        "asks for the client's": listen(shared_broker, right, authority, options=ask),
        "name": listen(shared_broker, elsewhere, authority),
        "expired": listen(shared_broker, expired, authority),
    }


@pytest.fixture
def tell(start, program, listeners, authority_file):
    """Assert why the `program` cannot use the listener of this name; return its line."""

    def connect(odd, why, scheme="amqps", authority=authority_file):
        env = {"SSL_CERT_FILE": authority} if authority else {}
        url = f"{scheme}://guest:{SECRET}@{listeners[odd]}/%2F"
        return assert_told(start(program, url=url, env=env), why, listeners[odd])

    return connect


@pytest.mark.parametrize("where", ["in SSL_CERT_FILE", "in the URL"])
def test_tasks_are_sent_and_done_over_tls(new_task, worker, host, listeners, authority_file, where):
    url, env = f"amqps://guest:guest@{listeners['nothing']}/%2F", {}
    if where == "in the URL":  # a comma may be in a URL, too
        url += f"?ssl_options={{'cafile': '{authority_file}', 'server_hostname': '{host}'}}"
    else:
        env = {"SSL_CERT_FILE": authority_file}
    new_task("task", url=url, env=env)
    console = worker(url=url, env=env)
    console.wait_for_line(RECEIVED)
    assert console.err == []


@pytest.mark.parametrize(
    ("odd", "why"),
    [("name", "certificate is not valid for"), ("expired", "certificate has expired")],
)
def test_a_wrong_certificate_is_refused(tell, odd, why):
    tell(odd, why)


@pytest.mark.parametrize("odd", ["nothing", "no authority"])
def test_an_unknown_authority_is_refused(tell, odd):
    why = "self.signed certificate|unable to get local issuer certificate"
    tell(odd, f"CERTIFICATE_VERIFY_FAILED.*({why})", authority=None)


def test_a_listener_that_asks_for_a_certificate_says_so(tell):
    """No advice hides it. RabbitMQ hangs up at once, so that its reason may not arrive."""
    tell("asks for the client's", "SSL.*(CERTIFICATE_REQUIRED|HANDSHAKE_FAILURE|EOF)")


def test_a_listener_without_tls_behind_amqps(start, broker, program):
    place = f"127.0.0.1:{broker.port}"
    console = start(program, url=f"amqps://guest:{SECRET}@{place}/%2F")
    line = assert_told(console, "WRONG_VERSION_NUMBER|SSL.* record layer", place)
    assert f"{place}: SSLError(" in line  # in the system's words alone


def test_a_certificate_of_the_clients_is_named_as_in_the_readme(
    new_task, listeners, host, authority, authority_file, tmp_path
):
    client = authority.issue_cert("client.example")
    client.cert_chain_pems[0].write_to_path(tmp_path / "client.pem")
    client.private_key_pem.write_to_path(tmp_path / "client.key")
    here = {
        "user:password@rabbitmq.example": "guest:guest@" + listeners["asks for the client's"],
        "rabbitmq.example": host,
        "/etc/ca.pem": authority_file,
        "/etc/client": str(tmp_path / "client"),
    }
    new_task("task", url=edited(block("text", "ssl_options").strip(), here))


def test_renewed_certificates_are_read(broker, host, worker, tmp_path):
    """What is missing or unfinished meanwhile is told, and tried again."""
    old, new, file = trustme.CA(), trustme.CA(), tmp_path / "authority.pem"
    old.cert_pem.write_to_path(file)
    place = listen(broker, old.issue_cert(host), old)
    options = f"{{'cafile': '{file}', 'server_hostname': '{host}'}}"
    console = worker(url=f"amqps://guest:guest@{place}/%2F?ssl_options={options}")
    port = place.split(":")[1]
    broker.ctl("eval", f'rabbit_networking:stop_tcp_listener({{"{host}", {port}, auto}}).')
    listen(broker, new.issue_cert(host), new, port=port)
    file.unlink()
    broker.ctl("close_all_connections", "renewed")
    console.wait_for_line(rf".*{place}: FileNotFoundError.*No such file.*; trying again")
    file.write_text("half of it")
    console.wait_for_line(rf".*{place}: SSLError.*; trying again")
    new.cert_pem.write_to_path(file)
    console.wait_for_line(WAITING, count=2)
