#!/bin/sh
# Sees to it that browser tests have Chromium and its driver, where that is possible.
# Never fails: without them the browser tests are skipped and say why.
set -u

have() { command -v "$1" >/dev/null 2>&1; }
have_browser() { have chromedriver && { have chromium || have chromium-browser; }; }

if have_browser; then
    exit 0
fi

if [ "$(id -u)" = 0 ] && have apt-get; then
    echo "Installing Chromium for the browser tests."
    log=$(mktemp)
    if DEBIAN_FRONTEND=noninteractive apt-get update -qq >"$log" 2>&1 &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            chromium chromium-driver fonts-liberation >>"$log" 2>&1 && have_browser; then
        rm -f "$log"
        exit 0
    fi
    tail -n 5 "$log" >&2
    rm -f "$log"
fi

echo "Chromium and chromedriver are missing, so the browser tests will be skipped." >&2
echo "hint: on Debian, as root: apt install chromium chromium-driver" >&2
echo "hint: elsewhere: install Chromium, and the chromedriver of the same version, on PATH" >&2
exit 0
