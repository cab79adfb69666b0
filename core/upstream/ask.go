package upstream

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/muxproxy/muxproxy/core/pool"
	"github.com/muxproxy/muxproxy/core/use"
)

// ours is the title of questions in our own words.
const ours = "muxproxy"

// errDown is why a question was taken back.
var errDown = errors.New("the server has ended the connection meanwhile")

// errBatch is why nobody was asked.
var errBatch = errors.New("BatchMode=yes forbids asking")

// ask puts a question to the person. The caller keeps the guard's clock from running meanwhile.
func (d *dialing) ask(ctx context.Context, q pool.Question) ([]string, error) {
	d.personal = true
	answers, err := []string(nil), pool.ErrNobody
	if d.asker != nil {
		answers, err = d.asker.Ask(ctx, q)
	}
	switch {
	case context.Cause(ctx) == errDown:
		return nil, errDown
	case errors.Is(err, pool.ErrNobody) && d.on("batchmode", false):
		return nil, errBatch // others who wait for this login, without BatchMode, have not answered either
	case err != nil:
		return nil, err
	}
	if len(answers) != len(q.Prompts) {
		return nil, fmt.Errorf("%d answers to %d questions", len(answers), len(q.Prompts))
	}
	d.answers++
	return answers, nil
}

// askLine asks one thing in our own words.
func (d *dialing) askLine(ctx context.Context, text, prompt string, echo bool) (string, error) {
	answers, err := d.ask(ctx, pool.Question{Title: ours, Text: text, Prompts: []pool.Prompt{{Text: prompt, Echo: echo}}})
	if err != nil {
		return "", err
	}
	return answers[0], nil
}

// unasked says why a question got no answer.
func unasked(err error) string {
	switch {
	case errors.Is(err, pool.ErrNobody):
		return "nobody can be asked for it here"
	case errors.Is(err, errBatch), errors.Is(err, errDown):
		return err.Error()
	}
	return use.Printable(err.Error())
}

// lines escapes text from the network line by line, so that its line breaks stay.
func lines(text string) string {
	text = strings.TrimRight(strings.ReplaceAll(text, "\r\n", "\n"), "\n")
	parts := strings.Split(text, "\n")
	for i, p := range parts {
		parts[i] = use.Printable(strings.ReplaceAll(p, "\t", " "))
	}
	return strings.Join(parts, "\n")
}

// tell calls back into the spec, unless Dial has returned.
func (d *dialing) tell(to func(string), text string) {
	d.telling.Lock()
	defer d.telling.Unlock()
	if to != nil && !d.told {
		to(text)
	}
}

// silence ends all telling.
func (d *dialing) silence() {
	d.telling.Lock()
	defer d.telling.Unlock()
	d.told = true
}

// debugf tells a step as `ssh -v` does. The line is escaped here.
func (d *dialing) debugf(format string, args ...any) {
	line := use.Printable(fmt.Sprintf(format, args...))
	d.log.Debug().Msg(line)
	d.tell(d.spec.Debug, line)
}

// sayf tells what ssh tells without -v.
func (d *dialing) sayf(format string, args ...any) {
	line := use.Printable(fmt.Sprintf(format, args...))
	d.log.Info().Msg(line)
	d.tell(d.spec.Say, line)
}
