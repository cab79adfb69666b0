#!/bin/bash
# Installs the deb and walks the way of somebody new to it: setup, ssh twice, status, doctor, setup --undo, purge. Nothing may
# be left. For a throwaway Debian machine, as root; it makes a user and takes it away again. Usage: newcomer.sh FILE.deb
set -euo pipefail
deb=$(realpath "$1")
me=mx$$
home=/home/$me
dir=$(mktemp -d)
sshd=
chmod 755 "$dir"

fail() {
	echo "newcomer: $*" >&2
	exit 1
}
step() { printf -- '-- %s\n' "$*"; }

# as runs a command like a login of the newcomer does.
as() {
	setpriv --reuid "$me" --regid "$me" --init-groups env -i HOME="$home" USER="$me" LOGNAME="$me" SHELL=/bin/bash \
		PATH=/usr/local/bin:/usr/bin:/bin TERM=xterm LANG=C.UTF-8 bash -c "cd; $1"
}

theirs() { pgrep -u "$me" || true; }

# await COMMAND... succeeds once the command does, or fails after 30 s.
await() {
	for ((i = 0; i < 300; i++)); do
		! "$@" || return 0
		sleep 0.1
	done
	return 1
}

clean() {
	status=$?
	exec 3>&-
	# By number, and no others than those of this script's own user and its sshd.
	for pid in $(theirs 2>/dev/null) $sshd; do kill "$pid" 2>/dev/null || true; done
	[ -z "$sshd" ] || wait "$sshd" 2>/dev/null || true
	[ $status = 0 ] || tail -n 20 "$dir"/*.log "$home"/.local/state/muxproxy/master.log 2>/dev/null || true
	if [ -e "$dir/files" ]; then dpkg --purge muxproxy >/dev/null 2>&1 || true; fi
	if id "$me" >/dev/null 2>&1; then userdel -r "$me" >/dev/null 2>&1 || true; fi
	rm -rf "$dir"
	exit $status
}
trap clean EXIT

[ "$(id -u)" = 0 ] || fail "this needs root"
! dpkg-query -W muxproxy >/dev/null 2>&1 || fail "muxproxy is installed already"

step "a user, and a host that they know"
useradd -m -s /bin/bash -p '*' "$me" # no password, but not locked
mkdir -p /run/sshd
ssh-keygen -q -t ed25519 -N '' -f "$dir/host_key"
mkdir -m 700 "$home/.ssh"
ssh-keygen -q -t ed25519 -N '' -f "$home/.ssh/id_ed25519"
cp "$home/.ssh/id_ed25519.pub" "$home/.ssh/authorized_keys"
listens() { grep -q 'Server listening' "$dir/sshd.log" || ! kill -0 "$sshd" 2>/dev/null; }
for try in 1 2 3 4 5; do
	port=$((20000 + RANDOM % 12000))
	/usr/sbin/sshd -D -e -f /dev/null -o "Port $port" -o 'ListenAddress 127.0.0.1' -o "HostKey $dir/host_key" -o 'UsePAM no' \
		-o 'PidFile none' -o "AllowUsers $me" 2>"$dir/sshd.log" &
	sshd=$!
	await listens && kill -0 "$sshd" 2>/dev/null && break
	[ $try -lt 5 ] || fail "sshd does not start"
done
printf 'Host box\n    HostName 127.0.0.1\n    Port %d\n\n# mine\nHost *\n\tServerAliveInterval=7' "$port" >"$home/.ssh/config"
echo "[127.0.0.1]:$port $(cut -d' ' -f1,2 "$dir/host_key.pub")" >"$home/.ssh/known_hosts"
chown -R "$me:" "$home/.ssh"
as 'ssh box true' || fail "ssh does not work without muxproxy"

# state is all that the newcomer's home has, and what else anywhere is theirs.
state() {
	(cd "$home" && find . -printf '%y %m %u:%g %P %l\n' && find . -type f -exec sha256sum {} +) | sort
	# Files of others that vanish meanwhile are no failure.
	{ find / -xdev \( -path /proc -o -path /sys -o -path "$home" -o -path "$dir" \) -prune -o -user "$me" -print 2>/dev/null || true; } | sort
	if [ -d "/run/user/$(id -u "$me")" ]; then find "/run/user/$(id -u "$me")" | sort; fi
}
state >"$dir/before"

step "install"
dpkg -i "$deb" >"$dir/apt.log" 2>&1 || fail "the package does not install"
dpkg -L muxproxy >"$dir/files"
for file in bin/muxproxy bin/muxproxyd lib/systemd/user/muxproxy.socket lib/systemd/user/muxproxy.service \
	share/bash-completion/completions/muxproxy share/zsh/vendor-completions/_muxproxy \
	share/fish/vendor_completions.d/muxproxy.fish share/doc/muxproxy/copyright; do
	grep -qFx "/usr/$file" "$dir/files" || fail "the package has no $file"
done
as 'muxproxy version'
[[ $(as 'muxproxy __complete doc 2>/dev/null') == doctor* ]] || fail "nothing is completed"

step "setup"
as 'muxproxy setup --dry-run' >/dev/null
state | diff "$dir/before" - || fail "setup --dry-run has changed something"
as 'muxproxy setup --yes'

step "ssh twice, over one login"
logins=$(grep -c '^Accepted ' "$dir/sshd.log")
mkfifo "$dir/hold"
as 'exec ssh box cat' <"$dir/hold" >"$dir/held" 2>"$dir/ssh.log" &
first=$!
exec 3>"$dir/hold"
echo one >&3
await grep -q one "$dir/held" || fail "the first ssh does not work"
[ "$(as 'ssh box echo two')" = two ] || fail "the second ssh does not work"
[ "$(grep -c '^Accepted ' "$dir/sshd.log")" = $((logins + 1)) ] || fail "they have not shared one login"

step "status and doctor"
as 'muxproxy status' | tee "$dir/status"
grep -q "$me@127.0.0.1:$port" "$dir/status" || fail "status does not show the connection"
as 'muxproxy doctor box' || fail "doctor finds a failure"
exec 3>&-
wait $first || fail "the first ssh ends with $?"

step "setup --undo"
as 'muxproxy setup --undo --yes'
gone() { [ -z "$(theirs)" ]; }
await gone || fail "these still run: $(ps -o pid=,args= -u "$me")"
state | diff "$dir/before" - || fail "setup --undo has left something, or taken too much"
as 'ssh box true' || fail "ssh does not work any more"

step "purge"
dpkg --purge muxproxy >"$dir/apt.log" 2>&1 || fail "the package does not go"
while read -r path; do
	[[ $path != *muxproxy* || ! (-e $path || -L $path) ]] || fail "$path is left"
done <"$dir/files"
rm "$dir/files"
echo "nothing is left"
