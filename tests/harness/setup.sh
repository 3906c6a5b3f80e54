# shellcheck shell=bash
# Sourced by tests/run, demo, soak and bench, in the project's folder: makes .venv, and sets
# TEST_BROKER to a RabbitMQ that is there.
. tests/harness/venv.sh

make_venv .venv requirements.txt tests/requirements.txt

engine_answers() { docker version >/dev/null && docker compose version >/dev/null; }

if [ -z "${TEST_BROKER:-}" ]; then
    if engine_answers 2>/dev/null; then TEST_BROKER=docker; else TEST_BROKER=local; fi
fi
case $TEST_BROKER in
docker)
    engine_answers || give_up "TEST_BROKER=docker needs Docker (docs.docker.com/engine/install)"
    ;;
local)
    if ! command -v rabbitmq-server >/dev/null && [ ! -d /usr/lib/rabbitmq/bin ]; then
        can_install || give_up "needs Docker, or RabbitMQ (rabbitmq.com/docs/download)"
        echo "$0: there is no RabbitMQ; TEST_BROKER=docker prevents what follows" >&2
        install rabbitmq-server
    fi
    ;;
*) give_up "TEST_BROKER=$TEST_BROKER is neither docker nor local" ;;
esac
export TEST_BROKER
