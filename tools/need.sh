#!/bin/bash
# Sees to it that programs are there. Usage: tools/need.sh PROGRAM:DEBIAN-PACKAGE...
# Root on Debian and its kin gets them installed, everybody else is told which packages are missing.
set -euo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # where sshd is, for users too
packages=()
for need in "$@"; do
	command -v "${need%%:*}" >/dev/null || packages+=("${need#*:}")
done
[ ${#packages[@]} -gt 0 ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	export DEBIAN_FRONTEND=noninteractive
	apt=(timeout 300 apt-get -qq -o Acquire::Retries=2 -o Acquire::http::Timeout=20)
	if { "${apt[@]}" update && "${apt[@]}" install -y --no-install-recommends "${packages[@]}"; } >&2; then
		exit 0
	fi
fi
echo "missing: install ${packages[*]} (as Debian calls them) and try again" >&2
exit 1
