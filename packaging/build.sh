#!/bin/bash
# Builds packages and archives into dist/. Usage: packaging/build.sh VERSION OS/ARCH...; Linux gets a deb, an rpm and a
# tar.gz, Windows a zip, the others a tar.gz. The same commit and the same Go give the same bytes, whatever the machine.
set -euo pipefail
umask 022
export LC_ALL=C CGO_ENABLED=0
cd "$(dirname "$0")/.."
described=$1
shift
: "${SOURCE_DATE_EPOCH:=$(git log -1 --format=%ct)}"
export SOURCE_DATE_EPOCH

# What git describe says, as a version that dpkg and rpm take and sort: 1.2.3, 1.2.3+4.gabc1234, 0+git.abc1234.
version=${described#v}
case $version in
[0-9]*.*) version=${version/-/+} version=${version//-/.} ;;
*) version=0+git.${version//-/.} ;;
esac

rm -rf dist
mkdir -p dist/stage
stage=$PWD/dist/stage
go build -C tools -o "$stage/tools/" ./archive github.com/goreleaser/nfpm/v2/cmd/nfpm
go build -trimpath -buildvcs=false -ldflags "-X main.version=$described" -o "$stage/native/" ./cmd/muxproxyd
packaging/share.sh "$stage/native/muxproxyd" "$described" "$stage/share"

for platform; do
	os=${platform%/*} arch=${platform#*/}
	name=muxproxy-$version-$os-$arch
	dir=$stage/$name
	mkdir -p "$dir"
	# -s -w: without symbol tables, which are a third of it; a panic's trace needs none.
	GOOS=$os GOARCH=$arch go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$described" \
		-o "$dir/bin/" ./cmd/muxproxy ./cmd/muxproxyd
	cp -R "$stage/share" "$dir/"
	cp README.md LICENSE "$dir/"
	case $os in
	windows)
		"$stage/native/muxproxyd" completion powershell >"$dir/share/muxproxy.ps1"
		"$stage/tools/archive" "$dir" "dist/$name.zip"
		continue
		;;
	linux) install -D -m 644 -t "$dir/share/systemd/user" packaging/systemd/*.{service,socket} ;;
	esac
	"$stage/tools/archive" "$dir" "dist/$name.tar.gz"
	[ "$os" = linux ] || continue
	mkdir -p "$dir/root/lib"
	mv "$dir"/{bin,share} "$dir/root/"
	mv "$dir/root/share/systemd" "$dir/root/lib/" # where distributions have it
	find "$dir/root/share/man" -type f -exec gzip -9n {} +
	for format in deb rpm; do
		ARCH=$arch VERSION=$version ROOT=$dir/root "$stage/tools/nfpm" package -f packaging/nfpm.yaml -p $format -t dist/ >/dev/null
	done
done
rm -rf dist/stage
cd dist
sha256sum -- * >SHA256SUMS
cat SHA256SUMS
