# Sourced by tests/run, demo, soak and bench: gets what they need, says so, and leaves the rest
# alone. Needs Python 3.10 or later; makes .venv, and a broker where the machine has none.

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

give_up() {
    echo "$0: $1" >&2
    exit 1
}

can_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

install() {
    echo "$0: installing $* with apt-get" >&2
    # RUNLEVEL=1: the packages are wanted, not the services that they would start.
    (apt-get update -q && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
        apt-get install -qy --no-install-recommends "$@") >/dev/null ||
        give_up "apt-get could not install $*"
}

python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    give_up "needs Python 3.10 or later as python3"

# make_venv FOLDER FILE...: a virtual environment that holds what the requirements files say, and
# what else its owner put in. One that was not finished, or is older than they are, is brought up.
make_venv() {
    local folder=$1 file stale=
    shift
    for file in "$@"; do
        [ "$folder/complete" -nt "$file" ] || stale=yes
    done
    [ "$stale" ] || return 0
    echo "$0: making $folder with $*" >&2
    python3 -m venv "$folder" >/dev/null 2>&1 || {
        can_install || give_up "python3 cannot make a virtual environment; install its venv module"
        install python3-venv
        python3 -m venv --clear "$folder"
    }
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${@/#/--requirement=}"
    touch "$folder/complete"
}

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
