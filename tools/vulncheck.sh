#!/bin/bash
# Runs govulncheck, which has its database on the network. Out of reach, this says so in one line and succeeds.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! timeout 5 bash -c '</dev/tcp/vuln.go.dev/443' 2>/dev/null; then
	echo "govulncheck: not run, its database (vuln.go.dev) is out of reach"
	exit 0
fi
timeout 300 go tool -modfile=tools/go.mod govulncheck ./...
