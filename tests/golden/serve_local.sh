#!/bin/bash
# serve/full/sft: an OpenAI-compatible server, made by launchers.serve from templates/serve.sh.j2.
# shellcheck disable=SC2016  # values stand in single quotes so that no shell expands them

SERVER_DIR=/data/outputs/.serve/full-sft-1a2b
PYTHON='/opt/py thon/bin/python'
NAME=full/sft
MODEL=/data/outputs/full/sft/model
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=2
# nobody is told that this runs
export HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1 VLLM_NO_USAGE_STATS=1 GRADIO_ANALYTICS_ENABLED=False
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
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

port=$(free_port $((20000 + RANDOM % 10000)))
# This server's models have the names under which they are loaded, and it lists those in a hub cache: so the model's
# folder gets its name here, and stands alone in a cache of our own.
mkdir -p "$(dirname "$NAME")" "hub/models--${NAME//\//--}"/{refs,snapshots}
ln -sfn "$MODEL" "$NAME"
ln -sfn "$MODEL" "hub/models--${NAME//\//--}/snapshots/local"
printf local >"hub/models--${NAME//\//--}/refs/main"
HF_HUB_CACHE="$SERVER_DIR/hub" "$PYTHON" -m transformers.cli.transformers serve "$NAME" --host 127.0.0.1 --port "$port" \
  --dtype auto &
server=$!
until answers "$server" "$port" /health; do
  if ! kill -0 "$server" 2>/dev/null; then break; fi
  pause 0.3
done

page_port=null
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
