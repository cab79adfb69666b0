#!/bin/bash
# Sees to it that programs are there. Usage: tools/need.sh WHAT:DEBIAN-PACKAGE...
# WHAT is a program, a C header of a library (NAME.h), a library to preload (NAME.so), or a module of Debian's Python
# (python3.NAME).
# Root on Debian and its kin gets them installed, everybody else is told which packages are missing.
set -euo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # where sshd is, for users too
packages=()
for need in "$@"; do
	what=${need%%:*}
	case $what in
	python3.*) /usr/bin/python3 -W ignore -c "import ${what#python3.}" ;;
	*.h) echo "#include <${what%.h}/$what>" | gcc -E - ;;
	*.so) ! LD_PRELOAD=$what sleep 0 2>&1 | grep . ;;
	*) command -v "$what" ;;
	esac >/dev/null 2>&1 || packages+=("${need#*:}")
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
