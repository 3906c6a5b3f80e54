# shellcheck shell=bash
# Sourced by tests/run, demo, soak and bench, in the project's folder: makes .venv, and gets a
# broker where the machine has none.
. tests/harness/venv.sh

make_venv .venv requirements.txt tests/requirements.txt

# Only what is missing altogether is installed; what is there and not to be used is told.
if can_install && ! command -v rabbitmq-server >/dev/null; then
    if [ "${TEST_BROKER:-}" = local ] ||
        { [ -z "${TEST_BROKER:-}" ] && ! (docker version && docker compose version) >/dev/null 2>&1; }; then
        echo "$0: there is no RabbitMQ and no Docker; TEST_BROKER=docker prevents what follows" >&2
        install rabbitmq-server
    fi
fi
.venv/bin/python -m tests.harness.brokers || exit 1
