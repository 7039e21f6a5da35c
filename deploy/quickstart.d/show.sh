# shellcheck shell=bash
# The main job, shown on real sandboxes. Each function sets `shown` to what it proved. Uses cluster.sh.

count=100
during_failover=60

ctl() { "$bin/warrenctl" "$@"; }

# Numbers in sandbox ids that no earlier run used.
stamp() { date +%H%M%S; }

import_template() {
  ctl template import python "$home/python.tar" > "$home/log/import.log" || fail "the template could not be imported"
  shown=$(ctl template list -o name | tr '\n' ' ')
}

create_hundred() {
  run_id=$(stamp)
  ctl sandbox create --template python --id "demo-$run_id" --count "$count" --cpu 0.1 --memory 64MiB --wait=60s -o name \
    > "$home/log/created" || fail "not every sandbox came to run: see above"
  [ "$(wc -l < "$home/log/created")" = "$count" ] || fail "of $count sandboxes only $(wc -l < "$home/log/created") were made"
  ctl node list | sed 's/^/    /'
  shown="$count containers running on ${#nodes[@]} nodes"
}

run_python() {
  local name results=0 example
  example=$(ctl sandbox exec "demo-$run_id-1" -- python3 -c 'print(sum(n * n for n in range(1000)))')
  [ "$example" = 332833500 ] || fail "Python answered \`$example\`, not 332833500"
  note "in demo-$run_id-1: sum of the squares below 1000 = $example"
  # shellcheck disable=SC2013 # names have no blanks
  for name in $(sed -n '1p;34p;67p;100p' "$home/log/created"); do
    [ "$(ctl sandbox exec "$name" -- python3 -c 'print(6 * 7)')" = 42 ] || fail "Python in $name did not answer 42"
    results=$((results + 1))
  done
  [ "$(ctl sandbox run --cpu 0.1 --memory 64MiB python -- python3 -c 'print(6 * 7)')" = 42 ] || fail "\`sandbox run\` did not answer 42"
  shown="print(sum(n*n for n in range(1000))) = $example; $results more, and one made for it, answer 42"
}

leader() { ctl server members -o json | grep -B3 -A3 MEMBER_ROLE_LEADER | sed -n 's/.*"replicaId": *"\{0,1\}\([0-9]*\).*/\1/p' | head -n 1; }

# Kills the leader while sandboxes are being created; every create that was acknowledged must be there afterwards.
kill_leader() {
  local victim pid creating acknowledged=$home/log/acknowledged lost=0 name
  victim=$(leader)
  [ -n "$victim" ] || fail "no leader is known"
  pid=$(pid_of "scheduler-$victim")
  : > "$acknowledged"
  ctl sandbox create --template python --id "flow-$run_id" --count "$during_failover" --cpu 0.05 --memory 32MiB -o name \
    > "$acknowledged" &
  creating=$!
  until [ -s "$acknowledged" ] || ! kill -0 "$creating" 2> /dev/null; do sleep 0.002; done
  kill -KILL "$pid"
  note "scheduler $victim led; killed with SIGKILL after $(wc -l < "$acknowledged") of $during_failover creates"
  wait "$creating" || fail "creates failed after the leader was killed"
  ctl sandbox list -o name > "$home/log/known"
  # shellcheck disable=SC2013 # names have no blanks
  for name in $(cat "$home/log/created" "$acknowledged"); do
    grep -qxF "$name" "$home/log/known" || lost=$((lost + 1))
  done
  [ "$lost" = 0 ] || fail "$lost acknowledged sandboxes are not known any more"
  start_scheduler "$victim"
  await_ready "scheduler-$victim"
  note "scheduler $(leader) leads; scheduler $victim is back"
  shown="$(cat "$home/log/created" "$acknowledged" | wc -l) acknowledged, 0 lost; a new leader took over"
}

delete_all() {
  local gone
  gone=$(cat "$home/log/created" "$home/log/acknowledged" | wc -l)
  # shellcheck disable=SC2046 # names have no blanks
  ctl sandbox delete --wait $(cat "$home/log/created" "$home/log/acknowledged") -o name > /dev/null || fail "not every sandbox was deleted"
  ctl sandbox show try-me > /dev/null 2>&1 || ctl sandbox create --template python --id try-me --cpu 0.5 --memory 256MiB --wait=60s -o name > /dev/null
  shown="$gone sandboxes gone; one, try-me, is left for you"
}
