#!/usr/bin/env bash
# The long tier of the tests: soak, stress, and what needs more than Rust and a
# C compiler. Installs what it lacks, so run it as root. `cargo test` is the
# other tier; what it runs is not run again here.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v nft >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq nftables >/dev/null
fi

cargo test --locked --test e2e -- --ignored
tests/kernels/run
