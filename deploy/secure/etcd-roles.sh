#!/bin/sh
# Users and roles of one deployment in etcd, and authentication switched on. Once, against a running etcd:
#
#   ETCDCTL_ENDPOINTS=http://HEAD:2379 STATOR_NAMESPACE=stator ROOT_PASSWORD=... HEAD_PASSWORD=... \
#   DECODE_PASSWORD=... PREFILL_PASSWORD=... OPERATOR_PASSWORD=... deploy/secure/etcd-roles.sh
#
# On the nodes: ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD. Everybody reads the deployment's keys. Written are:
#
#   head       instances of Frontend, Processor and Router
#   decode     instances of VllmWorker
#   prefill    instances of PrefillWorker, and queue consumers
#   operator   settings (`stator config`)
#
# A node that runs several services needs a user with all their roles: `etcdctl user grant-role head decode` makes the head
# one that also runs decode workers. Services of your own: grant their `instances/NAME/` likewise.
set -eu

export ETCDCTL_API=3
prefix="/stator/${STATOR_NAMESPACE:-stator}/"

role() { # role NAME PREFIX...
    name=$1
    shift
    etcdctl role add "$name" >/dev/null
    etcdctl role grant-permission "$name" --prefix=true read "$prefix" >/dev/null
    # Whoever is first marks the store, and puts a token there unless the nodes were given one.
    etcdctl role grant-permission "$name" readwrite "$prefix" >/dev/null
    etcdctl role grant-permission "$name" readwrite "${prefix}.epoch" >/dev/null
    etcdctl role grant-permission "$name" readwrite "${prefix}token" >/dev/null
    for written in "$@"; do
        etcdctl role grant-permission "$name" --prefix=true readwrite "$prefix$written" >/dev/null
    done
}

user() { # user NAME PASSWORD ROLE
    etcdctl user add "$1:$2" >/dev/null
    etcdctl user grant-role "$1" "$3" >/dev/null
}

role head instances/Frontend/ instances/Processor/ instances/Router/
role decode instances/VllmWorker/
role prefill instances/PrefillWorker/ queue-consumers/
role operator settings/

user root "$ROOT_PASSWORD" root
user head "$HEAD_PASSWORD" head
user decode "$DECODE_PASSWORD" decode
user prefill "$PREFILL_PASSWORD" prefill
user operator "$OPERATOR_PASSWORD" operator

etcdctl auth enable >/dev/null
echo "etcd asks for users now; $prefix has head, decode, prefill and operator"
