#!/usr/bin/env bash
# Install what `make test-servers` runs against: Debian's PostgreSQL 15, MariaDB, Redis and Chromium; OpenSearch
# and Kafka from Maven. Needs root or sudo once.
set -euo pipefail

wanted=()
[ -x /usr/lib/postgresql/15/bin/postgres ] || wanted+=(postgresql-15)
command -v chromium >/dev/null || wanted+=(chromium fonts-dejavu-core)
command -v chromedriver >/dev/null || wanted+=(chromium-driver)
command -v mariadbd >/dev/null || [ -x /usr/sbin/mariadbd ] || wanted+=(mariadb-server)
command -v redis-server >/dev/null || wanted+=(redis-server)
command -v java >/dev/null || wanted+=(openjdk-17-jre-headless)
command -v mvn >/dev/null || wanted+=(maven)

# The packages would create and start servers of their own; the tests start theirs.
sudo=()
[ "$(id -u)" -eq 0 ] || sudo=(sudo)
install_packages() {
  if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
    "${sudo[@]}" mkdir -p /etc/postgresql-common
    echo "create_main_cluster = false" | "${sudo[@]}" tee /etc/postgresql-common/createcluster.conf >/dev/null
  fi
  local policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee $policy >/dev/null
    "${sudo[@]}" chmod 755 $policy
    trap '"${sudo[@]}" rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  export DEBIAN_FRONTEND=noninteractive
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-confold "$@" >/dev/null
}
[ ${#wanted[@]} -eq 0 ] || install_packages "${wanted[@]}"

# What Maven brings, by coordinate, each as one file in the folder that the tests look in.
folder=${XDG_CACHE_HOME:-$HOME/.cache}/deltaworks-servers
bring() {
  local group=$1 artifact=$2 version=$3 type=$4
  [ -e "$folder/$artifact-$version.$type" ] && return
  mkdir -p "$folder"
  mvn -q -B org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy \
    -Dartifact="$group:$artifact:$version:$type" -DoutputDirectory="$folder" -Dmdep.useBaseVersion=true
}
bring org.opensearch.distribution.integ-test-zip opensearch 2.19.1 zip
if [ ! -e "$folder/kafka-4.1.1/kafka-tools-4.1.1.jar" ]; then
  mvn -q -B -f "$(dirname "$0")/kafka.pom.xml" org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies \
    -DoutputDirectory="$folder/kafka-4.1.1.part"
  rm -rf "$folder/kafka-4.1.1"
  mv "$folder/kafka-4.1.1.part" "$folder/kafka-4.1.1"
fi
