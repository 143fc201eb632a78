#!/usr/bin/env bash
# Run a training in GNU screen, so that it outlives your terminal:
#   scripts/run_in_screen.sh [--name NAME] data=imdb model=small ...    start it; NAME is `run` if you give none
#   scripts/run_in_screen.sh --list                                     what is running
#   scripts/run_in_screen.sh --stop NAME                                save a checkpoint, end it, wait until it is gone
# Its output is appended to outputs/screen/NAME.log. The same command resumes it.
# `mode=train` alone starts the default training. PYTHON=... names another interpreter than the `python` of your shell.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=outputs/screen

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; }
die() { echo "error: $*" >&2; exit 2; }

need_screen() { command -v screen >/dev/null || die "GNU screen is not installed (Debian and Ubuntu: apt-get install screen)"; }

# Print the screen name of a session, as in `screen -r`, if it exists.
session_of() { screen -ls | awk -v name="palimpsest-$1" '!/Dead/ { id = $1; if (sub(/^[0-9]+\./, "", $1) && $1 == name) print id }'; }

# Print the number of the training process if it still runs; the number may belong to another process by now.
process_of() {
  local pid
  pid="$(cat "$folder/$1.pid" 2>/dev/null)" || return 1
  { tr '\0' ' ' <"/proc/$pid/cmdline" || ps -p "$pid" -o args=; } 2>/dev/null | grep -q "main\.py" && echo "$pid"
}

start() {
  local name="$1" log="$folder/$1.log"
  shift
  [[ -z "$(session_of "$name")" ]] && ! process_of "$name" >/dev/null || # after `screen -X quit` it still saves
    die "a run named $name is there already; watch it with: tail -f $log, or choose another with --name"
  mkdir -p "$folder"
  command -v "${PYTHON:-python}" >/dev/null || die "there is no ${PYTHON:-python}; activate its environment, or set PYTHON="
  screen -dmS "palimpsest-$name" bash "$PWD/scripts/run_in_screen.sh" --inside "$name" "$@"
  cat <<TEXT
started $name
  watch   tail -f $log
  attach  screen -r palimpsest-$name        (leave it again with Ctrl-a d; Ctrl-C saves and ends the run)
  stop    scripts/run_in_screen.sh --stop $name
TEXT
}

inside() { # run in the session
  local name="$1" log="$folder/$1.log" status
  shift
  {
    trap : INT HUP # the training handles Ctrl-C and the end of the session, and saves first
    echo "[$(date '+%F %T')] ${PYTHON:-python} main.py $*"
    (echo "$BASHPID" >"$folder/$name.pid" && exec "${PYTHON:-python}" -u main.py "$@") && status=0 || status=$?
    echo "[$(date '+%F %T')] ended with status $status"
    rm -f "$folder/$name.pid"
  } 2>&1 | (trap '' INT HUP && exec tee -a "$log")
}

list() {
  local name
  for name in $(screen -ls | sed -n 's/^\t[0-9]*\.palimpsest-\([^\t]*\)\t.*/\1/p'); do
    echo "$name  process $(process_of "$name" || echo "-")  $(tail -n 1 "$folder/$name.log" 2>/dev/null)"
  done
}

stop() {
  local name="$1" pid signalled=""
  [[ -n "$(session_of "$name")" ]] || die "no run named $name; --list shows what there is"
  echo "stopping $name after its optimizer step ..."
  while [[ -n "$(session_of "$name")" ]]; do
    if [[ -z "$signalled" ]] && pid="$(process_of "$name")"; then
      kill -TERM "$pid"
      signalled=yes
    fi
    sleep 1
  done
  tail -n 4 "$folder/$name.log"
}

name=run
case "${1:-}" in
  --inside) shift; inside "$@"; exit ;;
  --list) need_screen; list; exit ;;
  --stop) [[ -n "${2:-}" ]] || die "--stop needs the name of a run; --list shows them"; need_screen; stop "$2"; exit ;;
  --name) [[ "${2:-}" =~ ^[A-Za-z0-9._-]+$ ]] || die "--name=${2:-} must be letters, digits, . _ -"; name="$2"; shift 2 ;;
  -*) usage; exit 2 ;;
esac
[[ $# -gt 0 ]] || { usage >&2; die "say what to run"; }
need_screen
start "$name" "$@"
