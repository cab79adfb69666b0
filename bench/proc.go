//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// proc is a process that this run started. It leads a session of its own, so that ^C reaches it through this program only,
// and so that what it starts can be ended with it.
type proc struct {
	cmd   *exec.Cmd
	began time.Time
	errs  *tail
	done  chan struct{} // closed when it has ended
	took  time.Duration // valid after done, as is err
	err   error
}

// tail keeps the end of what is written to it.
type tail struct {
	mu sync.Mutex // guards b
	b  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if len(t.b) > 2048 {
		t.b = t.b[len(t.b)-2048:]
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(strings.Fields(string(t.b)), " ")
}

// start starts a command, whose standard error is kept if it has none.
func start(cmd *exec.Cmd) (*proc, error) {
	p := &proc{cmd: cmd, errs: &tail{}, done: make(chan struct{})}
	if cmd.Stderr == nil {
		cmd.Stderr = p.errs
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = 2 * time.Second // somebody below it may hold its stderr
	p.began = time.Now()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		err := cmd.Wait()
		p.took = time.Since(p.began)
		if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
			p.err = fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, p.errs)
		}
		close(p.done)
	}()
	return p, nil
}

// kill ends it with all of its session that is left, and returns when it has ended.
func (p *proc) kill() {
	select {
	case <-p.done:
	default:
		unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL)
		<-p.done
	}
}

// wait waits for its end. When ctx ends before, it is killed.
func (p *proc) wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		p.kill()
		return context.Cause(ctx)
	}
}

func (p *proc) pid() int { return p.cmd.Process.Pid }

// cpu is the processor time that it has used, with those processes below that it has waited for. It has ended.
func (p *proc) cpu() time.Duration {
	return p.cmd.ProcessState.UserTime() + p.cmd.ProcessState.SystemTime()
}

// stat is a part of /proc/PID/stat, see proc_pid_stat(5).
type stat struct {
	parent int
	start  string
	own    time.Duration // user and system
	reaped time.Duration // of the children that it has waited for
}

// tick is what times in /proc/PID/stat are counted in: USER_HZ is 100 on every Linux.
const tick = 10 * time.Millisecond

func readStat(pid int) (stat, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return stat{}, err
	}
	// The name may hold anything, but no parenthesis comes after it.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 20 {
		return stat{}, fmt.Errorf("/proc/%d/stat: %d fields", pid, len(f))
	}
	n := func(i int) time.Duration {
		v, _ := strconv.ParseInt(f[i], 10, 64) // the kernel wrote it
		return time.Duration(v)
	}
	return stat{int(n(1)), f[19], (n(11) + n(12)) * tick, (n(13) + n(14)) * tick}, nil
}

// descendants are all processes below one, with their start times.
func descendants(root int) map[int]stat {
	all := map[int]stat{}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return all
	}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			if s, err := readStat(pid); err == nil {
				all[pid] = s
			}
		}
	}
	below := map[int]stat{}
	for more := true; more; {
		more = false
		for pid, s := range all {
			if _, known := below[pid]; !known && (s.parent == root || below[s.parent].start != "") {
				below[pid] = s
				more = true
			}
		}
	}
	return below
}

// treeCPU is the processor time of a process and of all below it, ended ones too.
func treeCPU(root int) time.Duration {
	s, err := readStat(root)
	if err != nil {
		return 0
	}
	sum := s.own + s.reaped
	for _, s := range descendants(root) {
		sum += s.own + s.reaped
	}
	return sum
}

// onProcessor is how long a process's threads have been on a processor, to the nanosecond (/proc/PID/schedstat). It is 0 of
// a process that has ended.
func onProcessor(pid int) time.Duration {
	var sum time.Duration
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid)) // the pattern is good
	for _, f := range files {
		var ns time.Duration
		if b, err := os.ReadFile(f); err == nil { // else the thread has ended since
			fmt.Sscan(string(b), &ns)
		}
		sum += ns
	}
	return sum
}

// mem is a process's resident memory in KiB: all of it, and with pages that several processes share divided among them.
// Only root may see the latter of a process that is not dumpable; it is 0 then.
type mem struct{ rss, pss float64 }

func readMem(pid int) (mem, error) {
	var m mem
	field := func(text, name string) float64 {
		_, rest, ok := strings.Cut("\n"+text, "\n"+name+":")
		if !ok {
			return 0
		}
		line, _, _ := strings.Cut(rest, "\n")
		v, _ := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(line), " kB"), 64)
		return v
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return m, err
	}
	m.rss = field(string(b), "VmRSS")
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid)); err == nil {
		m.pss = field(string(b), "Pss")
	}
	return m, nil
}

func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "?"
	}
	one, _, _ := strings.Cut(string(b), " ")
	return one
}

// machine says what this run was made on.
func (b *bench) machine() map[string]string {
	m := map[string]string{"processors": strconv.Itoa(runtime.NumCPU()), "processor": "?", "kernel": "?", "go": runtime.Version()}
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, rest, ok := strings.Cut(string(info), "model name"); ok {
			line, _, _ := strings.Cut(rest, "\n")
			m["processor"] = strings.Trim(line, "\t :")
		}
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m["kernel"] = unix.ByteSliceToString(u.Release[:])
	}
	if out, err := exec.Command("ssh", "-V").CombinedOutput(); err == nil {
		m["ssh"], _, _ = strings.Cut(strings.TrimSpace(string(out)), ",")
	}
	m["muxproxy"] = "muxproxy ?"
	if out, err := exec.Command(filepath.Join(b.bin, "muxproxy"), "version").Output(); err == nil {
		m["muxproxy"], _, _ = strings.Cut(strings.TrimSpace(string(out)), "\n")
	}
	return m
}
