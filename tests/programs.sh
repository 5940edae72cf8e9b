#!/usr/bin/env bash
# Installs the programs that tests/long.sh and the benchmark compare fastvpn with, or
# make packages with, and that Debian does not have, into target/programs; what is there is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A crates=([boringtun-cli]=boringtun-cli@0.7.1 [gotatun]=gotatun-cli@0.10.2
    [cargo-deb]=cargo-deb@3.8.0)
# GotaTun needs a newer Rust than fastvpn does.
declare -A toolchains=([boringtun-cli]=1.88 [gotatun]=1.95 [cargo-deb]=1.85)

version_at_least() {
    printf '%s\n%s\n' "$1" "$2" | sort -C -V
}

have=$(rustc --version | cut -d ' ' -f 2)
for program in "${!crates[@]}"; do
    [ ! -x "target/programs/bin/$program" ] || continue
    if ! version_at_least "${toolchains[$program]}" "$have"; then
        echo "not installed: $program needs Rust ${toolchains[$program]}, and this is $have"
        continue
    fi
    cargo install --locked --quiet --root target/programs "${crates[$program]}"
done
