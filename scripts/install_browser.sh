#!/usr/bin/env bash
# Installs the browser that tests/browser needs, from Debian: only where it is missing, only as root.
# Never fails: without it those tests are skipped and say so.
set -uo pipefail

if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
    exit 0
fi
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    printf 'no chromium here; the tests of the pages will be skipped (apt-get install chromium chromium-driver)\n' >&2
    exit 0
fi
apt() {
    DEBIAN_FRONTEND=noninteractive timeout --kill-after=10 300 \
        apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=30 -o DPkg::Lock::Timeout=60 "$@"
}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# The lists may be good enough where they cannot be fetched.
apt update >"$log" 2>&1
if ! apt install --yes --no-install-recommends chromium chromium-driver >>"$log" 2>&1; then
    tail -n 5 "$log" >&2
    printf 'chromium could not be installed; the tests of the pages will be skipped\n' >&2
fi
exit 0
