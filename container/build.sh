#!/usr/bin/env bash
# Build the image: container/build.sh [--cpu] [--tag TAG] [--wheels DIR] [-- ARGUMENTS OF docker build]
#
# --cpu          vLLM for CPUs instead of NVIDIA GPUs
# --tag TAG      name of the image; default: stator:gpu or stator:cpu
# --wheels DIR   with --cpu: a directory with the wheel of torch's CPU build for Python 3.12
# TORCH_INDEX    with --cpu: in the environment, the address of PyTorch's index of CPU builds
set -euo pipefail

fail() {
    echo "build.sh: $*" >&2
    exit 2
}

kind=gpu
tag=
wheels=
while [ $# -gt 0 ]; do
    case $1 in
        --cpu) kind=cpu ;;
        --tag) [ $# -ge 2 ] || fail "--tag needs a name"; tag=$2; shift ;;
        --wheels) [ $# -ge 2 ] || fail "--wheels needs a directory"; wheels=$2; shift ;;
        -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit ;;
        --) shift; break ;;
        *) fail "unknown option $1; options of docker build come after --" ;;
    esac
    shift
done
command -v docker >/dev/null || fail "docker is not installed"
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
arguments=(--tag "${tag:-stator:$kind}")

if [ "$kind" = gpu ]; then
    [ -z "$wheels" ] || fail "--wheels is for --cpu"
    arguments+=(--file "$repository/container/Dockerfile")
else
    if [ -n "$wheels" ]; then
        [ -d "$wheels" ] || fail "--wheels $wheels: there is no such directory"
    else
        wheels=$(mktemp -d)
        trap 'rmdir "$wheels"' EXIT
        [ -n "${TORCH_INDEX:-}" ] ||
            echo "build.sh: neither --wheels nor TORCH_INDEX: torch's CPU build must be where pip looks anyway" >&2
    fi
    arguments+=(--file "$repository/container/Dockerfile.cpu" --build-context "wheels=$wheels")
    # A secret, so that an address with a name and password in it is in no layer and no history.
    [ -z "${TORCH_INDEX:-}" ] || arguments+=(--secret "id=torch_index,env=TORCH_INDEX")
fi
# Mounts, secrets and further contexts need BuildKit, which older engines have but do not use by themselves.
DOCKER_BUILDKIT=1 docker build "${arguments[@]}" "$@" "$repository"
