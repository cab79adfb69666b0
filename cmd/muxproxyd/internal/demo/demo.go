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
	defer func() { err = errors.Join(err, os.RemoveAll(d.dir)) }()
	if err := d.prepare(); err != nil {
		return err
	}
	if d.server != nil {
		defer d.server.close()
	}
	defer func() { err = errors.Join(err, d.end()) }()
	rows, err := d.measure(ctx)
	if cause := context.Cause(ctx); cause != nil {
		return cause // what it broke is of no interest
	}
	if err != nil {
		return err
	}
	return d.print(rows)
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
	began          bool // a client was started, so a master may live
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
	if d.Host == "" {
		own["HOME"] = filepath.Join(d.dir, "home")
		own["SSH_AUTH_SOCK"] = ""
		if err := d.serve(); err != nil {
			return err
		}
	}
	d.env = environment(own)
	program := shellQuote(filepath.Join(d.Bin, "muxproxy"))
	known := quote(filepath.Join(d.dir, "state/muxproxy/known_hosts"))
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
	if err != nil {
		return nil, err
	}
	rows = append(rows, plain)

	d.progress("the first shared connection: starts the master, logs in")
	conns := d.conns()
	first := time.Now()
	if err := d.client(ctx, d.shared, false).Run(); err != nil {
		return nil, d.failed("muxproxy", err)
	}
	rows = append(rows, row{"first connection through muxproxy", time.Since(first), 1, d.conns() - conns})

	// Nothing keeps an unused connection here, so one session stays in the background.
	conns = d.conns()
	holder, err := d.hold(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, holder.release()) }()

	shared, err := d.median(ctx, "shared connection", d.shared, false)
	if err != nil {
		return nil, err
	}
	shared.conns = d.conns() - conns // the one of the session that stays
	rows = append(rows, shared)

	for _, way := range []struct {
		what  string
		args  []string
		plain bool
	}{{"plain ssh", d.direct, true}, {"shared connection", d.shared, false}} {
		together, err := d.together(ctx, way.what, way.args, way.plain)
		if err != nil {
			return nil, err
		}
		rows = append(rows, together)
	}
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
	return row{fmt.Sprintf("%s, median of %d", what, runs), times[runs/2], 1, d.conns() - conns}, nil
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
	return row{fmt.Sprintf("%s, %d at once", what, batch), time.Since(start), batch, d.conns() - conns}, errs
}

// client is one ssh that runs `true`. It is killed when ctx ends.
func (d *demo) client(ctx context.Context, args []string, plain bool) *exec.Cmd {
	cmd := exec.CommandContext(ctx, d.ssh, append(slices.Clone(args), d.host, "true")...)
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

// hold starts one and returns when the command at the other end has answered.
func (d *demo) hold(ctx context.Context) (*holder, error) {
	const what = "a session that stays"
	d.progress(what)
	cmd := d.client(ctx, d.shared, false)
	cmd.Args[len(cmd.Args)-1] = "echo held && cat"
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, d.failed(what, err)
	}
	h := &holder{cmd, in}
	if _, err := io.ReadFull(out, make([]byte, len("held\n"))); err != nil {
		return nil, d.failed(what, errors.Join(err, h.release()))
	}
	return h, nil
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
		out, err := cmd.Output()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("muxproxy %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(exit.Stderr))
		}
		return out, err
	}
	// A client that was killed may have been starting a master. This waits for that one's turn to end, so that no master
	// appears later. Where none can be started, none is left.
	if _, err := muxproxy("master", "start"); err != nil {
		return nil
	}
	var status struct {
		PID int `json:"pid"`
	}
	out, err := muxproxy("status", "--json")
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
	return errors.Join(err, findErr)
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
	base := map[int]time.Duration{}
	for _, r := range rows {
		if _, ok := base[r.n]; !ok {
			base[r.n] = r.took // plain ssh comes first
		}
		line := fmt.Sprintf("%s\t%.1f ms\t%.2f", r.what, float64(r.took)/float64(time.Millisecond), float64(r.took)/float64(base[r.n]))
		if d.server != nil {
			line += fmt.Sprintf("\t%d", r.conns)
		}
		fmt.Fprintln(w, line+"\t")
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintln(d.Stdout, "\nOne session stays open meanwhile, so that there is a connection to share.")
	return err
}
