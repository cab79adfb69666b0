package setup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/muxproxy/muxproxy/core/use"
)

// Plan is what is to be done. Nothing changes before Do.
type Plan struct {
	steps []step
	done  int // of the steps
	kept  int // of those that are done, so many can't be taken back any more
}

type step struct {
	text   string // for a person; "": goes with the step before or after
	detail string // lines to show below
	do     func(context.Context) error
	back   func() error // takes it back; nil: there is no need to
	final  bool         // once it is done, nothing is taken back
}

// Empty reports whether all is as it should be.
func (p *Plan) Empty() bool { return len(p.steps) == 0 }

// Write shows the plan to a person.
func (p *Plan) Write(w io.Writer) error {
	var b strings.Builder
	for _, s := range p.steps {
		if s.text == "" {
			continue
		}
		fmt.Fprintf(&b, "- %s\n", use.Printable(s.text))
		for line := range strings.Lines(s.detail) {
			fmt.Fprintf(&b, "      %s\n", use.Printable(strings.TrimRight(line, "\r\n")))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// Do does it. If a step fails, those before it are taken back, unless there is no way back any more. The error is a line for
// a person.
func (p *Plan) Do(ctx context.Context) error {
	for _, s := range p.steps[p.done:] {
		if err := s.do(ctx); err != nil {
			return both(err, p.Back())
		}
		if p.done++; s.final {
			p.kept = p.done
		}
	}
	return nil
}

// Back takes back what Do has done, the last first, as far as there is a way back.
func (p *Plan) Back() (err error) {
	for ; p.done > p.kept; p.done-- {
		if back := p.steps[p.done-1].back; back != nil {
			err = both(err, back())
		}
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

func (p *Plan) add(s step) { p.steps = append(p.steps, s) }

// makeDir plans the directories up to dir, for their owner alone.
func (p *Plan) makeDir(dir string) error {
	list := missing(dir)
	if len(list) == 0 {
		return nil
	}
	if err := writableDir(existing(dir)); err != nil {
		return err
	}
	for _, d := range list {
		p.add(step{
			do: func(context.Context) error {
				if err := os.Mkdir(d, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
					return err
				}
				return nil
			},
			back: func() error { return removeEmpty(d) },
		})
	}
	return nil
}

func (p *Plan) write(f *file, text []byte, what, detail string) error {
	if err := f.writable(); err != nil {
		return err
	}
	p.add(step{
		text: what, detail: detail,
		do:   func(context.Context) error { return f.replace(text) },
		back: func() error { return f.back(text) },
	})
	return nil
}

func (p *Plan) remove(f *file, what string) {
	p.add(step{
		text: what,
		do:   func(context.Context) error { return f.remove() },
		back: func() error { return f.back(nil) },
	})
}
