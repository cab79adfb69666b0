#!/bin/bash
# Generates Go code from the .proto files of this project. With --check nothing is written: it fails if the code that is
# there differs. protoc comes from Debian's protobuf-compiler, its two plugins from tools/go.mod.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v protoc >/dev/null || { echo "protoc is missing: install protobuf-compiler" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/bin" "$work/out"
go build -modfile=tools/go.mod -o "$work/bin/" \
	google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
mapfile -t protos < <(find core -name '*.proto' | sort)
for proto in "${protos[@]}"; do
	PATH="$work/bin:$PATH" protoc -I . --go_out="$work/out" --go_opt=paths=source_relative \
		--go-grpc_out="$work/out" --go-grpc_opt=paths=source_relative "$proto"
done
if [ "${1-}" != --check ]; then
	cp -R "$work/out/." .
	exit 0
fi
status=0
# The comment that names protoc's own version does not count.
while read -r file; do
	diff -u -I '^// .*protoc  *v' "$file" "$work/out/$file" || status=1
done < <({ find core -name '*.pb.go'; cd "$work/out" && find core -name '*.pb.go'; } | sort -u)
[ $status = 0 ] || echo "generated code is not up to date: run make proto" >&2
exit $status
