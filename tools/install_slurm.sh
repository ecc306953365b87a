#!/usr/bin/env bash
# Installs the Slurm that the tests start for themselves, where that is possible: Debian or Ubuntu, as root. Elsewhere it
# says so, and those tests are skipped.
set -u

command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "==> no Slurm here, and it is not installed (that takes root and apt-get): tests with one are skipped"
    exit 0
fi
echo "==> installing Slurm and MUNGE, for the tests"
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y -q --no-install-recommends slurm-wlm munge >/dev/null 2>&1; }
install || { apt-get update -q >/dev/null 2>&1 && install; } ||
    echo "==> Slurm could not be installed (apt-get install slurm-wlm munge): tests with one are skipped"
