# shellcheck shell=bash
# The quickstart's processes: starting, finding, stopping, removing. Uses $home, $bin and deploy/lib.sh.
#
# Scheduler i listens on 127.0.0.1:70i0 (API), 70i1 (peers), 70i2 (metrics and health); node agent i on 71i0 (data plane) and
# 71i1 (metrics and health).

replicas=(1 2 3)
nodes=(1 2 3)
endpoints=127.0.0.1:7010,127.0.0.1:7020,127.0.0.1:7030
members=1=127.0.0.1:7011/127.0.0.1:7010,2=127.0.0.1:7021/127.0.0.1:7020,3=127.0.0.1:7031/127.0.0.1:7030
export WARREN_ENDPOINTS=$endpoints

# What each node offers. CPU is handed out more often than this machine has it: the sandboxes mostly wait.
node_cpu_milli=4000
node_memory=3GiB
node_disk=64GiB

# The process of a component (`scheduler-1`, `node-2`), if it is alive and really ours.
pid_of() {
  local pid
  pid=$(cat "$home/run/$1.pid" 2> /dev/null) || return 1
  [ -n "$pid" ] && { tr '\0' ' ' < "/proc/$pid/cmdline"; } 2> /dev/null | grep -q -- "$home/$1 " && echo "$pid"
}

http_port() {
  case $1 in
    scheduler-*) echo "70${1#scheduler-}2" ;;
    node-*) echo "71${1#node-}1" ;;
  esac
}

# A line of HTTP status for a path, without needing curl.
http_status() { # port path
  local line=''
  exec 3<> "/dev/tcp/127.0.0.1/$1" || return 1
  printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "$2" >&3
  IFS= read -r -t 2 line <&3 || true
  exec 3>&-
  echo "${line//$'\r'/}"
} 2> /dev/null

is_ready() { [[ $(http_status "$(http_port "$1")" /readyz) == *' 200 '* ]]; }

start_process() { # component, command...
  local name=$1 pid
  shift
  if pid=$(pid_of "$name"); then
    # One that runs a binary which has been replaced since is started anew; sandboxes run on meanwhile.
    [[ $(readlink "/proc/$pid/exe") == *' (deleted)' ]] || return 0
    stop_process "$name"
  fi
  check_port_free "$name"
  mkdir -p "$home/$name"
  setsid "$@" >> "$home/log/$name.log" 2>&1 < /dev/null &
  echo $! > "$home/run/$name.pid"
  disown
}

check_port_free() {
  local port owner
  port=$(http_port "$1")
  owner=$(ss -Hltnp "sport = :$port or sport = :$((port - 1)) or sport = :${port%?}0" | head -n 1)
  [ -z "$owner" ] || fail "a port of $1 is taken: $owner. Stop that process and run this again."
}

start_scheduler() {
  local i=$1
  start_process "scheduler-$i" "$bin/warren-scheduler" --data-dir "$home/scheduler-$i" --replica-id "$i" \
    --api-listen "127.0.0.1:70${i}0" --peer-listen "127.0.0.1:70${i}1" --http-listen "127.0.0.1:70${i}2" \
    --initial-members "$members"
}

start_node() {
  local i=$1
  start_process "node-$i" "$bin/warren-node-agent" --data-dir "$home/node-$i" --node-id "node-$i" \
    --schedulers "$endpoints" --listen "127.0.0.1:71${i}0" --http-listen "127.0.0.1:71${i}1" \
    --cpu-milli "$node_cpu_milli" --memory "$node_memory" --disk "$node_disk"
}

# Waits until the component says that it is ready, 30 s at most.
await_ready() {
  local name=$1 deadline=$(($(now_ms) + 30000))
  until is_ready "$name"; do
    if ! pid_of "$name" > /dev/null || [ "$(now_ms)" -gt "$deadline" ]; then
      tail -n 20 "$home/log/$name.log" >&2
      fail "$name is not ready; the end of its log stands above ($home/log/$name.log)"
    fi
    sleep 0.05
  done
}

start_cluster() {
  local i begun
  begun=$(now_ms)
  for i in "${replicas[@]}"; do start_scheduler "$i"; done
  for i in "${replicas[@]}"; do await_ready "scheduler-$i"; done
  for i in "${nodes[@]}"; do start_node "$i"; done
  for i in "${nodes[@]}"; do await_ready "node-$i"; done
  "$bin/warrenctl" status | sed 's/^/    /'
  shown="3 schedulers and 3 nodes ready after $(seconds $(($(now_ms) - begun)))"
}

cluster_status() {
  local i name
  for name in "${replicas[@]/#/scheduler-}" "${nodes[@]/#/node-}"; do
    if pid_of "$name" > /dev/null; then say "$name runs as $(pid_of "$name")"; else say "$name does not run"; fi
  done
  [ ! -x "$bin/warrenctl" ] || "$bin/warrenctl" --timeout 3s status
}

# Stops a component and waits until it is gone; after 10 s by force.
stop_process() {
  local pid deadline=$(($(now_ms) + 10000))
  pid=$(pid_of "$1") || { rm -f "$home/run/$1.pid"; return 0; }
  kill -TERM "$pid" 2> /dev/null || true
  while pid_of "$1" > /dev/null; do
    [ "$(now_ms)" -le "$deadline" ] || kill -KILL "$pid" 2> /dev/null || true
    sleep 0.05
  done
  rm -f "$home/run/$1.pid"
}

clean() {
  local i left
  [ -d "$home" ] || { say "nothing to clean: there is no $home"; return; }
  for i in "${nodes[@]}"; do stop_process "node-$i"; done
  for i in "${replicas[@]}"; do stop_process "scheduler-$i"; done
  for i in "${nodes[@]}"; do
    if [ -x "$bin/warren-node-agent" ] && [ -d "$home/node-$i" ]; then
      "$bin/warren-node-agent" clean --data-dir "$home/node-$i" --node-id "node-$i" \
        || fail "node-$i could not be cleaned; nothing more was removed, run this again"
    fi
  done
  left=$(leftovers)
  [ -z "$left" ] || fail "this is left of the sandboxes, and $home was not removed:
$left"
  rm -rf "$home"
  say "${green}${bold}CLEAN${plain}: no process, mount, cgroup, namespace or file of the quickstart is left (packages and $target_dir stay)"
}

# What the sandboxes left on the host: mounts, cgroups, processes. Their network namespaces end with their processes.
leftovers() {
  grep -F " $home/" /proc/self/mountinfo | awk '{ print "mount " $5 }' || true
  find /sys/fs/cgroup -type d -path '*/warren/node-[123]*' 2> /dev/null | sed 's/^/cgroup /' || true
  # The pattern comes by a pipe, or grep would find itself.
  grep -lsFf <(echo "$home/") /proc/[0-9]*/cmdline 2> /dev/null | sed 's/^/process /' || true
}
