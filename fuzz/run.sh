#!/bin/sh
# Runs every fuzz target for a bounded time; fails as soon as one crashes.
#
#   fuzz/run.sh [SECONDS_PER_TARGET]      default: 10
#
# Stable Rust will do: RUSTC_BOOTSTRAP lets it take the coverage flags that
# cargo-fuzz passes, and no sanitizer is used (the code under test has no
# `unsafe`). Overflow checks and assertions are on. It starts from the packets
# in fuzz/seeds; what it finds grows in fuzz/corpus, which is not kept in the
# repository; the input of a crash stays in fuzz/artifacts.
set -eu

seconds=${1:-10}
cd "$(dirname "$0")/.."
export RUSTC_BOOTSTRAP=1

command -v cargo-fuzz >/dev/null || cargo install cargo-fuzz --locked
# Not in the loop's own line, where a failure would be a list of none.
targets=$(cargo fuzz list)
for target in $targets; do
    echo "== $target, $seconds s"
    mkdir -p "fuzz/corpus/$target" "fuzz/seeds/$target"
    cargo fuzz run --sanitizer none "$target" \
        "fuzz/corpus/$target" "fuzz/seeds/$target" -- \
        -max_total_time="$seconds" -max_len=2048 -timeout=10 -print_final_stats=1
done
