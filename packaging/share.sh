#!/bin/bash
# Writes what a package has besides the programs: manual pages, completion, documentation.
# Usage: packaging/share.sh MUXPROXYD VERSION DIR. Needs SOURCE_DATE_EPOCH.
set -euo pipefail
umask 022
muxproxyd=$(realpath "$1") version=$2 dir=$(realpath -m "$3")
cd "$(dirname "$0")/.."
rm -rf "$dir"
mkdir -p "$dir"/man/man{1,5,7} "$dir"/{bash-completion/completions,zsh/site-functions,fish/vendor_completions.d} \
	"$dir"/doc/muxproxy/docs
man=$(mktemp -d)
trap 'rm -rf "$man"' EXIT
go build -C tools -o "$man/" ./man

# page NAME SECTION SUMMARY SEE-ALSO: from Markdown on stdin
page() {
	"$man/man" -name "$1" -section "$2" -summary "$3" -see-also "$4" -version "$version" >"$dir/man/man$2/$1.$2"
}
"$muxproxyd" manual | page muxproxy 1 'share SSH connections between ssh, scp, sftp, rsync and git' \
	'ssh(1),ssh_config(5),muxproxy.hcl(5),muxproxy-plugin(7)'
page muxproxy.hcl 5 'policy of muxproxy' 'muxproxy(1),ssh_config(5),muxproxy-plugin(7)' <docs/policy.md
page muxproxy-plugin 7 'how to write a plugin for muxproxy' 'muxproxy(1),muxproxy.hcl(5)' <docs/plugins.md

"$muxproxyd" completion bash >"$dir/bash-completion/completions/muxproxy"
"$muxproxyd" completion zsh >"$dir/zsh/site-functions/_muxproxy"
"$muxproxyd" completion fish >"$dir/fish/vendor_completions.d/muxproxy.fish"

cp README.md config.hcl.example "$dir/doc/muxproxy/"
cp LICENSE "$dir/doc/muxproxy/copyright"
cp docs/*.md "$dir/doc/muxproxy/docs/"
for more in SECURITY.md CONTRIBUTING.md CHANGELOG.md; do
	[ ! -e $more ] || cp $more "$dir/doc/muxproxy/"
done
