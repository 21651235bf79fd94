#!/bin/bash
# full/sft: made by launchers.render from templates/slurm.sh.j2. The run's frozen config is beside it.
#SBATCH --job-name=full/sft
#SBATCH --comment=/data/outputs/full/sft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=/data/outputs/full/sft/slurm/slurm-%j.out
#SBATCH --error=/data/outputs/full/sft/slurm/slurm-%j.err
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
# shellcheck disable=SC2016  # values stand in single quotes so that no shell expands them

RUN_DIR=/data/outputs/full/sft
PYTHON='/opt/py thon/bin/python'
JOB_ID=$SLURM_JOB_ID
# Both files are appended to by every attempt: launchers.logs finds them apart by this line. The number is the one that
# `begin` will give; what modules and setup say belongs to the attempt too.
printf -v mark '\n=== attempt %d of job %s: 8 ranks on %s at %(%Y-%m-%dT%H:%M:%S%z)T' \
  "$(($(cat "$RUN_DIR/slurm/newest_attempt" 2>/dev/null) + 1))" "$JOB_ID" "${SLURM_JOB_NODELIST:-$HOSTNAME}" -1
echo "$mark"
echo "$mark" >&2
# pure SLURM output: users' formats must not change what our tools read
unset SQUEUE_FORMAT SINFO_FORMAT SACCT_FORMAT
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
export OMP_NUM_THREADS=8
# after modules and setup, which may read unset variables and change the path: the run's code is its snapshot
set -u
export PYTHONPATH="$RUN_DIR/code"
cd "$RUN_DIR" || exit 2

life() { "$PYTHON" -m post_training.run.life "$@"; }
# bash 5.2 drops a trap whose signal comes while it reads $( ) or <( ), and what that stands in: from the traps on, what
# commands say comes through a pipe. The other pipe stays empty.
exec {answers}<> <(:) {never}<> <(:)
line=""
line_of() { # COMMAND...: what it says, as one line in $line
  local status asking=1
  "$@" | tr '\n' ' ' | head -c 32768 >&"$answers"
  status=${PIPESTATUS[0]}
  echo >&"$answers"
  read -r line <&"$answers"
  return "$status"
}
# wait so many seconds: a sleep that leaves no process behind when its shell is killed
pause() { read -rt "$1" -u "$never"; }
# the first port from this one on that nobody listens on: another job may share the node
# shellcheck disable=SC2188,SC2317  # the redirection alone connects; called through line_of
free_port() { local port=$1; while (<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done; echo "$port"; }

trap '' USR1 # until there is an attempt to stop: it would end this script
starts=${SLURM_RESTART_COUNT:-0}

# What SLURM says of this job and its nodes: who is ending it, if anyone.
hear() {
  local job asking=1
  line_of timeout 10 scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null
  job=$line
  line_of timeout 10 sinfo -h -N -n "$SLURM_JOB_NODELIST" -o '%N:%t' 2>/dev/null
  word=(--restart-count "$starts" --job "$job" --node-states "$line")
}

# The same job id: dependents keep waiting. SLURM ends this script when it has taken the request.
requeue() { # [nodes to avoid]
  local avoid=${1# } tries=0 said
  trap '' TERM USR1
  until said=$(scontrol requeue "$SLURM_JOB_ID" 2>&1); do # the controller may be away for a while
    echo "$said" >&2
    tries=$((tries + 1))
    # requeued by SLURM already, or even running again while this script lives on, on a node that was given up
    if [[ $said == *"pending execution"* ]] || ! newest; then break; fi
    if [ "$tries" -ge 60 ]; then exit 1; fi
    pause 5
  done
  # only a pending job takes it
  if [ -n "$avoid" ]; then scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$avoid"; fi
  exec sleep 600
}
newest() { [ -z "$mine" ] || [ "$(cat "$RUN_DIR/slurm/newest_attempt")" -le "$mine" ]; }
mine=""

# Preempted or cancelled: SLURM ends this script. A job that left by itself within its preemption grace would
# not be requeued by SLURM (seen with 22.05), so it stays until then.
wait_for_the_end() {
  trap '' TERM USR1
  pause 3600
  if newest; then requeue; fi
  exit 143
}

# By a user, and what there was to save is saved: SLURM says so too, and ends the dependents.
cancel() {
  scancel "$SLURM_JOB_ID"
  exit 143
}

# Another job of this run may still be queued or running: only SLURM knows.
gone=""
while :; do
  attempt=$(life begin "$RUN_DIR" --job-id "$JOB_ID" --nodes "$(scontrol show hostnames | tr '\n' ',' | sed 's/,$//')" \
    --restart-count "$starts" --gone "$gone" --cluster "${SLURM_CLUSTER_NAME:-}")
  code=$?
  if [ "$code" -eq 5 ]; then requeue "$attempt"; fi
  if [ "$code" -ne 4 ]; then break; fi
  other=$attempt
  if [[ $other == local-* ]]; then # of a supervisor without SLURM, which holds this lock as long as it has the run
    if flock --nonblock "$RUN_DIR/slurm/.supervisor.lock" true; then gone=$other; continue; fi
    echo "error: a local supervisor has this run: this job leaves it alone" >&2
    exit 1
  fi
  if state=$(squeue -h --states=all -o %T -j "$other" 2>&1); then
    case $state in
      "" | BOOT_FAIL | CANCELLED | COMPLETED | DEADLINE | FAILED | NODE_FAIL | OUT_OF_MEMORY | TIMEOUT) gone=$other ;;
      COMPLETING) pause 2 ;; # its processes are being ended
      *)
        echo "error: job $other has this run ($state): this job leaves it alone" >&2
        exit 1
        ;;
    esac
  elif [[ $state == *"Invalid job id"* ]]; then
    gone=$other
  else
    echo "waiting for SLURM's word on job $other: $state" >&2
    pause 10
  fi
done
if [ "$code" -eq 6 ]; then cancel; fi
if [ "$code" -eq 3 ]; then exit 0; fi # finished before: a preempted job is requeued even so
if [ "$code" -ne 0 ]; then exit "$code"; fi
export POST_TRAINING_ATTEMPT=$attempt

signal=""      # what asked this attempt to stop
interrupted=0  # a trap ran, so `wait` returned early
late=0         # the exit code of processes that did not answer: a stop request, or the watch
aside=()       # processes of this script that do not outlive the attempt
word=()        # what SLURM said of the job while it ended
asking=0       # `line_of` waits for an answer: a handler must not ask then

# Handlers only record the request: the training processes look for it between steps, save and leave.
# shellcheck disable=SC2317  # called by the traps
ask() {
  interrupted=1
  if [ -n "$signal" ]; then return; fi
  signal=$1
  if [ "$signal" = TERM ] && [ "$asking" -eq 0 ]; then hear; fi
  life stop "$RUN_DIR" --attempt "$attempt" --signal "$signal" "${word[@]}"
  (pause 270; kill -USR2 $$) &
  aside+=("$!")
}
trap 'ask USR1' USR1
trap 'ask TERM' TERM
trap 'interrupted=1; late=124' USR2
trap 'interrupted=1; late=86' ALRM

mine=$attempt
# A step of its own that outlives this shell: where the shell alone is killed, the job would end as failed and take its
# dependents with it. SLURM gives a step KillWait seconds to leave, and the job is not over until then: time enough to
# requeue it; the SIGTERM at their beginning goes to all its processes. --mem=0: the training's step may have taken all
# of the job's memory.
export LIFE_SHELL=$$
srun --overlap --mem=0 --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" --gpus-per-node=0 --gpus=0 --input=none \
  --quiet bash -c '
    exec {never}<> <(:)
    trap "" TERM
    trap "exit 0" USR1
    while kill -0 "$LIFE_SHELL" 2>/dev/null; do read -rt 0.5 -u "$never"; done
    case $("$0" -m post_training.run.life guard "$1" --attempt "$2") in
      requeue)
        until said=$(scontrol requeue "$SLURM_JOB_ID" 2>&1) || [[ $said == *"pending execution"* ]]; do
          read -rt 1 -u "$never"
        done
        ;;
    esac
  ' "$PYTHON" "$RUN_DIR" "$attempt" &
guard=$!

# One task a GPU and no launcher in between: rank and world size come from SLURM's own variables.
# The batch script runs on the first node, where rank 0 is. The port follows from the job id and the start, so that no
# rank of an earlier one finds it.
line_of hostname
MASTER_ADDR=$line
line_of free_port $((10000 + (SLURM_JOB_ID * 7 + starts) % 20000))
MASTER_PORT=$line
export MASTER_ADDR MASTER_PORT
srun --nodes=1 --ntasks=8 --ntasks-per-node=8 \
  --cpus-per-task=8 --kill-on-bad-exit=1 --export=ALL --label \
  "$PYTHON" -m post_training.train "$RUN_DIR" &
main=$!

# Ranks that hang end themselves; where even that fails (stopped, or stuck in the kernel) this ends the attempt.
(
  SECONDS=0
  while :; do
    pause 30
    last=$(stat -c %Y "$RUN_DIR/slurm/progress.json" 2>/dev/null) || last=0
    quiet=$(($(date +%s) - last))
    if [ "$SECONDS" -gt 2280 ] && [ "$quiet" -gt 2280 ]; then kill -ALRM $$; fi
  done
) &
aside+=("$!")

# bash runs traps only between commands, and a trap ends `wait` early with a status above 128
while :; do
  interrupted=0
  wait "$main"
  code=$?
  if [ "$late" -ne 0 ]; then code=$late; break; fi
  if [ "$interrupted" -eq 0 ]; then break; fi
done
kill "${aside[@]}" 2>/dev/null

# srun ends with 0 where its node was given up; why it was asked to stop, where it was, is known already
if [ ! -e "$RUN_DIR/model/manifest.json" ] && [ -z "$signal" ]; then hear; fi
line_of life end "$RUN_DIR" --attempt "$attempt" --code "$code" --signal "$signal" "${word[@]}" || exit 1
action=$line
case $action in
  "exit "* | cancel) kill -USR1 "$guard" 2>/dev/null && wait "$guard" 2>/dev/null ;;
esac
case $action in
  requeue*) requeue "${action#requeue}" ;;
  wait) wait_for_the_end ;;
  cancel) cancel ;;
  "exit "*) exit "${action#exit }" ;;
esac
exit 1
