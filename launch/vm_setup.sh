#!/usr/bin/env bash
# Mounts the share and installs the package on a worker of a TPU VM. `tpu_vm.sh install` calls it on every worker.
#
#   launch/vm_setup.sh [SERVER:/SHARE]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if (($# > 0)) && ! mountpoint --quiet /shared; then
    # A new VM can be busy with its automatic updates.
    sudo apt-get --yes --quiet -o DPkg::Lock::Timeout=600 install nfs-common
    sudo mkdir -p /shared
    # A worker must see at once what another one writes, so names and attributes are not cached.
    sudo mount -t nfs -o hard,nfsvers=3,actimeo=0 "$1" /shared
    sudo chmod 777 /shared
fi
if mountpoint --quiet /shared; then
    mkdir -p /shared/data
    ln -sfn /shared/data data
fi

# The images have Python 3.10. uv installs a newer one.
python3 -m pip install --quiet --user uv
[[ -d .venv ]] || python3 -m uv venv --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv --editable '.[tpu,buckets]'
.venv/bin/python -c "
import jax
jax.distributed.initialize()
print(f'process {jax.process_index()} of {jax.process_count()} has {jax.local_device_count()} of {jax.device_count()} devices')"
