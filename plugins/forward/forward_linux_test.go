package forward

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/muxproxy/muxproxy/core/plugin"
	"github.com/muxproxy/muxproxy/core/plugin/pluginpb"
	"github.com/muxproxy/muxproxy/core/plugin/plugintest"
)

// The test binary plays the plugin as a process of its own, and clients of other users.
func TestMain(m *testing.M) {
	if os.Getenv(plugin.CookieKey) != "" || os.Getenv("PLAY_PLUGIN") != "" {
		plugin.Serve(New())
	}
	if to := os.Getenv("PLAY_CLIENT"); to != "" {
		playClient(to)
	}
	if address := os.Getenv("PLAY_MACHINE"); address != "" {
		playMachine(address)
	}
	os.Exit(m.Run())
}

// world is the plugin with a master that dials what it is asked to, on this machine.
type world struct {
	*plugintest.Session
	t *testing.T
	p *Plugin

	mu    sync.Mutex // guards what follows
	dials []*pluginpb.DialRequest
}

func newWorld(t *testing.T) *world {
	t.Helper()
	p := newPlugin()
	p.timing = timing{
		first: 5 * time.Millisecond, most: 50 * time.Millisecond, grace: 200 * time.Millisecond, fresh: time.Minute,
		clients: 5 * time.Millisecond,
	}
	w := &world{Session: plugintest.InProcess(t, p), t: t, p: p}
	t.Cleanup(func() { p.Close() })
	w.Master.OnDial = func(ctx context.Context, r *pluginpb.DialRequest) (net.Conn, error) {
		w.mu.Lock()
		w.dials = append(w.dials, r)
		w.mu.Unlock()
		c, err := (&net.Dialer{}).DialContext(ctx, r.GetNetwork(), r.GetAddress())
		if err != nil {
			return nil, &plugin.RefusedError{Reason: 2, Message: shorter(err).Error()}
		}
		return c, nil
	}
	w.Master.OnListen = func(_ context.Context, r *pluginpb.ListenRequest) (net.Listener, error) {
		l, err := net.Listen(r.GetNetwork(), r.GetAddress())
		if err != nil {
			return nil, grpcstatus.Error(codes.FailedPrecondition, "the server refused the remote forward")
		}
		return l, nil
	}
	return w
}

// configure brings one host block, "0", of the host h, and an empty one, "1".
func (w *world) configure(value string) []*pluginpb.Diagnostic {
	w.t.Helper()
	r := &pluginpb.ConfigureRequest{Blocks: []*pluginpb.Block{
		{Kind: pluginpb.Block_KIND_PLUGIN, Value: []byte("{}")},
		{Id: "0", Kind: pluginpb.Block_KIND_HOST, Value: []byte(value), Hosts: []string{"*.x", "!y", "h", "i"}},
		{Id: "1", Kind: pluginpb.Block_KIND_HOST, Value: []byte("{}"), Hosts: []string{"*"}},
	}}
	answer, err := w.Client.Configure(w.t.Context(), r)
	if err != nil {
		w.t.Fatal(err)
	}
	return answer.GetDiagnostics()
}

func (w *world) use(value string) {
	w.t.Helper()
	for _, d := range w.configure(value) {
		if d.GetSeverity() != pluginpb.Diagnostic_SEVERITY_WARNING {
			w.t.Fatal(d)
		}
	}
}

// command runs a command and returns its status and all that it printed.
func (w *world) command(args ...string) (int, string) {
	w.t.Helper()
	var out bytes.Buffer
	status := w.p.Command(w.t.Context(), args, &out, &out)
	return status, out.String()
}

func (w *world) list() (list []status) {
	w.t.Helper()
	code, out := w.command("list", "--json")
	if err := json.Unmarshal([]byte(out), &list); err != nil || code != 0 {
		w.t.Fatalf("list: %d, %v\n%s", code, err, out)
	}
	return list
}

// until polls until ok says so: the world has no event for what is waited for.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// opened waits until all forwards are open and returns where the i-th one listens.
func (w *world) opened(i int) string {
	w.t.Helper()
	var list []status
	until(w.t, "open", func() bool {
		list = w.list()
		for _, s := range list {
			if s.State != open {
				return false
			}
		}
		return true
	})
	return list[i].Listening[0]
}

// emptied waits until no connection has the place of one without a stream.
func (w *world) emptied() {
	w.t.Helper()
	until(w.t, "all places are free", func() bool {
		return !slices.ContainsFunc(w.p.all(), func(f *forward) bool { return len(f.slots) > 0 })
	})
}

// recorded waits until the audit log has so many lines with text in them, and checks that it has no more.
func (w *world) recorded(text string, n int) {
	w.t.Helper()
	count := func() int { return strings.Count(strings.Join(w.Master.Records(), "\n"), text) }
	until(w.t, fmt.Sprintf("%d times %q", n, text), func() bool { return count() >= n })
	if got := count(); got != n {
		w.t.Errorf("%d times %q:\n%s", got, text, strings.Join(w.Master.Records(), "\n"))
	}
}

// free is a port that nobody has.
func free(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// echo is a server that sends back what it gets, with its end.
func echo(t *testing.T, network, address string) net.Listener {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
			}()
		}
	}()
	return l
}

type halfCloser interface {
	net.Conn
	CloseWrite() error
}

func dial(t *testing.T, network, address string) halfCloser {
	t.Helper()
	c, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(halfCloser)
}

// talk sends something, ends, and reads all of what comes back.
func talk(t *testing.T, c halfCloser, say string) string {
	t.Helper()
	fmt.Fprint(c, say)
	c.CloseWrite()
	b, err := io.ReadAll(c)
	if err != nil {
		t.Errorf("after %q: %v", b, err)
	}
	return string(b)
}

// TCP and Unix sockets on every side; whose stream it is; both ends end apart; all of it is counted.
func TestLocal(t *testing.T) {
	dir := t.TempDir()
	tcp, unix := echo(t, "tcp", "127.0.0.1:0").Addr().String(), filepath.Join(dir, "echo")
	echo(t, "unix", unix)
	w := newWorld(t)
	both, v4, sock := free(t), fmt.Sprintf("127.0.0.1:%d", free(t)), filepath.Join(dir, "sock")
	w.use(fmt.Sprintf(`{"local": [
		{"address": "%d", "to": %q, "users": "self"}, {"address": %q, "to": %q, "users": "any"}, {"address": %q, "to": %q, "users": "self"}]}`,
		both, tcp, v4, unix, sock, tcp))
	w.opened(0)
	for i, c := range []struct {
		network, address, to string
		origin, pid          bool
	}{
		{"tcp", fmt.Sprintf("127.0.0.1:%d", both), "tcp " + tcp, true, true},
		{"tcp", fmt.Sprintf("[::1]:%d", both), "tcp " + tcp, true, true},
		{"tcp", v4, "unix " + unix, true, false},
		{"unix", sock, "tcp " + tcp, false, true},
	} {
		conn := dial(t, c.network, c.address)
		if got := talk(t, conn, "hello"); got != "hello" {
			t.Errorf("%s: %q", c.address, got)
		}
		w.mu.Lock()
		r := w.dials[i]
		w.mu.Unlock()
		wantOrigin, wantPID := "", int64(0)
		if c.origin {
			wantOrigin = conn.LocalAddr().String()
		}
		if c.pid {
			wantPID = int64(os.Getpid())
		}
		if r.GetNetwork()+" "+r.GetAddress() != c.to || r.GetOrigin() != wantOrigin || wantPID != 0 && r.GetPid() != wantPID {
			t.Errorf("%s: %v", c.address, r)
		}
	}
	until(t, "all of it counted", func() bool {
		n, in, out := uint64(0), uint64(0), uint64(0)
		for _, s := range w.list() {
			n, in, out = n+s.Total, in+s.In, out+s.Out
		}
		return n == 4 && in == 20 && out == 20
	})
	w.recorded("opened u@test.example.com:22 local ", 3)
	w.recorded(`policy, host "*.x" "!y" "h" "i"`, 3)
}

// The remote side says its end first, or last, and bytes flow the other way after it.
func TestHalfClose(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	w := newWorld(t)
	w.use(fmt.Sprintf(`{"local": [{"address": "127.0.0.1:%d", "to": %q, "users": "self"}]}`, free(t), l.Addr()))
	near := dial(t, "tcp", w.opened(0))
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	far := c.(*net.TCPConn)
	fmt.Fprint(far, "bye")
	far.CloseWrite()
	if b, err := io.ReadAll(near); string(b) != "bye" || err != nil {
		t.Fatalf("%q, %v", b, err)
	}
	fmt.Fprint(near, "one more thing")
	near.CloseWrite()
	if b, err := io.ReadAll(far); string(b) != "one more thing" || err != nil {
		t.Fatalf("%q, %v", b, err)
	}
}

// Real clients, in every protocol.
func TestClients(t *testing.T) {
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "the page") }))
	defer server.Close()
	w := newWorld(t)
	w.use(fmt.Sprintf(`{"dynamic": [{"address": "127.0.0.1:%d", "users": "self"}]}`, free(t)))
	at := w.opened(0)
	_, port, _ := net.SplitHostPort(server.Listener.Addr().String())
	_, none, _ := net.SplitHostPort(fmt.Sprintf("127.0.0.1:%d", free(t)))
	for _, c := range []struct {
		name string
		args []string
		host string // that the master is asked for
		port string
		want string
	}{
		{"socks4", []string{"--socks4", at}, "127.0.0.1", port, "the page"},
		{"socks4a", []string{"--socks4a", at}, "localhost", port, "the page"},
		{"socks5", []string{"--socks5", at}, "127.0.0.1", port, "the page"},
		{"socks5h", []string{"--socks5-hostname", at}, "localhost", port, "the page"},
		{"connect", []string{"-p", "-x", "http://" + at}, "localhost", port, "the page"},
		{"get", []string{"-x", "http://" + at}, "", port, "muxproxy: this proxy only has CONNECT"},
		{"socks4a, nobody there", []string{"--socks4a", at}, "localhost", none, "(91)"},
		{"socks5h, nobody there", []string{"--socks5-hostname", at}, "localhost", none, "(5)"},
		{"connect, nobody there", []string{"-p", "-x", "http://" + at}, "localhost", none, "502"},
	} {
		host := c.host
		if host == "" {
			host = "localhost"
		}
		w.mu.Lock()
		w.dials = nil
		w.mu.Unlock()
		out, _ := exec.Command(curl, append([]string{"-sS", "-4", "-m", "20"}, append(c.args, "http://"+host+":"+c.port+"/")...)...).CombinedOutput()
		if !strings.Contains(string(out), c.want) {
			t.Errorf("%s: %s", c.name, out)
		}
		w.mu.Lock()
		if c.host == "" && len(w.dials) != 0 || c.host != "" && (len(w.dials) != 1 || w.dials[0].GetAddress() != net.JoinHostPort(c.host, c.port)) {
			t.Errorf("%s: dialled %v", c.name, w.dials)
		} else if c.host != "" && (w.dials[0].GetPid() == 0 || w.dials[0].GetPid() == int64(os.Getpid())) {
			t.Errorf("%s: not curl's: %v", c.name, w.dials)
		}
		w.mu.Unlock()
	}
}

// The port is open while no connection is. Many who come first have it made once, and if that fails are told, each by its
// protocol, and the log once.
func TestOnDemand(t *testing.T) {
	to := echo(t, "tcp", "127.0.0.1:0").Addr().String()
	w := newWorld(t)
	var connects atomic.Int32
	var broken atomic.Bool
	broken.Store(true)
	hold := make(chan struct{})
	conn := &pluginpb.Connection{Id: 7, Target: &pluginpb.Target{User: "u", Host: "test.example.com", Port: 22}, Up: true}
	w.Master.SetConnections()
	w.Master.OnConnect = func(target string) (*pluginpb.ConnectResponse, error) {
		connects.Add(1)
		<-hold
		if target != "h" || broken.Load() {
			return nil, grpcstatus.Error(codes.FailedPrecondition, "h: connection refused")
		}
		w.Master.SetConnections(conn)
		return &pluginpb.ConnectResponse{Connection: conn}, nil
	}
	w.use(fmt.Sprintf(`{"local": [{"address": "127.0.0.1:%d", "to": %q, "users": "self"}], "dynamic": [{"address": "127.0.0.1:%d", "users": "self"}]}`,
		free(t), to, free(t)))
	socks, at := w.opened(0), w.opened(1)
	if strings.HasPrefix(w.list()[0].ID, "p") && w.list()[0].Kind != dynamic {
		socks, at = at, socks
	}
	if connects.Load() != 0 {
		t.Error("connected before anybody came")
	}
	const many = 20
	var coming sync.WaitGroup
	results := make(chan string, 3*many)
	come := func() {
		for range many {
			coming.Go(func() {
				c, err := net.Dial("tcp", at)
				if err != nil {
					results <- err.Error()
					return
				}
				defer c.Close()
				b := make([]byte, 2)
				fmt.Fprint(c, "hi")
				if _, err := io.ReadFull(c, b); err != nil {
					b = []byte("no")
				}
				results <- string(b)
			})
		}
	}
	come()
	coming.Go(func() {
		c := dial(t, "tcp", socks)
		fmt.Fprint(c, "\x05\x01\x00\x05\x01\x00\x03\x01h\x00\x50")
		b, _ := io.ReadAll(c)
		results <- string(b)
	})
	until(t, "all wait for one connection", func() bool {
		b := make([]byte, 1<<20)
		return strings.Count(string(b[:runtime.Stack(b, true)]), ".(*Plugin).connect(") == many+1
	})
	close(hold)
	coming.Wait()
	if n := connects.Load(); n != 1 {
		t.Errorf("%d connections for %d who came at once", n, many)
	}
	for range many + 1 {
		if r := <-results; r != "no" && r != "\x05\x00\x05\x01\x00\x01\x00\x00\x00\x00\x00\x00" {
			t.Errorf("%q", r)
		}
	}
	f := w.p.all()[0]
	f.mu.Lock()
	told := len(f.told)
	f.mu.Unlock()
	if told != 1 {
		t.Errorf("%d lines in the log", told)
	}
	broken.Store(false)
	come()
	coming.Wait()
	for range many {
		if r := <-results; r != "hi" {
			t.Errorf("%q", r)
		}
	}
	if n := connects.Load(); n != 2 {
		t.Errorf("%d connections", n)
	}
	// A connection that has ended is noticed when it is used, and made again.
	w.Master.SetConnections()
	if got := talk(t, dial(t, "tcp", at), "again"); got != "again" {
		t.Errorf("%q", got)
	}
	if n := connects.Load(); n != 3 {
		t.Errorf("%d connections", n)
	}
}

// A changed policy leaves alone what it still has: listeners, and the streams even of what it has no more.
func TestReload(t *testing.T) {
	to := echo(t, "tcp", "127.0.0.1:0").Addr().String()
	w := newWorld(t)
	one := func(port int) string {
		return fmt.Sprintf(`{"address": "127.0.0.1:%d", "to": %q, "users": "self"}`, port, to)
	}
	stays, goes := free(t), free(t)
	w.use(fmt.Sprintf(`{"local": [%s, %s]}`, one(stays), one(goes)))
	a, b := dial(t, "tcp", w.opened(0)), dial(t, "tcp", w.opened(1))
	ping := func(c net.Conn) {
		t.Helper()
		buf := make([]byte, 4)
		if fmt.Fprint(c, "ping"); !readIs(c, buf, "ping") {
			t.Errorf("the stream ends: %q", buf)
		}
	}
	ping(a)
	ping(b)
	before := w.list()
	// A reload that changes nothing, one that fails, and one that takes a forward away and has another one in its place.
	w.use(fmt.Sprintf(`{"local": [%s, %s]}`, one(stays), one(goes)))
	if ds := w.configure(`{"local": [{"address": "nonsense", "to": "x", "users": "self"}]}`); len(ds) != 1 {
		t.Errorf("%v", ds)
	}
	w.use(fmt.Sprintf(`{"local": [%s], "dynamic": [{"address": "127.0.0.1:%d", "users": "self"}]}`, one(stays), goes))
	w.opened(1)
	after := w.list()
	if len(after) != 2 || after[0].ID != before[0].ID || after[0].Connections != 1 || after[1].Kind != dynamic {
		t.Errorf("before %+v\nafter %+v", before, after)
	}
	w.recorded("opened ", 3)
	w.recorded("failed ", 0) // what takes the place of another waits for that
	ping(a)
	ping(b)
	w.use(`{}`)
	if c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", stays)); err == nil {
		c.Close()
		t.Error("still open")
	}
	ping(a)
	ping(b)
}

func readIs(r io.Reader, buf []byte, want string) bool {
	_, err := io.ReadFull(r, buf)
	return err == nil && string(buf) == want
}

// Another block holds for the host: the forward is not open, says so, and comes as soon as that changes.
func TestOtherBlock(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex // guards block and err
	block, err := "1", error(nil)
	w.Master.OnResolve = func(target string) (*pluginpb.ResolveResponse, error) {
		mu.Lock()
		defer mu.Unlock()
		return &pluginpb.ResolveResponse{Target: &pluginpb.Target{User: "u", Host: target, Port: 22}, Block: block}, err
	}
	set := func(b string, e error) {
		mu.Lock()
		block, err = b, e
		mu.Unlock()
	}
	w.use(fmt.Sprintf(`{"dynamic": [{"address": "127.0.0.1:%d", "users": "self"}]}`, free(t)))
	waits := func(reason string) {
		t.Helper()
		until(t, reason, func() bool {
			s := w.list()[0]
			return s.State == waiting && strings.Contains(s.Reason, reason) && len(s.Listening) == 0
		})
	}
	waits("another forward block holds for h")
	set("", nil)
	waits("the `when` of no forward block of h is true")
	set("", grpcstatus.Error(codes.PermissionDenied, "u@h:22 has no block of forward"))
	waits("no block of forward")
	set("0", nil)
	w.opened(0)
	// Trouble with finding out is no reason to close; another policy is.
	set("0", grpcstatus.Error(codes.FailedPrecondition, "ssh -G: no"))
	w.p.all()[0].wake()
	set("1", nil)
	w.p.all()[0].wake()
	waits("another forward block holds for h")
}

// What can't be had is one line, stops nothing else, and is tried again.
func TestTaken(t *testing.T) {
	to := echo(t, "tcp", "127.0.0.1:0").Addr().String()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	there, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	w.use(fmt.Sprintf(`{"local": [{"address": %q, "to": %q, "users": "self"}, {"address": "127.0.0.1:%d", "to": %q, "users": "self"}],
		"remote": [{"address": %q, "to": %q}]}`, taken.Addr(), to, free(t), to, there.Addr(), to))
	var list []status
	until(t, "two wait, one is open", func() bool {
		list = w.list()
		return list[0].State == waiting && list[1].State == open && list[2].State == waiting
	})
	if want := fmt.Sprintf("can't listen on %s: address already in use", taken.Addr()); list[0].Reason != want {
		t.Errorf("%q, want %q", list[0].Reason, want)
	}
	if want := "h: the server refused the remote forward"; list[2].Reason != want {
		t.Errorf("%q, want %q", list[2].Reason, want)
	}
	until(t, "tried more than once", func() bool { return len(w.Master.Records()) >= 3 })
	taken.Close()
	there.Close()
	for i := range 3 {
		w.opened(i)
	}
	if got := talk(t, dial(t, "tcp", taken.Addr().String()), "x"); got != "x" {
		t.Errorf("%q", got)
	}
	w.recorded("failed u@test.example.com:22 ", 2)
	w.recorded("opened ", 3)
}

// The server's side: TCP and Unix sockets here, and again after the connection was lost.
func TestRemote(t *testing.T) {
	dir := t.TempDir()
	tcp, unix := echo(t, "tcp", "127.0.0.1:0").Addr().String(), filepath.Join(dir, "echo")
	echo(t, "unix", unix)
	w := newWorld(t)
	sock := filepath.Join(dir, "there")
	var mu sync.Mutex // guards listening
	listening := map[string]net.Listener{}
	direct := w.Master.OnListen
	w.Master.OnListen = func(ctx context.Context, r *pluginpb.ListenRequest) (net.Listener, error) {
		l, err := direct(ctx, r)
		mu.Lock()
		listening[r.GetAddress()] = l
		mu.Unlock()
		return l, err
	}
	port := free(t)
	w.use(fmt.Sprintf(`{"remote": [{"address": "%d", "to": %q}, {"address": %q, "to": %q}, {"address": "127.0.0.1:0", "to": "127.0.0.1:%d"}]}`,
		port, unix, sock, tcp, free(t)))
	asked := fmt.Sprintf("localhost:%d", port) // as ssh does
	for round := range 2 {
		at := w.opened(0)
		if got := talk(t, dial(t, "tcp", at), "hello"); got != "hello" {
			t.Errorf("%q", got)
		}
		if got := talk(t, dial(t, "unix", sock), "hello"); got != "hello" {
			t.Errorf("%q", got)
		}
		if b, err := io.ReadAll(dial(t, "tcp", w.opened(2))); len(b) > 0 || err != nil && !strings.Contains(err.Error(), "reset") {
			t.Errorf("nobody is there: %q, %v", b, err)
		}
		until(t, "counted", func() bool { s := w.list()[0]; return s.In == uint64(5*round+5) && s.Out == uint64(5*round+5) })
		mu.Lock()
		lost := listening[asked]
		delete(listening, asked)
		mu.Unlock()
		if lost == nil {
			t.Fatalf("nobody listens on %s", asked)
		}
		lost.Close()
		until(t, "open again", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return listening[asked] != nil
		})
	}
}

// SOCKS from the server's side (ssh -R PORT).
func TestRemoteDynamic(t *testing.T) {
	to := echo(t, "tcp", "127.0.0.1:0").Addr().(*net.TCPAddr)
	w := newWorld(t)
	w.use(`{}`)
	if code, out := w.command("add", "-R", "127.0.0.1:0", "h"); code != 0 {
		t.Fatal(out)
	}
	at := w.opened(0)
	c := dial(t, "tcp", at)
	fmt.Fprintf(c, "\x05\x01\x00\x05\x01\x00\x01\x7f\x00\x00\x01%c%chello", to.Port>>8, to.Port&255)
	// %c writes UTF-8: the port goes as bytes.
	c.Close()
	c = dial(t, "tcp", at)
	c.Write([]byte{5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, byte(to.Port >> 8), byte(to.Port), 'h', 'i'})
	if got := talk(t, c, "!"); got != ok5+reply5(0)+"hi!" {
		t.Errorf("%q", got)
	}
	c = dial(t, "tcp", at)
	port := free(t)
	c.Write([]byte{5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, byte(port >> 8), byte(port)})
	if got := talk(t, c, ""); got != ok5+reply5(5) {
		t.Errorf("nobody there: %q", got)
	}
	until(t, "counted", func() bool { s := w.list()[0]; return s.In >= 3 && s.Out >= 3 })
	w.emptied()
	// Its streams end with the plugin, and don't look complete.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port = l.Addr().(*net.TCPAddr).Port
	c = dial(t, "tcp", at)
	c.Write([]byte{5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, byte(port >> 8), byte(port), 'h', 'i'})
	near, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	near.SetDeadline(time.Now().Add(20 * time.Second))
	if !readIs(near, make([]byte, 2), "hi") {
		t.Error("no stream")
	}
	w.p.Close()
	if n, err := near.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the plugin has ended: %d bytes, %v", n, err)
	}
}

// Policy decides where what comes from the server may lead, to a fixed place and by SOCKS; nothing is connected to before.
func TestRemoteIsJudged(t *testing.T) {
	good := echo(t, "tcp", "127.0.0.1:0").Addr().(*net.TCPAddr)
	dir := t.TempDir()
	sock := filepath.Join(dir, "echo")
	echo(t, "unix", sock)
	bad, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer bad.Close()
	came := make(chan struct{}, 10)
	go func() {
		for {
			c, err := bad.Accept()
			if err != nil {
				return
			}
			c.Close()
			came <- struct{}{}
		}
	}()
	w := newWorld(t)
	var mu sync.Mutex // guards asked
	var asked []string
	w.Master.OnPermit = func(_ context.Context, r *pluginpb.PermitRequest) error {
		mu.Lock()
		asked = append(asked, r.GetNetwork()+" "+r.GetAddress())
		mu.Unlock()
		switch {
		case r.GetAddress() == bad.Addr().String():
			return grpcstatus.Error(codes.PermissionDenied, "denied by policy: not there")
		case r.GetAddress() == "odd:1":
			return grpcstatus.Error(codes.Unimplemented, "what?")
		}
		return nil
	}
	w.use(fmt.Sprintf(`{"remote": [{"address": "127.0.0.1:0", "to": %q}, {"address": "localhost:0", "to": %q}]}`, bad.Addr(), sock))
	if code, out := w.command("add", "-R", "127.0.0.1:0", "h"); code != 0 {
		t.Fatal(out)
	}
	denied, allowed, socks := w.opened(0), w.opened(1), w.opened(2)
	connect := func(port int) string {
		return hello5 + string([]byte{5, 1, 0, 1, 127, 0, 0, 1, byte(port >> 8), byte(port)})
	}
	for _, c := range []struct{ name, at, say, want, asked string }{
		{"fixed, denied", denied, "hi", "", "tcp " + bad.Addr().String()},
		{"fixed, allowed", allowed, "hi", "hi", "unix " + sock},
		{"socks, denied", socks, connect(bad.Addr().(*net.TCPAddr).Port), ok5 + reply5(2), "tcp " + bad.Addr().String()},
		{"http, denied", socks, fmt.Sprintf("CONNECT %s HTTP/1.1\r\n\r\n", bad.Addr()), "HTTP/1.1 403 Forbidden\r\n", "tcp " + bad.Addr().String()},
		{"no answer that is one", socks, hello5 + "\x05\x01\x00\x03\x03odd\x00\x01", ok5 + reply5(1), "tcp odd:1"},
		{"socks, allowed", socks, connect(good.Port) + "hi", ok5 + reply5(0) + "hi", "tcp " + good.String()},
	} {
		mu.Lock()
		asked = nil
		mu.Unlock()
		near := dial(t, "tcp", c.at)
		fmt.Fprint(near, c.say)
		near.CloseWrite()
		got, _ := io.ReadAll(near) // a refusal may be a reset
		mu.Lock()
		if string(got) != c.want && !(strings.HasPrefix(c.want, "HTTP") && strings.HasPrefix(string(got), c.want)) || strings.Join(asked, "|") != c.asked {
			t.Errorf("%s: %q, want %q; asked about %q", c.name, got, c.want, asked)
		}
		mu.Unlock()
	}
	select {
	case <-came:
		t.Error("connected to what was denied")
	default:
	}
}

// What was kept and can't be read for a moment is neither lost nor overwritten.
func TestKeptLater(t *testing.T) {
	w := newWorld(t)
	port := free(t)
	data := fmt.Sprintf(`{"version":1,"last":7,"added":[{"id":7,"kind":"dynamic","spec":"127.0.0.1:%d","host":"h"}]}`, port)
	if _, err := w.Master.Keep(t.Context(), &pluginpb.KeepRequest{Data: []byte(data)}); err != nil {
		t.Fatal(err)
	}
	var broken atomic.Bool
	broken.Store(true)
	w.Master.OnKept = func() error {
		if broken.Load() {
			return grpcstatus.Error(codes.FailedPrecondition, "kept data: too many open files")
		}
		return nil
	}
	w.use(`{}`)
	const want = "muxproxy: the forwards that were added before can't be read: kept data: too many open files\n"
	if code, out := w.command("add", "-D", fmt.Sprint(free(t)), "h"); code != 255 || out != want {
		t.Errorf("%d: %s", code, out)
	}
	broken.Store(false)
	until(t, "restored", func() bool { return len(w.list()) == 1 })
	w.opened(0)
	if code, out := w.command("add", "-D", fmt.Sprintf("127.0.0.1:%d", free(t)), "h"); code != 0 || !strings.HasPrefix(out, "8: ") {
		t.Errorf("%d: %s", code, out)
	}
	w.use(`{}`)
	kept, err := w.Master.Kept(t.Context(), nil)
	if err != nil || strings.Count(string(kept.GetData()), `"id":`) != 2 || len(w.list()) != 2 {
		t.Errorf("%s, %v", kept.GetData(), err)
	}
}

// A forward that has as many clients as it can take, who say nothing, leaves the others alone, and ends at once.
func TestFull(t *testing.T) {
	to := echo(t, "tcp", "127.0.0.1:0").Addr().String()
	w := newWorld(t)
	var mu sync.Mutex // guards block
	block := "0"
	w.Master.OnResolve = func(target string) (*pluginpb.ResolveResponse, error) {
		mu.Lock()
		defer mu.Unlock()
		return &pluginpb.ResolveResponse{Target: &pluginpb.Target{User: "u", Host: target, Port: 22}, Block: block}, nil
	}
	w.use(fmt.Sprintf(`{"dynamic": [{"address": "127.0.0.1:%d", "users": "any"}], "local": [{"address": "127.0.0.1:%d", "to": %q, "users": "self"}],
		"remote": [{"address": "127.0.0.1:0", "to": %q}]}`, free(t), free(t), to, to))
	w.opened(0)
	list := w.p.all()
	var at [3]string
	for i := range list {
		at[i] = w.opened(i)
	}
	for i, f := range list {
		if f.spec.kind == local {
			if got := talk(t, dial(t, "tcp", at[i]), "x"); got != "x" {
				t.Errorf("while nothing is full: %q", got)
			}
			continue
		}
		for range cap(f.slots) { // what clients that say nothing have
			f.slots <- struct{}{}
		}
		if f.spec.kind == dynamic {
			dial(t, "tcp", at[i])
		}
	}
	for i, f := range list {
		switch f.spec.kind {
		case local:
			if got := talk(t, dial(t, "tcp", at[i]), "x"); got != "x" {
				t.Errorf("another forward: %q", got)
			}
		case remote:
			if b, err := io.ReadAll(dial(t, "tcp", at[i])); len(b) > 0 || err != nil && !strings.Contains(err.Error(), "reset") {
				t.Errorf("one too many from the server: %q, %v", b, err)
			}
		}
	}
	mu.Lock()
	block = "1"
	mu.Unlock()
	for _, f := range list {
		f.wake()
	}
	until(t, "closed", func() bool {
		for _, s := range w.list() {
			if s.State != waiting {
				return false
			}
		}
		return true
	})
}

// What can't be had is tried at growing distances, not at the longest from the first time on.
func TestBackOff(t *testing.T) {
	w := newWorld(t)
	w.p.timing.first, w.p.timing.most = time.Millisecond, time.Hour
	var tries atomic.Int32
	w.Master.OnListen = func(context.Context, *pluginpb.ListenRequest) (net.Listener, error) {
		tries.Add(1)
		return nil, grpcstatus.Error(codes.FailedPrecondition, "the server refused the remote forward")
	}
	w.use(`{"remote": [{"address": "127.0.0.1:0", "to": "h:80"}]}`)
	until(t, "tried again", func() bool { return tries.Load() >= 5 })
}

// A machine that slept for longer than a forward was wanted: its timer stood still.
func TestOverdue(t *testing.T) {
	w := newWorld(t)
	w.use(`{}`)
	if code, out := w.command("add", "h", "-D", fmt.Sprintf("127.0.0.1:%d", free(t)), "--for", "1h"); code != 0 {
		t.Fatal(out)
	}
	w.p.Observe(t.Context(), plugin.Event{Kind: "wake"})
	if len(w.list()) != 1 {
		t.Fatal("ended before its time")
	}
	f := w.p.all()[0]
	f.timer.Stop()
	f.until = time.Now().Add(-time.Second)
	w.p.Observe(t.Context(), plugin.Event{Kind: "wake"})
	if list := w.list(); len(list) != 0 {
		t.Errorf("%+v", list)
	}
	w.recorded("command: its time is over", 1)
}

// As many as can be kept, and no more.
func TestTooMany(t *testing.T) {
	w := newWorld(t)
	w.use(`{}`)
	dir := t.TempDir()
	for i := range maxAdded {
		if code, out := w.command("add", "h", "-D", filepath.Join(dir, fmt.Sprint(i))); code != 0 {
			t.Fatal(out)
		}
	}
	if code, out := w.command("add", "h", "-D", filepath.Join(dir, "x")); code != 1 || out != "muxproxy: there are 64 forwards already: remove some\n" {
		t.Errorf("%d: %s", code, out)
	}
	if code, out := w.command("add", strings.Repeat("h", maxText+1), "-D", "1080"); code != 2 || out != "muxproxy: more than 300 bytes are too long\n" {
		t.Errorf("%d: %s", code, out)
	}
}

// Clients that have not said what they want end with their forward.
func TestSilentClients(t *testing.T) {
	w := newWorld(t)
	w.use(`{}`)
	for _, add := range [][]string{{"-D", fmt.Sprintf("127.0.0.1:%d", free(t))}, {"-R", "127.0.0.1:0"}} {
		if code, out := w.command(append([]string{"add", "h"}, add...)...); code != 0 {
			t.Fatal(out)
		}
		c := dial(t, "tcp", w.opened(0))
		fmt.Fprint(c, "\x05")
		f := w.p.all()[0]
		until(t, "somebody is there", func() bool { return len(f.slots) == 1 })
		if code, out := w.command("remove", f.id); code != 0 {
			t.Error(out)
		}
		if n, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%q: %d bytes, %v", add, n, err)
		}
		until(t, "its place is free", func() bool { return len(f.slots) == 0 })
	}
}

// What commands add: with a time, with the clients, over restarts.
func TestCommands(t *testing.T) {
	to := echo(t, "tcp", "127.0.0.1:0").Addr().String()
	w := newWorld(t)
	w.use(fmt.Sprintf(`{"local": [{"address": "127.0.0.1:%d", "to": %q, "users": "self"}]}`, free(t), to))
	w.opened(0)
	taken := w.list()[0].Listen
	port, short := free(t), free(t)
	spec := fmt.Sprintf("127.0.0.1:%d:%s", port, to)
	for _, c := range []struct {
		args   []string
		status int
		want   string
	}{
		{nil, 2, "add, list or remove"},
		{[]string{"nonsense"}, 2, `unknown command "nonsense" for "muxproxy forward"`},
		{[]string{"add"}, 2, "give one HOST besides the option and its SPEC, not 0"},
		{[]string{"add", "h"}, 2, "give one of -L, -R and -D"},
		{[]string{"add", "-L", spec, "-D", "1080", "h"}, 2, "give one of"},
		{[]string{"add", "-L", "8080", "h"}, 2, `"8080" is no local forward: write [ADDRESS:]PORT:HOST:HOSTPORT`},
		{[]string{"add", "-L", spec, "h", "--for", "-1s"}, 2, "--for takes a duration"},
		{[]string{"add", "-L", spec, "h", "--for", "soon"}, 2, "invalid"},
		{[]string{"add", "-L", spec, "--", "-oProxyCommand=x"}, 2, "is no host"},
		{[]string{"add", "-L", "*:8080:h:80", "h"}, 1, "*:8080 lets other machines in: only policy can allow that"},
		{[]string{"add", "-D", taken, "h"}, 1, "can't listen on " + taken + ": address already in use"},
		{[]string{"add", "-L", spec, "--with-client", "h"}, 1, "no client is connected to u@test.example.com:22"},
		{[]string{"add", "-L", spec, "h"}, 0, fmt.Sprintf("2: listening on 127.0.0.1:%d\n", port)},
		{[]string{"add", "-L", spec, "h"}, 1, "there is such a forward already: 2"},
		{[]string{"add", "-D", fmt.Sprint(short), "--for", "1h", "h"}, 0, fmt.Sprintf("3: listening on 127.0.0.1:%d and [::1]:%d\n", short, short)},
		{[]string{"list"}, 0, "2   local    127.0.0.1:" + fmt.Sprint(port)},
		{[]string{"remove"}, 2, "give one ID or SPEC, not 0"},
		{[]string{"remove", "99"}, 1, `there is no forward "99"`},
		{[]string{"remove", "p1"}, 1, "p1 is policy's, in host"},
	} {
		code, out := w.command(c.args...)
		if code != c.status || !strings.Contains(out, c.want) || strings.Count(out, "\n") != 1 && c.args[0] != "list" {
			t.Errorf("%q: %d\n%s", c.args, code, out)
		}
	}
	for args, want := range map[string]string{
		"--help": "\n  muxproxy forward [command]\n", "add --help": "\n  muxproxy forward add (-L|-R|-D) SPEC HOST [flags]\n",
		"list --help": "\n  muxproxy forward list [flags]\n", "remove --help": "\n  muxproxy forward remove ID|SPEC [flags]\n",
	} {
		if code, out := w.command(strings.Fields(args)...); code != 0 || !strings.Contains(out, want) || strings.Contains(out, "muxproxy add") {
			t.Errorf("%s: %d\n%s", args, code, out)
		}
	}
	// A port that the server chose is what the list shows, and what remove takes.
	if code, out := w.command("add", "-R", "127.0.0.1:0:h:80", "h"); code != 0 {
		t.Error(out)
	}
	at := w.list()[3].Listening[0]
	if _, out := w.command("list"); !strings.Contains(out, "4   remote   "+at+" ") {
		t.Errorf("%s is not in\n%s", at, out)
	}
	_, chosen, _ := net.SplitHostPort(at)
	if code, out := w.command("remove", chosen); code != 0 || len(w.list()) != 3 {
		t.Errorf("%d: %s", code, out)
	}
	// A new process of the plugin finds what was added.
	kept, err := w.Master.Kept(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	w.p.Close()
	w2 := newWorld(t)
	if _, err := w2.Master.Keep(t.Context(), &pluginpb.KeepRequest{Data: kept.GetData()}); err != nil {
		t.Fatal(err)
	}
	w2.use(`{}`)
	w2.opened(1)
	list := w2.list()
	if len(list) != 2 || list[0].ID != "2" || list[0].To != to || list[0].Owner != "command" || !list[0].Until.IsZero() ||
		list[1].ID != "3" || time.Until(list[1].Until) < 50*time.Minute || time.Until(list[1].Until) > time.Hour+time.Second {
		t.Errorf("%+v", list)
	}
	if got := talk(t, dial(t, "tcp", fmt.Sprintf("127.0.0.1:%d", port)), "x"); got != "x" {
		t.Errorf("%q", got)
	}
	// By what it is, by where it listens, by its ID.
	if code, out := w2.command("remove", spec); code != 0 {
		t.Error(out)
	}
	if code, out := w2.command("remove", fmt.Sprint(short)); code != 0 {
		t.Error(out)
	}
	if len(w2.list()) != 0 {
		t.Errorf("%+v", w2.list())
	}
	// An ID is never given twice, and what is over ends.
	if code, out := w2.command("add", "-L", spec, "h", "--for", "2s"); code != 0 || !strings.HasPrefix(out, "5: ") {
		t.Error(code, out)
	}
	until(t, "over", func() bool { return len(w2.list()) == 0 })
	w2.Master.SetConnections(&pluginpb.Connection{Id: 1, Clients: 1, Target: &pluginpb.Target{User: "u", Host: "test.example.com", Port: 22}})
	if code, out := w2.command("add", "-L", spec, "h", "--with-client"); code != 0 {
		t.Error(out)
	}
	w2.opened(0)
	w2.Master.SetConnections(&pluginpb.Connection{Id: 1, Target: &pluginpb.Target{User: "u", Host: "test.example.com", Port: 22}})
	until(t, "the last client has left", func() bool { return len(w2.list()) == 0 })
	w2.recorded("command: the connection's last client has left", 1)
	until(t, "nothing is kept", func() bool {
		kept, err := w2.Master.Kept(t.Context(), nil)
		return err == nil && strings.Contains(string(kept.GetData()), `"added":[]`)
	})
	// Without a block for the host.
	w2.Master.OnResolve = func(string) (*pluginpb.ResolveResponse, error) {
		return nil, grpcstatus.Error(codes.PermissionDenied, "u@other:22 has no block of forward")
	}
	if code, out := w2.command("add", "-L", spec, "u@other"); code != 1 ||
		out != "muxproxy: policy has no forward block for u@other: put host \"other\" { forward {} } into it (muxproxy config path)\n" {
		t.Errorf("%d, %s", code, out)
	}
}

// What was kept is not trusted more than a command line.
func TestKeptNonsense(t *testing.T) {
	for _, data := range []string{"", "nonsense", `{"version":2}`, `{"version":1,"added":[{"id":1,"kind":"local","spec":"x","host":"h"}]}`,
		`{"version":1,"added":[{"id":1,"kind":"dynamic","spec":"*:1080","host":"h"}]}`,
		`{"version":1,"added":[{"id":1,"kind":"dynamic","spec":"1080","host":"h","until":"2020-01-01T00:00:00Z"}]}`} {
		w := newWorld(t)
		if _, err := w.Master.Keep(t.Context(), &pluginpb.KeepRequest{Data: []byte(data)}); err != nil {
			t.Fatal(err)
		}
		w.use(`{}`)
		if list := w.list(); len(list) != 0 {
			t.Errorf("%s: %+v", data, list)
		}
	}
}

// A login that was refused is not tried again and again, but when somebody has logged in.
func TestRefusedLogin(t *testing.T) {
	to := echo(t, "tcp", "127.0.0.1:0").Addr().String()
	w := newWorld(t)
	var connects atomic.Int32
	w.Master.OnConnect = func(string) (*pluginpb.ConnectResponse, error) {
		if connects.Add(1) == 1 {
			return &pluginpb.ConnectResponse{Refused: "u@h:22: permission denied"}, nil
		}
		return &pluginpb.ConnectResponse{Connection: w.Master.Connection()}, nil
	}
	w.use(fmt.Sprintf(`{"remote": [{"address": "127.0.0.1:0", "to": %q}]}`, to))
	until(t, "refused", func() bool { return w.list()[0].State == waiting })
	if s := w.list()[0]; s.Reason != "can't connect to h: u@h:22: permission denied" {
		t.Errorf("%q", s.Reason)
	}
	time.Sleep(10 * w.p.timing.most) // that nothing happens has no event
	if n := connects.Load(); n != 1 {
		t.Errorf("%d logins", n)
	}
	w.p.Observe(t.Context(), plugin.Event{Kind: "up"})
	w.opened(0)
}

func TestDiagnostics(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct{ value, want string }{
		{`{}`, ""},
		{`{"dynamic": [{"address": "1080", "users": "self"}]}`, ""},
		{`{"dynamic": [{"address": "x", "users": "self"}]}`, `dynamic 0: "x" is nothing to listen on: "x" is no port`},
		{`{"dynamic": [{"address": "0.0.0.0:1080", "users": "self"}]}`, "dynamic 0: 0.0.0.0:1080 lets other machines in: say gateway = true if it should"},
		{`{"dynamic": [{"address": "0.0.0.0:1080", "users": "self", "gateway": true}]}`, `warning dynamic 0: 0.0.0.0:1080 lets only your own processes`},
		{`{"dynamic": [{"address": "[::]:1080", "users": "any", "gateway": true}]}`, ""},
		{`{"local": [{"address": "1080", "to": "x", "users": "self"}]}`, `local 0 to: "x" leads nowhere: write HOST:PORT`},
		{`{"remote": [{"address": "0", "to": "h:80"}]}`, ""},
		{`{"remote": [{"address": "*:80", "to": "h:80"}]}`, "remote 0: *:80 lets other machines in"},
		{`{"local": [{"address": "0", "to": "h:80", "users": "self"}]}`, "local 0: \"0\" is nothing to listen on: only a server can choose a port"},
		{`{"local": [{"address": "81", "to": "h:80", "users": "self"}], "dynamic": [{"address": "81", "users": "self"}], "remote": [{"address": "81", "to": "h:80"}]}`,
			`warning : 81: the dynamic forward of host "*.x" "!y" "h" "i" listens there, too`},
		{`{"local": [{"address": "a", "to": "b", "users": "self"}, {"address": "81", "to": "b", "users": "self"}]}`, "local 0: \"a\" is nothing to listen on: \"a\" is no port\nlocal 1 to: \"b\" leads"},
	} {
		var got []string
		for _, d := range w.configure(c.value) {
			var path []string
			for _, step := range d.GetPath() {
				switch s := step.GetStep().(type) {
				case *pluginpb.Step_Attribute:
					path = append(path, s.Attribute)
				case *pluginpb.Step_Index:
					path = append(path, fmt.Sprint(s.Index))
				}
			}
			line := strings.Join(path, " ") + ": " + d.GetSummary()
			if d.GetSeverity() == pluginpb.Diagnostic_SEVERITY_WARNING {
				line = "warning " + line
			}
			got = append(got, line)
		}
		if text := strings.Join(got, "\n"); (text == "") != (c.want == "") || !strings.HasPrefix(text, c.want) {
			t.Errorf("%s:\n%s\nwant %s", c.value, text, c.want)
		}
	}
	answer, err := w.Client.Configure(t.Context(), &pluginpb.ConfigureRequest{Blocks: []*pluginpb.Block{
		{Kind: pluginpb.Block_KIND_PLUGIN, Value: []byte("{}")},
		{Id: "0", Kind: pluginpb.Block_KIND_HOST, Value: []byte(`{}`), Hosts: []string{"*"}}, // for forward add
		{Id: "1", Kind: pluginpb.Block_KIND_HOST, Value: []byte(`{"dynamic":[{"address":"1080","users":"self"}]}`), Hosts: []string{"*.x", "!y"}},
	}})
	checked, checkErr := w.Client.Check(t.Context(), &pluginpb.ConfigureRequest{Blocks: []*pluginpb.Block{
		{Id: "1", Kind: pluginpb.Block_KIND_HOST, Value: []byte(`{"dynamic":[{"address":"1080","users":"self"}]}`), Hosts: []string{"*.x", "!y"}},
	}})
	if ds := checked.GetDiagnostics(); checkErr != nil || len(ds) != 1 || ds[0].GetBlock() != "1" {
		t.Errorf("%v, %v", ds, checkErr)
	}
	if ds := answer.GetDiagnostics(); err != nil || len(ds) != 1 || ds[0].GetBlock() != "1" || !strings.Contains(ds[0].GetSummary(), "needs one host to go to") {
		t.Errorf("%v, %v", ds, err)
	}
}

// Five hundred at once.
func TestMany(t *testing.T) {
	to := echo(t, "tcp", "127.0.0.1:0").Addr().String()
	w := newWorld(t)
	w.use(fmt.Sprintf(`{"local": [{"address": "127.0.0.1:%d", "to": %q, "users": "self"}]}`, free(t), to))
	at := w.opened(0)
	const many = 500
	var coming sync.WaitGroup
	var good atomic.Int32
	all := make(chan struct{})
	for i := range many {
		coming.Go(func() {
			c, err := net.Dial("tcp", at)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(60 * time.Second))
			say := fmt.Sprintf("%06d", i)
			fmt.Fprint(c, say)
			if !readIs(c, make([]byte, 6), say) {
				t.Errorf("%s: lost", say)
				return
			}
			if good.Add(1) == many {
				close(all)
			}
			select {
			case <-all: // every one of them is open until then
			case <-time.After(60 * time.Second):
			}
		})
	}
	coming.Wait()
	if good.Load() != many {
		t.Errorf("%d of %d", good.Load(), many)
	}
	until(t, "counted", func() bool { s := w.list()[0]; return s.Total == many && s.In == 6*many && s.Connections == 0 })
	w.emptied()
}

// All that the master expects of a plugin.
func TestConformance(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	plugintest.Run(t, plugintest.Options{Path: exe, Env: []string{"PLAY_PLUGIN=1"}, Host: `{"local": []}`})
}
