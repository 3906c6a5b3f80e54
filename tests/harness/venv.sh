# shellcheck shell=bash
# Sourced: how the shell scripts get what they need, and say so. It leaves the rest alone.

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

# make_venv FOLDER FILE...: a virtual environment that holds what the requirements files say, and
# what else its owner put in. One that was not finished, or is older than they are, is brought up.
make_venv() {
    local folder=$1 file stale=
    shift
    for file in "$@"; do
        [ "$folder/complete" -nt "$file" ] || stale=yes
    done
    [ "$stale" ] || return 0
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        give_up "needs Python 3.10 or later as python3"
    echo "$0: making $folder with $*" >&2
    python3 -m venv "$folder" >/dev/null 2>&1 || {
        can_install || give_up "python3 cannot make a virtual environment; install its venv module"
        install python3-venv
        python3 -m venv --clear "$folder"
    }
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${@/#/--requirement=}"
    touch "$folder/complete"
}
