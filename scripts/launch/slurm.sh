#!/usr/bin/env bash
# A training run under SLURM that saves when it is asked to stop, and is queued again to go on.
# From the repository's root, with the arguments of scripts/train.py:
#
#   sbatch --partition=gpu --nodes=2 scripts/launch/slurm.sh \
#       --config=configs/mose.py:base_plus --config.data.root=/shared/MOSE --workdir=/shared/runs/mose
#
# The workdir must be given and on a file system that all nodes share. What is asked for below suits
# nodes with eight GPUs; options of sbatch on the command line go before it.
#SBATCH --job-name=sam2_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail

STOPPED=75 # exit status of a run that saved because it was asked to end

case " $* " in
*" --workdir"*) ;;
*)
  echo "error: give --workdir=DIR on a file system that all nodes share" >&2
  exit 2
  ;;
esac

# Under SLURM JAX gives process i of a node the i-th GPU, so that all processes of a node must see
# all of its GPUs (no --gpus-per-task). Of one process a node it would use one GPU: name all.
if [ "${SLURM_NTASKS_PER_NODE:-}" = 1 ] && [ "${SLURM_GPUS_ON_NODE:-1}" -gt 1 ]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

# SIGTERM is for the processes of the run; this shell must outlive them to see how they ended. No
# process is killed because another one ended first: they end one after the other.
trap : TERM
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  "${PYTHON:-python}" scripts/train.py "$@"
status=$?

# A job that the user cancelled also ends with this status, but is not running any more.
if [ $status -eq $STOPPED ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
  echo "stopped and saved: queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
