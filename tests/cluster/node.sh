#!/bin/bash
# node.sh FOLDER VENV NAME ADDRESS ARGUMENTS...: one Ray node, run in network, pid, uts, ipc and mount namespaces of its own.
# The node sees its own /tmp, /dev/shm, home and working directory. FOLDER holds its log and the cluster's `hosts`.
set -e
folder=$1 venv=$2 name=$3 address=$4
shift 4

hostname "$name"
mount --make-rprivate /
mount --bind "$folder/hosts" /etc/hosts
mount -t tmpfs tmpfs /mnt
mkdir /mnt/venv /mnt/home /mnt/work
mount --bind "$venv" /mnt/venv
exec > "$folder/$name.log" 2>&1
mount -t tmpfs -o size=3g tmpfs /tmp
mount -t tmpfs -o size=1g tmpfs /dev/shm

# The other end of this cable is moved here by the process that starts the node.
for _ in $(seq 100); do
    ip link show eth0 > /dev/null 2>&1 && break
    sleep 0.1
done
ip link set lo up
ip addr add "$address/24" dev eth0
ip link set eth0 up
ip route add default via "${address%.*}.1"

export HOME=/mnt/home PATH=/mnt/venv/bin:$PATH
unset VIRTUAL_ENV PYTHONPATH
cd /mnt/work
exec python -m ray.scripts.scripts start --node-ip-address="$address" --object-store-memory=250000000 "$@" --block
