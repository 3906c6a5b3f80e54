# shellcheck shell=bash
# Sourced, in the project's folder: the image that stands in for RabbitMQ's own, which the compose
# files take by this variable, and what it holds.
export RABBITMQ_IMAGE=rabbitmq-standin

# Print its versions. It has what a Debian suite had when it was built. That a suite moves on is no
# commit's fault, so it makes nothing red, but it is said.
tell_versions() {
    local named holds
    named=$(sed -n 's/.*rabbitmq:\([0-9.]*\)-management.*/\1/p' docker-compose.yml)
    # shellcheck disable=SC2016
    holds=$(docker run --rm --network none "$RABBITMQ_IMAGE" dpkg-query --show --showformat '${Version}' rabbitmq-server)
    echo "$0: $RABBITMQ_IMAGE holds RabbitMQ $holds"
    [[ $holds = "$named".* ]] ||
        echo "$0: WARNING: Debian has moved on: docker-compose.yml names RabbitMQ $named, which was not tested"
}
