#!/usr/bin/env bash
# Train under Slurm on one node or many, and resume by itself after a preemption.
#
#   sbatch --nodes 2 scripts/slurm.sh \
#       --cfg configs/msg_base_p4_win7_224.yaml --data-path <folder> --batch-size 64
#
# One task is one process and one GPU; on nodes with 4 GPUs give --ntasks-per-node 4 and
# --gpus-per-node 4 to sbatch. Two minutes before the time limit Slurm sends SIGUSR1 to the tasks. At
# a preemption with a grace time it sends SIGTERM. The tasks then finish the current update, save and
# exit with code 75, and this script queues the job again. It does the same if a signal ends Python
# before it listens (codes 138 and 143). The job then resumes from its output folder. A job that
# scancel ended is not queued again.
#SBATCH --job-name=msg-transformer
#SBATCH --ntasks-per-node=8
# Not --gpus-per-task, which hides from each task all GPUs but one, while SLURM_LOCALID counts on.
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Two jobs may share a node: the port comes from the job's number.
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
# Since Slurm 22.05 srun does not take --cpus-per-task from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-8}

srun --kill-on-bad-exit=0 python main.py "$@"
code=$?
state=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z]*')
case "$code" in 75 | 138 | 143) stopped=true ;; *) stopped=false ;; esac
if $stopped && [ "$state" != JobState=CANCELLED ]; then
    echo "stopped by Slurm and saved: queueing job $SLURM_JOB_ID again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
