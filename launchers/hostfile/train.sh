#!/bin/bash
# One node's part of a job on several nodes, without ssh between them. Run it on every node of the hostfile:
#   launchers/hostfile/train.sh HOSTFILE NODE_RANK MASTER_ADDRESS RECIPE.yaml [key=value ...]
# With ssh and pdsh, one call on one node does:  deepspeed --hostfile HOSTFILE --module ditmoe_ds.train RECIPE.yaml
set -euo pipefail
hostfile=$1 node_rank=$2 master=$3
shift 3
exec deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$node_rank" \
  --master_addr "$master" --master_port "${MASTER_PORT:-29500}" --module ditmoe_ds.train "$@"
