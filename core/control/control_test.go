package control_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/muxproxy/muxproxy/core/control"
	"github.com/muxproxy/muxproxy/core/use"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// backend is a master whose answers are set and whose calls are recorded.
type backend struct {
	status  control.Status
	err     error
	block   chan struct{} // if set, changing calls wait for it or their context
	entered chan struct{}

	mu    sync.Mutex // guards what follows
	calls []string
	by    use.Caller
}

func (b *backend) called(ctx context.Context, by use.Caller, call string) error {
	b.mu.Lock()
	b.calls = append(b.calls, call)
	b.by = by
	b.mu.Unlock()
	if b.block != nil {
		b.entered <- struct{}{}
		select {
		case <-b.block:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return b.err
}

func (b *backend) Status() control.Status    { return b.status }
func (b *backend) Exists(target string) bool { return target == "db" }
func (b *backend) Close(ctx context.Context, by use.Caller, target string) (int, error) {
	return 2, b.called(ctx, by, "close "+target)
}
func (b *backend) Drain(ctx context.Context, by use.Caller, target string) (int, error) {
	return 3, b.called(ctx, by, "drain "+target)
}
func (b *backend) Stop(ctx context.Context, by use.Caller, drain bool) error {
	return b.called(ctx, by, map[bool]string{true: "stop drain", false: "stop"}[drain])
}
func (b *backend) Restart(ctx context.Context, by use.Caller) (int, error) {
	return 77, b.called(ctx, by, "restart")
}
func (b *backend) Reload(ctx context.Context, by use.Caller, color bool) (control.Reloaded, error) {
	return control.Reloaded{File: "/c\xff", InForce: true, Text: "warning\xff", Diagnostics: []byte("[1]")},
		b.called(ctx, by, fmt.Sprintf("reload %v", color))
}
func (b *backend) Lock(ctx context.Context, by use.Caller, passphrase []byte) error {
	return b.called(ctx, by, "lock "+string(passphrase))
}
func (b *backend) Unlock(ctx context.Context, by use.Caller, passphrase []byte) (use.LockState, error) {
	if string(passphrase) == "wrong" {
		return use.LockState{Locked: true, By: []string{"person"}}, use.ErrPassphrase
	}
	return use.LockState{Locked: true, By: []string{"screen"}}, b.called(ctx, by, "unlock "+string(passphrase))
}
func (b *backend) HostKeys(made bool) (plain, ca []string) {
	if made {
		return nil, []string{"made"}
	}
	return []string{"ecdsa", "ed25519"}, []string{"ca"}
}
func (b *backend) Dump() string { return "goroutine 1\xff" }

// start serves b and returns the socket's path and what ends the server.
func start(t *testing.T, b control.Backend) (path string, stop func() error) {
	t.Helper()
	dir, err := os.MkdirTemp("", "control")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "control.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- control.Serve(ctx, l, b) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-served
	})
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return path, stop
}

func dial(t *testing.T, path string) *control.Master {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	m, err := control.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Disconnect() })
	return m
}

// fill sets every field of v to something, so that a field that a conversion forgets shows.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)))
			return
		}
		for i := range v.NumField() {
			if v.Type().Field(i).Tag.Get("json") != "-" { // nobody's to see
				fill(v.Field(i))
			}
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fill(v.Index(0))
		fill(v.Index(1))
	case reflect.String:
		v.SetString("some " + v.Type().String())
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(1 << 40)
	case reflect.Uint64:
		v.SetUint(1 << 63)
	default:
		panic(v.Type().String())
	}
}

func TestStatus(t *testing.T) {
	b := &backend{}
	path, _ := start(t, b)
	m := dial(t, path)
	for name, change := range map[string]func(*control.Status){
		"every field": func(s *control.Status) { fill(reflect.ValueOf(s).Elem()) },
		"empty": func(s *control.Status) {
			*s = control.Status{Upstreams: []control.Upstream{}, Clients: []control.Client{}}
		},
		"arguments that are not UTF-8": func(s *control.Status) {
			fill(reflect.ValueOf(s).Elem())
			s.Clients[0].Caller.Processes[0].Args[0] = "a\xffb"
		},
	} {
		t.Run(name, func(t *testing.T) {
			change(&b.status)
			got, err := m.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, b.status) {
				t.Errorf("got  %+v\nwant %+v", got, b.status)
			}
		})
	}
	// Text that no protobuf string can hold must not cost the whole answer.
	fill(reflect.ValueOf(&b.status).Elem())
	b.status.Clients[0].Alias = "a\xff"
	if got, err := m.Status(t.Context()); err != nil || got.Clients[0].Alias != "a\uFFFD" {
		t.Errorf("alias %q, %v", got.Clients[0].Alias, err)
	}
	// Larger than gRPC's own limit of 4 MiB.
	b.status.Clients[0].Caller.Processes[0].Args[0] = strings.Repeat("x", 5<<20)
	if _, err := m.Status(t.Context()); err != nil {
		t.Errorf("a large status: %v", err)
	}
}

func TestCalls(t *testing.T) {
	b := &backend{}
	path, _ := start(t, b)
	m := dial(t, path)
	for target, want := range map[string]bool{"db": true, "other\xff": false} {
		if got, err := m.Exists(t.Context(), target); err != nil || got != want {
			t.Errorf("Exists(%q): %v, %v", target, got, err)
		}
	}
	if n, err := m.Close(t.Context(), "db"); n != 2 || err != nil {
		t.Errorf("Close: %d, %v", n, err)
	}
	if n, err := m.Drain(t.Context(), ""); n != 3 || err != nil {
		t.Errorf("Drain: %d, %v", n, err)
	}
	if pid, err := m.Restart(t.Context()); err != nil || pid != 77 {
		t.Errorf("restart: %d, %v", pid, err)
	}
	if err := m.Stop(t.Context(), true); err != nil {
		t.Errorf("Stop: %v", err)
	}
	if err := m.Stop(t.Context(), false); err != nil {
		t.Errorf("Stop: %v", err)
	}
	r, err := m.Reload(t.Context(), true)
	if err != nil || r.File != "/c\uFFFD" || !r.InForce || r.Text != "warning\xff" || string(r.Diagnostics) != "[1]" {
		t.Errorf("Reload: %+v, %v", r, err)
	}
	if err := m.Lock(t.Context(), []byte("p\xff")); err != nil {
		t.Errorf("Lock: %v", err)
	}
	if left, err := m.Unlock(t.Context(), []byte("p\xff")); err != nil || !left.Locked || left.By[0] != "screen" {
		t.Errorf("Unlock: %+v, %v", left, err)
	}
	if left, err := m.Unlock(t.Context(), []byte("wrong")); !errors.Is(err, use.ErrPassphrase) || left.By[0] != "person" {
		t.Errorf("Unlock: %+v, %v", left, err)
	}
	if plain, ca, err := m.HostKeys(t.Context(), true); err != nil || len(plain) != 0 || len(ca) != 1 || ca[0] != "made" {
		t.Errorf("HostKeys that are made: %q, %q, %v", plain, ca, err)
	}
	if plain, ca, err := m.HostKeys(t.Context(), false); err != nil || len(plain) != 2 || len(ca) != 1 || ca[0] != "ca" {
		t.Errorf("HostKeys: %q, %q, %v", plain, ca, err)
	}
	if text, err := m.Dump(t.Context()); err != nil || text != "goroutine 1\xff" {
		t.Errorf("Dump: %q, %v", text, err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if got := strings.Join(b.calls, ", "); got != "close db, drain , restart, stop drain, stop, reload true, lock p\xff, unlock p\xff" {
		t.Errorf("calls: %s", got)
	}
	if b.by.UID != os.Geteuid() {
		t.Errorf("caller %+v", b.by)
	}
}

func TestErrors(t *testing.T) {
	b := &backend{}
	path, _ := start(t, b)
	m := dial(t, path)

	b.err = &use.Denied{By: "lock", Reason: "locked \"since\" noon", Hint: "run `muxproxy unlock`"}
	_, err := m.Close(t.Context(), "")
	var denied *use.Denied
	if !errors.As(err, &denied) || *denied != *b.err.(*use.Denied) {
		t.Errorf("denial: %v", err)
	}
	b.err = errors.New("no space left on device\xff")
	if err := m.Stop(t.Context(), false); err == nil || err.Error() != "no space left on device\uFFFD" {
		t.Errorf("error: %v", err)
	}
	b.err = nil

	b.block, b.entered = make(chan struct{}), make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-b.entered
		cancel()
	}()
	if _, err := m.Drain(ctx, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := m.Drain(ctx, ""); err == nil || !strings.Contains(err.Error(), "did not answer in time") {
		t.Errorf("too late: %v", err)
	}
}

// A call that stops the master gets its answer, and the end of the connection can be waited for.
func TestServerEnds(t *testing.T) {
	b := &backend{block: make(chan struct{}), entered: make(chan struct{}, 1)}
	path, stop := start(t, b)
	m := dial(t, path)
	answered := make(chan error, 1)
	go func() { answered <- m.Stop(context.Background(), false) }()
	<-b.entered
	stopped := make(chan error, 1)
	go func() { stopped <- stop() }()
	// The socket vanishes once the server has begun to end.
	for {
		c, err := net.Dial("unix", path)
		if err != nil {
			break
		}
		c.Close()
	}
	close(b.block)
	if err := <-answered; err != nil {
		t.Errorf("the call under way: %v", err)
	}
	if err := <-stopped; err != nil {
		t.Errorf("Serve: %v", err)
	}
	<-m.Lost()
	if _, err := m.Status(context.Background()); !errors.Is(err, control.ErrLost) {
		t.Errorf("a call after the end: %v", err)
	}
}

// A call that never ends is cut when the server ends.
func TestServerEndsDespiteCall(t *testing.T) {
	b := &backend{block: make(chan struct{}), entered: make(chan struct{}, 1)}
	path, stop := start(t, b)
	m := dial(t, path)
	answered := make(chan error, 1)
	go func() {
		_, err := m.Drain(context.Background(), "")
		answered <- err
	}()
	<-b.entered
	if err := stop(); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if err := <-answered; err == nil {
		t.Error("the call succeeded")
	}
}

func TestListenerCloses(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := control.Serve(t.Context(), l, &backend{}); err != nil {
		t.Error(err)
	}
}

// A peer that is no client, or says nothing, ends alone.
func TestGarbage(t *testing.T) {
	path, _ := start(t, &backend{})
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	silent, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if ok, err := dial(t, path).Exists(t.Context(), "db"); !ok || err != nil {
		t.Errorf("Exists: %v, %v", ok, err)
	}
}

// Connections that can't say who they are get no answer: TCP has no peer credentials.
func TestForeignConnection(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- control.Serve(ctx, l, &backend{}) }()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("read %d bytes, %v: want the end", n, err)
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
