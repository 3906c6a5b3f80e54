"""amqps:// with an authority of the tests' own.

The listeners are RabbitMQ's own, not a proxy's: it sends its authority along with its certificate,
which changes what OpenSSL says to a client that does not know it.
"""

import pytest
import trustme

from tests.harness.brokers import free_ports
from tests.harness.pages import block, edited
from tests.harness.scripts import DONE, NEW_TASK, WAITING, assert_told


@pytest.fixture
def host(broker):
    """The address where the listeners are, and that their certificates name."""
    broker.ctl("eval", "rabbit_networking:ensure_ssl().")
    return broker.inner_host


@pytest.fixture
def listen(broker, host):
    """Have the broker listen for TLS, with a certificate of `authority`; return its port."""

    def start_listener(authority, options="", port=None):
        certificate, port = authority.issue_cert(host), port or free_ports(1)[0]
        broker.ctl(
            "eval",
            f'ok = rabbit_networking:start_ssl_listener({{"{host}", {port}, auto}}, ['
            f"{{cert, {erlang(certificate.cert_chain_pems[0])}}},"
            f"{{key, {{'ECPrivateKey', {erlang(certificate.private_key_pem)}}}}},"
            f"{{cacerts, [{erlang(authority.cert_pem)}]}}{options}], 1).",
        )
        return port

    return start_listener


def erlang(pem):
    """Return a PEM as RabbitMQ's shell takes it, so that no file has to get to the broker."""
    lines = pem.bytes().decode().splitlines()
    return f'base64:decode(<<"{"".join(lines[1:-1])}">>)'


@pytest.fixture
def authority():
    return trustme.CA()


@pytest.fixture
def authority_file(authority, tmp_path):
    path = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(path)
    return path


def test_a_certificate_of_the_clients_is_named_as_in_the_readme(
    new_task, start, listen, host, authority, authority_file, tmp_path
):
    """Where there is none SSL says so, and no advice hides it."""
    port = listen(authority, ", {verify, verify_peer}, {fail_if_no_peer_cert, true}")
    client = authority.issue_cert("client.example")
    client.cert_chain_pems[0].write_to_path(tmp_path / "client.pem")
    client.private_key_pem.write_to_path(tmp_path / "client.key")
    here = {
        "user:password@rabbitmq.example": f"guest:guest@{host}:{port}",
        "rabbitmq.example": host,
        "/etc/ca.pem": str(authority_file),
        "/etc/client": str(tmp_path / "client"),
    }
    new_task("task", url=edited(block("text", "ssl_options").strip(), here))
    without = f"amqps://guest:guest@{host}:{port}/"
    console = start(NEW_TASK, url=without, env={"SSL_CERT_FILE": str(authority_file)})
    # RabbitMQ hangs up at once, so that its reason may not arrive.
    assert_told(console, "SSL.*(CERTIFICATE_REQUIRED|HANDSHAKE_FAILURE|EOF)")


def test_renewed_certificates_are_read(
    broker, host, listen, worker, queue, authority, authority_file
):
    """What is missing or unfinished meanwhile is told, and tried again."""
    port = listen(authority)
    options = f"{{'cafile': '{authority_file}', 'server_hostname': '{host}'}}"
    console = worker(url=f"amqps://guest:guest@{host}:{port}/%2F?ssl_options={options}")
    broker.ctl("eval", f'rabbit_networking:stop_tcp_listener({{"{host}", {port}, auto}}).')
    new = trustme.CA()
    listen(new, port=port)
    authority_file.unlink()
    broker.ctl("close_all_connections", "renewed")
    console.wait_for_line(rf".*{host}:{port}: FileNotFoundError.*No such file.*; trying again")
    authority_file.write_text("half of it")
    console.wait_for_line(rf".*{host}:{port}: SSLError.*; trying again")
    new.cert_pem.write_to_path(authority_file)
    console.wait_for_line(WAITING, count=2)
    queue.publish(b"task")
    console.wait_for_line(DONE)
