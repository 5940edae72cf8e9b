#!/usr/bin/env bash
# Makes the picture in README.md: `fastvpn top` on a terminal of tmux's, of a tunnel with
# traffic between network namespaces. Installs tmux if it is not there, which needs root.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v tmux >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq tmux >/dev/null
fi
FASTVPN_PICTURE=docs/top.svg cargo test --release --locked --test e2e -- \
    --exact top_is_made_a_picture
