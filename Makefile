# make help lists the targets. Without network all of them work or say in one line what they lack.

VERSION   ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
DEMO_HOST ?=

# Where the checkout is another user's, git refuses to look at it and go build would fail for that.
vcs := $(shell git status >/dev/null 2>&1 || echo -buildvcs=false)

# Everywhere, so that what lint, build and packages compile is the same and is compiled once.
export GOFLAGS := $(strip $(GOFLAGS) -trimpath)

# When the commit was made, for what holds a date (https://reproducible-builds.org/specs/source-date-epoch/).
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)

PREFIX    ?= /usr/local
# darwin/amd64 works as well; it takes as long to compile as each of these.
PLATFORMS ?= linux/amd64 linux/arm64 darwin/arm64 windows/amd64

tool := go tool -modfile=tools/go.mod

.PHONY: help build install man packages demo bench test lint cross-vet proto proto-check clean

help:
	@echo 'make build        bin/muxproxy and bin/muxproxyd, static'
	@echo 'make man          the manual pages, completion and what else goes beside the programs: bin/share'
	@echo 'make install      build, and put it all under PREFIX (/usr/local)'
	@echo 'make packages     dist: deb, rpm, tar.gz, zip; PLATFORMS="linux/amd64 ..." for some of them'
	@echo 'make demo         build, then measure what sharing gives; DEMO_HOST=HOST for a host of yours'
	@echo 'make bench        build, then measure beside ControlMaster; QUICK=1 for 3 minutes, CASES=PATTERN for some of it'
	@echo 'make test         all tests, with the race detector; copies of 256 MiB and 2 GiB of rekeying without it'
	@echo 'make lint         gofmt, go vet (linux, darwin, windows), staticcheck, govulncheck'
	@echo 'make proto        generate the code of the .proto files (needs protoc)'
	@echo 'make proto-check  fail if that would change anything'
	@echo 'make clean        remove bin and dist'

build:
	CGO_ENABLED=0 go build $(vcs) -ldflags '-X main.version=$(VERSION)' -o bin/ ./cmd/muxproxy ./cmd/muxproxyd

man: build
	packaging/share.sh bin/muxproxyd '$(VERSION)' bin/share

# Units: systemd looks for users' in share of /usr/local and of ~/.local, but not in lib of the latter (systemd.unit(5)).
install: man
	install -D -t '$(DESTDIR)$(PREFIX)/bin' bin/muxproxy bin/muxproxyd
	cp -R bin/share '$(DESTDIR)$(PREFIX)/'
	install -D -m 644 -t '$(DESTDIR)$(PREFIX)/share/systemd/user' packaging/systemd/muxproxy.socket packaging/systemd/muxproxy.service
	sed -i 's|/usr/bin/|$(PREFIX)/bin/|' '$(DESTDIR)$(PREFIX)/share/systemd/user/muxproxy.service'

packages:
	packaging/build.sh '$(VERSION)' $(PLATFORMS)

demo: build
	@tools/need.sh ssh:openssh-client curl:curl
	bin/muxproxy demo $(DEMO_HOST)

# BENCH_FLAGS: see bin/bench --help.
bench: build
	tools/need.sh ssh:openssh-client sshd:openssh-server rsync:rsync git:git
	CGO_ENABLED=0 go build $(vcs) -o bin/ ./bench
	bin/bench $(if $(QUICK),--quick) --cases '$(or $(CASES),*)' --out bench/out/bench.json $(BENCH_FLAGS)

# The race detector needs a C compiler. DEMO_HOST and the like never reach the tests: they use loopback only.
test:
	tools/need.sh gcc:gcc ssh:openssh-client sshd:openssh-server rsync:rsync git:git tmux:tmux curl:curl \
		nc:netcat-openbsd ps:procps plink:putty-tools dbclient:dropbear-bin tinysshd:tinysshd ansible:ansible-core \
		python3.paramiko:python3-paramiko python3.asyncssh:python3-asyncssh python3.dbusmock:python3-dbusmock dbus-daemon:dbus-daemon \
		libssh.h:libssh-dev libnss_wrapper.so:libnss-wrapper systemd-analyze:systemd systemd-socket-activate:systemd \
		ip:iproute2 python3.grpc:python3-grpcio python3.google.protobuf:python3-protobuf \
		protoc:protobuf-compiler grpc_python_plugin:protobuf-compiler-grpc
	go test -C tools ./...
	go test -race -timeout 10m $$(go list ./... | grep -v /e2e)
	go test -race -timeout 10m -count=1 ./e2e
	E2E_BIG=1 go test -timeout 10m -count=1 -run 'Bulk|ManyThroughAForward' ./e2e

# mandoc -T lint and groff -ww find what is wrong in a manual page.
lint: cross-vet man
	tools/need.sh mandoc:mandoc groff:groff-base
	@for page in bin/share/man/man*/*; do \
		mandoc -T lint -W warning $$page && LC_ALL=C.UTF-8 groff -ww -man -Tutf8 -z $$page 2>&1 | (! grep .) || exit 1; done
	@unformatted=$$(gofmt -l *.go core cmd e2e bench examples plugins tools); test -z "$$unformatted" || { echo "not gofmt-ed: $$unformatted"; exit 1; }
	go vet ./...
	go vet -C tools ./...
	$(tool) staticcheck ./...
	@tools/vulncheck.sh

cross-vet:
	CGO_ENABLED=0 GOOS=darwin GOARCH=arm64 go vet ./...
	CGO_ENABLED=0 GOOS=windows go vet ./...

proto:
	tools/protoc.sh

proto-check:
	tools/protoc.sh --check

clean:
	rm -rf bin dist
