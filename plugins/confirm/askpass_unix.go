//go:build unix

package confirm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/muxproxy/muxproxy/core/plugin"
)

const executableBits = true

// drainTime is how long something that an askpass program has left behind, outside its process group, may hold its output.
const drainTime = time.Second

// onlyMine reports whether nobody but this user and root can change a file, or what is in a directory, where its group may,
// as with the policy file. In a directory with the sticky bit others can't touch what is not theirs; a link may not be
// theirs either.
func onlyMine(path string) error {
	theirs := func(fi os.FileInfo) bool {
		st, ok := fi.Sys().(*syscall.Stat_t)
		return !ok || st.Uid != 0 && int(st.Uid) != os.Geteuid()
	}
	link, err := os.Lstat(path)
	if err != nil {
		return err
	}
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	switch {
	case theirs(link) || theirs(fi):
		return fmt.Errorf("%s belongs to another user", path)
	case fi.IsDir() && (fi.Mode().Perm()&0o002 == 0 || fi.Mode()&os.ModeSticky != 0):
	case fi.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("%s can be changed by others (mode %04o): chmod go-w %s", path, fi.Mode().Perm(), path)
	}
	return nil
}

// run is a runner. The program leads a process group of its own, which is killed with ctx.
func run(ctx context.Context, path string, env []string, prompt string) answer {
	cmd := exec.Command(path, prompt)
	cmd.Env = append(env, "SSH_ASKPASS_PROMPT=confirm")
	cmd.Dir = "/"
	out, outW, err := os.Pipe()
	if err != nil {
		return answer{verdict: noWay, why: err.Error()}
	}
	defer out.Close()
	errs, errsW, err := os.Pipe()
	if err != nil {
		outW.Close()
		return answer{verdict: noWay, why: err.Error()}
	}
	defer errs.Close()
	cmd.Stdout, cmd.Stderr = outW, errsW // files: Wait waits for nobody else who has them
	err = startGroup(cmd)
	outW.Close()
	errsW.Close()
	if err != nil {
		return answer{verdict: noWay, why: plugin.Printable(fmt.Sprintf("askpass can't be started: %v", err))}
	}
	var output, complaint []byte
	var reading sync.WaitGroup
	reading.Go(func() { output = readSome(out, maxAnswer+1) })
	reading.Go(func() { complaint = readSome(errs, 4096) })
	group := &group{cmd: cmd}
	stop := context.AfterFunc(ctx, group.kill)
	inTime := false
	held := awaitEnd(cmd.Process.Pid)
	if held { // its pid, and so its group's, is nobody else's before Wait
		inTime = stop()
		group.kill()
		group.leave()
	}
	err = cmd.Wait()
	if !held {
		inTime = stop()
		group.leave()
	}
	late := time.AfterFunc(drainTime, func() {
		_ = out.SetReadDeadline(time.Unix(1, 0))
		_ = errs.SetReadDeadline(time.Unix(1, 0))
	})
	reading.Wait()
	late.Stop()
	var exit *exec.ExitError
	switch {
	case !inTime || ctx.Err() != nil:
		return answer{verdict: unanswered}
	case err == nil && agreed(output):
		return answer{verdict: yes}
	case err == nil:
		return answer{verdict: no}
	case errors.As(err, &exit) && exit.Exited():
		// A dialog that could not be shown says so there; one that could may say other things.
		return answer{verdict: no, why: lastLine(complaint)}
	}
	return answer{verdict: noWay, why: plugin.Printable(fmt.Sprintf("askpass %s: %v", path, err))}
}

// lastLine is what a program said last, escaped.
func lastLine(b []byte) string {
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return brief(strings.TrimSpace(lines[len(lines)-1]), maxClaim)
}

// group is the process group of a program that runs. When that has been waited for, its number may be another's.
type group struct {
	cmd  *exec.Cmd
	mu   sync.Mutex // held while it is killed; guards left
	left bool
}

// kill kills all of it, unless it was left. Where a program can't be held before it is waited for (awaitEnd), that may come
// between the look at it and the kill.
func (g *group) kill() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.left && !errors.Is(g.cmd.Process.Signal(syscall.Signal(0)), os.ErrProcessDone) {
		killGroup(g.cmd.Process.Pid)
	}
}

// leave ends all killing, and waits for what is under way.
func (g *group) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.left = true
}

// killGroup is replaced in tests.
var killGroup = func(pid int) { _ = syscall.Kill(-pid, syscall.SIGKILL) }
