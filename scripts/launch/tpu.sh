#!/usr/bin/env bash
# Runs one command on all hosts of a Cloud TPU slice; they find each other without flags.
#
#   export TPU=NAME ZONE=europe-west4-b
#   scripts/launch/tpu.sh setup
#   scripts/launch/tpu.sh train --config=configs/mose.py:base_plus \
#       --config.data.root=/mnt/shared/MOSE --workdir=/mnt/shared/runs/mose
#   scripts/launch/tpu.sh stop
#
# setup   copies this checkout to every host and installs it
# train   scripts/train.py with the arguments given; goes on where the workdir's checkpoint ended
# stop    asks a run to save and end, from another terminal
#
# The workdir and the data must be on a file system that all hosts have mounted, such as Filestore.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${TPU:?name of the TPU slice}" "${ZONE:?zone of the TPU slice}"
CHECKOUT=sam2_jax # in the home folder of every host
PID=$CHECKOUT/.pid

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

case ${1:-} in
setup)
  packed=$(mktemp --suffix=.tgz)
  trap 'rm -f "$packed"' EXIT
  git ls-files -z | tar czf "$packed" --null --files-from=-
  gcloud compute tpus tpu-vm scp "$packed" "$TPU:$CHECKOUT.tgz" --zone="$ZONE" --worker=all
  on_all_hosts "mkdir -p $CHECKOUT && tar xzf $CHECKOUT.tgz -C $CHECKOUT && cd $CHECKOUT \
    && python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
  ;;
train)
  shift
  on_all_hosts "echo \$\$ > $PID && cd $CHECKOUT \
    && exec .venv/bin/python scripts/train.py$(printf ' %q' "$@")"
  ;;
stop)
  on_all_hosts "kill -TERM \$(cat $PID)"
  ;;
*)
  echo "error: ${1:-nothing} is none of setup, train, stop" >&2
  exit 2
  ;;
esac
