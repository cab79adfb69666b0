//go:build unix

package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/muxproxy/muxproxy/core/sshconfig"
)

// pair makes two connected sockets.
func pair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		unix.CloseOnExec(fd)
		f := os.NewFile(uintptr(fd), "socketpair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return conns[0], conns[1]
}

// pipe makes a pipe.
func pipe(t testing.TB) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// openFiles counts the descriptors of this process.
func openFiles(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/dev/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func hello() Hello {
	return Hello{
		Version: Version,
		Target:  Target{User: `dom\me`, Host: "db.example.com", Port: 2222, Alias: "db"},
		Mode:    Copy,
		SSHArgs: []string{"-o", "SetEnv A=\"x\ny\"", "-v"},
		Env:     map[string]string{"HOME": "/home/me"},
	}
}

func TestFramesBothWays(t *testing.T) {
	x, y := pair(t)
	bridge, master := NewConn(x), NewConn(y)
	h := hello()
	if err := bridge.SendHello(h); err != nil {
		t.Fatal(err)
	}
	if got, files, err := master.ReadHello(); err != nil || files != nil || !reflect.DeepEqual(got, h) {
		t.Errorf("hello: %+v, %v, %v", got, files, err)
	}
	for _, a := range []Answer{{Kind: Served}, {Kind: Resolve}, {Kind: Bypass}, {Kind: Failed, Message: "no <route>"},
		{Kind: Resolve, Via: []string{}}, {Kind: Resolve, Via: []string{"me@a:22", "ssh://b"}}} {
		if err := master.SendAnswer(a); err != nil {
			t.Fatal(err)
		}
		if got, err := bridge.ReadAnswer(); err != nil || !reflect.DeepEqual(got, a) {
			t.Errorf("answer: %+v, %v", got, err)
		}
	}
	r := Resolution{
		Config: sshconfig.Resolved{Options: map[string][]string{"user": {"me"}}, Volatile: true}, AgentPath: "/a", Error: "e",
	}
	if err := bridge.SendResolution(r, nil); err != nil {
		t.Fatal(err)
	}
	if got, agent, err := master.ReadResolution(); err != nil || agent != nil || !reflect.DeepEqual(got, r) {
		t.Errorf("resolution: %+v, %v, %v", got, agent, err)
	}
	n := Note{Text: "hi", Authenticated: true, Fatal: true}
	if err := master.SendNote(n); err != nil {
		t.Fatal(err)
	}
	if got, err := bridge.ReadNote(); err != nil || got != n {
		t.Errorf("note: %+v, %v", got, err)
	}
	master.Close()
	if _, err := bridge.ReadNote(); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
}

func TestStreamFollowsFrames(t *testing.T) {
	x, y := pair(t)
	var sent bytes.Buffer
	sent.Write(frame(answerFrame, `{"kind":"served"}`))
	sent.WriteString("SSH-2.0-x\r\n")
	if _, err := x.Write(sent.Bytes()); err != nil {
		t.Fatal(err)
	}
	x.Close()
	c := NewConn(y)
	if a, err := c.ReadAnswer(); err != nil || a.Kind != Served {
		t.Fatalf("%+v, %v", a, err)
	}
	if rest, err := io.ReadAll(c.NetConn()); string(rest) != "SSH-2.0-x\r\n" || err != nil {
		t.Errorf("the stream: %q, %v", rest, err)
	}
}

func TestFilesTravel(t *testing.T) {
	x, y := pair(t)
	bridge, master := NewConn(x), NewConn(y)
	in, toIn := pipe(t)
	fromOut, out := pipe(t)
	h := hello()
	h.Mode = Pipes
	if err := bridge.SendHello(h, in, out); err != nil {
		t.Fatal(err)
	}
	in.Close()
	out.Close()
	got, files, err := master.ReadHello()
	if err != nil || len(files) != 2 || !reflect.DeepEqual(got, h) {
		t.Fatalf("%+v, %v, %v", got, files, err)
	}
	for _, f := range files {
		raw, err := f.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) {
			if flags, err := unix.FcntlInt(fd, unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Errorf("not close-on-exec: %#x, %v", flags, err)
			}
			if flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
				t.Errorf("not non-blocking: %#x, %v", flags, err)
			}
		})
	}
	if _, err := toIn.Write([]byte("up")); err != nil {
		t.Fatal(err)
	}
	toIn.Close()
	if b, err := io.ReadAll(files[0]); string(b) != "up" || err != nil {
		t.Errorf("fd 0: %q, %v", b, err)
	}
	if _, err := files[1].Write([]byte("down")); err != nil {
		t.Fatal(err)
	}
	files[0].Close()
	files[1].Close()
	if b, err := io.ReadAll(fromOut); string(b) != "down" || err != nil {
		t.Errorf("fd 1: %q, %v", b, err)
	}

	ours, theirs := pair(t)
	if err := bridge.SendResolution(Resolution{Agent: true, AgentPath: "/agent"}, theirs); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	r, agent, err := master.ReadResolution()
	if err != nil || !r.Agent || agent == nil {
		t.Fatalf("%+v, %v, %v", r, agent, err)
	}
	if _, err := agent.Write([]byte("hi")); err != nil {
		t.Fatal(err)
	}
	agent.Close()
	if b, err := io.ReadAll(ours); string(b) != "hi" || err != nil {
		t.Errorf("agent: %q, %v", b, err)
	}
}

// A frame larger than the socket's buffer needs more than one write, and only the first carries the files.
func TestFilesWithALongFrame(t *testing.T) {
	x, y := pair(t)
	in, _ := pipe(t)
	_, out := pipe(t)
	h := hello()
	h.Mode = Pipes
	for range 15 {
		h.SSHArgs = append(h.SSHArgs, strings.Repeat("x", maxString))
	}
	sent := make(chan error, 1)
	go func() { sent <- NewConn(x).SendHello(h, in, out) }()
	got, files, err := NewConn(y).ReadHello()
	if err != nil || len(files) != 2 || !reflect.DeepEqual(got, h) {
		t.Fatalf("%d files, %v", len(files), err)
	}
	files[0].Close()
	files[1].Close()
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

// sendRaw sends bytes with files.
func sendRaw(t *testing.T, c *net.UnixConn, b []byte, files ...*os.File) {
	t.Helper()
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	if _, _, err := c.WriteMsgUnix(b, unix.UnixRights(fds...), nil); err != nil {
		t.Fatal(err)
	}
}

func frame(t frameType, body string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(body)+1))
	return append(append(b, byte(t)), body...)
}

const helloPipes = `{"version":1,"mode":"pipes","target":{"user":"u","host":"h","port":22}}`

func TestUnwantedFilesAreClosed(t *testing.T) {
	r, w := pipe(t)
	regular, err := os.Create(t.TempDir() + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer regular.Close()
	readHello := func(c *Conn) error { _, _, err := c.ReadHello(); return err }
	readAnswer := func(c *Conn) error { _, err := c.ReadAnswer(); return err }
	readResolution := func(c *Conn) error { _, _, err := c.ReadResolution(); return err }
	copyHello := strings.Replace(helloPipes, "pipes", "copy", 1)
	many := make([]*os.File, 100)
	for i := range many {
		many[i] = r
	}
	for _, tc := range []struct {
		name  string
		bytes []byte
		files []*os.File
		read  func(*Conn) error
	}{
		{"three with hello", frame(helloFrame, helloPipes), []*os.File{r, w, r}, readHello},
		{"a hundred with hello", frame(helloFrame, helloPipes), many, readHello},
		{"one with hello", frame(helloFrame, helloPipes), []*os.File{r}, readHello},
		{"none with hello", frame(helloFrame, helloPipes), nil, readHello},
		{"two with mode copy", frame(helloFrame, copyHello), []*os.File{r, w}, readHello},
		{"a regular file", frame(helloFrame, helloPipes), []*os.File{r, regular}, readHello},
		{"wrong type", frame(noteFrame, helloPipes), []*os.File{r, w}, readHello},
		{"bad JSON", frame(helloFrame, "{"), []*os.File{r, w}, readHello},
		{"bad target", frame(helloFrame, strings.Replace(helloPipes, "22", "0", 1)), []*os.File{r, w}, readHello},
		{"other version", frame(helloFrame, strings.Replace(helloPipes, "1", "2", 1)), []*os.File{r, w}, readHello},
		{"too long", []byte{0xff, 0, 0, 0, 1}, []*os.File{r, w}, readHello},
		{"cut short", frame(helloFrame, helloPipes)[:20], []*os.File{r, w}, readHello},
		{"cut in the head", []byte{0, 0}, []*os.File{r, w}, readHello},
		{"with an answer", frame(answerFrame, `{"kind":"served"}`), []*os.File{r}, readAnswer},
		{"with no agent", frame(resolutionFrame, `{}`), []*os.File{r}, readResolution},
		{"two agents", frame(resolutionFrame, `{"agent":true}`), []*os.File{r, w}, readResolution},
		{"agent missing", frame(resolutionFrame, `{"agent":true}`), nil, readResolution},
		{"agent not a socket", frame(resolutionFrame, `{"agent":true}`), []*os.File{regular}, readResolution},
	} {
		t.Run(tc.name, func(t *testing.T) {
			x, y := pair(t)
			sendRaw(t, x, tc.bytes, tc.files...)
			x.Close()
			before := openFiles(t)
			if err := tc.read(NewConn(y)); err == nil {
				t.Error("no error")
			}
			if after := openFiles(t); after != before {
				t.Errorf("%d files are open, before %d", after, before)
			}
		})
	}
}

func TestMalformed(t *testing.T) {
	readNote := func(c *Conn) error { _, err := c.ReadNote(); return err }
	long := strings.Repeat("x", maxText+1)
	for _, tc := range []struct {
		name  string
		bytes []byte
		read  func(*Conn) error
		want  error
	}{
		{"no length", []byte{0, 0, 0, 0, 1}, readNote, ErrMalformed},
		{"over the bound", []byte{0, 0x10, 0, 1, 4}, readNote, ErrMalformed},
		{"no body", []byte{0, 0, 0, 1, 4}, readNote, ErrMalformed},
		{"half a head", []byte{0, 0, 0}, readNote, io.ErrUnexpectedEOF},
		{"half a body", []byte{0, 0, 0, 9, 4, '{'}, readNote, io.ErrUnexpectedEOF},
		{"text after JSON", frame(noteFrame, `{}{}`), readNote, ErrMalformed},
		{"long note", frame(noteFrame, `{"text":"`+long+`"}`), readNote, ErrMalformed},
		{"long message", frame(answerFrame, `{"kind":"error","message":"`+long+`"}`),
			func(c *Conn) error { _, err := c.ReadAnswer(); return err }, ErrMalformed},
		{"unknown answer", frame(answerFrame, `{"kind":"hello"}`),
			func(c *Conn) error { _, err := c.ReadAnswer(); return err }, ErrMalformed},
		{"error without text", frame(answerFrame, `{"kind":"error"}`),
			func(c *Conn) error { _, err := c.ReadAnswer(); return err }, ErrMalformed},
		{"agent's path", frame(resolutionFrame, `{"agent_path":"/a\u001b[2J"}`),
			func(c *Conn) error { _, _, err := c.ReadResolution(); return err }, ErrMalformed},
		{"an option's value", frame(resolutionFrame, `{"config":{"options":{"user":["a\nb"]}}}`),
			func(c *Conn) error { _, _, err := c.ReadResolution(); return err }, ErrMalformed},
		{"unknown type", frame(9, `{}`), func(c *Conn) error { _, err := c.ReadAnswer(); return err }, ErrMalformed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			x, y := pair(t)
			sendRaw(t, x, tc.bytes)
			x.Close()
			if err := tc.read(NewConn(y)); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

func TestOtherVersion(t *testing.T) {
	x, y := pair(t)
	sendRaw(t, x, frame(helloFrame, `{"version":7,"target":[]}`))
	h, _, err := NewConn(y).ReadHello()
	if !errors.Is(err, ErrVersion) || errors.Is(err, ErrMalformed) || h.Version != 7 {
		t.Errorf("%+v, %v", h, err)
	}
	if err := NewConn(y).SendAnswer(Answer{Kind: Failed, Message: "restart"}); err != nil {
		t.Fatal(err)
	}
	if a, err := NewConn(x).ReadAnswer(); err != nil || a.Message != "restart" {
		t.Errorf("%+v, %v", a, err)
	}
}

func TestHelloCheck(t *testing.T) {
	for name, change := range map[string]func(*Hello){
		"version":             func(h *Hello) { h.Version++ },
		"mode":                func(h *Hello) { h.Mode = "" },
		"no user":             func(h *Hello) { h.Target.User = "" },
		"no host":             func(h *Hello) { h.Target.Host = "" },
		"no port":             func(h *Hello) { h.Target.Port = 0 },
		"user as an option":   func(h *Hello) { h.Target.User = "-oProxyCommand=x" },
		"host as an option":   func(h *Hello) { h.Target.Host = "-x" },
		"alias as an option":  func(h *Hello) { h.Target.Alias = "-x" },
		"bidi is text":        func(h *Hello) { h.Target.User = "\u0085" },
		"user not UTF-8":      func(h *Hello) { h.Target.User = "\xff" },
		"host with a space":   func(h *Hello) { h.Target.Host = "a b" },
		"host no address":     func(h *Hello) { h.Target.Host = "a:b" },
		"long alias":          func(h *Hello) { h.Target.Alias = strings.Repeat("a", maxName+1) },
		"many arguments":      func(h *Hello) { h.SSHArgs = make([]string, maxArgs+1) },
		"a long argument":     func(h *Hello) { h.SSHArgs = []string{strings.Repeat("a", maxString+1)} },
		"an escape":           func(h *Hello) { h.SSHArgs = []string{"\x1b[2J"} },
		"argument not UTF-8":  func(h *Hello) { h.SSHArgs = []string{"\xc3"} },
		"another variable":    func(h *Hello) { h.Env = map[string]string{"LD_PRELOAD": "x"} },
		"line in a variable":  func(h *Hello) { h.Env = map[string]string{"HOME": "/a\n"} },
		"a variable too long": func(h *Hello) { h.Env = map[string]string{"HOME": strings.Repeat("/", maxPath+1)} },
	} {
		t.Run(name, func(t *testing.T) {
			h := hello()
			change(&h)
			x, _ := pair(t)
			if err := NewConn(x).SendHello(h); err == nil {
				t.Error("sent")
			}
		})
	}
}

func TestSendRefuses(t *testing.T) {
	x, _ := pair(t)
	c := NewConn(x)
	r, _ := pipe(t)
	h := hello()
	for name, f := range map[string]func() error{
		"files with mode copy":   func() error { return c.SendHello(h, r) },
		"agent not announced":    func() error { return c.SendResolution(Resolution{}, r) },
		"agent missing":          func() error { return c.SendResolution(Resolution{Agent: true}, nil) },
		"option not UTF-8":       func() error { return c.SendResolution(resolution("\xff"), nil) },
		"more than a frame":      func() error { return c.SendResolution(resolution(strings.Repeat("x", maxString), 20), nil) },
		"error without a reason": func() error { return c.SendAnswer(Answer{Kind: Failed}) },
	} {
		if err := f(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	r.Close()
	h.Mode = Pipes
	if err := c.SendHello(h, r, r); err == nil {
		t.Error("closed files: no error")
	}
}

func resolution(value string, times ...int) Resolution {
	n := 1
	if len(times) > 0 {
		n = times[0]
	}
	r := Resolution{Config: sshconfig.Resolved{Options: map[string][]string{}}}
	for range n {
		r.Config.Options["x"] = append(r.Config.Options["x"], value)
	}
	return r
}

func TestLongTextIsCut(t *testing.T) {
	x, y := pair(t)
	long := strings.Repeat("ä", maxText)
	for _, text := range []string{long, "x" + long, strings.Repeat("\xffx", maxText)} {
		if err := NewConn(x).SendNote(Note{Text: text}); err != nil {
			t.Fatal(err)
		}
		n, err := NewConn(y).ReadNote()
		if err != nil || len(n.Text) > maxText || len(n.Text) < maxText-5 {
			t.Errorf("%d bytes, %v", len(n.Text), err)
		}
		if !utf8.ValidString(n.Text) || !strings.HasSuffix(n.Text, "...") {
			t.Errorf("ends with %q", n.Text[len(n.Text)-8:])
		}
	}
}

func TestDeadPeer(t *testing.T) {
	x, y := pair(t)
	y.Close()
	if err := NewConn(x).SendHello(hello()); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("got %v", err)
	}
}

func TestParseTarget(t *testing.T) {
	for in, want := range map[string]Target{
		"me@h:22":                {User: "me", Host: "h", Port: 22},
		"a@b@h:1":                {User: "a@b", Host: "h", Port: 1},
		"u:style@h:65535":        {User: "u:style", Host: "h", Port: 65535},
		`dom\u@10.1.2.3:22`:      {User: `dom\u`, Host: "10.1.2.3", Port: 22},
		"u@::1:22":               {User: "u", Host: "::1", Port: 22},
		"u@[::1]:22":             {User: "u", Host: "::1", Port: 22},
		"u@fe80::1%eth0:2222":    {User: "u", Host: "fe80::1%eth0", Port: 2222},
		"u@x:y@[2001:db8::1]:22": {User: "u@x:y", Host: "2001:db8::1", Port: 22},
		"zoë schmidt@h_1.x-y:22": {User: "zoë schmidt", Host: "h_1.x-y", Port: 22},
	} {
		got, err := ParseTarget(in)
		if err != nil || got != want {
			t.Errorf("%q: got %+v, %v", in, got, err)
		}
		if again, err := ParseTarget(got.String()); err != nil || again != got {
			t.Errorf("%q: printed as %q, that is %+v, %v", in, got, again, err)
		}
	}
	for _, in := range []string{
		"", "h", "h:22", "u@h", "@h:22", "u@:22", "u@h:", "u@h:0", "u@h:65536", "u@h:+22", "u@h:22x", "u@h:-1", "u@h: 22",
		"-u@h:22", "u@-h:22", "u@h\n:22", "u\x1b@h:22", "u\x00@h:22", "u@[h]:22", "u@[::1:22", "u@::1]:22", "u@[]:22", "u@a:b:22",
		"u\xff@h:22", "u@h/x:22", "u@h x:22", "u@[::1]x:22", "u\u009b2J@h:22",
	} {
		if got, err := ParseTarget(in); err == nil {
			t.Errorf("%q: got %+v", in, got)
		}
	}
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"":                      "",
		"plain, zoë \\n 日本 👍":   "plain, zoë \\n 日本 👍",
		"\x1b]0;x\x07":          `\x1b]0;x\x07`,
		"a\nb\tc\rd\x00\x7f":    `a\nb\tc\rd\x00\x7f`,
		"\u009b2J":              `\u009b2J`,
		"a\u202eb\u2066c\u061c": `a\u202eb\u2066c\u061c`,
		"\u2028\u200b\ufeff":    `\u2028\u200b\ufeff`,
		"\xff\xc3":              `\xff\xc3`,
		"\ufffd":                "\ufffd",
	} {
		if got := Printable(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}

func FuzzParseTarget(f *testing.F) {
	for _, s := range []string{"me@h:22", "a@b@[::1]:1", `d\u@fe80::1%e:22`, "@:", "u@[:]:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseTarget(s)
		if err != nil {
			return
		}
		printed := got.String()
		again, err := ParseTarget(printed)
		if err != nil || again != got {
			t.Errorf("%q is %+v, printed %q is %+v, %v", s, got, printed, again, err)
		}
		h := Hello{Version: Version, Target: got, Mode: Copy}
		if err := h.Check(); err != nil {
			t.Errorf("%q: parsed, but %v", s, err)
		}
	})
}

func FuzzPrintable(f *testing.F) {
	f.Add("a\x1b[2J\u202e\xff")
	f.Fuzz(func(t *testing.T, s string) {
		p := Printable(s)
		if !utf8.ValidString(p) || strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r >= 0x7f && r < 0xa0 }) {
			t.Errorf("%q: %q", s, p)
		}
		if again := Printable(p); again != p {
			t.Errorf("%q: %q, then %q", s, p, again)
		}
	})
}

// readers of every type of frame; files that they return are closed.
var readers = []func(*Conn) error{
	func(c *Conn) error {
		h, files, err := c.ReadHello()
		for _, f := range files {
			f.Close()
		}
		if err == nil {
			return h.Check()
		}
		return err
	},
	func(c *Conn) error { _, err := c.ReadAnswer(); return err },
	func(c *Conn) error {
		_, agent, err := c.ReadResolution()
		if agent != nil {
			agent.Close()
		}
		return err
	},
	func(c *Conn) error { _, err := c.ReadNote(); return err },
}

// feed sends b, then reads one frame of each type that kind names, until an error. It returns what is left unread.
func feed(t *testing.T, kind byte, b []byte) (rest []byte, err error) {
	x, y := pair(t)
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		x.Write(b)
		x.Close()
	}()
	err = readers[int(kind)%len(readers)](NewConn(y))
	rest, _ = io.ReadAll(y)
	y.Close()
	<-sent
	return rest, err
}

func FuzzFrames(f *testing.F) {
	f.Add(byte(0), []byte{0, 0, 0, 1, 1})
	f.Add(byte(3), append(frame(noteFrame, `{"text":"x"}`), "SSH-2.0"...))
	f.Add(byte(1), frame(answerFrame, `{"kind":"served"}`))
	f.Fuzz(func(t *testing.T, kind byte, b []byte) {
		rest, err := feed(t, kind, b)
		if err != nil {
			return
		}
		size := int(binary.BigEndian.Uint32(b)) + 4
		if !bytes.Equal(rest, b[size:]) {
			t.Errorf("a frame of %d bytes took %d", size, len(b)-len(rest))
		}
	})
}

func FuzzBodies(f *testing.F) {
	f.Add(byte(0), []byte(strings.Replace(helloPipes, "pipes", "fds", 1)))
	f.Add(byte(1), []byte(`{"kind":"error","message":"m"}`))
	f.Add(byte(2), []byte(`{"config":{"options":{"user":["me"]},"files":[{"path":"/x","mtime":"2026-01-02T03:04:05Z"}]}}`))
	f.Add(byte(3), []byte(`{"text":"\u001b","fatal":true}`))
	f.Fuzz(func(t *testing.T, kind byte, body []byte) {
		if len(body) >= MaxFrame {
			return
		}
		typ := helloFrame + frameType(int(kind)%len(readers))
		rest, err := feed(t, kind, append(frame(typ, string(body)), "after"...))
		if err == nil && string(rest) != "after" {
			t.Errorf("left %q", rest)
		}
	})
}
