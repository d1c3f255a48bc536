#!/usr/bin/env bash
# A run on two Ray nodes of one machine, each in a network namespace of its own, joined by a virtual
# cable: what a run on two machines does, sockets and keys among it. Needs root and iproute2.
#
#     bench/two_nodes.sh configs/quickstart.yaml [KEY=VALUE ...]
#
# On real machines: `ray start --head --node-ip-address=ADDRESS --port=6379` on the first, `ray start
# --address=ADDRESS:6379 --node-ip-address=ITS_OWN` on the others, the same code and a shared run
# folder and RAY_AUTH_TOKEN on all, and on the first
# `rlhfuse train CONFIG placement.ray_address=ADDRESS:6379`.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }

head=rlhfuse-head other=rlhfuse-other net=10.213.77
ray_files=$(mktemp -d)

clean_up() {
    for name in $head $other; do
        ip netns pids $name 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns del $name 2>/dev/null || true
    done
    rm -rf "$ray_files"
}
trap clean_up EXIT

for name in $head $other; do
    ip netns add $name
    ip -n $name link set lo up
done
ip link add cable netns $head type veth peer name cable netns $other
ip -n $head addr add $net.1/24 dev cable
ip -n $other addr add $net.2/24 dev cable
ip -n $head link set cable up
ip -n $other link set cable up

# Ray nodes and drivers know each other by a token, the same on all machines.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(python -c "import secrets; print(secrets.token_hex(32))")
export RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
common=(--num-cpus=1 --object-store-memory=80000000 --disable-usage-stats)
ip netns exec $head ray start --head --node-ip-address=$net.1 --port=6379 \
    --include-dashboard=false --temp-dir="$ray_files" "${common[@]}" >/dev/null
ip netns exec $other ray start --address=$net.1:6379 --node-ip-address=$net.2 "${common[@]}" >/dev/null
ip netns exec $head rlhfuse train "$@" placement.ray_address=$net.1:6379
