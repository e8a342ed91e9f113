#!/usr/bin/env bash
# Install what `make test-servers` runs against: Debian's PostgreSQL 15 and Chromium. Needs root or sudo once.
set -euo pipefail

wanted=()
[ -x /usr/lib/postgresql/15/bin/postgres ] || wanted+=(postgresql-15)
command -v chromium >/dev/null || wanted+=(chromium fonts-dejavu-core)
command -v chromedriver >/dev/null || wanted+=(chromium-driver)
[ ${#wanted[@]} -eq 0 ] && exit 0

sudo=()
[ "$(id -u)" -eq 0 ] || sudo=(sudo)
# Without this the package would create and start a cluster of its own; the tests start theirs.
if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
  "${sudo[@]}" mkdir -p /etc/postgresql-common
  echo "create_main_cluster = false" | "${sudo[@]}" tee /etc/postgresql-common/createcluster.conf >/dev/null
fi
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-confold "${wanted[@]}" >/dev/null
