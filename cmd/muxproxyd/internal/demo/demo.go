// Package demo shows in numbers what sharing a connection gives: real ssh clients through muxproxy, against a server of
// its own or one that the user names.
package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// Options say what to measure and where to print.
type Options struct {
	Stdout io.Writer // the table
	Stderr io.Writer // progress, and what ssh says to the user
	// Host is a destination as ssh takes it, reached as the user's own configuration says. Empty: a server in this
	// process, on loopback.
	Host string
	// Bin is the directory of the programs muxproxy and muxproxyd; empty: the one of this executable.
	Bin string
}

const (
	runs  = 5  // a median of so many
	batch = 10 // so many at once

	// endPatience bounds what is done to end the master.
	endPatience = 30 * time.Second
)

// Run measures and prints. It needs ssh in PATH. The master that it starts is its own, not the user's; that master has
// ended and every file is removed when Run returns, also when ctx ends before.
func Run(ctx context.Context, o Options) (err error) {
	d := demo{Options: o, host: o.Host}
	if _, ok := o.Stderr.(*os.File); !ok { // which ssh gets as it is
		d.Stderr = &lockedWriter{w: o.Stderr}
	}
	if d.Bin == "" {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		d.Bin = filepath.Dir(self)
	}
	if d.ssh, err = exec.LookPath("ssh"); err != nil {
		return fmt.Errorf("the demo needs an OpenSSH client: %w", err)
	}
	for _, program := range []string{"muxproxy", "muxproxyd"} {
		if _, err := exec.LookPath(filepath.Join(d.Bin, program)); err != nil {
			return fmt.Errorf("no %s in %s: build it first, as `make demo` does: %w", program, d.Bin, err)
		}
	}
	if d.dir, err = os.MkdirTemp("", "muxproxy-demo-"); err != nil {
		return err
	}
	defer func() { err = both(err, os.RemoveAll(d.dir)) }()
	if err := d.prepare(); err != nil {
		return err
	}
	if d.server != nil {
		defer d.server.close()
	}
	defer func() { err = both(err, d.end()) }()
	rows, err := d.measure(ctx)
	if cause := context.Cause(ctx); cause != nil {
		return cause // what it broke is of no interest
	}
	if err != nil {
		return err
	}
	if err := d.print(rows); err != nil || d.server == nil {
		return err
	}
	err = d.showPlugins(ctx)
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// both is one line for two errors, either of which may be nil.
func both(a, b error) error {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	}
	return fmt.Errorf("%w; %w", a, b)
}

type demo struct {
	Options
	host   string  // what ssh is told
	ssh    string  // path
	dir    string  // holds everything that this run makes
	server *server // nil: a real host
	env    []string
	// direct and shared are ssh's arguments before the host.
	direct, shared []string
	quiet          []string // added for plain ssh
	began          bool     // a client was started, so a master may live
}

// lockedWriter takes turns: many ssh write to stderr at once.
type lockedWriter struct {
	mu sync.Mutex // guards w
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// row is one line of the table.
type row struct {
	what  string
	plain bool
	took  time.Duration
	n     int // ssh clients that it took; 1 if took is a median
	conns int // TCP connections that the server saw
}

// prepare makes places, keys and a server, and computes the two ways to call ssh.
func (d *demo) prepare() error {
	for _, name := range []string{"state", "run", "config", "data", "home"} {
		if err := os.Mkdir(filepath.Join(d.dir, name), 0o700); err != nil {
			return err
		}
	}
	own := map[string]string{
		"XDG_STATE_HOME":  filepath.Join(d.dir, "state"),
		"XDG_RUNTIME_DIR": filepath.Join(d.dir, "run"),
		"XDG_CONFIG_HOME": filepath.Join(d.dir, "config"),
		"XDG_DATA_HOME":   filepath.Join(d.dir, "data"),
		"MUXPROXY_BYPASS": "",
		"MUXPROXY_CONFIG": "",
	}
	// No ControlMaster of the user's may answer in place of what is measured.
	d.direct = []string{"-o", "ControlMaster=no", "-o", "ControlPath=none"}
	if d.Host != "" {
		// Nobody should have to log in fifteen times to see that once is enough.
		d.quiet = []string{"-o", "BatchMode=yes"}
	} else {
		own["HOME"] = filepath.Join(d.dir, "home")
		own["SSH_AUTH_SOCK"] = ""
		if err := d.serve(); err != nil {
			return err
		}
	}
	d.env = environment(own)
	program := shellQuote(filepath.Join(d.Bin, "muxproxy"))
	known := `"` + filepath.Join(d.dir, "state/muxproxy/known_hosts") + `"` // tokens are not looked for in this one
	d.shared = append(slices.Clone(d.direct),
		"-o", "ProxyCommand="+strings.ReplaceAll(program, "%", "%%")+" '%r@%h:%p' '%n'", "-o", "ProxyUseFdpass=no",
		"-o", "GlobalKnownHostsFile="+known+" /etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2")
	if d.server != nil {
		// No other configuration, and none but this key and this host.
		d.direct = append([]string{"-F", filepath.Join(d.dir, "ssh_config")}, d.direct...)
		d.shared = append([]string{"-F", filepath.Join(d.dir, "ssh_config")}, d.shared...)
	}
	return nil
}

// serve starts the server in this process and writes a client's files for it.
func (d *demo) serve() error {
	server, key, err := startServer()
	if err != nil {
		return err
	}
	d.server, d.host = server, "muxproxy-demo"
	port := server.port()
	files := map[string]string{
		"id":          string(key),
		"known_hosts": fmt.Sprintf("[127.0.0.1]:%d %s", port, server.hostKey()),
		"ssh_config": fmt.Sprintf(`Host %s
    HostName 127.0.0.1
    Port %d
    User demo
    IdentityFile %s
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile %s
    BatchMode yes
`, d.host, port, quote(filepath.Join(d.dir, "id")), quote(filepath.Join(d.dir, "known_hosts"))),
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(d.dir, name), []byte(content), 0o600); err != nil {
			server.close()
			return err
		}
	}
	return nil
}

// environment is this process's with some variables changed, or removed where the value is "".
func environment(change map[string]string) []string {
	env := slices.DeleteFunc(os.Environ(), func(e string) bool {
		name, _, _ := strings.Cut(e, "=")
		_, ok := change[name]
		return ok
	})
	for name, value := range change {
		if value != "" {
			env = append(env, name+"="+value)
		}
	}
	return env
}

// quote makes one word of a path for ssh_config, where % begins a token.
func quote(path string) string { return `"` + strings.ReplaceAll(path, "%", "%%") + `"` }

// shellQuote makes one word for the shell that runs a ProxyCommand.
func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// measure runs the clients. The order matters: plain ssh first warms what both ways need.
func (d *demo) measure(ctx context.Context) (rows []row, err error) {
	plain, err := d.median(ctx, "plain ssh", d.direct, true)
	withPlain := err == nil
	switch {
	case withPlain:
		rows = append(rows, plain)
	case d.server != nil || ctx.Err() != nil:
		return nil, err
	default:
		d.progress("plain ssh does not log in without a question, so it is left out: %v", err)
	}

	// Nothing keeps an unused connection here, so the first session stays in the background. A login that asks questions
	// asks them once.
	conns := d.conns()
	holder, took, err := d.hold(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = both(err, holder.release()) }()
	rows = append(rows, row{"first connection through muxproxy", false, took, 1, d.conns() - conns})

	shared, err := d.median(ctx, "shared connection", d.shared, false)
	if err != nil {
		return nil, err
	}
	rows = append(rows, shared)

	if withPlain {
		switch plain, err := d.together(ctx, "plain ssh", d.direct, true); {
		case err == nil:
			rows = append(rows, plain)
		case d.server != nil || ctx.Err() != nil:
			return nil, err
		default: // MaxStartups in sshd_config(5), for instance
			d.progress("not every plain ssh was let in at once, so they are left out: %v", err)
		}
	}
	together, err := d.together(ctx, "shared connection", d.shared, false)
	if err != nil {
		return nil, err
	}
	rows = append(rows, together)
	return rows, nil
}

// median is the median time of some clients, one after another.
func (d *demo) median(ctx context.Context, what string, args []string, plain bool) (row, error) {
	conns := d.conns()
	var times []time.Duration
	for i := range runs {
		d.progress("%s, %d of %d", what, i+1, runs)
		start := time.Now()
		if err := d.client(ctx, args, plain).Run(); err != nil {
			return row{}, d.failed(what, err)
		}
		times = append(times, time.Since(start))
	}
	slices.Sort(times)
	return row{fmt.Sprintf("%s, median of %d", what, runs), plain, times[runs/2], 1, d.conns() - conns}, nil
}

// together is the time of a batch of clients at once.
func (d *demo) together(ctx context.Context, what string, args []string, plain bool) (row, error) {
	d.progress("%s, %d at once", what, batch)
	conns := d.conns()
	start := time.Now()
	ended := make(chan error, batch)
	for range batch {
		client := d.client(ctx, args, plain)
		go func() { ended <- client.Run() }()
	}
	var errs error
	for range batch {
		if err := <-ended; err != nil && errs == nil {
			errs = d.failed(what, err)
		}
	}
	return row{fmt.Sprintf("%s, %d at once", what, batch), plain, time.Since(start), batch, d.conns() - conns}, errs
}

// client is one ssh that runs `true`. It is killed when ctx ends.
func (d *demo) client(ctx context.Context, args []string, plain bool) *exec.Cmd {
	args = slices.Clone(args)
	if plain {
		args = append(args, d.quiet...)
	}
	cmd := exec.CommandContext(ctx, d.ssh, append(args, d.host, "true")...)
	cmd.Env, cmd.Stderr = d.env, d.Stderr
	cmd.WaitDelay = time.Second // a ProxyCommand may hold stderr for a moment longer
	if plain {
		// The user's own configuration may lead through muxproxy already.
		cmd.Env = append(slices.Clone(d.env), "MUXPROXY_BYPASS=1")
	} else {
		d.began = true
	}
	return cmd
}

func (d *demo) conns() int {
	if d.server == nil {
		return 0
	}
	return d.server.count()
}

func (d *demo) failed(what string, err error) error {
	return fmt.Errorf("ssh to %s (%s): %w", d.host, what, err)
}

func (d *demo) progress(format string, args ...any) {
	fmt.Fprintf(d.Stderr, "demo: "+format+"\n", args...)
}

// holder is a session that keeps the connection in use.
type holder struct {
	cmd *exec.Cmd
	in  io.Closer
}

// hold starts one and returns how long it took until the command at the other end answered.
func (d *demo) hold(ctx context.Context) (*holder, time.Duration, error) {
	const what = "the first connection through muxproxy"
	d.progress(what + ", which starts the master and logs in")
	cmd := d.client(ctx, d.shared, false)
	cmd.Args[len(cmd.Args)-1] = "echo held && cat"
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, 0, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, 0, err
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, 0, d.failed(what, err)
	}
	h := &holder{cmd, in}
	if _, err := io.ReadFull(out, make([]byte, len("held\n"))); err != nil {
		if ended := h.release(); ended != nil {
			err = ended // says more than an early end of its output
		}
		return nil, 0, d.failed(what, err)
	}
	return h, time.Since(start), nil
}

func (h *holder) release() error {
	h.in.Close()
	return h.cmd.Wait()
}

// end stops the master, also after ctx has ended. Nothing is left to write into d.dir then.
func (d *demo) end() error {
	if !d.began {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), endPatience)
	defer cancel()
	muxproxy := func(args ...string) ([]byte, error) {
		cmd := exec.CommandContext(ctx, filepath.Join(d.Bin, "muxproxy"), args...)
		cmd.Env = d.env
		apart(cmd) // ^C may come twice
		out, err := cmd.Output()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("muxproxy %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(exit.Stderr))
		}
		return out, err
	}
	// A client that was killed may have been starting a master. This waits for that one's turn to end, so that no master
	// appears later.
	_, startErr := muxproxy("master", "start")
	var status struct {
		PID int `json:"pid"`
	}
	out, err := muxproxy("status", "--json")
	if err != nil && startErr != nil {
		return nil // none can be started, and none is there
	}
	if err == nil {
		err = json.Unmarshal(out, &status)
	}
	if err != nil {
		return fmt.Errorf("the demo's own master may still run: %w", err)
	}
	if _, err = muxproxy("master", "stop"); err == nil {
		return nil
	}
	p, findErr := os.FindProcess(status.PID)
	if findErr == nil {
		findErr = p.Kill()
	}
	return both(err, findErr)
}

// print writes the table.
func (d *demo) print(rows []row) error {
	to := d.host
	if d.server != nil {
		to = "a server on this machine, without any network in between"
	}
	fmt.Fprintf(d.Stdout, "\n`ssh host true`, to %s:\n\n", to)
	w := tabwriter.NewWriter(d.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	head := "\ttime\tof plain ssh"
	if d.server != nil {
		head += "\tTCP connections"
	}
	fmt.Fprintln(w, head+"\t")
	base := map[int]time.Duration{} // plain ssh's, by how many
	for _, r := range rows {
		if r.plain {
			base[r.n] = r.took
		}
		ratio := "?"
		if b, ok := base[r.n]; ok {
			ratio = fmt.Sprintf("%.2f", float64(r.took)/float64(b))
		}
		line := fmt.Sprintf("%s\t%.1f ms\t%s", r.what, float64(r.took)/float64(time.Millisecond), ratio)
		if d.server != nil {
			line += fmt.Sprintf("\t%d", r.conns)
		}
		fmt.Fprintln(w, line+"\t")
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintln(d.Stdout, "\nThe first session through muxproxy stays open meanwhile, so that there is a connection to share.")
	return err
}
