#!/bin/bash
# A run on a Slurm cluster, one task a GPU, started again until it is done.
#
# Command   sbatch --nodes 8 configs/slurm.sh --config configs/swav_rn50_800ep.toml \
#               loader.dataset=s3://… checkpoint.run=s3://…
#           from the folder of the checkout, which every node sees under the same path; options of
#           sbatch go before the script's name and win over those below
#
# The store's credentials come from the environment that sbatch is called in. Five minutes before
# its time is over, and when it is preempted, every task gets SIGTERM: the ranks save and leave with
# exit code 3, and the job is put back in the queue. It then goes on from that checkpoint. Tried on
# Slurm 22.05 with two CPU tasks on one node: out of time, requeued, resumed.
#
#SBATCH --job-name=cropstream
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# All tasks of a node see all its GPUs and take the one of their local rank, so no --gpus-per-task.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it over from sbatch

# A rank that crashes leaves the others to their own errors for a minute, which say more than a kill.
# shellcheck disable=SC2016 # the tasks' variables, not ours
srun --kill-on-bad-exit=0 --wait=60 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec "$0" -m trainer "$@"
' "${PYTHON:-.venv/bin/python}" "$@"
code=$?

if test "$code" -eq 3; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
