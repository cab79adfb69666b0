package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/muxproxy/muxproxy/core/paths"
	"github.com/muxproxy/muxproxy/core/use"
)

const (
	logPoll    = 200 * time.Millisecond // between looks at a followed file
	logMaxLine = 1 << 20                // a longer one is printed in pieces
)

func newLog(a *app) *cobra.Command {
	var follow, audit bool
	var lines int
	cmd := &cobra.Command{
		Use:   "log [-f] [-n N] [--audit]",
		Short: "print the end of the master's log or of the audit log",
		Long: `Prints the last lines of the master's log (master.log), or of the audit log
(audit.log): one JSON object to a line.`,
		Example: "  muxproxy log -f\n  muxproxy log --audit -n 1000 | jq 'select(.decision == \"deny\")'",
		Args: func(cmd *cobra.Command, args []string) error {
			if lines < 0 {
				return fmt.Errorf("-n %d: want a number of lines", lines)
			}
			return cobra.NoArgs(cmd, args)
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			name := paths.MasterLog
			if audit {
				name = paths.AuditLog
			}
			return runLog(cmd.Context(), a, name, lines, follow)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what is added, until interrupted")
	cmd.Flags().IntVarP(&lines, "lines", "n", 20, "how many lines, `N`, of the end to print first")
	cmd.Flags().BoolVar(&audit, "audit", false, "the audit log")
	return cmd
}

func runLog(ctx context.Context, a *app, name string, lines int, follow bool) error {
	dirs, err := paths.Find(a.getenv)
	if err != nil {
		return err
	}
	path := filepath.Join(dirs.State, name)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return no("there is no %s yet: no master has run", path)
	}
	if err != nil {
		return err
	}
	t := &tail{path: path, file: f, out: a.stdout}
	defer func() { t.file.Close() }()
	if err := t.seek(lines); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := t.copy(); err != nil || !follow {
		return errors.Join(err, t.flush())
	}
	tick := time.NewTicker(logPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil // the way to end it
		case <-tick.C:
		}
		if err := t.more(); err != nil {
			return err
		}
	}
}

// tail prints a growing file, line by line, escaped.
type tail struct {
	path    string
	file    *os.File
	out     io.Writer
	partial []byte // the begin of a line whose rest is not written yet
}

// seek goes to the begin of the nth line from the end.
func (t *tail) seek(n int) error {
	end, err := t.file.Seek(0, io.SeekEnd)
	if err != nil || n == 0 {
		return err
	}
	block := make([]byte, 64<<10)
	for at := end; at > 0; {
		from := max(at-int64(len(block)), 0)
		b := block[:at-from]
		if _, err := t.file.ReadAt(b, from); err != nil {
			return err
		}
		for i := len(b) - 1; i >= 0; i-- {
			if b[i] != '\n' || from+int64(i) == end-1 { // the last line's own end does not count
				continue
			}
			if n--; n == 0 {
				_, err := t.file.Seek(from+int64(i)+1, io.SeekStart)
				return err
			}
		}
		at = from
	}
	_, err = t.file.Seek(0, io.SeekStart)
	return err
}

// copy prints all whole lines up to the end of the file.
func (t *tail) copy() error {
	b := make([]byte, 64<<10)
	for {
		n, err := t.file.Read(b)
		t.partial = append(t.partial, b[:n]...)
		for {
			i := bytes.IndexByte(t.partial, '\n')
			if i < 0 && len(t.partial) >= logMaxLine {
				i = len(t.partial)
			}
			if i < 0 {
				break
			}
			if _, err := fmt.Fprintln(t.out, use.Printable(string(t.partial[:i]))); err != nil {
				return err
			}
			t.partial = t.partial[min(i+1, len(t.partial)):]
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// flush prints a last line that has no end.
func (t *tail) flush() error {
	if len(t.partial) == 0 {
		return nil
	}
	_, err := fmt.Fprintln(t.out, use.Printable(string(t.partial)))
	t.partial = nil
	return err
}

// more prints what was added. If the file was rotated it prints the rest of the old one, then the new one; if it was
// emptied, it begins again.
func (t *tail) more() error {
	there, statErr := os.Stat(t.path) // before the copy: after a rename nothing is added to the old file for long
	here, err := t.file.Stat()
	if err != nil {
		return err
	}
	at, err := t.file.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	if here.Size() < at {
		if _, err := t.file.Seek(0, io.SeekStart); err != nil {
			return err
		}
		t.partial = nil
	}
	if err := t.copy(); err != nil {
		return err
	}
	if statErr != nil || os.SameFile(there, here) {
		return nil // gone: the next one is on its way
	}
	next, err := os.Open(t.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	t.file.Close()
	t.file = next
	if err := t.flush(); err != nil {
		return err
	}
	return t.copy()
}

// splitLines yields the lines of text, escaped; tabs stay, they indent.
func splitLines(text string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for line := range strings.Lines(text) {
			line = strings.TrimSuffix(line, "\n")
			body := strings.TrimLeft(line, "\t")
			if !yield(line[:len(line)-len(body)] + use.Printable(body)) {
				return
			}
		}
	}
}
