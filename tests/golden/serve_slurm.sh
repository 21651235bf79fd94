#!/bin/bash
# serve/x y/b: an OpenAI-compatible server, made by launchers.serve from templates/serve.sh.j2.
#SBATCH --job-name='serve/x y/b'
#SBATCH --partition=gpu
#SBATCH --account='a b'
#SBATCH --qos=high
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=h100:2
#SBATCH --cpus-per-task=24
#SBATCH --mem=500G
#SBATCH --time=04:00:00
#SBATCH --constraint='a&b'
#SBATCH --exclude='n[1-2]'
#SBATCH --output='/data/it'"'"'s 100%% "quoted" $HOME `x` & %%j/.serve/x/server.out'
#SBATCH --error='/data/it'"'"'s 100%% "quoted" $HOME `x` & %%j/.serve/x/server.err'
#SBATCH --no-requeue
# shellcheck disable=SC2016  # values stand in single quotes so that no shell expands them

SERVER_DIR='/data/it'"'"'s 100% "quoted" $HOME `x` & %j/.serve/x'
PYTHON='/opt/py thon/bin/python'
NAME='x y/b'
MODEL='/data/it'"'"'s 100% "quoted" $HOME `x` & %j/model'
module load cuda/12.4
module load 'my module'
export TEXT='it'"'"'s $X'
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=24
# nobody is told that this runs
export HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1 VLLM_NO_USAGE_STATS=1 GRADIO_ANALYTICS_ENABLED=False
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
ulimit -n 4096
set -u
cd "$SERVER_DIR" || exit 2

# wait so many seconds: a sleep that leaves no process behind when its shell is killed; a pipe made once, since bash 5.2
# drops a trap whose signal comes while it reads <( )
exec {never}<> <(:)
pause() { read -rt "$1" -u "$never"; }
# shellcheck disable=SC2188  # the redirection alone connects
taken() { (<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
# the first port from this one on that nobody listens on: others may share the node
free_port() { local port=$1; while taken "$port"; do port=$((port + 1)); done; echo "$port"; }
# Whether process $1 itself listens on port $2 and answers a request for $3 with 200: another program may have taken
# the port since it was looked for, and its answer says nothing about ours.
answers() {
  local inode status=""
  inode=$(awk -v at="$(printf '0100007F:%04X' "$2")" '$2 == at && $4 == "0A" { print $10 }' /proc/net/tcp)
  if [ -z "$inode" ] || [ -z "$(find "/proc/$1/fd" -lname "socket:\[$inode\]" 2>/dev/null)" ]; then return 1; fi
  { exec 3<>"/dev/tcp/127.0.0.1/$2"; } 2>/dev/null || return 1
  printf 'GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n' "$3" >&3
  read -rt 10 status <&3
  exec 3>&-
  [[ $status == *" 200 "* ]]
}

server="" page="" asked=""
# Called by the trap: cancelled, preempted, or out of time. Whoever does not leave within ten seconds is killed.
# shellcheck disable=SC2317
leave() {
  asked=1
  trap '' TERM INT HUP
  local tries=0 process
  for process in $page $server; do kill "$process" 2>/dev/null; done
  for process in $page $server; do
    while kill -0 "$process" 2>/dev/null && [ "$tries" -lt 50 ]; do pause 0.2; tries=$((tries + 1)); done
    kill -KILL "$process" 2>/dev/null
  done
}
trap leave TERM INT HUP

port=8123
if taken "$port"; then
  echo "error: serve.port=$port: a program on $(hostname) has it already" >&2
  exit 1
fi
"$PYTHON" -m vllm.entrypoints.cli.main serve "$MODEL" --served-model-name "$NAME" --host 127.0.0.1 --port "$port" \
  --dtype bfloat16 --tensor-parallel-size 2 --max-model-len=8192 'it'"'"'s $X' &
server=$!
until answers "$server" "$port" /health; do
  if ! kill -0 "$server" 2>/dev/null; then break; fi
  pause 0.3
done

page_port=null
if [ -z "$asked" ] && kill -0 "$server" 2>/dev/null; then
  page_port=$(free_port 7860)
  PYTHONPATH='/opt/post training' GRADIO_TEMP_DIR="$SERVER_DIR/tmp" "$PYTHON" -m launchers.page \
    --url "http://127.0.0.1:$port/v1" --model "$NAME" --port "$page_port" --raw >page.err 2>&1 &
  page=$!
  until answers "$page" "$page_port" /; do
    if ! kill -0 "$page" 2>/dev/null; then page_port=null; break; fi
    pause 0.3
  done
fi
if [ -z "$asked" ] && kill -0 "$server" 2>/dev/null; then
  printf '{"version": 1, "node": "%s", "port": %d, "page_port": %s, "started": %d}\n' \
    "$(hostname)" "$port" "$page_port" "$(date +%s)" >.endpoint.json.tmp
  mv .endpoint.json.tmp endpoint.json
fi

# a trap ends `wait` early, with a status above 128
wait "$server"
code=$?
if [ -n "$asked" ]; then exit 0; fi
if [ -n "$page" ]; then kill "$page" 2>/dev/null; fi
echo "error: the server ended by itself, with status $code" >&2
exit 1
