#!/bin/bash
# full/eval: made by launchers.render from templates/slurm.sh.j2. The run's frozen config is beside it.
#SBATCH --job-name=full/eval
#SBATCH --comment=/data/outputs/full/eval
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=24:00:00
#SBATCH --output=/data/outputs/full/eval/slurm/slurm-%j.out
#SBATCH --error=/data/outputs/full/eval/slurm/slurm-%j.err
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --dependency=afterok:3
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --requeue
# shellcheck disable=SC2016  # values stand in single quotes so that no shell expands them

RUN_DIR=/data/outputs/full/eval
PYTHON='/opt/py thon/bin/python'
JOB_ID=$SLURM_JOB_ID
NODE=$(hostname)
# pure SLURM output: users' formats must not change what our tools read
unset SQUEUE_FORMAT SINFO_FORMAT SACCT_FORMAT
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
export OMP_NUM_THREADS=2
# after modules and setup, which may read unset variables and change the path: the run's code is its snapshot
set -u
export PYTHONPATH="$RUN_DIR/code"
cd "$RUN_DIR" || exit 2

life() { "$PYTHON" -m post_training.run.life "$@"; }

attempt=$(life begin "$RUN_DIR" --job-id "$JOB_ID" --node "$NODE")
code=$?
if [ "$code" -eq 3 ]; then exit 0; fi # finished before: a preempted job is requeued even so
if [ "$code" -ne 0 ]; then exit "$code"; fi
export POST_TRAINING_ATTEMPT=$attempt

signal=""      # what asked this attempt to stop
interrupted=0  # a trap ran, so `wait` returned early
late=0         # the stop request was not answered in time
timer=""

# Handlers only record the request: the training processes look for it between steps, save and leave.
# shellcheck disable=SC2317  # called by the traps
ask() {
  interrupted=1
  if [ -n "$signal" ]; then return; fi
  signal=$1
  life stop "$RUN_DIR" --attempt "$attempt" --signal "$signal"
  # `read -t` on a pipe that stays silent: a sleep that leaves no process behind when its shell is killed
  (read -rt 270 <> <(:); kill -USR2 $$) &
  timer=$!
}
trap 'ask USR1' USR1
trap 'ask TERM' TERM
trap 'interrupted=1; late=1' USR2

# One task a GPU and no launcher in between: rank and world size come from SLURM's own variables.
# The batch script runs on the first node, where rank 0 is. The port follows from the job id and the start.
MASTER_ADDR=$(hostname)
MASTER_PORT=$((10000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 20000))
export MASTER_ADDR MASTER_PORT
srun --nodes=2 --ntasks=2 --ntasks-per-node=1 \
  --cpus-per-task=2 --kill-on-bad-exit=1 --export=ALL \
  "$PYTHON" -m post_training.train "$RUN_DIR" &
main=$!

# bash runs traps only between commands, and a trap ends `wait` early with a status above 128
while :; do
  interrupted=0
  wait "$main"
  code=$?
  if [ "$late" -eq 1 ]; then code=124; break; fi
  if [ "$interrupted" -eq 0 ]; then break; fi
done
if [ -n "$timer" ]; then kill "$timer" 2>/dev/null; fi

action=$(life end "$RUN_DIR" --attempt "$attempt" --code "$code" --signal "$signal") || exit 1
case $action in
  requeue)
    # the same job id: dependents keep waiting. SLURM ends this script when it has taken the request.
    scontrol requeue "$SLURM_JOB_ID" || exit 1
    exec sleep 600
    ;;
  "exit 143")
    # preempted or cancelled: SLURM ends this script. A job that left by itself within its preemption grace would
    # not be requeued by SLURM (seen with 22.05), so it stays until then.
    trap '' TERM
    exec sleep 600
    ;;
  "exit "*) exit "${action#exit }" ;;
esac
exit 1
