#!/usr/bin/env bash
# Run stator in the image, as it would run here: container/run.sh [OPTIONS] ARGUMENTS-OF-STATOR
#
# -it              with a terminal
# --cpu            without GPUs, in the image stator:cpu
# --tag TAG        another image than stator:gpu or stator:cpu
# --env-file FILE  lines NAME=value for the container; the place for STATOR_TOKEN, if it is not in the environment
#
# For instance, in examples/llm:
#   ../../container/run.sh -it serve graphs.agg_router:Frontend -f ./configs/multinode-405b.yaml
#
# The current directory is there under its own name, and is the current one. Models and compiled kernels are kept in this
# user's caches (HF_HOME, VLLM_CACHE_ROOT, or below ~/.cache), the deployment's token in ~/.local/state/stator. Variables
# named STATOR_*, HF_*, VLLM_*, NCCL_* and UCX_*, and NATS_SERVER, ETCD_ENDPOINTS and CUDA_VISIBLE_DEVICES are passed on
# by name: their values are on no command line.
set -euo pipefail

fail() {
    echo "run.sh: $*" >&2
    exit 2
}

kind=gpu
tag=
terminal=()
env_file=()
while [ $# -gt 0 ]; do
    case $1 in
        -it | -ti) terminal=(--interactive --tty) ;;
        --cpu) kind=cpu ;;
        --tag) [ $# -ge 2 ] || fail "--tag needs a name"; tag=$2; shift ;;
        --env-file)
            [ $# -ge 2 ] || fail "--env-file needs a file"
            [ -r "$2" ] || fail "--env-file $2: there is no such file, or it may not be read"
            env_file=(--env-file "$2")
            shift
            ;;
        -h | --help) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit ;;
        --) shift; break ;;
        -*) fail "unknown option $1; options of stator come after its command" ;;
        *) break ;;
    esac
    shift
done
command -v docker >/dev/null || fail "docker is not installed"

# Never root in there: files in the caches belong to whoever started it.
user=$(id -u) group=$(id -g)
if [ "$user" -eq 0 ]; then
    user=${SUDO_UID:-1000} group=${SUDO_GID:-1000}
fi
[ "$user" -ne 0 ] || fail "SUDO_UID is 0; start it as an ordinary user who may use docker"

# Docker would make a directory that is not there, as root.
mounts=()
mount() { # mount HERE THERE
    if [ ! -d "$1" ]; then
        mkdir -p "$1"
        [ "$(id -u)" -ne 0 ] || chown "$user:$group" "$1"
    fi
    mounts+=(--volume "$1:$2")
}
home=/home/stator
mount "${HF_HOME:-$HOME/.cache/huggingface}" "$home/.cache/huggingface"
mount "${VLLM_CACHE_ROOT:-$HOME/.cache/vllm}" "$home/.cache/vllm"
mount "${XDG_STATE_HOME:-$HOME/.local/state}/stator" "$home/.local/state/stator"
mounts+=(--volume "$PWD:$PWD" --workdir "$PWD")

variables=()
while IFS= read -r name; do
    case $name in
        # Places of this machine, which are mounted where the image has them.
        HF_HOME | HF_HUB_CACHE | VLLM_CACHE_ROOT) ;;
        STATOR_* | HF_* | VLLM_* | NCCL_* | UCX_* | NATS_SERVER | ETCD_ENDPOINTS | CUDA_VISIBLE_DEVICES)
            variables+=(--env "$name")
            ;;
    esac
done < <(compgen -e)

devices=()
if [ "$kind" = gpu ]; then
    devices+=(--gpus all)
    # RDMA for NIXL and NCCL, where the node has it.
    [ ! -d /dev/infiniband ] || devices+=(--device /dev/infiniband)
    # Registered memory is locked memory; the default limit is 64 kB.
    devices+=(--ulimit memlock=-1 --ulimit stack=67108864)
fi

# The host's network: nodes tell each other addresses and ports, and NIXL and NCCL choose more. The host's shared memory:
# tensor parallel processes exchange through it, and Docker's own 64 MB are too few. 40 s to stop: Stator drains for 30.
exec docker run --rm --init --network host --ipc host --stop-timeout 40 --user "$user:$group" \
    "${terminal[@]}" "${devices[@]}" "${mounts[@]}" "${env_file[@]}" "${variables[@]}" "${tag:-stator:$kind}" "$@"
