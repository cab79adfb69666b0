package setup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/sshconfig"
)

// startTime bounds the wait for somebody who is starting a master.
const startTime = 15 * time.Second

// Undo plans what takes away all that Make's plan and the master have made: afterwards every file is byte for byte what it
// was, or what the user has made of it since without our line. Policy and plugins are the user's and stay.
//
// The included file goes nearly last: it holds what another try would have to know.
func Undo(o Options) (*Plan, error) {
	included, err := read(o.included())
	if err != nil {
		return nil, err
	}
	rec := parseRecord(included.before)
	rec.add(&rec.in, o.config())
	p := &Plan{}
	for _, path := range rec.in {
		if err := p.takeOut(path, o.included(), slices.Contains(rec.made, path)); err != nil {
			return nil, err
		}
	}
	if r := o.Running; r != nil {
		s := "s"
		if r.Clients == 1 {
			s = ""
		}
		p.add(step{text: fmt.Sprintf("stop the master, pid %d, which ends %d client%s", r.PID, r.Clients, s), do: r.Stop})
	}
	if err := p.removeState(o.Dirs); err != nil {
		return nil, err
	}
	if included.exists {
		p.remove(included, "remove "+included.path)
	}
	dirs := slices.Clone(rec.made)
	slices.Reverse(dirs) // sorted, so that what is in a directory comes first
	for _, dir := range dirs {
		if info, err := os.Lstat(dir); err == nil && info.IsDir() {
			p.add(step{do: func(context.Context) error { return removeEmpty(dir) }})
		}
	}
	if !slices.ContainsFunc(p.steps, func(s step) bool { return s.text != "" }) {
		return &Plan{}, nil
	}
	return p, nil
}

// takeOut plans the removal of our line from a file, or of the file itself if it was made for that line.
func (p *Plan) takeOut(path, included string, made bool) error {
	f, err := read(path)
	if err != nil {
		return err
	}
	rest, n := sshconfig.RemoveInclude(f.before, included)
	if n == 0 {
		return nil
	}
	if err := f.writable(); err != nil {
		return err
	}
	if _, link := os.Readlink(path); len(rest) == 0 && made && link != nil {
		p.remove(f, "remove "+f.path+", which has nothing else in it")
		return nil
	}
	return p.write(f, rest, "take one line out of "+f.String(), sshconfig.IncludeLine(included)+"\n")
}

// removeState plans the removal of what the master leaves behind. If a master lives on another host that shares the state
// directory, what that one needs stays.
func (p *Plan) removeState(d paths.Dirs) error {
	if err := paths.CheckDir(d.State); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("what is in the state directory is not trusted, nor removed: %w", err)
	}
	var dirs []string
	// The master may have been started with another XDG_RUNTIME_DIR.
	if sockets, err := d.Published(); err == nil && filepath.Base(sockets) == filepath.Base(d.State) {
		dirs = append(dirs, sockets)
	}
	for _, dir := range []string{d.Runtime, d.State} {
		if !slices.Contains(dirs, dir) && dir != d.Run {
			dirs = append(dirs, dir)
		}
	}
	others, err := elsewhere(d)
	if err != nil {
		return err
	}
	if len(others) > 0 {
		dirs[len(dirs)-1] = d.Run
	}
	dirs = slices.DeleteFunc(dirs, func(dir string) bool {
		_, err := os.Lstat(dir)
		return err != nil || paths.CheckDir(dir) != nil
	})
	if len(dirs) == 0 {
		return nil
	}
	text := "remove " + strings.Join(dirs, " and ") + " (known_hosts, logs, sockets, locks)"
	if len(others) > 0 {
		text += "; the rest of " + d.State + " stays, for a master lives on another host: " + strings.Join(others, ", ")
	}
	p.add(step{text: text, final: true, do: func(ctx context.Context) error {
		if _, err := os.Lstat(d.Run); err == nil {
			unlock, err := keepOut(ctx, d)
			if err != nil {
				return err
			}
			defer unlock()
		}
		for _, dir := range dirs {
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
		}
		return nil
	}})
	return nil
}

// elsewhere are the folders of other hosts' living masters. flock(2) reaches them over NFS.
func elsewhere(d paths.Dirs) ([]string, error) {
	entries, err := os.ReadDir(d.State)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var found []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "run-") || e.Name() == filepath.Base(d.Run) {
			continue
		}
		path := filepath.Join(d.State, e.Name(), paths.MasterLock)
		if _, err := os.Lstat(path); err != nil {
			continue
		}
		lock, err := paths.TryLock(path)
		switch {
		case errors.Is(err, paths.ErrLocked):
			found = append(found, e.Name())
		case err != nil:
			return nil, err
		default:
			lock.Close()
		}
	}
	return found, nil
}

// keepOut keeps a master from being started, and finds that none lives.
func keepOut(ctx context.Context, d paths.Dirs) (unlock func(), err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, startTime, errors.New("a master is being started"))
	defer cancel()
	start, err := paths.Lock(ctx, filepath.Join(d.Run, paths.StartLock))
	if err != nil {
		return nil, err
	}
	living, err := paths.TryLock(filepath.Join(d.Run, paths.MasterLock))
	if err != nil {
		start.Close()
		if errors.Is(err, paths.ErrLocked) {
			err = errors.New("a master lives that did not before; run it again")
		}
		return nil, err
	}
	return func() { living.Close(); start.Close() }, nil
}

// removeEmpty removes a directory that nothing is in.
func removeEmpty(dir string) error {
	err := os.Remove(dir)
	if errors.Is(err, fs.ErrNotExist) || notEmpty(dir) {
		return nil
	}
	return err
}

func notEmpty(dir string) bool {
	entries, err := os.ReadDir(dir)
	return err == nil && len(entries) > 0
}
