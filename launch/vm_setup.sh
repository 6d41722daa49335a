#!/usr/bin/env bash
# On a worker of a TPU VM: mounts the share and installs the package. `tpu_vm.sh install` runs it on every worker.
#
#   launch/vm_setup.sh [SERVER:/SHARE]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if (($# > 0)) && ! mountpoint --quiet /shared; then
    # A new VM may be busy with its own updates.
    sudo apt-get --yes --quiet -o DPkg::Lock::Timeout=600 install nfs-common
    sudo mkdir -p /shared
    # Every worker has to see at once what another one has made, so nothing is cached about names and attributes.
    sudo mount -t nfs -o hard,nfsvers=3,actimeo=0 "$1" /shared
    sudo chmod 777 /shared
fi
if mountpoint --quiet /shared; then
    mkdir -p /shared/data
    ln -sfn /shared/data data
fi

# The images come with Python 3.10; uv brings a newer one.
python3 -m pip install --quiet --user uv
[[ -d .venv ]] || python3 -m uv venv --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv --editable '.[tpu]'
.venv/bin/python -c "
import jax
jax.distributed.initialize()
print(f'process {jax.process_index()} of {jax.process_count()} has {jax.local_device_count()} of {jax.device_count()} devices')"
