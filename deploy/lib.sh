# shellcheck shell=bash
# Shared by deploy/quickstart and deploy/test: progress, packages, the toolchain. Sourced, never run.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target_dir=${CARGO_TARGET_DIR:-$repository/target}
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-never}

if [ -t 1 ]; then
  bold=$'\e[1m' green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'
else
  bold='' green='' red='' plain=''
fi

say() { printf '%s\n' "$@"; }
note() { printf '    %s\n' "$*"; }
fail() {
  printf '%sFAILED:%s %s\n' "$red$bold" "$plain" "$*" >&2
  exit 1
}

# Milliseconds on a clock that nobody sets.
now_ms() { awk '{ printf "%d", $1 * 1000 }' /proc/uptime; }

# 1234 -> "1.2 s"
seconds() { printf '%d.%d s' $(($1 / 1000)) $((($1 % 1000) / 100)); }

require_root() { [ "$(id -u)" = 0 ] || fail "run as root: sandboxes need namespaces, mounts and cgroups"; }

require_debian() {
  command -v apt-get > /dev/null || fail "this script installs Debian packages, and there is no apt-get here (Debian 12 is what it is tested on)"
}

# Puts cargo on PATH, or says how to get it.
require_rust() {
  if ! command -v cargo > /dev/null && [ -x "$HOME/.cargo/bin/cargo" ]; then
    PATH=$HOME/.cargo/bin:$PATH
  fi
  command -v cargo > /dev/null || fail "the Rust toolchain is missing. Get it with

    apt-get install -y curl && curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal -c rustfmt -c clippy

  then run this command again (rust-toolchain.toml picks the version)."
}

# Installs those of the named Debian packages that are not installed.
install_packages() {
  local missing=() package log
  for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2> /dev/null | grep -qx installed || missing+=("$package")
  done
  if [ ${#missing[@]} = 0 ]; then
    note "all ${#} Debian packages are installed"
    return
  fi
  note "installing: ${missing[*]}"
  log=$(mktemp)
  if ! { DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 update \
    && DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install -y --no-install-recommends "${missing[@]}"; } > "$log" 2>&1; then
    tail -n 15 "$log" >&2
    fail "apt-get could not install ${missing[*]} (is the network there? the whole log: $log)"
  fi
  rm -f "$log"
}

# gVisor (`runsc`) is in Debian's backports only. Where it cannot be had, that is said, and its tests skip aloud.
install_gvisor() {
  local sources=/etc/apt/sources.list.d/bookworm-backports.sources made='' log
  command -v runsc > /dev/null && return
  if ! grep -qx 'VERSION_CODENAME=bookworm' /etc/os-release; then
    note "skipped: gVisor (runsc) is known to be packaged for Debian bookworm's backports only"
    return
  fi
  if ! grep -rqs bookworm-backports /etc/apt/sources.list /etc/apt/sources.list.d; then
    printf '%s\n' 'Types: deb' 'URIs: http://deb.debian.org/debian' 'Suites: bookworm-backports' 'Components: main' \
      'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg' > "$sources"
    made=$sources
  fi
  log=$(mktemp)
  if ! { DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 update \
    && DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 install -y --no-install-recommends \
      -t bookworm-backports runsc; } > "$log" 2>&1; then
    note "skipped: apt-get could not install gVisor (runsc) from bookworm-backports (the whole log: $log)"
    # A source that cannot be read would fail every later update.
    [ -z "$made" ] || rm -f "$made"
    return
  fi
  rm -f "$log"
}

require_space() { # directory, MiB
  local free
  free=$(df -Pm "$1" | awk 'NR == 2 { print $4 }')
  [ "$free" -ge "$2" ] || fail "$1 has $free MiB free, and $2 MiB are needed"
}
