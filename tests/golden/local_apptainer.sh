#!/bin/bash
# full/sft: made by launchers.render from templates/local.sh.j2. The run's frozen config is beside it.
# shellcheck disable=SC2016  # values stand in single quotes so that no shell expands them

RUN_DIR=/data/outputs/full/sft
PYTHON='/opt/py thon/bin/python'
JOB_ID=${POST_TRAINING_JOB_ID:?set by the local supervisor}
# Both files are appended to by every attempt: launchers.logs finds them apart by this line. The number is the one that
# `begin` will give; what modules and setup say belongs to the attempt too.
printf -v mark '\n=== attempt %d of job %s: 1 rank on %s at %(%Y-%m-%dT%H:%M:%S%z)T' \
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

# The script stays on the node, where SLURM's commands are, and only Python runs in the container. What an image sets
# itself comes before what the job has, so that what must hold is said inside; packages in the node user's home folder
# are not the image's.
# shellcheck disable=SC2054
python=(apptainer --silent exec --bind /hf,/scratch/me:/scratch:ro,/data/outputs --pwd "$RUN_DIR" '/data/it'"'"'s mine/train.sif' env "PYTHONPATH=$RUN_DIR/code" "PYTHONNOUSERSITE=${PYTHONNOUSERSITE-1}" "$PYTHON")
life() { "${python[@]}" -m post_training.run.life "$@"; }
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
hear() { :; }                           # no SLURM to ask
requeue() { exit 75; }  # the supervisor starts this script again
wait_for_the_end() { exit 143; }
cancel() { exit 143; }

# the supervisor holds the run's lock
attempt=$(life begin "$RUN_DIR" --job-id "$JOB_ID" --nodes "$(hostname)" --sole)
code=$?
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

line_of free_port $((10000 + $$ % 20000))
MASTER_PORT=$line
export MASTER_PORT MASTER_ADDR=127.0.0.1 WORLD_SIZE=1
launch() {
  local rank ranks=() code=0 status
  for ((rank = 0; rank < WORLD_SIZE; rank++)); do
    RANK=$rank LOCAL_RANK=$rank "${python[@]}" -m post_training.train "$RUN_DIR" &
    ranks+=("$!")
  done
  for rank in "${ranks[@]}"; do
    wait "$rank"
    status=$?
    if [ "$status" -ne 0 ] && [ "$code" -eq 0 ]; then
      code=$status
      # as srun's --kill-on-bad-exit: one rank that failed takes the others with it
      if [ "$status" -ne 85 ]; then kill "${ranks[@]}" 2>/dev/null; fi
    fi
  done
  return "$code"
}
launch &
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
  requeue*) requeue "${action#requeue}" ;;
  wait) wait_for_the_end ;;
  cancel) cancel ;;
  "exit "*) exit "${action#exit }" ;;
esac
exit 1
